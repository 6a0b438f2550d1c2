"""Any data set written in a form that is quick to read, or can be read from elsewhere."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mtdiffusion import Dataset
from mtdiffusion_registry import DatasetConfig, EmptySplit, UserError
from mtdiffusion_registry.errors import all_told
from mtdiffusion_registry.looking import look_through
from mtdiffusion_registry.pace import Pace


class _Told(Dataset):
    """A data set that tells how far its reader is; when a sample cannot be read, all that is wrong with it and with the
    ``others``."""

    def __init__(self, dataset: Dataset, what: str, fingerprint: str | None) -> None:
        self.dataset, self.what, self.fingerprint = dataset, what, fingerprint
        self._pace = Pace(f"packing {what}", len(dataset))
        self._next = 0
        self.others: list[_Told] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        try:
            sample = self.dataset[index]
        except (ValueError, OSError):
            all_told(lambda: self.look_through(index), *(each.look_through for each in self.others))
            raise  # of what can be read now
        self._next = index + 1
        self._pace.tell(index + 1)
        return sample

    def look_through(self, start: int | None = None) -> None:
        """Read the samples from ``start`` on, or those that were not yet.

        Raises:
            UserError: all that is wrong with them.
        """
        start, self._next = self._next if start is None else start, len(self)
        look_through(self.dataset, self.what, start)

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
        UserError: if samples cannot be read: of each kind of trouble in how many, and the first few; or if one cannot
            be written.
    """
    splits: dict[str, _Told] = {}
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
    for each in splits.values():
        each.others = [other for other in splits.values() if other is not each]
    packer.pack(splits, folder)
    return {name: len(dataset) for name, dataset in splits.items()}
