"""Numbers that are not finite are named: what of which sample, at which step; the last good checkpoint stays."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtdiffusion_benchmarks.reliability.numbers import spoil
from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine.trainer import Diverged, Progress, Trainer
from tests.engine.tiny import REGISTRY, toy

ROOT = Path(__file__).parents[2]
BAD = 7
"""The sample that is spoilt; it has a picture."""


def trainer_of(run: Path, *overrides: str) -> Trainer:
    shown = ("conditioning.observed=0.0", "conditioning.partial=0.0")  # nothing: then every picture has a loss
    settings = ("training.steps=40", "training.checkpoint_every=2", "data.count=16", *shown, *overrides)
    return Trainer(toy(*settings), run, REGISTRY, device="cpu", on_message=lambda _: None)


def place_of(trainer: Trainer, first: int) -> int:
    """The first step from ``first`` on that the spoilt sample is in."""
    sampler = trainer.sampler(first - 1, first + 20)
    steps = [first + part // sampler.parts for part, turn in enumerate(sampler) if BAD in turn.indices]
    return steps[0]


NAMED = {
    "code": r"the code of image, loss, l2/image.*",
    "loss": r"loss, l2/image",
    "gradient": r"the gradient of \S+ and of \d+ more parameters",
    "bfloat16": r"loss, l2/image",
}


@pytest.mark.parametrize("where", ["code", "loss", "gradient", "bfloat16"])
def test_a_step_that_is_left_out_names_the_sample(where: str, tmp_path: Path) -> None:
    precision = ["training.precision=bfloat16"] * (where == "bfloat16")
    trainer = trainer_of(tmp_path / "run", "training.log_every=1", "training.steps=12", *precision)
    step = place_of(trainer, 5)
    spoil(trainer, where, math.nan, [BAD], lambda: trainer.step == step - 1)
    told: list[Progress] = []
    trainer.train(told.append)
    assert [report.step for report in told if report.skipped] == [step]
    said = {report.step: report.where for report in told}.pop(step)
    assert re.search(rf"^Step {step}, computed again: not finite is ({NAMED[where]}) of sample {BAD}\. ", said), said
    assert ("In float32 it is finite" in said) == (where == "bfloat16")
    assert not any(report.where for report in told if report.step != step)


@pytest.mark.parametrize("where", ["code", "loss", "gradient"])
def test_a_training_that_diverges_names_the_sample_and_keeps_the_checkpoint(where: str, tmp_path: Path) -> None:
    """Of two samples, both in every step, one is spoilt from step 5 on."""
    trainer = trainer_of(tmp_path / "run", "data.count=2")
    spoil(trainer, where, math.nan, [1], lambda: trainer.step >= 4)
    with pytest.raises(Diverged) as error:
        trainer.train()
    said = str(error.value)
    assert re.search(rf"Step 5, computed again: not finite is ({NAMED[where]}) of sample 1[.;]", said), said
    assert "of sample 0" not in said
    assert "There is a checkpoint of step 2" in said
    kept = ckpt.list_checkpoints(tmp_path / "run")
    assert [folder.name for folder in kept] == ["step-00000002"]
    for name in ("model", "ema", "optimizer"):
        assert all(bool(x.isfinite().all()) for x in load_file(kept[0] / f"{name}.safetensors").values())


@pytest.mark.parametrize("what", ["exp_avg_sq", "weights", "averaged weights"])
def test_a_state_that_is_not_finite_is_not_saved(what: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", "training.log_every=1")
    name, weight = next(iter(trainer.model.named_parameters()))

    def hurt(progress: Progress) -> None:
        if progress.step == 6:
            values = {"exp_avg_sq": trainer.optimizer.state[weight].get("exp_avg_sq"), "weights": weight}
            values["averaged weights"] = next(trainer.ema.module.parameters())
            values[what].data.view(-1)[0] = torch.inf

    with pytest.raises(Diverged) as error:
        trainer.train(hurt)
    said = str(error.value)
    owner = "the" if what.endswith("weights") else "AdamW's"
    assert f"after step 6, {owner} {what}" in said
    assert name in said and "That state was not saved. There is a checkpoint of step 4." in said
    assert [folder.name for folder in ckpt.list_checkpoints(tmp_path / "run")] == ["step-00000002", "step-00000004"]


SCRIPT = """
import json, math, os, sys; sys.path.insert(0, {root!r})
from pathlib import Path
from mtdiffusion_benchmarks.reliability.numbers import spoil
from tests.engine.test_locating import BAD, trainer_of

trainer = trainer_of(Path(sys.argv[1]), "training.log_every=1", "training.steps=12", *sys.argv[3:])
step = int(sys.argv[2])
spoil(trainer, "loss", math.nan, [BAD], lambda: trainer.step == step - 1)
told = []
trainer.train(lambda report: told.append([report.step, report.skipped, report.where]))
if os.environ["RANK"] == "0":
    print("told", json.dumps(told))
"""


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_any_process_finds_the_sample_and_the_first_names_it(parallel: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    step = place_of(trainer_of(tmp_path / "alone"), 5)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    settings = [f"training.parallel={parallel}", "training.accumulate=1"]
    done = subprocess.run(
        [*start, str(tmp_path / "run"), str(step), *settings],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("told "))
    told = json.loads(line.removeprefix("told "))
    assert [at for at, skipped, _ in told if skipped] == [step]
    assert [where for at, _, where in told if at == step] == [
        f"Step {step}, computed again: not finite is loss, l2/image of sample {BAD}. "
    ]
