"""The benchmark's runner: the matrix, one result a cell, whatever interrupts it."""

from __future__ import annotations

import fcntl
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from importlib import invalidate_caches
from pathlib import Path

import attrs
import pytest
import torch

from mtdiffusion_benchmarks.profile import Cell, base_experiment, cell_experiment, load_profile, plan, shipped
from mtdiffusion_benchmarks.report import build_report
from mtdiffusion_benchmarks.runner import Runner
from mtdiffusion_benchmarks.stored import expanded
from mtdiffusion_engine import cli
from mtdiffusion_engine.checkpoint import read_json
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import Query, Registry, UserError

CONFIG = """
[data]
kind = "digits"
[latent]
height = 8
width = 8
[modalities.image]
kind = "image"
size = 8
channels = 1
[modalities.label]
kind = "label"
classes = 10
[backbone]
kind = "unet"
channels = 16
[training]
steps = 6
batch_size = 8
warmup = 1
log_every = 2
checkpoint_every = 2
sample_every = 0
[sampling]
steps = 3
[evaluation]
steps = 2
samples = 16
[[evaluation.evaluators]]
kind = "judge"
epochs = 1
width = 8
"""

PROFILE = """
title = "tiny"
seeds = [0, 1]
figures = 2
[settings.digits]
config = "config.toml"
[tasks."image+label"]
paper = "joint image and label"
task = { kind = "combination", modalities = ["image", "label"] }
[tasks.masked]
task = { kind = "combination", modalities = ["image"], masked = ["image"], hidden = [0.5], patterns = ["box"] }
[methods.joint]
title = "joint model"
method = { kind = "joint" }
[methods.class-conditional]
method = { kind = "single", targets = ["image"], observed = ["label"] }
[methods.hot]
method = { kind = "joint" }
set = ["training.learning_rate=1e30", "training.clip=1e30"]
[[run]]
settings = ["digits"]
tasks = ["image+label"]
methods = ["joint", "class-conditional"]
[[run]]
settings = ["digits"]
tasks = ["masked"]
methods = ["joint", "hot"]
seeds = [0]
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.toml").write_text(CONFIG)
    (folder / "profile.toml").write_text(PROFILE)
    return folder


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.discover()


def runner_of(source: Path, out: Path, registry: Registry, **options: object) -> tuple[Runner, list[Cell], list[str]]:
    profile, path = load_profile(str(source / "profile.toml"), registry)
    said: list[str] = []
    return Runner(profile, path.parent, out, registry, say=said.append, **options), plan(profile), said


def results(out: Path) -> dict[str, dict]:
    return {path.stem: expanded(json.loads(path.read_text())) for path in sorted((out / "cells").glob("*.json"))}


def test_denormals_are_flushed_for_methods_that_have_a_loop_of_their_own(
    source: Path, tmp_path: Path, registry: Registry
) -> None:
    torch.set_flush_denormal(False)
    smallest = torch.full((4,), torch.finfo(torch.float32).tiny)
    assert (smallest / 2).all()
    runner_of(source, tmp_path / "out", registry)[0].run([])
    assert not (smallest / 2).any()


def test_a_query_names_its_metrics() -> None:
    assert Query().key("image") == "joint"
    assert Query(("image", "mask"), ("label",)).key("label") == "label|image+mask"
    assert Query((), ("image",), 0.75, "box").key("image") == "image|image:75%box"
    with pytest.raises(ValueError, match="found in both: image"):
        Query(("image",), ("image",))
    with pytest.raises(ValueError, match="expected what to generate given image"):
        Query(("image",))


def test_the_matrix_is_the_blocks_in_order_each_cell_once(source: Path, registry: Registry) -> None:
    profile, _ = load_profile(str(source / "profile.toml"), registry)
    ids = [cell.id for cell in plan(profile)]
    assert ids[:2] == ["digits/image+label/joint/0", "digits/image+label/class-conditional/0"]
    assert len(ids) == len(set(ids)) == 6
    assert [c.id for c in plan(profile, ("*/masked/hot/*",))] == ["digits/masked/hot/0"]
    with pytest.raises(UserError, match=r"--only nothing\*: matches no cell"):
        plan(profile, ("nothing*",))


OURS = [*shipped().values(), *sorted((Path(__file__).parents[2] / "benchmarks").glob("*/*.toml"))]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_our_profiles_are_sound(path: Path, registry: Registry, tmp_path: Path) -> None:
    profile, _ = load_profile(str(path), registry)
    runner = Runner(profile, path.parent, tmp_path, registry, say=lambda _: None)
    # Every cell's configuration can be made; tests/test_examples.py checks those whose plugins are in examples/.
    runner._check([cell for cell in plan(profile) if cell.setting != "speech"])


def test_the_small_profile_has_every_combination_of_the_four_modalities(registry: Registry) -> None:
    profile, _ = load_profile("small", registry)
    names = ("image", "mask", "label", "clip")
    every = {frozenset(some) for count in range(1, 5) for some in itertools.combinations(names, count)}
    for setting in ("digits", "shapes"):
        tasks = {cell.task for cell in plan(profile) if cell.setting == setting and cell.method == "joint"}
        assert every <= {frozenset(profile.tasks[task].task.instances()) for task in tasks}


@pytest.mark.long
def test_the_smoke_profile_runs_every_task_and_method(tmp_path: Path, registry: Registry) -> None:
    profile, path = load_profile("smoke", registry)
    cells = plan(profile)
    assert Runner(profile, path.parent, tmp_path, registry, say=lambda _: None).run(cells) == {"ok": len(cells)}
    assert {type(method.method).__name__ for method in profile.methods.values()} == {
        registry.config_class("method", info.kind).__name__
        for info in registry.plugins()
        if info.group == "method" and info.kind
    }
    assert cli.main(["bench", "report", str(tmp_path)]) == 0
    assert "smoke" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_cells_are_measured_once_and_a_diverged_one_has_no_numbers(
    source: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("mtdiffusion_benchmarks.methods.joint.SELDOM", 0.0)
    runner, cells, said = runner_of(source, out, registry)
    assert runner.run(cells) == {"ok": 5, "diverged": 1}
    for told in ("digits__image+label__joint__0: training: 2 of 6, 0:", "all cells: 1 of 6, ", "all cells: 5 of 6, "):
        assert any(line.startswith(told) and line.endswith(" left") for line in said), told
    found = results(out)
    joint = found["digits__image+label__joint__0"]
    assert {"label|image/accuracy", "image|label/judge_accuracy", "joint/fid_judge"} <= set(joint["metrics"])
    assert "label|image/readout_accuracy" in joint["metrics"]
    assert joint["directions"]["fid_judge"] == "lower"
    assert joint["cost"]["flops_per_step"] > 1e6 and joint["cost"]["steps"] == 6
    assert [point["step"] for point in joint["curve"]] == [2, 4, 6]
    assert {figure["name"] for figure in joint["figures"]} == {"joint", "label|image", "image|label"}
    assert not found["digits__image+label__joint__1"]["figures"]
    alone = found["digits__image+label__class-conditional__0"]
    assert alone["role"] == "control"
    assert {key.split("/")[0] for key in alone["metrics"]} == {"image|label", "real"}  # only what it was trained for
    assert "image|image:50%box/mse" in found["digits__masked__joint__0"]["metrics"]
    hot = found["digits__masked__hot__0"]
    assert hot["status"] == "diverged" and "training diverged" in hot["reason"]
    assert hot["metrics"] == {} and hot["cost"] is None
    assert not list((out / "runs").iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    again, cells, said = runner_of(source, out, registry)
    assert again.run(cells) == {"ok": 5, "diverged": 1} and said == []
    assert {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before


def test_an_interrupted_cell_goes_on_and_ends_as_if_it_had_not_been(
    source: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cells, _ = runner_of(source, tmp_path / "whole", registry)
    whole.run(cells[:1])
    broken, cells, _ = runner_of(source, tmp_path / "broken", registry)
    advance = Trainer.advance

    def stops(self: Trainer, *args: object) -> object:
        if self.step == 5:
            raise KeyboardInterrupt
        return advance(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", stops)
        with pytest.raises(KeyboardInterrupt):
            broken.run(cells[:1])
    assert results(tmp_path / "broken") == {}
    broken.run(cells[:1])
    (one,), (other,) = results(tmp_path / "whole").values(), results(tmp_path / "broken").values()
    assert one["metrics"] == other["metrics"]
    drop = "seconds"
    assert [{k: v for k, v in p.items() if k != drop} for p in one["curve"]] == [
        {k: v for k, v in p.items() if k != drop} for p in other["curve"]
    ]


def test_a_damaged_result_is_made_again_and_one_of_another_configuration_is_refused(
    source: Path, tmp_path: Path, registry: Registry
) -> None:
    out = tmp_path / "out"
    runner, cells, _ = runner_of(source, out, registry)
    runner.run(cells[1:2])
    (path,) = (out / "cells").iterdir()
    whole = json.loads(path.read_text())
    path.write_text(path.read_text()[:100])
    runner, cells, said = runner_of(source, out, registry)
    assert runner.run(cells[1:2]) == {"ok": 1}
    assert any("running the cell again" in text for text in said)
    assert json.loads(path.read_text())["metrics"] == whole["metrics"]
    (source / "config.toml").write_text(CONFIG.replace("batch_size = 8", "batch_size = 4"))
    runner, cells, _ = runner_of(source, out, registry)
    with pytest.raises(UserError, match="holds a result of another configuration of digits/image"):
        runner.run(cells[1:2])
    assert json.loads(path.read_text())["metrics"] == whole["metrics"]


def test_a_finished_cell_is_read_once(
    source: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    runner, cells, _ = runner_of(source, out, registry)
    runner.run(cells[1:2])
    read: list[Path] = []

    def counted(path: Path) -> dict[str, object]:
        read.append(path)
        return read_json(path)

    monkeypatch.setattr("mtdiffusion_benchmarks.runner.read_json", counted)
    assert runner.run(cells[1:2]) == {"ok": 1}
    assert [path for path in read if path.parent.name == "cells"] == [out / "cells" / f"{cells[1].stem}.json"]


def test_a_cell_that_another_process_runs_is_left_to_it(source: Path, tmp_path: Path, registry: Registry) -> None:
    out = tmp_path / "out"
    runner, cells, _ = runner_of(source, out, registry)
    lock = out / "locks" / f"{cells[0].stem}.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert runner.run(cells[:1]) == {"elsewhere": 1}
    assert results(out) == {}


def test_a_metric_whose_weights_are_missing_fails_its_cell_and_is_tried_again(
    source: Path, tmp_path: Path, registry: Registry
) -> None:
    lacking = CONFIG + '[[evaluation.evaluators]]\nkind = "features"\nextractor = "inception"\n'
    (source / "config.toml").write_text(lacking)
    runner, cells, _ = runner_of(source, tmp_path / "out", registry)
    assert runner.run(cells[1:2]) == {"failed": 1}
    (cell,) = results(tmp_path / "out").values()
    assert "weights" in cell["reason"] and cell["metrics"] == {}
    assert runner._result(cells[1]) is None  # not taken for done


def test_what_is_wrong_with_a_profile_is_said_at_once(source: Path, registry: Registry) -> None:
    path = source / "profile.toml"
    path.write_text(PROFILE.replace('methods = ["joint", "hot"]', 'methods = ["jiont"]'))
    with pytest.raises(UserError, match="no 'jiont'; there are joint, class-conditional, hot"):
        load_profile(str(path), registry)
    path.write_text(PROFILE.replace('["image", "label"]', '["image", "sound"]'))
    runner, cells, _ = runner_of(source, source / "out", registry)
    with pytest.raises(UserError, match="the setting has no modality named sound; it has image, label"):
        runner.run(cells)
    assert not (source / "out" / "cells").exists()
    with pytest.raises(UserError, match="no such profile or file; there are"):
        load_profile("nothing", registry)


TWIN = """
from typing import ClassVar
from attrs import frozen
from mtdiffusion import SNRMatched
from mtdiffusion_registry import WeightScheduleConfig, hookimpl

MTDIFFUSION_API = 1

@frozen
class Twin(WeightScheduleConfig):
    kind: ClassVar[str] = "twin"
    def build(self, names):
        return SNRMatched()

@hookimpl
def mtdiffusion_weight_schedules():
    return [Twin]
"""


def test_a_setting_may_leave_plugins_out(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bench-twin-a", "bench-twin-b"):  # two distributions that declare one kind
        site, module = tmp_path / name, name.replace("-", "_")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[mtdiffusion.plugins]\nweight_schedule.twin = {module}\n")
        (site / f"{module}.py").write_text(TWIN)
        monkeypatch.syspath_prepend(site)
    registry = Registry.discover()
    (source / "config.toml").write_text(CONFIG + '\n[process.weights]\nkind = "twin"\n')
    profile, path = load_profile(str(source / "profile.toml"), registry)
    (cell, *_) = plan(profile)
    for make in (
        lambda profile: base_experiment(profile, "digits", path.parent, registry),
        lambda profile: cell_experiment(profile, cell, path.parent, registry),
    ):
        with pytest.raises(UserError, match=r"weight_schedule\.twin is declared by more than one plugin"):
            make(profile)
        chosen = make(attrs.evolve(profile, set=('plugins.disable=["bench-twin-b"]',)))
        assert type(chosen.process.weights).__module__ == "bench_twin_a"
        with pytest.raises(UserError, match=r"modality\.label of mtdiffusion .* is installed but blocked by plugins"):
            make(attrs.evolve(profile, set=('plugins.disable=["bench-twin-b", "modality.label"]',)))


PACKAGE = {
    "__init__.py": "from mtdiffusion_registry import hookimpl\nfrom tide_weights.config import Tide\n"
    "MTDIFFUSION_API = 1\n\n@hookimpl\ndef mtdiffusion_weight_schedules():\n    return [Tide]\n",
    "config.py": "from typing import ClassVar\nfrom attrs import frozen\nfrom mtdiffusion import SNRMatched\n"
    "from mtdiffusion_registry import WeightScheduleConfig\n\n@frozen\nclass Tide(WeightScheduleConfig):\n"
    '    kind: ClassVar[str] = "tide"\n    def build(self, names):\n        return SNRMatched()\n',
}


def install(site: Path, version: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> Registry:
    """A distribution with the package above, and other modules beside it, as pip leaves it: imported anew."""
    shutil.rmtree(site, ignore_errors=True)
    info = site / f"tide_weights-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tide-weights\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[mtdiffusion.plugins]\nweight_schedule.tide = tide_weights\n")
    (site / "tide_weights").mkdir()
    for name, text in PACKAGE.items():
        (site / "tide_weights" / name).write_text(text)
    for name in more:
        (site / name).write_text(f"# {version}\n")
    names = [*(f"tide_weights/{name}" for name in PACKAGE), *more]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in names))
    return imported_anew(site, monkeypatch)


def imported_anew(site: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tide_weights"]:
        monkeypatch.delitem(sys.modules, name)
    if str(site) not in sys.path:
        monkeypatch.syspath_prepend(site)
    invalidate_caches()
    return Registry.discover()


@pytest.mark.slow
def test_a_changed_plugin_is_named_and_its_cells_are_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, site = tmp_path / "out", tmp_path / "site"
    registry = install(site, "1.0", monkeypatch, "tide_helper.py")
    (source / "config.toml").write_text(CONFIG + '\n[process.weights]\nkind = "tide"\n')

    def run(registry: Registry, **options: object) -> tuple[list[str], dict[str, dict], set[str]]:
        """What was said, the results, and which cells were made now."""
        before = {path.stem: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
        runner, cells, said = runner_of(source, out, registry, **options)
        assert runner.run(cells[:2]) == {"ok": 2}
        now = {path.stem: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
        return said, results(out), {stem for stem, written in now.items() if before.get(stem) != written}

    _, found, made = run(registry, keep_runs=True)
    assert len(made) == 2
    joint = found["digits__image+label__joint__0"]["plugins"]
    assert {"modality.image", "backbone.unet", "dataset.digits", "evaluator.judge", "method.joint"} < joint.keys()
    assert "task.combination" in joint and "method.single" not in joint
    first = joint["weight_schedule.tide"]
    assert (first["distribution"], first["version"], first["module"]) == ("tide-weights", "1.0", "tide_weights")
    assert run(registry) == ([], found, set())

    config = site / "tide_weights" / "config.py"
    config.write_text(config.read_text() + "# another comment\n")
    registry = imported_anew(site, monkeypatch)
    said, kept, made = run(registry, keep_changed=True)
    assert not made and kept == found
    assert "weight_schedule.tide: other code" in said[0] and "joint/0" in said[0] and "kept (--keep-ch" in said[1]

    said, found, made = run(registry, keep_runs=True)
    assert len(made) == 2 and "weight_schedule.tide: other code" in said[0] and "made again" in said[1]
    assert len(said[0].split("hash ")[1].split(",")[0]) == 16
    assert sum("what was trained of it is of other plugins" in text for text in said) == 2  # the runs had been kept
    second = found["digits__image+label__joint__0"]["plugins"]["weight_schedule.tide"]
    assert second["code"] != first["code"] and second["version"] == "1.0"
    assert run(registry) == ([], found, set())

    said, found, made = run(install(site, "1.1", monkeypatch, "tide_helper.py"))
    assert len(made) == 2 and "weight_schedule.tide: version 1.0, now 1.1" in said[0]

    (site / "tide_helper.py").write_text("# of the same distribution, beside the package\n")
    said, found, made = run(imported_anew(site, monkeypatch))
    assert len(made) == 2 and "weight_schedule.tide: other code" in said[0]

    for path in (out / "cells").glob("*.json"):  # of before plugins were recorded
        path.write_text(json.dumps({key: value for key, value in read_json(path).items() if key != "plugins"}))
        break
    said, _, made = run(install(site, "2.0", monkeypatch))
    assert "kept: 1 cell of before the plugins were recorded" in said[0] and len(made) == 1
    build_report(out)
    told = [line for line in (out / "report.md").read_text().splitlines() if "of other plugins" in line]
    assert len(told) == 1 and "1 cell of before" in told[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda config: f"loss = 3\n{config}", r"config\.toml: loss: found 3 \(int\), expected a table"),
        (lambda config: f"{config}[loss]\nreadout = {{ lable = 0.5 }}\n", r"config\.toml: .*no modality named lable"),
    ],
    ids=["no table", "misspelt"],
)
def test_what_is_wrong_with_a_setting_is_said_with_its_file_before_anything_runs(
    change: Callable[[str], str], told: str, source: Path, tmp_path: Path, registry: Registry
) -> None:
    config = source / "config.toml"
    config.write_text(change(config.read_text()))
    runner, cells, _ = runner_of(source, tmp_path / "out", registry)
    with pytest.raises(UserError, match=told):
        runner.run(cells)
    assert not list((tmp_path / "out").rglob("*.json"))


def test_read_outs_and_paths_of_modalities_that_a_task_or_a_control_lacks_are_left_out(
    source: Path, tmp_path: Path, registry: Registry
) -> None:
    """A setting names all its modalities; a task has some of them, a control fewer."""
    config = (source / "config.toml").read_text()
    config = config.replace("[sampling]", "[sampling]\npath = { image = 0.25, label = 0.5 }")
    (source / "config.toml").write_text(config + "[loss]\nreadout = { image = 0.5, label = 0.25 }\n")
    alone = PROFILE.replace(
        'kind = "single", targets = ["image"], observed = ["label"]', 'kind = "single", targets = ["image"]'
    )
    (source / "profile.toml").write_text(alone)
    runner, cells, _ = runner_of(source, tmp_path / "out", registry)
    experiments = {cell.id: cell_experiment(runner.profile, cell, source, registry) for cell in cells}
    assert experiments["digits/image+label/joint/0"].loss.readout == {"image": 0.5, "label": 0.25}
    assert experiments["digits/masked/joint/0"].loss.readout == {"image": 0.5}
    assert experiments["digits/image+label/joint/0"].sampling.path == {"image": 0.25, "label": 0.5}
    assert experiments["digits/masked/joint/0"].sampling.path == {"image": 0.25}
    runner.run([cell for cell in cells if cell.id == "digits/image+label/class-conditional/0"])
    (made,) = results(tmp_path / "out").values()
    assert made["status"] == "ok", made["reason"]


def test_the_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, out = str(source / "profile.toml"), str(tmp_path / "out")
    assert cli.main(["bench", "list"]) == 0
    assert "smoke" in capsys.readouterr().out
    assert cli.main(["bench", "run", profile, "--out", out, "--only", "digits/masked/joint/0"]) == 0
    assert "1 cells: 1 ok" in capsys.readouterr().out
    assert cli.main(["bench", "list", profile, "--out", out]) == 0
    assert "ok        digits/masked/joint/0" in capsys.readouterr().out
    # A change reaches the configuration of each cell, and results of another are not taken for these.
    assert (
        cli.main(
            ["bench", "run", profile, "--out", out, "--only", "digits/masked/joint/0", "--set", "training.steps=4"]
        )
        == 2
    )
    assert "holds a result of another configuration of digits/masked/joint/0" in capsys.readouterr().err
    changed = ["bench", "run", profile, "--out", f"{out}-4", "--only", "digits/masked/joint/0"]
    assert cli.main([*changed, "--set", "training.steps=4", "sampling.steps=2"]) == 0
    result = expanded(read_json(tmp_path / "out-4/cells/digits__masked__joint__0.json"))
    assert result["cost"]["steps"] == result["config"]["experiment"]["training"]["steps"] == 4
    for change, owner in (
        ("training.seed=1", 'every cell sets "training.seed" itself; give --seeds'),
        ("conditioning.partial=0.5", 'the task masked sets "conditioning.partial" itself'),
    ):
        assert cli.main([*changed, "--set", change]) == 2
        assert f"--set {change}: {owner}" in capsys.readouterr().err
    hot = ["bench", "run", profile, "--out", out, "--only", "digits/masked/hot/0", "--set", "training={steps=4}"]
    assert cli.main(hot) == 2
    assert "--set training={steps=4}: every cell sets" in capsys.readouterr().err
    assert cli.main([*hot[:-1], "training.clip=2"]) == 2
    assert 'the method hot sets "training.clip" itself; change it in the profile' in capsys.readouterr().err
    assert cli.main(["bench", "run", "nothing", "--out", out]) == 2
    assert "no such profile" in capsys.readouterr().err
    assert cli.main(["bench", "report", str(source)]) == 2
    assert "no results here" in capsys.readouterr().err


def test_the_command_line_for_other_programs(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    profile, out = str(source / "profile.toml"), tmp_path / "out"

    def document(*arguments: object) -> dict:
        capfd.readouterr()
        assert cli.main(["bench", *map(str, arguments), "--json"]) == 0
        return json.loads(capfd.readouterr().out, parse_constant=pytest.fail)

    profiles = document("list")["profiles"]
    assert [each["name"] for each in profiles] == list(shipped())
    masked = "digits/masked/joint/0"
    made = document("run", profile, "--out", out, "--only", masked)
    assert made == {"out": str(out), "states": {"ok": 1}, "cells": {masked: "ok"}}
    assert document("report", out) == {"html": str(out / "report.html"), "markdown": str(out / "report.md")}
    assert set(document("list", profile)["cells"].values()) == {None}
    states = document("list", profile, "--out", out)["cells"]
    assert states.pop(masked) == "ok" and set(states.values()) == {"to do"}
    # Other seeds, also where a part of the profile has its own.
    assert {name[-2:] for name in document("list", profile, "--seeds", 4, 7)["cells"]} == {"/4", "/7"}
    assert document("list", profile, "--seeds", 2, "--only", "*/hot/*")["cells"] == {"digits/masked/hot/2": None}
    for seeds in (["-1"], ["1", "1"]):
        assert cli.main(["bench", "list", profile, "--seeds", *seeds]) == 2
        assert f"--seeds {' '.join(seeds)}: expected numbers from 0, each once" in capfd.readouterr().err
    # As `bench run` does, with the same changes: what is there is of another configuration then.
    assert document("list", profile, "--out", out, "--only", masked, "--set", "training.steps=4")["cells"] == {
        masked: "other"
    }
    # Where a plugin is gone, a result is still listed.
    (source / "config.toml").write_text(CONFIG.replace('kind = "digits"', 'kind = "gone"'))
    assert document("list", profile, "--out", out, "--only", masked)["cells"] == {masked: "ok"}
    cell = out / "cells" / "digits__masked__joint__0.json"
    cell.write_text(cell.read_text()[:-20])
    assert document("list", profile, "--out", out, "--only", masked)["cells"] == {masked: "damaged"}


@pytest.mark.parametrize("action", ["report .", "perf", "curves", "data", "reading", "reliability", "topology"])
def test_changes_are_refused_by_name_where_no_configuration_is_read(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", *action.split(), "--set", "training.steps=4"])
    name = action.split()[0]
    assert re.search(rf"error: bench {name}: --set: (it|what|a report) .{{20}}", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "training.steps=4"], "bench list: --set is about a profile's cells"),
        (["PROFILE", "--set", "training.stesp=4"], 'unknown key "stesp"; did you mean "steps"?'),
        (["PROFILE", "--set", "training.seed=4"], 'every cell sets "training.seed" itself'),
        (["PROFILE", "--only", "nothing"], "--only nothing: matches no cell"),
    ],
)
def test_a_listing_refuses_what_a_run_would(
    options: list[str], message: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(source / "profile.toml") if option == "PROFILE" else option for option in options]
    assert cli.main(["bench", "list", *options]) == 2
    assert message in capsys.readouterr().err
