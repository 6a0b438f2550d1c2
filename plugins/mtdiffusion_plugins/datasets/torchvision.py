"""``torchvision``: data sets that torchvision reads from disk, as they are published: nothing is downloaded.

ImageFolder (and so ImageNet, also at 64 × 64), CIFAR-10, PASCAL VOC 2012 and Cityscapes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from attrs import field, frozen
from attrs.validators import in_
from torch import Tensor

from mtdiffusion.interfaces import Dataset
from mtdiffusion_plugins.datasets._decoded import Decoded, decode
from mtdiffusion_plugins.datasets._walking import is_data, require_no_loop, say_once
from mtdiffusion_plugins.fields import ImageField, MaskField
from mtdiffusion_plugins.files import from_levels, read_pixels
from mtdiffusion_plugins.sizes import Size, positive_size, sides
from mtdiffusion_registry.configs import DatasetConfig
from mtdiffusion_registry.errors import EmptySplit, UserError
from mtdiffusion_registry.hookspecs import hookimpl
from mtdiffusion_registry.pictures import fit

MTDIFFUSION_API = 1

_LAYOUT = {
    "image_folder": "root/train/CLASS/*.png and root/val/CLASS/*.png (or test in place of val)",
    "cifar10": "root/cifar-10-batches-py/data_batch_1 ... (from cifar-10-python.tar.gz, unpacked)",
    "voc": "root/VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}",
    "cityscapes": "root/leftImg8bit/{train,val}/CITY/*.png and root/gtFine/{train,val}/CITY/*_labelIds.png",
}
VOC_VOID, CITYSCAPES_VOID = 255, 19
HELD_OUT = ("val", "test")


class Listing(NamedTuple):
    """Files and the numbers of their classes, by the name that torchvision's ImageFolder has for them."""

    samples: list[tuple[str, int]]


class TorchvisionDataset(Dataset):
    """Pictures scaled and cropped centrally to one size, as of the ``folder`` data set, each with a label or a mask.

    Args:
        images: uint8 ``[n, 3, h, w]``, or the pictures' files decoded.
        second: "label" or "mask", and its values: int64 ``[n]``, or the masks' files decoded.
        to_classes: ``[256]`` int64, from a mask's pixel values to class indices.
        names: of the classes, in the order of their indices; (): not known.

    Attributes:
        source: of ``image_folder``, its files.
    """

    source: Listing | None = None

    def __init__(
        self,
        images: Tensor | Decoded,
        second: tuple[str, Tensor | Decoded],
        to_classes: Tensor | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.to_classes = to_classes
        self.class_names = {second[0]: tuple(names)}
        self._images, (self._name, self._second) = images, second
        self._levels = False  # whether pictures in memory are given as they are
        digest = hashlib.sha256(str(to_classes.tolist() if to_classes is not None else None).encode())
        for part in (images, self._second):
            digest.update(part.key.encode() if isinstance(part, Decoded) else part.numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        image, second = self._images[index], self._second[index]
        if not isinstance(self._images, Decoded) and not self._levels:
            image = from_levels(image)
        return {"image": image, self._name: second if self.to_classes is None else self.to_classes[second]}

    def stored(self, dtypes: Mapping[str, Collection[torch.dtype]]) -> TorchvisionDataset:
        other = copy(self)
        taken = dtypes.get("image", ())
        other._levels = torch.uint8 in taken
        if isinstance(self._images, Decoded):
            other._images = self._images.stored(taken)
        if torch.uint8 in (taken := dtypes.get(self._name, ())) and self.to_classes is not None:
            other.to_classes = self.to_classes.to(torch.uint8)
        elif isinstance(self._second, Decoded):
            other._second = self._second.stored(taken)
        return other

    def describe(self, index: int, field: str | None = None) -> str:
        part = self._second if field == self._name and isinstance(self._second, Decoded) else self._images
        return part.paths[index] if isinstance(part, Decoded) else f"sample {index}"


def _image_folder(root: Path, split: str, size: tuple[int, int]) -> TorchvisionDataset:
    def folder_of(split: str) -> Path:
        names = ("train",) if split == "train" else HELD_OUT
        return next((root / name for name in names if (root / name).is_dir()), root / names[0])

    # The training split says which number a class has, in both splits: the other may lack some.
    classes = sorted(_classes(folder_of("train")))
    if unknown := sorted(set(_classes(folder_of(split))) - set(classes)):
        raise UserError(
            f"{folder_of(split)}: has the class {', '.join(unknown[:5])}, which {folder_of('train')} has not; remove "
            "it, or make that folder there too"
        )

    paths: list[str] = []
    labels: list[int] = []
    left = [entry.name for entry in folder_of(split).iterdir() if entry.is_file() and is_data(entry.name)]
    # In the order of torchvision's ImageFolder, whose import takes over a second.
    for index, name in enumerate(classes):
        for where, files in sorted(_walked(folder_of(split) / name)):
            found = [f"{where}/{file}" for file in sorted(filter(_is_picture, files))]
            left += [f"{name}/{file}" for file in files if not _is_picture(file) and is_data(file)]
            paths += found
            labels += [index] * len(found)
    if left:
        some = ", ".join(sorted(left)[:5])
        say_once(f"{folder_of(split)}: {len(left)} files that are no pictures of a class are left out: {some}")
    label = torch.tensor(labels, dtype=torch.int64)
    made = TorchvisionDataset(_decoded(paths, size), ("label", label), names=classes)
    made.source = Listing(list(zip(paths, labels, strict=True)))
    return made


def _walked(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder in one and the names of its files. A link that leads back is refused before it is followed."""
    for where, folders, files in os.walk(folder, followlinks=True):
        require_no_loop(where, folders)
        yield where, files


def _classes(folder: Path) -> list[str]:
    """Names of the classes' folders; hidden ones are none."""
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))]
    if not names:
        raise FileNotFoundError(f"{folder} has no folder of a class")
    return names


def _is_picture(name: str) -> bool:
    suffix = os.path.splitext(name)[1]  # noqa: PTH122  # a Path takes many times as long to make, and there are many
    return suffix.lower() in ImageField.suffixes and not name.startswith(".")


def _decoded(paths: Sequence[str], size: tuple[int, int]) -> Decoded:
    if not paths:
        raise EmptySplit("there are no pictures")
    found = decode("image", ImageField(), paths, size)
    assert isinstance(found, Decoded)
    return found


def _masks(paths: Sequence[str], size: tuple[int, int]) -> Decoded:
    found = decode("mask", MaskField(), paths, size)
    assert isinstance(found, Decoded)
    return found


def _cifar10(root: Path, split: str, size: tuple[int, int]) -> TorchvisionDataset:
    from PIL import Image
    from torchvision.datasets import CIFAR10

    source = CIFAR10(str(root), train=split == "train")
    if size == source.data.shape[1:3]:
        images = torch.from_numpy(source.data).movedim(-1, 1).contiguous()
    else:
        images = torch.stack([read_pixels(fit(Image.fromarray(pixels), size), 3) for pixels in source.data])
    return TorchvisionDataset(images, ("label", torch.tensor(source.targets)), names=source.classes)


def _voc(root: Path, split: str, size: tuple[int, int]) -> TorchvisionDataset:
    """0 background, 1..20 the classes, and 255 what borders two things, which is none of them."""
    from torchvision.datasets import VOCSegmentation

    source = VOCSegmentation(str(root), year="2012", image_set="train" if split == "train" else "val")
    images = _decoded([str(path) for path in source.images], size)
    return TorchvisionDataset(images, ("mask", _masks([str(path) for path in source.masks], size)))


def _cityscapes(root: Path, split: str, size: tuple[int, int]) -> TorchvisionDataset:
    """The 19 classes of the benchmark, in its order, and 19 for all that it leaves out."""
    from torchvision.datasets import Cityscapes

    to_classes = torch.full((256,), CITYSCAPES_VOID)
    classes = [""] * CITYSCAPES_VOID
    for each in Cityscapes.classes:
        if 0 <= each.train_id < CITYSCAPES_VOID:
            to_classes[each.id], classes[each.train_id] = each.train_id, each.name
    names = "train" if split == "train" else "val"
    source = Cityscapes(str(root), split=names, mode="fine", target_type="semantic")
    images = _decoded([str(path) for path in source.images], size)
    masks = _masks([str(paths[0]) for paths in source.targets], size)
    return TorchvisionDataset(images, ("mask", masks), to_classes, classes)


_READERS: Mapping[str, Callable[[Path, str, tuple[int, int]], TorchvisionDataset]] = {
    "image_folder": _image_folder,
    "cifar10": _cifar10,
    "voc": _voc,
    "cityscapes": _cityscapes,
}


@frozen(kw_only=True)
class TorchvisionConfig(DatasetConfig):
    """Data on disk in the layout in which they are published.

    Fields: ``image`` float32 ``[3, height, width]`` in [−1, 1]; ``label`` int64 (image_folder, cifar10) or ``mask``
    int64 ``[height, width]`` (voc: 21 classes, and 255 for the void border, which the mask modality is to ignore;
    cityscapes: 19 classes, and 19 for the rest). In image_folder the folders of the training split, in the order of
    their names, say which number a class has.

    Attributes:
        name: image_folder, cifar10, voc or cityscapes.
        root: the folder that holds it.
        size: side in pixels, or height and width, to which pictures are scaled and cropped centrally.
    """

    kind: ClassVar[str] = "torchvision"

    name: Literal["image_folder", "cifar10", "voc", "cityscapes"] = field(validator=in_(tuple(_READERS)))
    root: Path = field(converter=Path)
    size: Size = field(default=32, validator=positive_size)

    def build(self, split: Literal["train", "test"]) -> TorchvisionDataset:
        expected = f"Expected {_LAYOUT[self.name]}; it is not downloaded for you."
        try:
            return _READERS[self.name](self.root.expanduser().absolute(), split, sides(self.size))
        except EmptySplit as error:
            raise EmptySplit(f"data.root {self.root}: {self.name} ({split}) is empty: {error}. {expected}") from error
        except UserError:
            raise
        except (OSError, RuntimeError) as error:
            raise UserError(f"data.root {self.root}: no {self.name} ({split}) there: {error}. {expected}") from error


@hookimpl
def mtdiffusion_datasets() -> list[type[DatasetConfig]]:
    return [TorchvisionConfig]
