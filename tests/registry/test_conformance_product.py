"""The conformance kit as its users meet it: in pytest, on the command line, and over all that is installed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import torchvision
from fake_distributions import Install
from PIL import Image
from tests.plugins.tiny_autoencoders import saved, untrained
from tests.plugins.tiny_networks import random_weights

from mtdiffusion_engine.cli import main
from mtdiffusion_registry import Registry
from mtdiffusion_registry.testing import CHECKS

DATASET = """
from typing import ClassVar
import torch
from attrs import frozen
from mtdiffusion.interfaces import Dataset
from mtdiffusion_registry import DatasetConfig, hookimpl

MTDIFFUSION_API = 1

class Labels(Dataset):
    def __len__(self):
        return 3
    def __getitem__(self, index):
        return {"label": torch.tensor(index - 1)}

@frozen
class Toy(DatasetConfig):
    kind: ClassVar[str] = "toy"
    shards: int
    def build(self, split):
        if self.shards > 1:
            raise RuntimeError("only one shard")
        return Labels()

@hookimpl
def mtdiffusion_datasets():
    return [Toy]
"""
"""Its labels begin at -1, which breaks the convention for fields."""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_each_check_is_a_test_of_its_own(install: Install, tmp_path: Path) -> None:
    install(DATASET)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_toy.py").write_text(
        "from mtdiffusion_registry.testing import conformance\n"
        "toy = conformance('dataset.toy', values={'shards': 1})\n"
        "shards = conformance('dataset.toy', values={'shards': 2})\n"
        "gone = conformance('dataset.gone')\n"
    )
    done = run(tmp_path, "-rA", "--tb=short")
    for line in (
        "PASSED test_toy.py::toy::config",
        "FAILED test_toy.py::toy::fields",
        "FAILED test_toy.py::shards::build",
        "FAILED test_toy.py::gone::entry_point",
    ):
        assert line in done.stdout, done.stdout + done.stderr
    assert "needs fields" in done.stdout  # determinism is skipped
    assert "found: \"train\"[0]['label'] is torch.int64 of shape () with -1" in done.stdout
    assert "testing/dataset.py" not in done.stdout  # a traceback of the kit says nothing
    assert 'raise RuntimeError("only one shard")' in done.stdout
    assert 'there is no dataset of kind "gone"' in done.stdout


def test_a_program_that_a_test_starts_needs_no_plugin(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTEST_VERSION": "9"}
    code = "from mtdiffusion_registry.testing import conformance; print(len(conformance('clock_law.shared').checks))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr


def test_without_the_pytest_plugin_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "test_toy.py").write_text(
        "from mtdiffusion_registry.testing import conformance\ntoy = conformance('dataset.digits')\n"
    )
    done = run(tmp_path, "-p", "no:mtdiffusion")
    assert done.returncode == 2
    assert "which is not loaded: pytest -p mtdiffusion_registry.pytest_plugin" in done.stdout


def test_a_project_without_the_kit_pays_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\n"
        "class Odd:\n"
        "    def __getattr__(self, name):\n"
        "        raise RuntimeError(name)\n"
        "odd = Odd()\n"
        "def test_nothing_is_imported():\n"
        "    assert 'mtdiffusion_registry.pytest_plugin' in sys.modules\n"
        "    heavy = {'torch', 'numpy', 'cattrs', 'mtdiffusion', 'mtdiffusion_registry.testing'}\n"
        "    assert not heavy & set(sys.modules)\n"
    )
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_line_says_what_failed(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(DATASET)
    assert main(["plugins", "check", "toy", "--set", "shards=1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [check.id for check in CHECKS["dataset"]]
    failed = [line for line in lines if line.startswith("failed")]
    assert len(failed) == 1
    assert failed[0].startswith("failed   fields ")
    assert "to meet it: convert it in __getitem__" in failed[0]
    skipped = [line.split() for line in lines if line.startswith("skipped")]
    assert skipped == [["skipped", "determinism", "needs", "fields"], ["skipped", "stored", "needs", "determinism"]]
    assert lines[-1] == "dataset.toy: 6 ok, 1 failed, 2 skipped"

    assert main(["plugins", "check", "dataset.toy", "--set", "shards=2"]) == 1
    assert "RuntimeError: only one shard" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imge"], 'there is no plugin "imge"; did you mean "image"?'),
        (["sonar"], "After a change of entry points, install their package again"),
        (["label"], 'modality.label: missing key "classes"'),
        (["label", "--set", "classes=1"], "classes"),
        (["label", "--set", "clases=2"], "clases"),
        (["dataset.digits", "--latent", "4"], "the checks of a dataset have no option height, width"),
    ],
)
def test_bad_usage_is_no_failed_check(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert not out


def test_a_kind_of_two_groups_must_say_which(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(DATASET, names=("dataset.label",))
    assert main(["plugins", "check", "label"]) == 2
    said = capsys.readouterr().err
    assert '"label" is the kind of 3 plugins; say which: ' in said
    assert all(f"{group}.label" in said for group in ("modality", "dataset", "field"))


VALUES = {
    "modality.image": ["size=8", "channels=1"],
    "modality.latent_image": ["size=32"],
    "modality.image_features": ["size=32", "model=vit_tiny_patch16_224", "input_size=32"],
    "modality.mask": ["size=8"],
    "modality.label": ["classes=10"],
    "modality.clip": ["dim=16"],
    "modality.text": ["length=12"],
    "dataset.shapes": ["count=20", "test_count=10"],
    "dataset.photos": ["count=20", "test_count=10"],
    "dataset.torchvision": ["name=image_folder"],
    "dataset.huggingface": ['fields={label="label"}'],
    "dataset.folder": ['fields={label="label"}'],
    "dataset.webdataset": ['fields={label="label"}'],
    "weight_schedule.target": ["knots=[1.0, 0.5, 0.0]"],
    "clock_law.offset": ["ahead={a=0.5}"],
    "evaluator.judge": ["epochs=2"],
    "task.combination": ['modalities=["image", "label"]'],
    "task.transition": ["source=image", "target=label"],
    "method.single": ['targets=["label"]'],
    "method.mae": ["target=image"],
    "method.sdedit": ["target=image"],
    "method.regression": ["target=label", 'observed=["image"]'],
    "evaluator.lpips": ["net=squeeze"],
}
OURS = [f"{i.group}.{i.kind}" for i in Registry.discover().plugins() if i.distribution == "mtdiffusion"]


def files(name: str, folder: Path) -> dict[str, Path]:
    """Those that a plugin reads, by the key of its configuration, so that nothing is downloaded."""
    if name == "dataset.folder":
        (folder / "label.json").write_text(json.dumps({f"{index}": index % 3 for index in range(50)}))
        return {"root": folder}
    if name == "dataset.webdataset":
        with tarfile.open(folder / "a.tar", "w") as tar:
            for index in range(50):
                member = tarfile.TarInfo(f"{index}.cls")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"%d" % (index % 3)))
        return {"root": folder}
    if name == "dataset.torchvision":
        for split in ("train", "val"):
            (folder / split / "grey").mkdir(parents=True)
            Image.new("RGB", (40, 40), "grey").save(folder / split / "grey" / "0.png")
        return {"root": folder}
    if name == "dataset.huggingface":
        pytest.importorskip("datasets.arrow_dataset")
        for split in ("train", "test"):
            (folder / f"{split}.csv").write_text("label\n" + "0\n1\n" * 5)
        return {"path": folder}
    if name == "dataset.litdata":
        pytest.importorskip("litdata")
        pytest.skip("shards are checked where they are packed, in test_litdata")
    if name == "modality.latent_image":
        pytest.importorskip("diffusers")
        return {"autoencoder": saved(untrained("AutoencoderTiny"), folder)}
    if name == "modality.image_features":
        return {"weights": random_weights(folder, img_size=32)}
    if name in ("evaluator.lpips", "evaluator.features"):  # the layout that lpips asks for; features refuses it
        torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), folder / "weights.pth")
        return {"weights": folder / "weights.pth"}
    return {}


@pytest.mark.parametrize("name", OURS)
def test_all_that_we_ship_keeps_its_contract(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = [*VALUES.get(name, []), *(f"{key}={path}" for key, path in files(name, tmp_path).items())]
    status = main(["plugins", "check", name, *(["--set", *values] if values else [])])
    out, err = capsys.readouterr()
    assert status == 0, out + err
