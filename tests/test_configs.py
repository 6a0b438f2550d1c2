"""Every configuration in configs/ trains and samples: two steps of each, on few samples."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtdiffusion_engine import load_run
from mtdiffusion_engine.experiment import load_experiment
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import Registry
from mtdiffusion_registry.config import dump_toml
from tests.plugins.tiny_autoencoders import saved, untrained
from tests.plugins.tiny_networks import VIT, random_weights

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


def stand_in(tables: dict[str, Any], root: Path) -> Path:
    """A folder of noise, laid out as the configuration's own data are, which do not ship."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name, kind in tables["data"]["fields"].items():
            if kind == "label":
                rows = "".join(f"{index},{index % 2}\n" for index in range(count))
                (root / split).mkdir(parents=True, exist_ok=True)
                (root / split / f"{name}.csv").write_text(f"stem,value\n{rows}")
                continue
            if kind == "caption":
                (root / split / name).mkdir(parents=True)
                for index in range(count):
                    (root / split / name / f"{index}.txt").write_text("a large red circle at the top left")
                continue
            classes = tables["modalities"][name].get("classes", 256)
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                shape = (120, 160, 3) if kind == "image" else (120, 160)
                picture = Image.fromarray(rng.integers(0, classes, shape, np.uint8))
                picture.save(folder / f"{index}.{'jpg' if kind == 'image' else 'png'}")
    return root


@pytest.mark.parametrize(
    "path",
    [
        # Those beside latent-256 differ from it by one modality, and take as long.
        pytest.param(path, id=path.stem, marks=[pytest.mark.long] * path.stem.startswith("latent-256-"))
        for path in CONFIGS
    ],
)
def test_a_configuration_trains_and_samples(path: Path, tmp_path: Path) -> None:
    few = ["training.steps=2", "training.batch_size=4", "sampling.steps=2"]
    tables = tomllib.loads(path.read_text())
    if tables["data"]["kind"] == "folder":
        few.append(f"data.root={stand_in(tables, tmp_path / 'data')}")
        for name, table in tables["modalities"].items():
            if "autoencoder" in table:  # in its place one of random weights, and a backbone for a CPU
                pytest.importorskip("diffusers")
                place = saved(untrained("AutoencoderTiny"), tmp_path / "autoencoder")
                few += [f"modalities.{name}.autoencoder={place}", "backbone.width=48", "backbone.depth=1"]
            if table["kind"] == "image_features":
                weights = random_weights(tmp_path, img_size=32)
                few += [f"modalities.{name}.{key}" for key in (f"model={VIT}", f"weights={weights}", "input_size=32")]
            if "pretrained" in table:  # in its place the small model that ships, which comes with its weights
                del table["pretrained"]
                dump_toml(tables, tmp_path / path.name)
                path = tmp_path / path.name
                few += [f"modalities.{name}.model=builtin:shapes", f"modalities.{name}.dim=64"]
    elif tables["data"]["kind"] != "digits":
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
