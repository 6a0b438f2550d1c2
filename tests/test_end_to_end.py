"""Half a minute of training on real digits, by the command line: one model must already read and draw."""

import json
from pathlib import Path

import pytest

from mtdiffusion_engine.cli import main

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_one_model_learns_every_direction(tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = [
        "training.steps=250",
        "backbone.channels=24",
        "sampling.steps=20",
        "evaluation.bound_times=0",
        "evaluation.joint_draws=2",
    ]
    train = ["train", str(ROOT / "configs/digits-demo.toml"), "--out", str(run), "--device", "cpu", "--set", *changes]
    assert main(train) == 0
    assert main(["evaluate", str(run), "--samples", "128", "--steps", "8", "--device", "cpu"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    # Chance is 0.1 for what is read and drawn; a mask of background alone has a mean IoU of about 0.35.
    assert metrics["label|image/accuracy"] > 0.6
    assert metrics["image|label/judge_accuracy"] > 0.6
    assert metrics["mask|image/miou"] > 0.75
    assert metrics["clip|image/cosine"] > 0.75
    assert metrics["label|image/readout_accuracy"] > 0.6
    assert metrics["mask|image/readout_miou"] > 0.75
    assert metrics["joint/judge_agreement"] > 0.4
    assert metrics["real/judge_accuracy"] > 0.97
    assert metrics["joint/draws"] == 2
    assert metrics["joint/fid_judge_std"] > 0
    assert metrics["joint/samples"] == metrics["label|image/samples"] == 128
