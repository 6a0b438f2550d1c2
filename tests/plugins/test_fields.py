import io
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from torch.utils.data import default_collate

from mtdiffusion_plugins.fields import CaptionField, ClassFolderField, EmbeddingField, ImageField, LabelField, MaskField
from mtdiffusion_registry.pictures import read_levels
from mtdiffusion_registry.testing import ContractError, check_field, conformance


def encoded(mode, format, **options):
    pixels = np.random.default_rng(0).integers(0, 3, (40, 60), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def array(vector):
    buffer = io.BytesIO()
    np.save(buffer, vector)
    return buffer.getvalue()


PICTURES = {".png": encoded("L", "png"), ".jpg": encoded("RGB", "jpeg"), ".webp": encoded("RGB", "webp")}

image = conformance(ImageField(channels=1), files=PICTURES)
mask = conformance("field.mask", files={".png": encoded("P", "png"), ".tif": encoded("L", "tiff")})
colours = conformance(MaskField(colours=("#000000", "#010101", "#020202")), files={".png": encoded("RGB", "png")})
label = conformance(
    LabelField(),
    files={".txt": b"3\n"},
    cells=[("2.0", torch.tensor(2)), (7, torch.tensor(7)), (" cat ", "cat"), ("", None), (None, None)],
)
class_folder = conformance(ClassFolderField(), cells=[("cat", "cat")])
embedding = conformance(
    EmbeddingField(),
    files={".npy": array(np.ones(4)), ".safetensors": save({"x": torch.ones(4)})},
    cells=[([3.0, 4.0], torch.tensor([0.6, 0.8]))],
)
caption = conformance(CaptionField(), cells=[(" é\n", "é"), ("", None), (float("nan"), None)])


def test_all_at_once():
    check_field(ImageField(), files=PICTURES)


@pytest.mark.parametrize(
    ("reader", "match"),
    [
        (lambda *_: np.zeros((3, 40, 60), np.uint8), "can be sent to another process"),
        (default_collate, "imports no torch.*torch is imported"),
        (partial(read_levels, channels=1), "equal to what read gives"),
    ],
)
def test_a_reader_that_does_not_do_as_read_is_refused(reader, match, monkeypatch):
    monkeypatch.setattr(ImageField, "reader", lambda _: reader)
    with pytest.raises(ContractError, match=re.compile(match, re.S)):
        check_field(ImageField(), files=PICTURES)


@pytest.mark.parametrize("values", [{"colours": ["red", "#ff0000"]}, {"colours": ["reddish"]}])
def test_colours_that_are_none_or_alike_are_refused(values):
    with pytest.raises(ValueError, match="colours: expected"):
        MaskField(**values)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"values": (0, 255, 255)}, r"values: expected a different pixel value .* found \[0, 255, 255\]"),
        ({"values": (0, -1)}, r"values: expected .* of 0 or more"),
        ({"colours": ("black", "red"), "ignore": 1}, r"ignore: expected an index that is no class, 0 to 1, found 1"),
    ],
)
def test_masks_whose_values_would_be_two_classes_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        MaskField(**options)
