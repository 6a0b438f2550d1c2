"""A run over several sessions: what may change between them, where its data are, which weights it starts from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from attrs import Factory, evolve, frozen
from safetensors.torch import load_file

from mtdiffusion import Dataset
from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine import load_run
from mtdiffusion_engine.environment import ignored_variables
from mtdiffusion_engine.experiment import (
    Experiment,
    load_experiment,
    path_keys,
    require_same,
    structure_experiment,
    with_absolute_paths,
    with_precision,
)
from mtdiffusion_engine.trainer import Diverged, Progress, Trainer
from mtdiffusion_registry import DatasetConfig, UserError
from mtdiffusion_registry.config import apply_overrides
from tests.engine import tiny
from tests.engine.tiny import TOY, ToyData, toy

ROOT = Path(__file__).parents[2]


@frozen
class Part:
    at: Path
    weight: float = 1.0


@frozen
class Stored(DatasetConfig):
    """Noise, as many samples as a file in a folder says; the other paths are not read."""

    kind: ClassVar[str] = "stored"
    root: Path
    parts: tuple[Part, ...] = ()
    more: dict[str, Path] = Factory(dict)
    files: tuple[Path, ...] = ()
    cache: Path | None = None

    def build(self, split: Literal["train", "test"]) -> Dataset:
        file = self.root / "count"
        if not file.is_file():
            raise UserError(f"data folder {self.root} does not exist")
        return ToyData(int(file.read_text()), "", -1)


REGISTRY = tiny.REGISTRY.with_classes(Stored)


def stored(root: str | Path, *overrides: str) -> Experiment:
    tables = apply_overrides(tomllib.loads(TOY), [f'data={{kind="stored", root="{root}"}}', *overrides])
    return structure_experiment(tables, REGISTRY, "test")


def session(
    experiment: Experiment, run: Path, *, resume: bool = False, init_from: Path | None = None
) -> tuple[Trainer, list[str]]:
    """A trainer, and what it said."""
    said: list[str] = []
    trainer = Trainer(
        experiment, run, REGISTRY, resume=resume, init_from=init_from, device="cpu", on_message=said.append
    )
    return trainer, [line for line in said if not line.startswith("warning: ")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps. Not to be changed: copy it."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    session(toy(), run)[0].train()
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "count").write_text("11")
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# --- what may change --------------------------------------------------------------------------------------------------


def test_a_finished_run_goes_on_when_it_is_given_more_steps(run: Path) -> None:
    changed = toy("training.steps=14", "training.weight_decay=0.5", "loss.l1=0.5", "sampling.steps=3")
    trainer, said = session(changed, run, resume=True)
    assert said == [
        "changed since the last session: loss.l1 from 0.0 to 0.5; sampling.steps from 2 to 3; "
        "training.steps from 10 to 14; training.weight_decay from 0.01 to 0.5"
    ]
    assert trainer.step == 10
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.5]
    assert trainer.objective.weights.l1 == 0.5
    trainer.train()
    assert ckpt.require_run(run).name == "step-00000014"
    assert load_experiment(run / "config.toml", [], REGISTRY) == with_precision(changed, native=False)
    assert session(changed, run, resume=True)[1] == []  # it is no change any more


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.seed=1", "training.seed is 0, asked for 1"),
        ("training.batch_size=4", "training.batch_size is 8, asked for 4"),
        ("data.count=12", "data.count is 11, asked for 12"),
        ("backbone.channels=16", "backbone.channels is 8, asked for 16"),
        ("process.curve=linear", "process.curve is cosine, asked for linear"),
        ('modalities.extra={kind="label", classes=3}', "modalities.extra.classes is not set, asked for 3"),
    ],
)
def test_what_may_not_change_is_refused_by_name_with_what_to_do(run: Path, override: str, told: str) -> None:
    before = contents(run)
    with pytest.raises(UserError) as error:
        session(toy(override, "training.steps=14"), run, resume=True)
    assert told in str(error.value)
    assert "training.steps" not in str(error.value)
    assert f"mtdiffusion train CONFIG --out NEW --init-from {run}" in str(error.value)
    assert contents(run) == before


def test_fewer_steps_than_there_are_is_refused(run: Path) -> None:
    before = contents(run)
    with pytest.raises(UserError, match=r"training\.steps = 9: .* has 10 steps already; give that number or more"):
        session(toy("training.steps=9"), run, resume=True)
    assert contents(run) == before


def test_measurements_are_of_one_configuration(finished: Path) -> None:
    """What a benchmark compares may not be resumed with changes."""
    require_same(toy("sampling.steps=3", "training.keep=1"), finished, REGISTRY)
    with pytest.raises(UserError, match=r"training\.learning_rate is 0\.002, asked for 0\.1"):
        require_same(toy("training.learning_rate=0.1"), finished, REGISTRY)


def test_the_advice_after_a_divergence_works(tmp_path: Path) -> None:
    """Here the one checkpoint has the weights that diverge at the next step, whatever is changed."""
    run = tmp_path / "run"
    wild = ("training.clip=1e30", "training.checkpoint_every=1")
    with pytest.raises(Diverged) as error:
        session(toy("training.learning_rate=1e12", *wild), run)[0].train()
    message = str(error.value)
    step = int(message.partition("from step ")[2].partition(" ")[0])
    assert f"mtdiffusion train --resume --out {run} --set training.learning_rate=1e+11" in message
    assert ckpt.name_of(step - 1) + ckpt.ASIDE in [path.name for path in (run / "checkpoints").iterdir()]
    for _ in range(2):  # the checkpoint before may be no better
        trainer, _ = session(toy("training.learning_rate=1e-4", *wild), run, resume=True)
        assert trainer.step < step - 1
        try:
            trainer.train()
            break
        except Diverged:
            continue
    assert ckpt.require_run(run).name == "step-00000010"
    assert all(bool(x.isfinite().all()) for x in load_file(ckpt.require_run(run) / "model.safetensors").values())


def test_another_number_of_samples_is_said(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    session(stored(data), run)[0].train(stop_at=4)
    state_file = ckpt.require_run(run) / "state.json"
    state = json.loads(state_file.read_text())
    assert state["samples"] == 11
    assert session(stored(data), run, resume=True)[1] == []
    (data / "count").write_text("13")
    trainer, said = session(stored(data), run, resume=True)
    assert [line.partition(":")[0] for line in said] == [
        "the number of training samples is 13, at the last checkpoint it was 11",
    ]
    trainer.train()
    assert ckpt.require_run(run).name == "step-00000010"


def test_two_processes_do_not_train_one_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, _ = session(toy(), run)
    second, _ = session(toy(), run, resume=True)

    def intrude(_: Progress) -> None:
        with pytest.raises(UserError, match="another process is training this run"):
            second.train()
        with pytest.raises(UserError, match="another process is training this run"):
            session(toy(), run, resume=True)

    before = sorted(contents(run))
    first.train(intrude, stop_at=1)
    assert sorted(path for path in contents(run) if "/checkpoints" not in path) == before
    assert first.step == 1
    assert second.step == 0
    session(toy(), run, resume=True)[0].train()  # it is free again
    assert ckpt.require_run(run).name == "step-00000010"


# --- from another run's weights ---------------------------------------------------------------------------------------


def test_a_run_starts_from_the_averaged_weights_of_another(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    experiment = toy("training.seed=5", "training.batch_size=6", "process.curve=linear", "loss.l1=1.0")
    trainer, _ = session(experiment, run, init_from=finished)
    source = load_file(ckpt.require_run(finished) / "ema.safetensors")
    for model in (trainer.model, trainer.averaged_model):
        assert model.state_dict().keys() == source.keys()
        assert all(torch.equal(x, source[key]) for key, x in model.state_dict().items())
    assert trainer.step == 0
    # Killed before its first checkpoint, it still goes on from those weights.
    resumed, _ = session(experiment, run, resume=True)
    assert all(torch.equal(x, source[key]) for key, x in resumed.model.state_dict().items())
    for each in (trainer, resumed):
        each.train(stop_at=2)
    assert not all(torch.equal(x, source[key]) for key, x in trainer.model.state_dict().items())
    assert all(torch.equal(x, resumed.model.state_dict()[key]) for key, x in trainer.model.state_dict().items())
    assert ckpt.load_state(ckpt.require_run(run))["init_from"] == {"run": str(finished), "checkpoint": "step-00000010"}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("backbone.channels=16", r"backbone\.\S+ is \[.*\], expected \[.*and \d+ more"),
        ("modalities.label.classes=4", r"modalities\.label\.\S+ is \[.*\], expected \[4"),
        ('modalities.extra={kind="label", classes=3, field="label"}', r"image \(image\).*expected .*, extra \(label\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_written(
    finished: Path, tmp_path: Path, override: str, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        session(toy(override), tmp_path / "run", init_from=finished)
    with pytest.raises(UserError, match="expected the folder of a run, found nothing"):
        session(toy(), tmp_path / "run", init_from=tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_the_order_of_modalities_is_that_of_the_channels(finished: Path, tmp_path: Path) -> None:
    experiment = toy()
    turned = evolve(experiment, modalities=dict(reversed(experiment.modalities.items())))
    with pytest.raises(UserError, match=r"are image \(image\), mask \(mask\), label \(label\), expected label"):
        session(turned, tmp_path / "run", init_from=finished)


# --- where data are ---------------------------------------------------------------------------------------------------


def test_paths_are_made_absolute_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    parts = 'data.parts=[{at="a", weight=2.0}, {at="~/b"}]'
    given = stored("data", parts, 'data.more={x="c"}', 'data.files=["d", "/e"]')
    assert path_keys(given) == {"data.root", "data.parts[0].at", "data.parts[1].at", "data.more.x", "data.files"}
    made = with_absolute_paths(given)
    assert made.data == Stored(
        tmp_path / "data",
        (Part(tmp_path / "a", 2.0), Part(Path("/home/somebody/b"))),
        {"x": tmp_path / "c"},
        (tmp_path / "d", Path("/e")),
    )
    assert evolve(made, data=given.data) == given
    assert with_absolute_paths(made) == made
    with pytest.raises(UserError, match=r"~nobody-of-that-name/x: .*write the whole path"):
        with_absolute_paths(stored("~nobody-of-that-name/x"))


def test_a_run_can_be_used_from_anywhere(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session(stored("data"), Path("run"))[0].train(stop_at=1)
    monkeypatch.chdir("/")
    assert len(load_run(tmp_path / "run", registry=REGISTRY, device="cpu").data("test")) == 11
    trainer, said = session(stored(data), tmp_path / "run", resume=True)  # the same place, otherwise spelt
    assert (trainer.step, said) == (1, [])


def test_data_that_moved_are_found_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    session(stored(data, 'data.parts=[{at="a"}]'), run)[0].train(stop_at=2)
    data.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    before = contents(run)
    with pytest.raises(UserError, match="does not exist"):
        load_run(run, registry=REGISTRY, device="cpu").data("train")
    elsewhere = load_run(run, registry=REGISTRY, device="cpu", overrides=["data.root=moved"])
    assert len(elsewhere.data("train")) == 11
    assert contents(run) == before
    experiment = load_experiment(run / "config.toml", ["data.root=moved"], REGISTRY)
    trainer, said = session(experiment, run, resume=True)
    assert said == [f"changed since the last session: data.root from {data} to {tmp_path / 'moved'}"]
    trainer.train()
    assert len(load_run(run, registry=REGISTRY, device="cpu").data("train")) == 11
    with pytest.raises(UserError, match=r"data\.parts\[0\]\.weight is 1\.0, asked for 3\.0"):
        session(stored("moved", 'data.parts=[{at="b", weight=3.0}]'), run, resume=True)


def test_of_a_trained_run_only_what_its_model_does_not_depend_on_can_be_set(finished: Path) -> None:
    def load(*overrides: str) -> Experiment:
        return load_run(finished, registry=REGISTRY, device="cpu", overrides=overrides).experiment

    experiment = load("data.count=5", "evaluation.steps=1", "sampling.steps=7", "training.seed=0")
    assert (experiment.sampling.steps, experiment.evaluation.steps) == (7, 1)
    for override, told in {
        "training.seed=1": r"training\.seed is 0, asked for 1",
        "loss.l1=1.0": r"loss\.l1 is 0\.0, asked for 1\.0",
        "modalities.label.classes=4": r"modalities\.label\.classes is 3, asked for 4",
    }.items():
        with pytest.raises(UserError, match=f"{told}.*only data, evaluation and sampling can be set"):
            load("sampling.steps=7", override)


# --- the environment --------------------------------------------------------------------------------------------------

ASKS = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_CPU": "true",
}


def test_a_launchers_environment_does_not_decide_how_to_train(finished: Path, tmp_path: Path) -> None:
    script = f"""
import os, sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from mtdiffusion_engine.trainer import Trainer
from tests.engine.tiny import REGISTRY, toy
before = dict(os.environ)
Trainer(toy(), Path({str(tmp_path / "run")!r}), REGISTRY, device="cpu").train()
assert all(os.environ[name] == before[name] for name in {list(ASKS)})
"""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | ASKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for told in (
        'MIXED_PRECISION=bf16 is ignored; set training.precision = "bfloat16" instead (it is "float32")',
        "GRADIENT_ACCUMULATION_STEPS=4 is ignored; set training.accumulate = 4 instead (it is 2)",
        "DYNAMO_BACKEND=EAGER is ignored; set training.compile = true instead (it is false)",
        'USE_FSDP=true is ignored; set training.parallel = "fsdp" instead (it is "ddp")',
        "USE_DEEPSPEED=true is ignored: several processes train in data parallel, as training.parallel says",
    ):
        assert told in done.stdout
    assert "USE_CPU" not in done.stdout
    whole, other = (load_file(ckpt.require_run(each) / "model.safetensors") for each in (finished, tmp_path / "run"))
    assert all(torch.equal(x, other[key]) for key, x in whole.items())


def test_what_a_launcher_sets_by_itself_is_not_mentioned() -> None:
    config = toy("training.precision=bfloat16").training
    names: Callable[..., list[str]] = lambda **environment: ignored_variables(config, environment)  # noqa: E731
    default = {"MIXED_PRECISION": "no", "GRADIENT_ACCUMULATION_STEPS": "1", "DYNAMO_BACKEND": "NO", "USE_FSDP": "false"}
    assert names(**{f"ACCELERATE_{name}": value for name, value in default.items()}) == []
    assert names(ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2") == []
    assert len(names(ACCELERATE_MIXED_PRECISION="fp16", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="3")) == 2
    assert ignored_variables(toy("training.parallel=fsdp").training, {"ACCELERATE_USE_FSDP": "1"}) == []
