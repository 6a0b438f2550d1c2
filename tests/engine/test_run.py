"""The Python API: load a run, sample with any subset observed."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtdiffusion import sample
from mtdiffusion_engine import Run, checkpoint, load_run
from mtdiffusion_engine import run as run_module
from mtdiffusion_engine.pictures import to_image
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import UserError
from tests.engine.tiny import REGISTRY, toy

SHAPES = {"image": (1, 8, 8), "mask": (8, 8), "label": ()}


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return load_run(tiny_run, device="cpu")


def test_a_few_lines_do(tiny_run: Path) -> None:
    run = load_run(str(tiny_run))
    out = run.sample(5, observed={"label": 3})
    assert {name: tuple(x.shape) for name, x in out.items()} == {n: (5, *shape) for n, shape in SHAPES.items()}
    assert out["label"].tolist() == [3] * 5
    assert not run.model.training


def test_the_package_imports_torch_when_it_must() -> None:
    code = """
import sys
import mtdiffusion_engine
assert "torch" not in sys.modules
from mtdiffusion_engine import load_run
assert "torch" in sys.modules and load_run.__module__ == "mtdiffusion_engine.run"
try:
    mtdiffusion_engine.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_loaded_run_samples_as_the_averaged_model_did_in_memory(tmp_path: Path) -> None:
    trainer = Trainer(toy(), tmp_path / "run", REGISTRY, device="cpu")
    trainer.train()
    model, settings = trainer.averaged_model, trainer.experiment.sampling
    expected = sample(model, 6, settings=settings, generator=torch.Generator().manual_seed(4))
    run = load_run(tmp_path / "run", device="cpu", registry=REGISTRY)
    out = run.sample(6, seed=4)
    assert run.experiment == trainer.experiment
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[name], expected[name]) for name in out)
    drawn = sample(trainer.model.eval(), 6, settings=settings, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(drawn["image"], out["image"])  # the last weights are not the averaged ones


def test_a_run_is_shown_in_one_short_line(run: Run) -> None:
    said = repr(run)
    assert said == f"Run({str(run.path)!r}, checkpoint='step-00000010', modalities=[image, mask, label])"


def test_any_subset_can_be_observed(run: Run) -> None:
    truth = run.data("test").batch(range(3)).x
    for names in itertools.chain.from_iterable(itertools.combinations(SHAPES, k) for k in range(4)):
        out = run.sample(3, observed={name: truth[name] for name in names})
        for name, x in out.items():
            run.modality(name).check(x)
            assert len(x) == 3
            assert name not in names or torch.equal(x, truth[name])


def test_one_value_serves_all_samples(run: Run) -> None:
    image = run.data("test")[0]["image"]
    one = run.sample(4, observed={"image": image, "label": 7})
    batch = run.sample(4, observed={"image": image.expand(4, -1, -1, -1), "label": torch.full((4,), 7)})
    array = run.sample(4, observed={"image": image.double().numpy(), "label": np.int32(7)})
    assert all(torch.equal(one[name], batch[name]) and torch.equal(one[name], array[name]) for name in SHAPES)


def test_names_paths_and_pictures_are_given_as_they_are(run: Run, tmp_path: Path) -> None:
    # A picture of 8 bits, so that it is the same in a file and out of it.
    pixels = (torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    picture.save(tmp_path / "picture.png")
    expected = run.sample(2, observed={"image": (pixels.float() / 127.5 - 1)[None], "label": 7})
    for given in (
        picture,
        pixels[..., None].numpy(),
        tmp_path / "picture.png",
        str(tmp_path / "picture.png"),
        [picture] * 2,
    ):
        out = run.sample(2, observed={"image": given, "label": "7"})
        assert all(torch.equal(out[name], expected[name]) for name in SHAPES)
    assert run.sample(2, observed={"label": ["7", "3"]})["label"].tolist() == [7, 3]

    half = torch.zeros(8, 8)
    half[:4] = 1
    to_image(half.expand(3, -1, -1)).save(tmp_path / "holes.png")
    seen = [run.sample(1, observed={"image": picture}, visible={"image": m}) for m in (half, tmp_path / "holes.png")]
    assert torch.equal(seen[0]["image"], seen[1]["image"])


@pytest.mark.filterwarnings("error")
def test_arrays_are_given_in_the_layouts_that_pictures_have(run: Run) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8)
    grey = Image.fromarray(pixels[0])
    own = torch.tensor(pixels / 127.5 - 1, dtype=torch.float32)[:, None]
    floats = own.numpy()
    frozen = np.asarray(grey)
    assert not frozen.flags.writeable
    colours = np.repeat(pixels[..., None], 3, -1)
    one = (frozen, frozen[..., None], colours[0], floats[0], floats[0, 0], floats[0, 0, ..., None], own[0, 0])
    batch = (pixels, pixels[..., None], colours, floats, floats[:, 0], floats[:, 0, ..., None], own)
    lists = (list(pixels), list(colours), list(floats), list(own), [Image.fromarray(each) for each in pixels])
    for given in one:
        assert torch.allclose(run._batch("image", given, 4), own[:1].expand(4, -1, -1, -1), atol=1e-6)
    for given in (*batch, *lists):
        assert torch.allclose(run._batch("image", given, 4), own, atol=1e-6)
    assert torch.allclose(run._batch("image", floats[0, 0, ::-1], 1), own[:1].flip(2), atol=1e-6)
    assert run._batch("image", np.full((20, 16), 255, np.uint8), 1).eq(1).all()  # scaled, as a file is
    assert run.sample(4, observed={"image": frozen, "label": np.uint8(7)})["image"].shape == (4, 1, 8, 8)

    classes = pixels // 128
    for given, count in ((classes[0], 1), (classes, 4), (list(classes), 4), (classes.astype(np.int32), 4)):
        assert torch.equal(run._batch("mask", given, count), torch.tensor(classes[:count], dtype=torch.int64))
    assert run._batch("label", [np.array(3), np.array(4)], 2).tolist() == [3, 4]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("given", "found"),
    [
        (np.zeros((9, 9), np.float32), r"float32 \[9, 9\]"),
        (np.zeros((9, 9, 1)), r"float64 \[9, 9, 1\]"),
        (np.zeros((8, 8, 3)), r"float64 \[8, 8, 3\]"),
        (np.zeros((8, 8), np.int64), r"int64 \[8, 8\]"),
        (np.zeros((2, 8, 8, 2), np.uint8), r"uint8 \[2, 8, 8, 2\]"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"uint8 \[8, 8\]"),
        (np.zeros(8), r"float64 \[8\]"),
    ],
)
def test_an_array_that_is_no_picture_is_told_what_is_one(run: Run, given: object, found: str) -> None:
    message = rf"^observed image: expected a picture: floats \[8, 8\], .* of uint8, 0 to 255, .*; found {found}$"
    with pytest.raises(UserError, match=message):
        run.sample(2, observed={"image": given})


def test_an_array_of_another_range_is_told_the_range(run: Run) -> None:
    with pytest.raises(UserError, match=r"observed image: image: expected values from -1\.001 to 1\.001, found 255"):
        run.sample(2, observed={"image": np.full((8, 8), 255.0)})


def test_what_cannot_be_given_is_said(run: Run) -> None:
    with pytest.raises(UserError, match="observed label: label: expected a class from 0 to 9, found 'horse'"):
        run.sample(1, observed={"label": "horse"})
    with pytest.raises(UserError, match="observed image: expected a tensor, a text, a path or a picture, found object"):
        run.sample(1, observed={"image": object()})
    with pytest.raises(UserError, match="observed label: expected one value or a batch of 3, found a batch of 2"):
        run.sample(3, observed={"label": ["1", "2"]})


def test_what_is_seen_of_a_modality_stays_and_the_rest_is_filled_in(run: Run) -> None:
    truth = run.data("test")[0]["image"]
    visible = torch.zeros(8, 8)
    visible[:, :4] = 1
    hidden = truth.clone()
    hidden[:, :, 4:] = -truth[:, :, 4:]
    out = run.sample(3, observed={"image": truth}, visible={"image": visible})
    assert torch.equal(out["image"][..., :4], truth[..., :4].expand(3, -1, -1, -1))
    assert not torch.equal(out["image"][..., 4:], truth[..., 4:].expand(3, -1, -1, -1))
    # What is hidden must not matter.
    other = run.sample(3, observed={"image": hidden}, visible={"image": visible.bool().expand(3, 8, 8)})
    assert all(torch.equal(out[name], other[name]) for name in out)


def test_the_seed_decides(run: Run) -> None:
    first, again, other = run.sample(2, seed=1), run.sample(2, seed=1), run.sample(2, seed=2)
    assert torch.equal(first["image"], again["image"])
    assert not torch.equal(first["image"], other["image"])


def test_many_samples_are_drawn_in_chunks(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attrs import evolve

    from mtdiffusion_engine import run as run_module

    run = load_run(tiny_run, device="cpu")
    run = evolve(run, experiment=evolve(run.experiment, evaluation=evolve(run.experiment.evaluation, batch_size=4)))
    sizes: list[int] = []

    def counted(model: object, batch: int, **kwargs: object) -> object:
        sizes.append(batch)
        return sample(model, batch, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "sample", counted)
    labels = torch.arange(10)
    out = run.sample(10, observed={"label": labels})
    assert sizes == [4, 4, 2]
    assert torch.equal(out["label"], labels)
    assert out["image"].shape == (10, 1, 8, 8)
    assert not torch.equal(out["image"][0], out["image"][4])


def test_settings_change_the_samples(run: Run) -> None:
    plain = run.sample(2, observed={"label": 1})
    for change in ({"steps": 7}, {"solver": "ddim"}, {"guidance": 3.0}, {"draw": True}):
        changed = run.sample(2, observed={"label": 1}, **change)  # type: ignore[arg-type]
        assert not torch.equal(changed["image"], plain["image"]), change
    assert run.settings(steps=7, solver=None).steps == 7
    assert run.settings(steps=None) == run.experiment.sampling


def test_a_path_may_be_named_given_by_offsets_or_given_itself(run: Run) -> None:
    plain = run.sample(2, steps=4)
    shared, none_ahead, itself = (
        run.sample(2, steps=4, path=path)
        for path in ("shared", {"label": 0.0}, torch.tensor([[20, 15, 10, 5, 0]]).T.expand(5, 3))  # type: ignore[arg-type]
    )
    ahead = run.sample(2, steps=4, path={"label": 1.0})
    for name, x in plain.items():  # this run's law is one clock for all
        assert torch.equal(x, shared[name])
        assert torch.equal(x, none_ahead[name])
        assert torch.equal(x, itself[name])
    assert not torch.equal(ahead["image"], plain["image"])


def test_little_strength_keeps_what_was_given(run: Run) -> None:
    given = run.data("test").batch([0]).x["image"][0]
    near, far = (
        run.sample(4, observed={"image": given}, strength={"image": strength}, steps=20)["image"]
        for strength in (0.05, 1.0)
    )
    assert (near - given).abs().mean() < (far - given).abs().mean()
    assert not torch.equal(near[0], given)


def test_only_what_is_asked_for_is_generated(run: Run) -> None:
    assert run.sample(2, observed={"label": 1}, generate=["mask"]).keys() == {"label", "mask"}


def test_the_newest_checkpoint_may_be_removed_by_a_training_that_goes_on(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    newest = checkpoint.list_checkpoints(folder)[-1]
    build = run_module.build_model

    def meanwhile(experiment: Any) -> Any:
        step = (checkpoint.step_of(newest) or 0) + 10
        if newest.is_dir():
            newer = newest.rename(newest.with_name(checkpoint.name_of(step)))
            state = json.loads((newer / "state.json").read_text())
            (newer / "state.json").write_text(json.dumps(state | {"step": step}))
        return build(experiment)

    monkeypatch.setattr(run_module, "build_model", meanwhile)
    assert checkpoint.step_of(load_run(folder).checkpoint) == (checkpoint.step_of(newest) or 0) + 10
    (load_run(folder).checkpoint / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"ema\.safetensors: missing from the checkpoint"):
        load_run(folder)


def test_a_checkpoint_can_be_chosen(tiny_run: Path) -> None:
    assert load_run(tiny_run, checkpoint=8).checkpoint.name == "step-00000008"
    assert load_run(tiny_run).checkpoint.name == "step-00000010"
    with pytest.raises(UserError, match=r"no checkpoint of step 7 \(there is 8, 10\)"):
        load_run(tiny_run, checkpoint=7)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"observed": {"lable": 3}}, 'no modality named "lable"; did you mean "label"?.*image, mask, label'),
        ({"visible": {"imge": 3}}, 'no modality named "imge"; did you mean "image"?'),
        ({"generate": ["masks"]}, 'no modality named "masks"; did you mean "mask"?'),
        ({"observed": {"label": 10}}, "observed label: .*expected values from 0 to 9, found 10"),
        ({"observed": {"label": 0.5}}, "observed label: .*expected int64, found torch.float32"),
        ({"observed": {"label": [1, 2]}}, "expected one value or a batch of 3, found a batch of 2"),
        (
            {"observed": {"image": torch.zeros(1, 9, 9)}},
            r"observed image: .*\[1, 8, 8\] .*; found float32 \[1, 9, 9\]",
        ),
        ({"observed": {"image": torch.zeros(8)}}, r"observed image: .*\[1, 8, 8\] .*; found float32 \[8\]"),
        ({"observed": {"image": torch.full((1, 8, 8), torch.nan)}}, "observed image: .*found NaN"),
        ({"observed": {"image": torch.full((1, 8, 8), 255.0)}}, "observed image: .*from -1.001 to 1.001, found 255"),
        ({"visible": {"image": torch.ones(8, 8)}}, "'image', but it is not among the observed"),
        ({"observed": {"label": 1}, "visible": {"label": torch.ones(8, 8)}}, "visible label: .*no places"),
        ({"observed": {"image": torch.zeros(1, 8, 8)}, "visible": {"image": torch.ones(4, 4)}}, r"found \[4, 4\]"),
        ({"observed": {"image": torch.zeros(1, 8, 8)}, "visible": {"image": torch.ones(8, 8) / 2}}, "other values"),
        ({"steps": 0}, "sampling: 'steps' must be >= 1"),
        ({"solver": "euler"}, "sampling: 'solver' must be in"),
        ({"eta": -1.0}, "sampling: 'eta' must be >= 0"),
        ({"path": {"lable": 0.5}}, "path: no modality named lable"),
        ({"path": torch.tensor([[20, 20], [0, 0]])}, r"path: expected integer clocks \[steps \+ 1, 3\]"),
        ({"strength": {"image": 0.5}}, "strength: 0.5 was given for 'image', but it is not among the observed"),
        ({"observed": {"label": 1}, "strength": {"label": 0.0}}, r"strength\['label'\]: expected a share"),
        ({"path": "label=0.6"}, r"path': expected shares by .*, such as {'label': 0.6}; found 'label=0.6'"),
        ({"path": "together"}, r"path': expected shares by .*, such as {'label': 0.6}; found 'together'"),
        ({"strength": "image=0.4,mask=0.2"}, "strength: expected a dict .* {'image': 0.4, 'mask': 0.2}; found"),
        (
            {"observed": "label=3"},
            "observed: expected a dict by modality name, such as {'label': '3'}; found 'label=3'",
        ),
        ({"visible": 3}, "visible: expected a dict by modality name, such as {'label': '3'}; found 3"),
        ({"generate": "image,mask"}, r"generate: expected a list of .*, such as \['image', 'mask'\]; found"),
        ({"n": 0}, "expected at least 1 sample, found 0"),
    ],
)
def test_requests_that_do_not_fit(run: Run, request_: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run.sample(**{"n": 3, **request_})  # type: ignore[arg-type]
