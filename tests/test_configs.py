"""Every configuration in configs/ trains and samples: two steps of each, on few samples."""

import tomllib
from pathlib import Path

import pytest
import torch

from mtdiffusion_engine import load_run
from mtdiffusion_engine.experiment import load_experiment
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import Registry

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_trains_and_samples(path: Path, tmp_path: Path) -> None:
    few = ["training.steps=2", "training.batch_size=4", "sampling.steps=2"]
    if "digits" not in tomllib.loads(path.read_text())["data"]["kind"]:
        few += ["data.count=16", "data.test_count=8"]
    registry = Registry.discover()
    experiment = load_experiment(path, few, registry)
    Trainer(experiment, tmp_path / "run", registry, device="cpu").train()
    run = load_run(tmp_path / "run", device="cpu")
    out = run.sample(2)
    assert set(out) == set(experiment.modalities)
    for name, x in out.items():
        run.modality(name).check(x)
    first = next(iter(out))
    given = run.sample(2, observed={first: out[first]})
    assert torch.equal(given[first], out[first])
