import numpy as np
import pytest
import torch

from mtdiffusion_plugins.datasets._tensors import TensorDataset, from_uint8


def test_samples_are_rows_of_the_columns():
    data = TensorDataset({"x": torch.arange(6).view(3, 2), "caption": ["a", "b", "c"]})
    assert len(data) == 3
    assert data[1]["x"].tolist() == [2, 3] and data[1]["caption"] == "b"
    with pytest.raises(IndexError):
        data[3]


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"one length.*'x': 3.*'caption': 2"):
        TensorDataset({"x": torch.arange(3), "caption": ["a", "b"]})
    with pytest.raises(ValueError, match="one length"):
        TensorDataset({})


def test_bytes_become_pictures():
    pixels = np.zeros((2, 4, 5, 3), np.uint8)
    pixels[1, 2, 3] = (0, 255, 51)
    picture = from_uint8(pixels)
    assert picture.shape == (2, 3, 4, 5) and picture.is_contiguous()
    assert picture[1, :, 2, 3].tolist() == pytest.approx([-1, 1, -0.6])
