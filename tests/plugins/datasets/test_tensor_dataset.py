import numpy as np
import pytest
import torch

from mtdiffusion_plugins.datasets._tensors import TensorDataset, channels_first


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


def test_bytes_are_levels_or_whole_numbers_unless_they_are_asked_for_as_they_are():
    pixels = np.zeros((2, 4, 5, 3), np.uint8)
    pixels[1, 2, 3] = (0, 255, 51)
    mask = torch.tensor([[[0]], [[7]]], dtype=torch.uint8)
    data = TensorDataset({"image": channels_first(pixels), "mask": mask, "x": torch.ones(2)}, levels=["image"])
    picture = data[1]["image"]
    assert picture.shape == (3, 4, 5) and picture.dtype == torch.float32
    assert picture[:, 2, 3].tolist() == pytest.approx([-1, 1, -0.6])
    assert data[1]["mask"].dtype == torch.int64 and data[1]["mask"].tolist() == [[7]]
    stored = data.stored({"image": [torch.uint8], "x": [torch.uint8]})
    assert stored[1]["image"][:, 2, 3].tolist() == [0, 255, 51]
    assert (stored[1]["mask"].dtype, stored[1]["x"].dtype) == (torch.int64, torch.float32)
    assert data[1]["image"].dtype == torch.float32  # it is another data set
