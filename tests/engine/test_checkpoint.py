"""Checkpoints are written whole or not at all, and what is damaged is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_registry import UserError


def save(run: Path, step: int, keep: int = 2) -> Path:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors = model.state_dict()
    return ckpt.save_checkpoint(run, step, model=tensors, ema=tensors, optimizer=optimizer, state={}, keep=keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    assert [path.name for path in ckpt.list_checkpoints(tmp_path)] == names(tmp_path)


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(tmp_path, 1, keep=1)
    (tmp_path / "config.toml").touch()
    real, calls = ckpt.save_file, []

    def fail(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError("no space left on device")
        real(tensors, path)

    monkeypatch.setattr(ckpt, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, 2, keep=1)
    assert ckpt.require_run(tmp_path) == old
    ckpt.load_tensors(old / "ema.safetensors")
    monkeypatch.setattr(ckpt, "save_file", real)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-00000003"]  # what was half written is gone, too


def test_what_someone_keeps_beside_checkpoints_is_none_and_stays(tmp_path: Path) -> None:
    first = save(tmp_path, 5)
    (tmp_path / "config.toml").touch()
    others = ["step-00000005-best", "step-00000005 copy", "step-5", "step-000000005", "step-٠٠٠٠٠٠٠٥", "keep-me"]
    others += [".step-00000005", ".step-backup", ".step-00000005.old"]
    for name in others:
        shutil.copytree(first, first.with_name(name))
    (first.parent / "step-00000009").write_text("a file")
    assert ckpt.list_checkpoints(tmp_path) == [first]
    for step in (10, 99999999, 100000000):
        save(tmp_path, step, keep=2)
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(tmp_path)] == [99999999, 100000000]
    assert ckpt.require_run(tmp_path).name == "step-100000000"
    assert names(tmp_path) == sorted([*others, "step-00000009", "step-99999999", "step-100000000"])
    linked = first.with_name("step-00000050")
    linked.symlink_to(first.with_name("keep-me"), target_is_directory=True)
    save(tmp_path, 100000001, keep=1)
    assert linked.exists() and ckpt.list_checkpoints(tmp_path)[0] == linked


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    old = save(tmp_path, 1)
    (tmp_path / "config.toml").touch()
    shutil.copytree(old, old.with_name(".step-00000002.123"))
    assert ckpt.list_checkpoints(tmp_path) == [old]
    assert ckpt.require_run(tmp_path) == old


def test_the_optimizer_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    folder = ckpt.save_checkpoint(tmp_path, 3, model={}, ema={}, optimizer=optimizer, state={}, keep=1)
    other = torch.optim.AdamW(model.parameters(), lr=0.1)
    ckpt.load_optimizer(other, folder / "optimizer.safetensors")
    first, second = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert first.keys() == second.keys() == {0, 1}
    for index, entry in first.items():
        assert entry.keys() == second[index].keys() >= {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, second[index][key]) for key, value in entry.items())


def test_a_tensor_under_two_names_is_stored_under_both(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict({"encoder": nn.Linear(3, 3), "decoder": nn.Linear(3, 3)})
        model["decoder"].weight = model["encoder"].weight
        mean = torch.randn(3)
        model["encoder"].register_buffer("mean", mean)
        model["decoder"].register_buffer("mean", mean)
        model["decoder"].register_buffer("first", mean[:1])  # a part of it
        return model

    model, other = tied(), tied()
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    tensors = model.state_dict()
    optimizer = torch.optim.AdamW(model.parameters())
    folder = ckpt.save_checkpoint(tmp_path, 1, model=tensors, ema=tensors, optimizer=optimizer, state={}, keep=1)
    for file in ("model.safetensors", "ema.safetensors"):
        ckpt.load_weights(other, folder / file)
        assert other.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    path = folder / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"ema\.safetensors: damaged"):
        ckpt.load_tensors(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"ema\.safetensors: damaged"):
        ckpt.load_tensors(path)
    path.unlink()
    with pytest.raises(UserError, match=r"ema\.safetensors: missing"):
        ckpt.load_tensors(path)
    (folder / "state.json").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"state\.json: cannot be read"):
        ckpt.load_state(folder)


@pytest.mark.parametrize(("found", "by"), [(None, "mtdiffusion 0.1"), (3, "a newer mtdiffusion")])
def test_a_run_of_another_version_is_refused_by_name(tmp_path: Path, found: int | None, by: str) -> None:
    state = save(tmp_path, 1) / "state.json"
    stored = ckpt.read_json(state)
    assert stored.pop("format") == ckpt.FORMAT
    ckpt.write_json(state, stored | ({} if found is None else {"format": found}))
    (tmp_path / "config.toml").touch()
    with pytest.raises(UserError, match=rf"step-00000001: made by {by} \(format .*, expected 2\).*Train it anew"):
        ckpt.require_run(tmp_path)


def test_the_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(UserError, match="belong to another model"):
        ckpt.load_weights(nn.Linear(4, 2), folder / "model.safetensors")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    ckpt.write_json(path, {"b": 1, "a": [0.5]})
    assert ckpt.read_json(path) == {"a": [0.5], "b": 1}
    with pytest.raises(TypeError):
        ckpt.write_json(path, {"c": object()})
    assert ckpt.read_json(path) == {"a": [0.5], "b": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected the folder of a run, found nothing"):
        ckpt.require_run(tmp_path / "nothing")
    with pytest.raises(UserError, match="not the folder of a run"):
        ckpt.require_run(tmp_path)
    (tmp_path / "config.toml").touch()
    with pytest.raises(UserError, match="found a file"):
        ckpt.require_run(tmp_path / "config.toml")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        ckpt.require_run(tmp_path)


def test_a_checkpoint_of_another_step_than_its_folder_says_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    saved = save(tmp_path, 7)
    assert ckpt.require_run(tmp_path) == saved
    renamed = saved.rename(saved.with_name("step-00000009"))
    expected = r"state\.json: is of step 7, and its folder is named step-00000009, .* name it step-00000007 again"
    with pytest.raises(UserError, match=expected):
        ckpt.require_run(tmp_path)
    renamed.rename(saved)
    exported = shutil.copytree(saved, tmp_path / "step-00000009")  # an exported run may be called anything
    assert ckpt.load_state(exported)["step"] == 7
