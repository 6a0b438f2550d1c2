"""A segmentation network as a judge: it tells pictures that show their mask from others, and near from far."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtdiffusion_plugins.image import ImageConfig
from mtdiffusion_plugins.mask import MaskConfig
from mtdiffusion_plugins.metrics import segmenter
from mtdiffusion_plugins.metrics.segmenter import SegmenterConfig
from mtdiffusion_registry import ModalityConfig, UserError
from mtdiffusion_registry.testing import check_evaluator

CONFIG = SegmenterConfig(epochs=12, width=8, ignore=255)


def scenes(count: int, seed: int) -> dict[str, Tensor]:
    """A light and a dark square before a grey ground; the mask says which is which, its lowest row is void."""
    generator = torch.Generator().manual_seed(seed)
    image = 0.1 * torch.randn(count, 3, 12, 16, generator=generator)
    mask = torch.zeros(count, 12, 16, dtype=torch.int64)
    for index in range(count):
        for kind, shade in ((1, 0.8), (2, -0.8)):
            top, left = torch.randint(0, 7, (2,), generator=generator).tolist()
            left += 8 * (kind == 2) * (left < 1)
            image[index, :, top : top + 4, left : left + 5] = shade
            mask[index, top : top + 4, left : left + 5] = kind
    mask[:, -1] = 255
    return {"image": image.clamp(-1, 1), "mask": mask}


@pytest.fixture(scope="module")
def judge() -> segmenter.Segmenter:
    return SegmenterConfig.build(CONFIG, scenes(160, 0))  # type: ignore[return-value]


def test_it_reads_masks_off_pictures_that_it_has_not_seen(judge: segmenter.Segmenter) -> None:
    real = judge.real(scenes(40, 1))
    assert real["segmenter_miou"] > 0.8
    assert all(math.isfinite(value) for value in real.values())


def test_pictures_that_do_not_show_their_mask_are_told(judge: segmenter.Segmenter) -> None:
    test = scenes(40, 1)
    shuffled = {"image": test["image"].roll(1, 0), "mask": test["mask"]}
    right, wrong = judge.joint(test), judge.joint(shuffled)
    assert right["segmenter_agreement"] > 0.8 and wrong["segmenter_agreement"] < 0.6
    assert right["fid_segmenter"] == pytest.approx(wrong["fid_segmenter"], rel=1e-6)  # the pictures are the same
    given = judge.conditional("image", shuffled, test)
    assert given["segmenter_miou"] == pytest.approx(wrong["segmenter_agreement"])
    assert judge.conditional("mask", test, test) == {}


def test_distances_grow_with_what_is_wrong(judge: segmenter.Segmenter) -> None:
    test = scenes(60, 2)
    distances = []
    for noise in (0.0, 0.3, 1.0):
        image = test["image"] + noise * torch.randn(test["image"].shape, generator=torch.Generator().manual_seed(3))
        distances.append(judge.joint({"image": image, "mask": test["mask"]})["fid_segmenter"])
    assert distances[0] < distances[1] < distances[2]


def test_it_is_trained_once(judge: segmenter.Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmenter, "train_network", None)  # would fail if it were called
    again = CONFIG.build(scenes(160, 0))
    assert again.real(scenes(8, 1)) == judge.real(scenes(8, 1))


def test_an_index_that_masks_ignore_is_not_learned_as_a_class_in_silence() -> None:
    def masks(**values: int) -> dict[str, ModalityConfig]:
        return {"image": ImageConfig(size=(12, 16)), "mask": MaskConfig(size=(12, 16), classes=11, **values)}

    for ignore, found in ((None, "not set"), (255, "255")):
        message = f"ignore: modalities.mask ignores index 11, .*; expected ignore = 11, found {found}"
        with pytest.raises(ValueError, match=message):
            SegmenterConfig(ignore=ignore).check(masks(ignore=11))
    SegmenterConfig(ignore=11).check(masks(ignore=11))
    SegmenterConfig(ignore=11).check(masks())  # its masks may have what the modality never sees
    SegmenterConfig().check(masks())


def test_it_keeps_the_contract_and_refuses_what_is_none_of_its_business() -> None:
    data = scenes(64, 0)
    check_evaluator(SegmenterConfig(epochs=2, width=4), data={**data, "mask": data["mask"].clamp(max=2)})
    for changes, message in (
        ({"mask": torch.zeros(4, dtype=torch.int64)}, r"expected pictures as input and masks as target"),
        ({"mask": data["mask"][:4, :6]}, r"pictures and masks of one size, found \\[12, 16\\] and \\[6, 16\\]"),
        ({"mask": torch.full((4, 12, 16), 255)}, "all pixels of the training masks are to be ignored"),
    ):
        with pytest.raises(UserError, match=message.replace("\\\\", "\\")):
            CONFIG.build({"image": data["image"][:4], **changes})
