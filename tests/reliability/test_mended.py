"""Faults that were found by trying: each a sentence now, or nothing lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine import load_run
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_plugins.datasets.folder import _arrays
from mtdiffusion_registry import UserError
from mtdiffusion_registry.config import apply_overrides, load_toml
from tests.engine.tiny import REGISTRY, toy

NESTED = "[" * 200_000


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    Trainer(toy(), run, REGISTRY, device="cpu", on_message=lambda _: None).train()
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def session(run: Path, **options: bool | Path) -> Trainer:
    return Trainer(toy(), run, REGISTRY, device="cpu", on_message=lambda _: None, **options)  # type: ignore[arg-type]


def test_what_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(NESTED)
    (tmp_path / "x.toml").write_text(f"x = {NESTED}")
    with pytest.raises(UserError, match=r"x\.json: cannot be read"):
        ckpt.read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"x\.toml: .*nested too deeply"):
        load_toml(tmp_path / "x.toml")
    with pytest.raises(UserError, match=r"override.*nested too deeply"):
        apply_overrides({}, [f"x={NESTED}"])


@pytest.mark.parametrize("state", [[], 3, {"format": 2}, {"format": 2, "step": "ten"}, {"format": 2, "step": -1}])
def test_a_checkpoints_state_is_checked(run: Path, state: object) -> None:
    checkpoint = ckpt.list_checkpoints(run)[-1]
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"state\.json: (damaged|expected)"):
        ckpt.load_state(checkpoint)


def test_a_checkpoint_that_does_not_say_what_training_goes_on_by_is_not_resumed(run: Path) -> None:
    path = ckpt.list_checkpoints(run)[-1] / "state.json"
    state = ckpt.read_json(path)
    del state["ema_updates"]
    ckpt.write_json(path, state)
    with pytest.raises(UserError, match=r"state\.json: damaged \(it has no ema_updates"):
        session(run, resume=True)


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_a_checkpoint_with_a_value_that_is_no_number_is_refused(run: Path, name: str) -> None:
    path = ckpt.list_checkpoints(run)[-1] / f"{name}.safetensors"
    tensors = load_file(path)
    key = max(tensors, key=lambda key: tensors[key].numel())
    tensors[key].view(-1)[0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"{name}\.safetensors: damaged \({key} holds NaN"):
        if name == "ema":
            load_run(run, registry=REGISTRY, device="cpu")
        else:
            session(run, resume=True)


def test_moments_of_other_parameters_are_refused(run: Path) -> None:
    save_file({"99999.exp_avg": torch.zeros(1)}, ckpt.list_checkpoints(run)[-1] / "optimizer.safetensors")
    with pytest.raises(UserError, match=r"damaged \(found '99999\.exp_avg'"):
        session(run, resume=True)


def test_old_checkpoints_that_a_kill_left_go_when_the_run_is_resumed(run: Path) -> None:
    newest = ckpt.list_checkpoints(run)[-1]
    shutil.copytree(newest, run / "checkpoints" / "step-00000001")
    (run / "checkpoints" / ".step-00000002.1234567").mkdir()
    session(run, resume=True).train()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000008", newest.name]


def test_a_run_whose_making_was_cut_short_is_made_again(run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    made = session(new, init_from=run)
    first = load_file(new / "checkpoints" / "step-00000000" / "model.safetensors")
    (new / "config.toml").rename(new / f".config.toml.{os.getpid() + 1}")  # killed before it had its name
    again = session(new, init_from=run)
    assert again.step == made.step == 0
    assert all(torch.equal(x, first[key]) for key, x in again.model.state_dict().items())
    assert sorted(path.name for path in new.iterdir()) == ["checkpoints", "config.toml", "plugins.json"]


def test_what_somebody_put_into_a_folder_stays_there(tmp_path: Path) -> None:
    (tmp_path / "plugins.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        session(tmp_path)
    assert (tmp_path / "plugins.json").is_file()


def test_an_archive_that_is_huge_when_it_is_unpacked_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    count = 2**28  # 1 GiB of zeros
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("000.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
        for _ in range(count * 4 // 2**24):
            file.write(bytes(2**24))
    (tmp_path / "label.npz").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"label\.npz: would take 1\.0 GiB unpacked"):
        _arrays(tmp_path / "label.npz")


def test_vectors_that_are_packed_are_still_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "label.npz", **{f"{i:03d}": np.zeros(64, np.float32) for i in range(50)})
    assert len(_arrays(tmp_path / "label.npz")) == 50
