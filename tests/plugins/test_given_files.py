"""Files that a person gives beside a run's data are read as the data set reads its own; what is no file is told."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch import Tensor

from mtdiffusion import Modality
from mtdiffusion_engine.data import load_data
from mtdiffusion_engine.experiment import Experiment, build_model
from mtdiffusion_engine.given import tensor_of
from mtdiffusion_engine.play import values
from mtdiffusion_engine.play.values import Canvas, Painting
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.config import structure

CONFIG = """
data = {{ kind = "folder", root = "{root}", fields = {{ {fields} }}, size = 8 }}
latent = {{ height = 8, width = 8 }}
backbone = {{ kind = "unet", channels = 8, multipliers = [1], heads = 0, vector = 8 }}
[modalities]
{modalities}
"""
CLASSES = np.arange(64).reshape(8, 8) % 3
COLOURS = ("white", "black", "red")


def experiment(root: Path, fields: str, modalities: str) -> Experiment:
    config = CONFIG.format(root=root, fields=fields, modalities=modalities)
    return structure(Registry.discover(), tomllib.loads(config), Experiment)


def mask_of(root: Path, field: str = "", classes: int = 3, more: str = "") -> Modality:
    """The mask modality of a model whose data are in a folder."""
    fields = f'mask = {{ kind = "mask"{field} }}'
    modalities = f'mask = {{ kind = "mask", size = 8, classes = {classes}{more} }}'
    return build_model(experiment(root, fields, modalities)).modality("mask")


def rgb(colours: Sequence[str]) -> np.ndarray:
    return np.array([ImageColor.getrgb(colour)[:3] for colour in colours], np.uint8)


def saved(path: Path, pixels: np.ndarray, palette: Sequence[str] | None = None) -> str:
    image = Image.fromarray(pixels.astype(np.uint8))
    if palette is not None:
        image.putpalette(rgb(palette).flatten().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return str(path)


def save_rgb(path: Path, classes: np.ndarray) -> str:
    return saved(path, rgb(COLOURS)[classes])


def save_quantised(path: Path, classes: np.ndarray) -> str:
    """The colours by a palette whose order is another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb(COLOURS)[classes]).quantize(3).save(path)
    return str(path)


def save_values(path: Path, classes: np.ndarray) -> str:
    return saved(path, np.array([255, 0, 7], np.uint8)[classes])


FIELDS = [
    (', colours = ["white", "black", "red"]', save_rgb),
    (', colours = ["white", "black", "red"]', save_quantised),
    (", values = [255, 0, 7]", save_values),
]


@pytest.mark.parametrize(("field", "save"), FIELDS)
def test_a_mask_is_read_as_the_data_have_it(
    field: str, save: Callable[[Path, np.ndarray], str], tmp_path: Path
) -> None:
    mask = mask_of(tmp_path / "data", field)
    x = torch.from_numpy(CLASSES)
    assert torch.equal(mask.parse(save(tmp_path / "mine.png", CLASSES)), x)
    assert torch.equal(tensor_of(mask, Image.open(tmp_path / "mine.png")), x)
    larger = save(tmp_path / "larger.png", CLASSES.repeat(3, 0).repeat(3, 1))
    assert torch.equal(mask.parse(larger), x)
    mask.resize = False
    with pytest.raises(UserError, match=r"larger\.png: expected 8 × 8 pixels, found 24 × 24"):
        mask.parse(larger)


@pytest.mark.parametrize("field", ["", *(field for field, _ in FIELDS[1:])])
def test_what_a_model_writes_and_what_is_painted_are_read_whatever_the_data_have(field: str, tmp_path: Path) -> None:
    mask = mask_of(tmp_path / "data", field)
    x = torch.from_numpy(CLASSES)
    assert torch.equal(mask.parse(str(mask.write(x, tmp_path, "written"))), x)
    shown = (mask.render(x[None])[0] * 255).round().byte().permute(1, 2, 0).numpy()
    if not field:
        assert torch.equal(mask.parse(saved(tmp_path / "painted.png", shown)), x)
    canvas = Canvas.of(mask)
    painting = Painting.of(values.opened(mask, tmp_path / "written.png", canvas), [], canvas.size)
    assert torch.equal(values.read_painting(mask, painting, canvas, tmp_path), x)


def test_a_mask_in_the_legends_colours_and_one_of_indices_are_read_where_the_data_have_others(tmp_path: Path) -> None:
    mask = mask_of(tmp_path, ', colours = ["white", "blue", "red"]', more=', colours = ["black", "lime", "yellow"]')
    x = torch.from_numpy(CLASSES)
    shown = (mask.render(x[None])[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert torch.equal(mask.parse(saved(tmp_path / "painted.png", shown)), x)
    assert torch.equal(mask.parse(saved(tmp_path / "indices.png", CLASSES)), x)
    with pytest.raises(UserError, match=r"strange\.png: .* a colour that is none of colours, such as #008000"):
        mask.parse(saved(tmp_path / "strange.png", CLASSES, ("white", "green", "red")))


def test_values_that_are_void_are_void_in_a_file_that_might_hold_classes(tmp_path: Path) -> None:
    """0 is void to the data, and 1 their class 0; without ``ignore`` such a file can hold classes alone."""
    path, given = saved(tmp_path / "mine.png", CLASSES % 2), torch.from_numpy(CLASSES % 2)
    mask = mask_of(tmp_path / "data", ", values = [1, 2], ignore = 255", classes=2, more=", ignore = 255")
    assert torch.equal(mask.parse(path), torch.where(given == 1, 0, 255))
    mask = mask_of(tmp_path / "data", ", values = [1, 2]", classes=2, more=", ignore = 255")
    assert torch.equal(mask.parse(path), given)


def test_a_mask_with_another_palette_than_the_datas_is_refused(tmp_path: Path) -> None:
    for stem in "ab":
        saved(tmp_path / "data" / "mask" / f"{stem}.png", CLASSES, ("black", "red", "lime"))
    mask = mask_of(tmp_path / "data")
    expected = r"mine\.png: index 1 of its palette is #00ff00, and #ff0000 in .*a\.png, .* without a palette, in grey"
    with pytest.raises(UserError, match=expected):
        mask.parse(saved(tmp_path / "mine.png", CLASSES, ("black", "lime", "red")))
    for palette in (("black", "red", "lime"), ("black", "red", "lime", "blue"), None):
        path = saved(tmp_path / "mine.png", CLASSES, palette)
        assert torch.equal(mask.parse(path), torch.from_numpy(CLASSES))


def test_a_palette_in_the_order_of_other_classes_is_refused_by_the_modalitys_colours(tmp_path: Path) -> None:
    """Where the data are not at hand, or have no palette."""
    mask = mask_of(tmp_path, more=', colours = ["black", "red", "lime"]')
    x = torch.from_numpy(CLASSES)
    with pytest.raises(UserError, match=r"mine\.png: index 1 .* #00ff00, the colour of class 2 .* as RGB; .* in grey"):
        mask.parse(saved(tmp_path / "mine.png", CLASSES, ("black", "lime", "red")))
    voc = ("black", "#800000", "#008000")
    for palette in (voc, ("lime", "#800000", "black"), [f"#{i:02x}{i:02x}{i:02x}" for i in range(256)], None):
        assert torch.equal(mask.parse(saved(tmp_path / "mine.png", CLASSES, palette)), x)
    anything = mask_of(tmp_path)
    assert torch.equal(anything.parse(saved(tmp_path / "mine.png", CLASSES, ("white", "black", "red"))), x)


def test_colours_in_another_order_than_the_datas_are_refused_before_a_training(tmp_path: Path) -> None:
    more = ', colours = ["black", "red", "lime"]'
    for stem in map(str, range(20)):
        saved(tmp_path / "mask" / f"{stem}.png", CLASSES, ("black", "lime", "red"))
    for field in ("", ', colours = ["black", "lime", "red"]'):
        config = experiment(
            tmp_path,
            f'mask = {{ kind = "mask"{field} }}',
            f'mask = {{ kind = "mask", size = 8, classes = 3{more} }}',
        )
        expected = "modalities.mask: colours: #00ff00 is class 1 of the data and class 2 of this modality"
        with pytest.raises(UserError, match=expected):
            load_data(config, build_model(config), "train")


@pytest.mark.parametrize(
    ("name", "modality", "given", "expected"),
    [
        (
            "mask",
            'kind = "mask", size = 8',
            "8",
            "8: no such file; a mask is given as a picture file, of class indices",
        ),
        ("image", 'kind = "image", size = 8', "horse", "horse: no such file; a picture is given as a file, such as"),
        ("clip", 'kind = "clip", dim = 4', "horse", "horse: no such file; an embedding is given as a file"),
        ("label", 'kind = "label", classes = 3', "none.txt", "none.txt: no such file; a class is given by its number"),
        (
            "label",
            'kind = "label", classes = 3',
            "none.json",
            "none.json: no such file; a class is given by its number",
        ),
    ],
)
def test_what_is_no_file_is_told_how_the_modality_is_given(
    name: str, modality: str, given: str, expected: str, tmp_path: Path
) -> None:
    built = build_model(experiment(tmp_path, f'{name} = "mask"', f"{name} = {{ {modality} }}")).modality(name)
    with pytest.raises(UserError, match=f"^{expected}"):
        built.parse(given)
    with pytest.raises(UserError, match="no such file"):
        built.parse("x" * 300 + ".json")


@pytest.mark.parametrize(("content", "expected"), [("2", 2), (" 1.0\n", 1), ("cat\n", 0)])
def test_a_label_is_read_from_a_text_file_as_the_data_have_it(content: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    config = 'label = { kind = "label", classes = 3, names = ["cat", "dog", "owl"] }'
    label = build_model(experiment(tmp_path, 'label = "label"', config)).modality("label")
    read: Tensor = label.parse(str(tmp_path / "a.txt"))
    assert read.item() == expected
