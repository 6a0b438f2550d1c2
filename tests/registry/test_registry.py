"""Discovery without imports, and errors that name who is to blame."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from attrs import frozen
from fake_distributions import PLUGIN, Install

from mtdiffusion_registry import DatasetConfig, PluginError, PluginInfo, Registry, UserError

OWNER = "plugin dataset.toy of toy-plugin 1.0 (module {module}): "


def info(registry: Registry, entry_point: str) -> PluginInfo:
    (found,) = [info for info in registry.plugins() if info.entry_point == entry_point]
    return found


def test_a_plugin_is_found_and_imported_when_it_is_asked_for(install: Install) -> None:
    module = install()
    registry = Registry.discover()
    assert info(registry, "dataset.toy") == PluginInfo(
        "dataset.toy", "dataset", "toy", "toy-plugin", "1.0", module, "ok", ""
    )
    assert "toy" in registry.kinds("dataset")
    assert module not in sys.modules
    cls = registry.config_class("dataset", "toy")
    assert cls.__module__ == module
    assert registry.config_class("dataset", "toy") is cls


def test_our_own_plugins_are_found_as_everybody_elses() -> None:
    assert {"image", "mask", "label", "clip"} <= set(Registry.discover().kinds("modality"))


def test_several_entry_points_may_point_at_one_module(install: Install) -> None:
    more = PLUGIN.replace("return [Toy]", "return [Toy, Other]").replace(
        "@hookimpl", '@frozen\nclass Other(Toy):\n    kind: ClassVar[str] = "other"\n\n@hookimpl'
    )
    install(more, names=("dataset.toy", "dataset.other"))
    registry = Registry.discover()
    assert registry.config_class("dataset", "toy").__name__ == "Toy"
    assert registry.config_class("dataset", "other").__name__ == "Other"


def test_only_the_paths_given_are_searched(install: Install, tmp_path: Path) -> None:
    install()
    install(names=("dataset.second",), distribution="second")
    assert [info.entry_point for info in Registry.discover(paths=[tmp_path / "site1"]).plugins()] == ["dataset.second"]


def test_listing_imports_neither_plugins_nor_torch(install: Install, tmp_path: Path) -> None:
    install("raise RuntimeError('imported')")
    code = """
import sys
from mtdiffusion_registry import Registry, hookimpl
from mtdiffusion_registry import config
names = [info.entry_point for info in Registry.discover().plugins()]
assert "dataset.toy" in names and "modality.image" in names, names
heavy = {"torch", "numpy", "mtdiffusion", "mtdiffusion_plugins", "mtdiffusion_engine"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site0')!r})\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_failing_import_is_an_error_with_its_cause_and_only_for_who_asks(install: Install) -> None:
    module = install("import no_such_library")
    good = install(PLUGIN.replace('"toy"', '"good"'), names=("dataset.good",), distribution="good")
    registry = Registry.discover()
    assert registry.config_class("dataset", "good").__module__ == good
    with pytest.raises(PluginError) as caught:
        registry.config_class("dataset", "toy")
    assert str(caught.value) == OWNER.format(module=module) + (
        "its import failed: ModuleNotFoundError: No module named 'no_such_library'. "
        "Upgrade or reinstall toy-plugin, or do without this kind"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("leaves", ["SystemExit: 3", "BaseException: 3"])
def test_a_plugin_that_exits_on_import_does_not_take_us_along(install: Install, leaves: str) -> None:
    install(f"raise {leaves.partition(':')[0]}(3)")
    with pytest.raises(PluginError, match=f"its import failed: {leaves}"):
        Registry.discover().config_class("dataset", "toy")


def test_one_kind_of_two_distributions_is_refused_by_name(install: Install) -> None:
    first = install()
    second = install(distribution="rival", version="2.1")
    registry = Registry.discover()
    rows = {i.distribution: i for i in registry.plugins() if i.entry_point == "dataset.toy"}
    assert {i.status for i in rows.values()} == {"conflict"}
    assert rows["toy-plugin"].reason == f"also declared by rival 2.1 (module {second})"
    assert "toy" not in registry.kinds("dataset")
    with pytest.raises(PluginError) as caught:
        registry.config_class("dataset", "toy")
    assert f"toy-plugin 1.0 (module {first})" in str(caught.value)
    assert f"rival 2.1 (module {second})" in str(caught.value)
    assert "MTDIFFUSION_DISABLE_PLUGINS" in str(caught.value)
    assert not {first, second} & set(sys.modules)
    # ... and following the advice settles it.
    assert Registry.discover(block=["rival"]).config_class("dataset", "toy").__module__ == first


def test_a_distribution_twice_on_the_path_counts_once_and_the_first_wins(install: Install) -> None:
    install(version="1.0")
    newer = install(version="1.1", distribution="Toy_Plugin")
    found = info(Registry.discover(), "dataset.toy")
    assert (found.version, found.module, found.status) == ("1.1", newer, "ok")


def test_a_first_distribution_without_plugins_hides_an_older_one_with(install: Install) -> None:
    install(version="1.0")
    install(version="2.0", entry_points="[console_scripts]\n")
    assert "toy" not in Registry.discover().kinds("dataset")


def test_a_broken_entry_point_is_no_rival_of_a_usable_one(install: Install) -> None:
    module = install()
    install(distribution="rival", value="{module}:Toy")
    registry = Registry.discover()
    rows = {i.distribution: i.status for i in registry.plugins() if i.entry_point == "dataset.toy"}
    assert rows == {"toy-plugin": "ok", "rival": "broken"}
    assert registry.config_class("dataset", "toy").__module__ == module


@pytest.mark.parametrize("name", ["dataset.toy", "toy-plugin", "Toy_Plugin"])
def test_blocking_by_list_and_by_environment(install: Install, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module = install()
    by_list = Registry.discover(block=[name])
    monkeypatch.setenv("MTDIFFUSION_DISABLE_PLUGINS", f"x, {name}")
    for by, registry in (("the block list", by_list), ("MTDIFFUSION_DISABLE_PLUGINS", Registry.discover())):
        found = info(registry, "dataset.toy")
        assert (found.status, found.reason) == ("blocked", f"blocked by {by}")
        with pytest.raises(UserError, match=rf"dataset\.toy of toy-plugin 1\.0 is installed but blocked by {by}"):
            registry.config_class("dataset", "toy")
    assert module not in sys.modules


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("toy", "{module}", 'must be named GROUP.KIND; unknown group "toy"'),
        ("datset.toy", "{module}", 'must be named GROUP.KIND; unknown group "datset"; did you mean "dataset"?'),
        ("dataset.", "{module}", "must be named GROUP.KIND, with KIND an identifier"),
        ("dataset.to-y", "{module}", "must be named GROUP.KIND, with KIND an identifier"),
        ("dataset.toy", "{module}:Toy", "must point at a module, found '"),
    ],
)
def test_ill_formed_entry_points_are_listed_as_broken(install: Install, name: str, value: str, reason: str) -> None:
    install(names=(name,), value=value)
    found = info(Registry.discover(), name)
    assert found.status == "broken"
    assert found.reason.startswith(reason)
    with pytest.raises(UserError, match=r"must point at a module|no dataset of kind.*entry points that are broken: 1"):
        Registry.discover().config_class("dataset", "toy")


def test_one_unreadable_file_hides_no_other_plugin(install: Install) -> None:
    install(entry_points="[mtdiffusion.plugins]\nno equals sign\n", distribution="mangled")
    install()
    registry = Registry.discover()
    assert info(registry, "dataset.toy").status == "ok"
    assert any(i.distribution == "mangled" and i.status == "broken" for i in registry.plugins())


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("MTDIFFUSION_API = 1", "", "it does not state the plugin API it was written for; set MTDIFFUSION_API = 1"),
        ("API = 1", "API = '1'", "found MTDIFFUSION_API = '1', not a number"),
        ("API = 1", "API = 0", "it is of plugin API 0, this mtdiffusion has 1; upgrade toy-plugin"),
        ("API = 1", "API = 2", "it is of plugin API 2, this mtdiffusion has 1; upgrade mtdiffusion"),
        (
            "mtdiffusion_datasets",
            "mtdiffusion_dataset",
            'there is no hook mtdiffusion_dataset; did you mean "mtdiffusion_datasets"?',
        ),
        (
            "@hookimpl\ndef mtdiffusion_datasets",
            "def mtdiffusion_datsets",
            'there is no hook mtdiffusion_datsets; did you mean "mtdiffusion_datasets"?',
        ),
        ("def mtdiffusion_datasets", "def datasets", "there is no hook datasets"),
        ("@hookimpl", "", "its function mtdiffusion_datasets lacks the marker"),
        ("datasets():", "datasets(registry):", "its hooks do not fit: "),
        ("@hookimpl\ndef mtdiffusion_datasets():\n    return [Toy]", "", "it has no hook mtdiffusion_datasets"),
        ("return [Toy]", "1 / 0", "its hook mtdiffusion_datasets failed: ZeroDivisionError: division by zero"),
        ("return [Toy]", "raise SystemExit(3)", "its hook mtdiffusion_datasets failed: SystemExit: 3"),
        ("return [Toy]", "raise BaseException(3)", "its hook mtdiffusion_datasets failed: BaseException: 3"),
        ("return [Toy]", "pass", "must return a list of config classes, found None"),
        ("return [Toy]", "return Toy", "must return a list of config classes, found <class"),
        ("return [Toy]", "return [Toy()]", "it must be a subclass of DatasetConfig, the class itself"),
        ("return [Toy]", "return [int]", "returned <class 'int'>: it must be a subclass of DatasetConfig"),
        ("return [Toy]", "return [Toy, Toy]", 'returned two classes of kind "toy"'),
        ("return [Toy]", "return []", 'returned kinds [], not "toy"'),
        ('= "toy"', '= "tot"', "returned kinds ['tot'], not \"toy\""),
        ("@frozen", "", "it must be decorated with @attrs.frozen"),
        ('    kind: ClassVar[str] = "toy"\n', "", "it must state its kind"),
        ('kind: ClassVar[str] = "toy"', 'kind: str = "toy"', "it must state its kind"),
        ("    def build(self, split): ...", "", "it must define build"),
    ],
)
def test_a_wrong_plugin_is_refused_with_what_is_wrong(install: Install, old: str, new: str, problem: str) -> None:
    assert old in PLUGIN
    module = install(PLUGIN.replace(old, new))
    with pytest.raises(PluginError) as caught:
        Registry.discover().config_class("dataset", "toy")
    assert str(caught.value).startswith(OWNER.format(module=module))
    assert problem in str(caught.value)


def test_an_unknown_kind_is_answered_by_what_there_is(install: Install) -> None:
    install()
    registry = Registry.discover()
    with pytest.raises(UserError, match='there is no dataset of kind "toyy"; did you mean "toy"\\?') as caught:
        registry.config_class("dataset", "toyy")
    assert ", ".join(registry.kinds("dataset")) in str(caught.value)
    assert "mtdiffusion plugins list" in str(caught.value)
    with pytest.raises(UserError, match='there is no group "modalities"; did you mean "modality"\\?'):
        registry.config_class("modalities", "image")


@frozen
class Notebook(DatasetConfig):
    kind: ClassVar[str] = "toy"

    def build(self, split: str) -> None:  # type: ignore[override]
        raise NotImplementedError


def test_classes_can_be_registered_directly_in_a_new_value(install: Install) -> None:
    empty = Registry()
    registry = empty.with_classes(Notebook)
    assert registry.config_class("dataset", "toy") is Notebook
    assert empty.plugins() == []

    install()
    registry = Registry.discover().with_classes(Notebook)
    assert registry.config_class("dataset", "toy") is Notebook
    rows = {i.distribution: i for i in registry.plugins() if i.entry_point == "dataset.toy"}
    assert rows["(registered directly)"].status == "ok"
    assert rows["toy-plugin"].status == "blocked"
    assert rows["toy-plugin"].reason.startswith("replaced by ")
    assert registry.kinds("dataset").count("toy") == 1


def test_only_proper_classes_can_be_registered() -> None:
    with pytest.raises(PluginError, match="it must subclass one of ModalityConfig"):
        Registry().with_classes(int)  # type: ignore[arg-type]

    class Undecorated(Notebook):
        kind = "other"

    with pytest.raises(PluginError, match=r"decorated with @attrs\.frozen"):
        Registry().with_classes(Undecorated)
