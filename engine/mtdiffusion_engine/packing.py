"""Any data set written in a form that is quick to read, or can be read from elsewhere."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mtdiffusion import Dataset
from mtdiffusion_registry import DatasetConfig, EmptySplit, UserError
from mtdiffusion_registry.pace import Pace


class _Told(Dataset):
    """A data set that tells how far its reader is, and whose errors name the sample."""

    def __init__(self, dataset: Dataset, what: str, fingerprint: str | None) -> None:
        self.dataset, self.what, self.fingerprint = dataset, what, fingerprint
        self._pace = Pace(f"packing {what}", len(dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        try:
            sample = self.dataset[index]
        except (ValueError, OSError) as error:
            raise UserError(f"{self.what}: {self.describe(index)}: {error}") from error
        self._pace.tell(index + 1)
        return sample

    def describe(self, index: int, field: str | None = None) -> str:
        return self.dataset.describe(index, field)


def pack_data(data: DatasetConfig, packer: type[DatasetConfig], folder: Path) -> dict[str, int]:
    """Write both splits of a data set, with all of its fields, into an empty folder.

    Args:
        data: the data set; its test split may be empty.
        packer: the kind that writes it, and reads it again.

    Returns:
        The number of samples by split.

    Raises:
        EmptySplit: if there are no training samples.
        UserError: if a sample cannot be read or written.
    """
    splits: dict[str, Dataset] = {}
    for split in ("train", "test"):
        try:
            dataset = data.build(split)
        except EmptySplit:
            if split == "train":
                raise
            continue
        except ValueError as error:
            raise UserError(f"data ({split}): {error}") from error
        splits[split] = _Told(dataset, f"data ({split})", dataset.fingerprint)
    packer.pack(splits, folder)
    return {name: len(dataset) for name, dataset in splits.items()}
