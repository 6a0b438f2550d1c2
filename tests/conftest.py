"""A small run that the tests of the engine and of the command line share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.tiny import CONFIG

# On whatever processor, training.precision = "auto" is float32 here, also in processes that tests start: what tests
# find of a training is the same everywhere.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the tests' own: what they keep is not found in the user's, nor the user's by them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTDIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file: image, mask and label of the digits, trained in a second."""
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """The run that ``mtdiffusion train`` makes of it. Not to be changed: copy it."""
    from mtdiffusion_engine.cli import main

    run = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", str(tiny_config), "--out", str(run), "--device", "cpu"]) == 0
    return run


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handling of Ctrl-C, which a shell turns off for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
