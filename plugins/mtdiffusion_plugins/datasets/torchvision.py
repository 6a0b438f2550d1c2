"""``torchvision``: data sets that torchvision reads from disk, as they are published: nothing is downloaded.

ImageFolder (and so ImageNet, also at 64 × 64), CIFAR-10, PASCAL VOC 2012 and Cityscapes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from attrs import field, frozen
from attrs.validators import ge, in_
from torch import Tensor

from mtdiffusion.interfaces import Dataset
from mtdiffusion_registry.configs import DatasetConfig
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.hookspecs import hookimpl

if TYPE_CHECKING:
    from PIL.Image import Image

MTDIFFUSION_API = 1

_LAYOUT = {
    "image_folder": "root/train/CLASS/*.png and root/val/CLASS/*.png (or test in place of val)",
    "cifar10": "root/cifar-10-batches-py/data_batch_1 ... (from cifar-10-python.tar.gz, unpacked)",
    "voc": "root/VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}",
    "cityscapes": "root/leftImg8bit/{train,val}/CITY/*.png and root/gtFine/{train,val}/CITY/*_labelIds.png",
}
VOC_VOID, CITYSCAPES_VOID = 255, 19


class TorchvisionDataset(Dataset):
    """Pictures cut to their central square and resized; masks likewise, by the nearest pixel.

    Args:
        source: torchvision's data set: item i is (picture, class index or mask picture).
        to_classes: ``[256]`` int64, from a mask's pixel values to class indices; None: the second item is a label.
    """

    def __init__(self, source: Any, size: int, to_classes: Tensor | None) -> None:
        self.source, self.size, self.to_classes = source, size, to_classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        try:
            picture, second = self.source[index]
        except OSError as error:
            raise UserError(f"sample {index}: cannot be read ({error}); replace the file or remove it") from error
        image = self._square(picture.convert("RGB"), nearest=False).float() / 127.5 - 1
        if self.to_classes is None:
            return {"image": image, "label": torch.tensor(second)}
        return {"image": image, "mask": self.to_classes[self._square(second, nearest=True)[0].long()]}

    def _square(self, picture: Image, *, nearest: bool) -> Tensor:
        """uint8 ``[c, size, size]``."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        how = InterpolationMode.NEAREST if nearest else InterpolationMode.BILINEAR
        cut = F.center_crop(F.pil_to_tensor(picture), [min(picture.size)] * 2)
        resized: Tensor = F.resize(cut, [self.size, self.size], interpolation=how, antialias=not nearest)
        return resized


def _image_folder(root: Path, train: bool) -> Any:
    from torchvision.datasets import ImageFolder

    names = ("train",) if train else ("val", "test")
    folder = next((root / name for name in names if (root / name).is_dir()), root / names[0])
    return ImageFolder(str(folder))


def _cifar10(root: Path, train: bool) -> Any:
    from torchvision.datasets import CIFAR10

    return CIFAR10(str(root), train=train)


def _voc(root: Path, train: bool) -> Any:
    from torchvision.datasets import VOCSegmentation

    return VOCSegmentation(str(root), year="2012", image_set="train" if train else "val")


def _cityscapes(root: Path, train: bool) -> Any:
    from torchvision.datasets import Cityscapes

    return Cityscapes(str(root), split="train" if train else "val", mode="fine", target_type="semantic")


def _voc_classes() -> Tensor:
    """0 background, 1..20 the classes; the void border counts as background."""
    table = torch.zeros(256, dtype=torch.long)
    table[:21] = torch.arange(21)
    return table


def _cityscapes_classes() -> Tensor:
    """The 19 classes of the benchmark, in its order, and 19 for all that it leaves out."""
    from torchvision.datasets import Cityscapes

    table = torch.full((256,), CITYSCAPES_VOID)
    for each in Cityscapes.classes:
        if 0 <= each.train_id < CITYSCAPES_VOID:
            table[each.id] = each.train_id
    return table


_READERS: dict[str, tuple[Callable[[Path, bool], Any], Callable[[], Tensor] | None]] = {
    "image_folder": (_image_folder, None),
    "cifar10": (_cifar10, None),
    "voc": (_voc, _voc_classes),
    "cityscapes": (_cityscapes, _cityscapes_classes),
}


@frozen(kw_only=True)
class TorchvisionConfig(DatasetConfig):
    """Data on disk in the layout in which they are published.

    Fields: ``image`` float32 ``[3, size, size]`` in [−1, 1]; ``label`` int64 (image_folder, cifar10) or ``mask`` int64
    ``[size, size]`` (voc: 21 classes, the void border as background; cityscapes: 19 classes and 19 for the rest).

    Attributes:
        name: image_folder, cifar10, voc or cityscapes.
        root: the folder that holds it.
        size: side in pixels that pictures are cut and resized to.
    """

    kind: ClassVar[str] = "torchvision"

    name: Literal["image_folder", "cifar10", "voc", "cityscapes"] = field(validator=in_(tuple(_READERS)))
    root: str
    size: int = field(default=32, validator=ge(8))

    def build(self, split: Literal["train", "test"]) -> Dataset:
        read, classes = _READERS[self.name]
        try:
            source = read(Path(self.root), split == "train")
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"data.root {self.root}: no {self.name} ({split}) there: {error}. Expected {_LAYOUT[self.name]}; it is "
                "not downloaded for you."
            ) from error
        if len(source) == 0:
            raise UserError(f"data.root {self.root}: {self.name} ({split}) is empty; expected {_LAYOUT[self.name]}")
        return TorchvisionDataset(source, self.size, classes() if classes else None)


@hookimpl
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:
    return [TorchvisionConfig]
