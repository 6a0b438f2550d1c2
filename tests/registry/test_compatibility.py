"""Plugins of other versions, broken ones and ones that are gone, as distributions that pip installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pluggy
import pytest
from tests.engine.tiny import CONFIG

from mtdiffusion_engine import load_run
from mtdiffusion_engine.checkpoint import read_json
from mtdiffusion_engine.cli import main
from mtdiffusion_engine.experiment import PLUGINS_FILE
from mtdiffusion_registry import ConfigError, PluginError, Registry, UserError, hookspecs

PLUGIN = """
from typing import ClassVar

from attrs import frozen
from mtdiffusion import SNRMatched
from mtdiffusion_registry import WeightScheduleConfig, hookimpl

MTDIFFUSION_API = 1


@frozen
class Gone(WeightScheduleConfig):
    kind: ClassVar[str] = "KIND"

    def build(self, names):
        return SNRMatched()


@hookimpl
def mtdiffusion_weight_schedules():
    return [Gone]
"""

DISTRIBUTIONS = {
    "good": ("good", PLUGIN),
    "newer": ("newer", PLUGIN.replace("API = 1", "API = 2")),
    "older": ("older", PLUGIN.replace("API = 1", "API = 0")),
    "broken": ("broken", "raise RuntimeError('no GPU')"),
    "misspelt": ("misspelt", PLUGIN.replace("weight_schedules", "weight_schedule")),
    "slow": ("slow", "import time\ntime.sleep(1.1)\n" + PLUGIN),
    "twin-a": ("twin", PLUGIN),
    "twin-b": ("twin", PLUGIN),
}
"""The kind and the module of each distribution; it is called ``mtdiffusion-NAME``, version 1.2."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed all of them into."""
    sources, site = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("site")
    for name, (kind, code) in DISTRIBUTIONS.items():
        module = f"mtdiffusion_{name.replace('-', '_')}"
        folder = sources / name
        folder.mkdir()
        (folder / f"{module}.py").write_text(code.replace("KIND", kind))
        (folder / "pyproject.toml").write_text(
            f"""
            build-system = {{ requires = ["hatchling"], build-backend = "hatchling.build" }}
            tool.hatch.build.targets.wheel.only-include = ["{module}.py"]
            [project]
            name = "mtdiffusion-{name}"
            version = "1.2"
            entry-points."mtdiffusion.plugins"."weight_schedule.{kind}" = "{module}"
            """
        )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--target", site, *(sources / name for name in DISTRIBUTIONS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture
def site(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder, on the path."""
    monkeypatch.syspath_prepend(installed)
    yield installed
    for name in DISTRIBUTIONS:
        sys.modules.pop(f"mtdiffusion_{name.replace('-', '_')}", None)


# --- versions, and what is broken -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("newer", "is of plugin API 2, this mtdiffusion has 1; upgrade mtdiffusion, or install an older"),
        ("older", "is of plugin API 0, this mtdiffusion has 1; upgrade mtdiffusion-older, or install an older"),
        ("broken", "its import failed: RuntimeError: no GPU. Upgrade or reinstall mtdiffusion-broken"),
        ("misspelt", 'there is no hook mtdiffusion_weight_schedule; did you mean "mtdiffusion_weight_schedules"?'),
    ],
)
def test_what_cannot_be_used_is_refused_by_name_and_no_other(site: Path, name: str, problem: str) -> None:
    registry = Registry.discover()
    with pytest.raises(PluginError) as caught:
        registry.config_class("weight_schedule", name)
    owner = f"plugin weight_schedule.{name} of mtdiffusion-{name} 1.2 (module mtdiffusion_{name}): "
    assert str(caught.value).startswith(owner)
    assert problem in str(caught.value)
    assert registry.config_class("weight_schedule", "good").__module__ == "mtdiffusion_good"


def test_two_distributions_of_one_kind_are_refused_until_one_is_left_out(site: Path) -> None:
    registry = Registry.discover()
    assert "twin" not in registry.kinds("weight_schedule")
    with pytest.raises(PluginError) as caught:
        registry.config_class("weight_schedule", "twin")
    assert re.search(r"mtdiffusion-twin-[ab] 1\.2 .* and mtdiffusion-twin-[ab] 1\.2 ", str(caught.value))
    for way in ("plugins.disable", "MTDIFFUSION_DISABLE_PLUGINS"):
        assert way in str(caught.value)
    left = registry.blocking(["mtdiffusion-twin-b"])
    assert left.origin("weight_schedule", "twin")["distribution"] == "mtdiffusion-twin-a"
    assert "twin" not in registry.kinds("weight_schedule")  # a registry is a value


def test_verbose_lists_what_fails_and_what_is_slow(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "list"]) == 0
    assert not {name for name in sys.modules if name.startswith("mtdiffusion_slow")}
    plain = {line.split()[1]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert plain["slow"][-1] == plain["broken"][-1] == "ok"  # a promise: nothing was imported

    assert main(["plugins", "list", "--verbose"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[1]: line.split() for line in lines}
    assert rows["KIND"][-3:] == ["STATUS", "SECONDS", "MODULE"]
    assert float(rows["slow"][-2]) > 1
    assert float(rows["good"][-2]) < 1
    assert {name: rows[name][4] for name in ("good", "slow", "newer", "older", "broken", "misspelt")} == {
        "good": "ok", "slow": "ok", "newer": "broken", "older": "broken", "broken": "broken", "misspelt": "broken",
    }  # fmt: skip
    slow = [line for line in lines if ": slow: " in line and "mtdiffusion-" in line]
    assert len(slow) == 1
    assert slow[0].startswith("weight_schedule.slow of mtdiffusion-slow 1.2: slow: the import of mtdiffusion_slow took")
    assert any("weight_schedule.broken of mtdiffusion-broken 1.2: broken: " in line for line in lines)


# --- leaving plugins out ----------------------------------------------------------------------------------------------


def test_a_star_leaves_nothing_but_our_own(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTDIFFUSION_DISABLE_PLUGINS", "*")
    registry = Registry.discover()
    assert {info.distribution for info in registry.plugins() if info.status == "ok"} == {"mtdiffusion"}
    with pytest.raises(UserError, match="is installed but blocked by MTDIFFUSION_DISABLE_PLUGINS; take it off there"):
        registry.config_class("weight_schedule", "good")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose weight schedule is a plugin's."""
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.replace("[process]\n", '[process]\nweights.kind = "good"\n'))
    return path


def train(config: Path, out: Path, *changes: str) -> int:
    return main(["train", str(config), "--out", str(out), "--device", "cpu", "--set", "training.steps=1", *changes])


def test_a_configuration_may_leave_plugins_out(
    site: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, tmp_path / "run", 'plugins.disable=["mtdiffusion-good"]') == 2
    assert "process.weights.kind: weight_schedule.good of mtdiffusion-good 1.2 is installed but blocked by plugins.disable" in capsys.readouterr().err  # noqa: E501  # fmt: skip
    # ... and so choose between two.
    assert train(config, tmp_path / "run", "process.weights.kind=twin", 'plugins.disable=["mtdiffusion_twin_b"]') == 0
    recorded = read_json(tmp_path / "run" / PLUGINS_FILE)
    assert recorded["weight_schedule.twin"]["distribution"] == "mtdiffusion-twin-a"
    assert load_run(tmp_path / "run", device="cpu").experiment.plugins is not None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("plugins.disable=5", "plugins.disable: found 5 (int), expected an array"),
        ("plugins.disable=[5]", "plugins.disable[0]: found 5 (int), expected a string"),
        ("plugins.disabled=[]", 'plugins: unknown key "disabled"; did you mean "disable"?'),
        ("plugins=5", "plugins: found 5 (int), expected a table"),
    ],
)
def test_an_ill_formed_block_list_is_an_error(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, problem: str
) -> None:
    assert train(tiny_config, tmp_path / "run", change) == 2
    assert problem in capsys.readouterr().err


# --- a plugin that is gone --------------------------------------------------------------------------------------------


def test_a_run_says_what_to_install_when_its_plugin_is_gone(
    site: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(site, tmp_path / "own")
    monkeypatch.setattr(sys, "path", [str(own), *(entry for entry in sys.path if entry != str(site))])
    run = tmp_path / "run"
    assert train(config, run) == 0
    recorded = read_json(run / PLUGINS_FILE)
    assert recorded["weight_schedule.good"] == {
        "distribution": "mtdiffusion-good",
        "version": "1.2",
        "module": "mtdiffusion_good",
    }
    assert {name: origin["distribution"] for name, origin in recorded.items()} == {
        "weight_schedule.good": "mtdiffusion-good",
        **dict.fromkeys(
            ["dataset.digits", "backbone.unet", "modality.image", "modality.mask", "modality.label"], "mtdiffusion"
        ),
    }
    load_run(run, device="cpu")

    shutil.rmtree(own)
    advice = (
        "process.weights.kind: weight_schedule.good is not installed. The run was trained with mtdiffusion-good 1.2 "
        '(module mtdiffusion_good), which provides it: pip install "mtdiffusion-good==1.2"'
    )
    with pytest.raises(ConfigError) as caught:
        load_run(run, device="cpu")
    assert str(caught.value) == f"{run / 'config.toml'}: {advice}"
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(run), "--device", "cpu"]) == 2
    assert advice in capsys.readouterr().err
    (run / PLUGINS_FILE).unlink()  # as in runs that are older than this file
    with pytest.raises(ConfigError, match='there is no weight_schedule of kind "good"'):
        load_run(run, device="cpu")


def test_a_class_that_was_registered_directly_is_said_to_be_one(site: Path) -> None:
    cls = Registry.discover().config_class("weight_schedule", "good")
    empty = Registry()
    origin = empty.with_classes(cls).origin("weight_schedule", "good")
    with pytest.raises(UserError, match=r"a class of the module mtdiffusion_good .*with_classes\(\.\.\.\)"):
        empty.with_origins({"weight_schedule.good": origin}).config_class("weight_schedule", "good")


# --- how the API may grow ---------------------------------------------------------------------------------------------


def test_a_hook_may_gain_arguments_and_plugins_of_before_still_fit(site: Path) -> None:
    Registry.discover().config_class("weight_schedule", "good")
    old = sys.modules["mtdiffusion_good"]

    class Grown:
        @staticmethod
        @hookspecs.hookspec
        def mtdiffusion_weight_schedules(context: str) -> list[type]:  # type: ignore[empty-body]
            """The hook, with an argument more than when the plugin was written."""

    class New:
        @staticmethod
        @hookspecs.hookimpl
        def mtdiffusion_weight_schedules(context: str) -> list[str]:
            return [context]

    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(Grown)
    manager.register(old)
    manager.register(New)
    manager.check_pending()
    assert manager.hook.mtdiffusion_weight_schedules(context="something new") == [["something new"], [old.Gone]]


def test_a_deprecated_hook_warns_and_works(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notice = DeprecationWarning("mtdiffusion_weight_schedules is deprecated since 0.2: use mtdiffusion_schedules")

    def mtdiffusion_weight_schedules() -> list[type]:  # type: ignore[empty-body]
        """The hook, on its way out."""

    deprecated = hookspecs.hookspec(warn_on_impl=notice)(mtdiffusion_weight_schedules)
    monkeypatch.setattr(hookspecs, "mtdiffusion_weight_schedules", deprecated)
    with pytest.warns(DeprecationWarning, match="deprecated since 0.2: use") as caught:
        assert Registry.discover().config_class("weight_schedule", "good").kind == "good"
    assert {Path(warning.filename).name for warning in caught} == {"mtdiffusion_good.py"}  # it names the plugin's file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Registry.discover().config_class("dataset", "digits")
