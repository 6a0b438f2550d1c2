import json

import pytest

from mtdiffusion_registry.registry import Registry
from mtdiffusion_registry.testing import check_dataset


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("digits", {}),
        ("shapes", {"count": 20, "test_count": 10}),
        ("photos", {"count": 20, "test_count": 10}),
        ("folder", {"fields": {"label": "label"}}),
    ],
)
def test_it_is_found_by_its_kind_and_keeps_the_contract(kind, options, tmp_path):
    if kind == "folder":
        (tmp_path / "label.json").write_text(json.dumps({f"{index}": index % 3 for index in range(50)}))
        options = options | {"root": str(tmp_path)}
    config = Registry.discover().config_class("dataset", kind)
    assert config.kind == kind
    check_dataset(config(**options))
