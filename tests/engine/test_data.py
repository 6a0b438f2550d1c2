"""From fields to batches: order, presence, derived modalities, and what is wrong with the data."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from PIL import Image
from torch import Tensor

from mtdiffusion_engine.data import ModalityData, StepSampler, derive_seed, made_ahead, training_batches
from mtdiffusion_engine.experiment import build_model
from mtdiffusion_plugins.clip import ClipConfig
from mtdiffusion_plugins.datasets.folder import FolderConfig
from mtdiffusion_plugins.fields import ClassFolderField
from mtdiffusion_plugins.label import LabelConfig
from mtdiffusion_registry import UserError
from mtdiffusion_registry.errors import Fault, SampleError
from tests.engine.tiny import ToyData, toy


def toy_data(lacking: str = "", count: int = 11) -> ModalityData:
    model = build_model(toy())
    return ModalityData(ToyData(count, lacking, -1), {name: model.modality(name) for name in model.names})


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_every_sample_comes_once_an_epoch_in_one_order_however_a_step_is_shared_out(world: int, parts: int) -> None:
    size, batch, steps = 10, 12, 15
    ranks = [list(StepSampler(size, batch, 0, 0, steps, parts, rank, world)) for rank in range(world)]
    # Ranks take turns, so what all of them saw by a given step is a whole stretch of the epochs.
    turns = [turn for both in zip(*ranks, strict=True) for turn in both]
    order = [index for turn in turns for index in turn.indices]
    assert [turn.first for turn in turns] == list(range(0, len(order), batch // (parts * world)))
    alone = [index for turn in StepSampler(size, batch, 0, 0, steps) for index in turn.indices]
    assert order == alone
    epochs = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    assert len(epochs) == batch * steps // size
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_order_continues_from_any_step_and_follows_from_the_seed() -> None:
    whole = list(StepSampler(7, 3, 5, 0, 12))
    for start in range(12):
        assert list(StepSampler(7, 3, 5, start, 12)) == whole[start:]
    assert list(StepSampler(7, 3, 6, 0, 12)) != whole
    assert len(StepSampler(7, 3, 5, 4, 12)) == 8
    assert len(StepSampler(7, 4, 5, 4, 12, parts=2)) == 16


def test_items_are_made_ahead_in_order_and_what_goes_wrong_is_raised_at_its_turn() -> None:
    made: list[int] = []

    def make(item: int) -> int:
        if item == 5:
            raise UserError("five")
        made.append(item)
        return item * item

    ahead = made_ahead(iter(range(8)), make, depth=2)
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) >= 3  # before they are asked for
    assert [next(ahead) for _ in range(4)] == [1, 4, 9, 16]
    with pytest.raises(UserError, match="five"):
        next(ahead)
    assert list(made_ahead(iter(range(3)), make)) == [0, 1, 4]
    before = threading.active_count()
    left = made_ahead(iter(range(100)), lambda item: item)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_seeds_are_distinct_and_stay_what_they_are() -> None:
    keys = [(a, b, c) for a in range(4) for b in range(20) for c in range(3)]
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 1, 2) == 1535930435702422785  # runs resume on other machines and in later versions


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_has_what_the_samples_have_and_placeholders_for_the_rest() -> None:
    data = toy_data(lacking="label")
    batch = data.batch([0, 1, 2, 4])
    assert batch.presence.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]]
    for name, x in batch.x.items():
        data.modalities[name].check(x)
    for row, index in enumerate([0, 1, 2, 4]):
        assert torch.equal(batch.x["image"][row], data.dataset[index]["image"])  # type: ignore[arg-type]
    assert batch.x["label"][[0, 2]].tolist() == [int(data.dataset[i]["label"]) for i in (0, 2)]  # type: ignore[arg-type]


def test_a_batch_may_lack_a_modality_altogether() -> None:
    batch = toy_data(lacking="image").batch([1, 4])
    assert batch.presence.tolist() == [[0, 1, 1], [0, 1, 1]]
    assert batch.x["image"].shape == (2, 1, 4, 4)


def test_a_derived_modality_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(toy())
    config = ClipConfig(dim=16, source="image", model="none")
    clip = config.build(model.layout.share("image"), model.backbone.features)
    calls: list[int] = []

    def derive(source: Tensor) -> Tensor:
        calls.append(len(source))
        return torch.nn.functional.normalize(source.flatten(1), dim=1)

    monkeypatch.setattr(clip, "derive", derive)
    data = ModalityData(ToyData(11, "image", -1), {"clip": clip, "label": model.modality("label")})
    first, second = data.batch(range(11)), data.batch(range(11))
    assert calls == [7]  # of the 11 samples, the 4 without an image have no embedding
    assert first.presence[:, 0].tolist() == [float(i % 3 != 1) for i in range(11)]
    assert torch.equal(first.x["clip"], second.x["clip"])
    image = data.dataset[2]["image"]
    assert isinstance(image, Tensor)
    assert torch.allclose(first.x["clip"][2], image.flatten() / image.norm())


class Paired(ToyData):
    """Labels drawn anew at each turn."""

    def varied(self, index: int, seed: int) -> dict[str, Tensor | str]:
        drawn = torch.randint(3, (), generator=torch.Generator().manual_seed(seed))
        return {**self[index], "label": drawn}


def labels(start: int, stop: int, rank: int = 0, world: int = 1, workers: int = 0) -> list[Tensor]:
    model = build_model(toy())
    data = ModalityData(Paired(11, "", -1), {name: model.modality(name) for name in model.names})
    sampler = StepSampler(11, 8, 0, start, stop, 1, rank, world)
    return [batch.x["label"] for batch in training_batches(data, sampler, workers)]


def test_what_a_data_set_varies_differs_from_epoch_to_epoch_and_goes_on_from_any_step() -> None:
    through = labels(0, 11)
    assert all(torch.equal(a, b) for a, b in zip(through[4:], labels(4, 11), strict=True))  # as if resumed
    shared = zip(labels(0, 11, 0, 2), labels(0, 11, 1, 2), strict=True)
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(through, shared, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(through, labels(0, 11, workers=1), strict=True))
    order = [index for turn in StepSampler(11, 8, 0, 0, 11) for index in turn.indices]
    of_one = [label for label, index in zip(torch.cat(through).tolist(), order, strict=True) if index == 5]
    assert len(of_one) == 8 and len(set(of_one)) > 1
    model = build_model(toy())
    plain = ModalityData(Paired(11, "", -1), {name: model.modality(name) for name in model.names})
    assert torch.equal(plain.batch(range(11)).x["label"], plain.dataset.label)  # type: ignore[attr-defined]


def test_what_a_modality_cannot_be_derived_from_is_said() -> None:
    model = build_model(toy())
    config = ClipConfig(dim=16, source="caption", model="none")
    clip = config.build(model.layout.share("image"), model.backbone.features)
    with pytest.raises(UserError, match="data: modality 'clip' cannot be made from 'caption'"):
        ModalityData(ToyData(11, "", -1), {"clip": clip})


def test_a_modality_may_be_derived_from_texts() -> None:
    model = build_model(toy())
    config = ClipConfig(dim=16, source="caption", tower="text", model="none")
    clip = config.build(model.layout.share("image"), model.backbone.features)
    given: list[object] = []

    def derive(source: list[str]) -> Tensor:
        given.extend(source)
        return torch.nn.functional.one_hot(torch.tensor([len(text) % 16 for text in source]), 16).float()

    object.__setattr__(clip, "derive", derive)
    dataset = ToyData(5, "caption", -1)
    data = ModalityData(dataset, {"clip": clip, "label": model.modality("label")})
    have = [index for index in range(5) if "caption" in dataset[index]]
    captions = [dataset[index]["caption"] for index in have]
    assert 0 < len(have) < 5 and given == captions
    batch = data.batch(range(5))
    assert batch.presence[:, 0].nonzero()[:, 0].tolist() == have
    assert batch.x["clip"][have].argmax(1).tolist() == [len(str(caption)) % 16 for caption in captions]


class Altered(ToyData):
    """Toy data, one sample of which is another; read() counts."""

    def __init__(self, count: int, **changes: object) -> None:
        super().__init__(count, "", -1)
        self.changes = changes
        self.reads = 0

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        self.reads += 1
        sample = super().__getitem__(index)
        if index == 9:
            if "error" in self.changes:
                raise self.changes["error"]  # type: ignore[misc]
            sample |= self.changes  # type: ignore[arg-type]
        return sample

    def describe(self, index: int, field: str | None = None) -> str:
        return f"the toy {index}"


def altered(count: int = 11, **changes: object) -> ModalityData:
    model = build_model(toy())
    return ModalityData(Altered(count, **changes), {name: model.modality(name) for name in model.names})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": torch.tensor(77)}, "data: the toy 9: modality 'label': label of 3 classes: expected values from 0"),
        ({"image": torch.zeros(1, 5, 5)}, r"data: the toy 9: modality 'image': .*\[batch, 1, 5, 5\]|1, 5, 5"),
        ({"image": torch.full((1, 4, 4), float("nan"))}, "data: the toy 9: modality 'image': .*finite"),
        ({"label": "cat"}, "data: the toy 9: modality 'label': .*found 'cat'"),
        ({"mask": "cat"}, "data: the toy 9: modality 'mask': found the text 'cat', expected a tensor"),
        ({"error": ValueError("row 9 is damaged")}, "data: the toy 9: row 9 is damaged"),
        ({"error": OSError(5, "Input/output error")}, "data: the toy 9: .*Input/output error"),
    ],
)
def test_a_bad_sample_is_named_before_any_work(changes: dict[str, object], message: str) -> None:
    data = altered(**changes)
    data.batch(range(9))
    with pytest.raises(UserError, match=message):
        data.verify()
    loader = training_batches(data, StepSampler(11, 11, 0, 0, 1), workers=0)
    with pytest.raises(UserError, match=message):
        next(loader)


def test_data_of_another_dtype_than_the_placeholder_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = altered(image=torch.zeros(1, 4, 4, dtype=torch.float64))
    monkeypatch.setattr(data.modalities["image"], "check", lambda x: None)  # too lenient, as a plugin's may be
    expected = r"the toy 9: modality 'image': expected torch\.float32, as of its placeholder, found torch\.float64"
    with pytest.raises(UserError, match=expected):
        data.batch([9])


def test_texts_are_read_by_the_modality() -> None:
    config = LabelConfig(classes=3, names=("cat", "dog", "emu"))
    model = build_model(toy())
    label = config.build(model.layout.share("label"), model.backbone.features)
    data = ModalityData(Altered(11, label="emu"), {"label": label})
    assert int(data[9]["label"]) == 2
    batch = data.batch([8, 9])  # indices and names, side by side
    assert batch.x["label"].tolist() == [int(data[8]["label"]), 2]


class Named(ToyData):
    class_names = MappingProxyType({"label": ("cat", "dog", "emu")})


@pytest.mark.parametrize(
    ("names", "number"), [(("cat", "dog", "emu"), None), (("cat", "emu", "dog"), 2), (("a", "b", "dog"), 1), ((), None)]
)
def test_a_class_that_the_data_have_at_another_number_is_refused(names: tuple[str, ...], number: int | None) -> None:
    """Names that the data do not know are left alone: folders are often called by codes."""
    model = build_model(toy())
    label = LabelConfig(classes=3, names=names).build(model.layout.share("label"), model.backbone.features)
    data = ModalityData(Named(11, "", -1), {"label": label})
    if number is None:
        data.verify()
        return
    expected = rf'modalities\.label: .\w+. is class {number} of the data, .* names = \["cat", "dog", "emu"\]'
    with pytest.raises(UserError, match=expected):
        data.verify()


class Numbered(ToyData):
    class_names = MappingProxyType({"label": ("1", "2", "3")})


def test_classes_called_by_other_numbers_than_theirs_are_noticed() -> None:
    """Folders from 1, or sorted as texts (1, 10, 2): a label without names goes by its number."""
    model = build_model(toy())
    data = ModalityData(Numbered(11, "", -1), {"label": model.modality("label")})
    with pytest.raises(UserError, match=r"'1' is class 0 of the data, and class 1 of this modality"):
        data.verify()


@pytest.mark.parametrize("names", [("1", "2", "3"), ("001", "000", "002"), ("0", "2", "x")])
def test_a_number_of_the_data_is_not_taken_for_a_class_of_another_name(names: tuple[str, ...]) -> None:
    model = build_model(toy())
    label = LabelConfig(classes=3, names=names).build(model.layout.share("label"), model.backbone.features)
    with pytest.raises(
        UserError, match=r"modalities\.label\.names: '\d+' is the name of class \d, and the data have num"
    ):
        ModalityData(ToyData(11, "", -1), {"label": label}).verify()


class LateLabels(ToyData):
    """Whose first samples have no label."""

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        sample = super().__getitem__(index)
        return {name: value for name, value in sample.items() if name != "label" or index > 8}


def test_numbers_that_come_late_are_not_taken_for_classes_of_other_names() -> None:
    model = build_model(toy())
    label = LabelConfig(classes=3, names=("1", "2", "3")).build(model.layout.share("label"), model.backbone.features)
    with pytest.raises(UserError, match="'1' is the name of class 0, and the data have numbers"):
        ModalityData(LateLabels(11, "", -1), {"label": label}).verify()


@pytest.mark.parametrize("names", [("0", "1", "2"), ("1 star", "2 stars", "3 stars"), ("10", "20", "30")])
def test_names_that_are_no_number_of_another_class_are_taken(names: tuple[str, ...]) -> None:
    model = build_model(toy())
    label = LabelConfig(classes=3, names=names).build(model.layout.share("label"), model.backbone.features)
    ModalityData(ToyData(11, "", -1), {"label": label}).verify()


@pytest.mark.parametrize("named", [1, 8])
def test_names_that_are_numbers_serve_data_that_have_names(tmp_path: Path, named: int) -> None:
    for i, name in enumerate("123" * named):
        folder = tmp_path / "image" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{i:02}.png")
    data = FolderConfig(root=tmp_path, fields={"image": "image", "label": ClassFolderField()}, test_fraction=0)
    model = build_model(toy())
    label = LabelConfig(classes=3, names=("1", "2", "3")).build(model.layout.share("label"), model.backbone.features)
    found = ModalityData(data.build("train"), {"label": label})
    found.verify()
    assert found.batch(range(3 * named)).x["label"].tolist() == [0] * named + [1] * named + [2] * named


def test_what_was_looked_through_is_not_again_while_it_stays_the_same() -> None:
    model = build_model(toy())
    modalities = {name: model.modality(name) for name in model.names}
    keys = dict.fromkeys(modalities, "as they are")

    def reads(fingerprint: str | None, **changed: str) -> int:
        dataset = Altered(11)
        dataset.fingerprint = fingerprint
        data = ModalityData(dataset, modalities, keys={**keys, **changed})
        before = dataset.reads
        data.verify()
        return dataset.reads - before

    assert [reads("toys, verified"), reads("toys, verified")] == [11, 0]
    assert reads("other toys, verified") == 11
    assert reads("toys, verified", label="changed") == 11
    assert [reads(None), reads(None)] == [11, 11]


def test_a_derived_modality_is_kept_under_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(toy())
    config = ClipConfig(dim=16, source="image", model="none")
    clip = config.build(model.layout.share("image"), model.backbone.features)
    calls: list[int] = []

    def derive(source: Tensor) -> Tensor:
        calls.append(len(source))
        return torch.nn.functional.normalize(source.flatten(1), dim=1)

    monkeypatch.setattr(clip, "derive", derive)

    def embedded(fingerprint: str, key: str) -> Tensor:
        dataset = ToyData(11, "image", -1)
        dataset.fingerprint = fingerprint
        return ModalityData(dataset, {"clip": clip}, keys={"clip": key}).batch(range(11)).x["clip"]

    first = embedded("toys, derived", "a")
    assert torch.equal(embedded("toys, derived", "a"), first) and calls == [7]
    embedded("toys, derived", "b")
    embedded("others, derived", "a")
    assert calls == [7, 7, 7]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_are_given_no_modules(method: str) -> None:
    """A module can hold what no other process can be sent: a parametrised layer, an open file."""
    data = toy_data(lacking="label")
    for modality in data.modalities.values():
        modality.unsendable = lambda: None  # type: ignore[assignment]
    sampler = StepSampler(11, 4, 0, 0, 2)
    wanted = list(training_batches(data, sampler, workers=0))
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method(method, force=True)
    try:
        found = list(training_batches(data, sampler, workers=1))
    finally:
        torch.multiprocessing.set_start_method(before, force=True)
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one.presence, other.presence)
        assert all(torch.equal(one.x[name], other.x[name]) for name in one.x)


class Damaged(ToyData):
    """Toy data with several kinds of trouble."""

    def __init__(self, count: int, changes: Mapping[int, Mapping[str, object]]) -> None:
        super().__init__(count, "", -1)
        self.changes = changes

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        changes = self.changes.get(index, {})
        if "error" in changes:
            raise changes["error"]  # type: ignore[misc]
        return super().__getitem__(index) | changes  # type: ignore[operator]


def test_all_kinds_of_trouble_of_samples_are_told_in_one_round() -> None:
    changes: dict[int, dict[str, object]] = {i: {"label": torch.tensor(70 + i)} for i in range(290, 297)}
    changes |= {
        0: {"error": ValueError("no more")},  # the first, by which it is seen what fields there are
        3: {"error": OSError(5, "Input/output error")},
        5: {"label": "cat", "mask": "dog"},
        9: {
            "error": SampleError(
                [Fault("have an odd 'x'", "x is odd", "Even it"), Fault("have no y", "y is not there")]
            )
        },
    }
    model = build_model(toy())
    modalities = {name: model.modality(name) for name in model.names}
    data = ModalityData(Damaged(300, changes), modalities)
    with pytest.raises(UserError) as caught:
        data.verify()
    lines = str(caught.value).split("\n")
    assert lines[0] == "5 kinds of trouble with the data:"
    assert lines[1:4] == [
        "- data: 2 of 300 samples cannot be read:",
        "  sample 0: no more",
        "  sample 3: [Errno 5] Input/output error",
    ]
    assert "- data: sample 9: x is odd. Even it" in lines and "- data: sample 9: y is not there" in lines
    assert next(line for line in lines if "'mask'" in line).startswith(
        "- data: sample 5: modality 'mask': found the text"
    )
    place = lines.index("- data: 8 of 300 samples have a value that modality 'label' refuses:")
    told = lines[place + 1 : place + 7]
    assert told[0].startswith("  sample 5: modality 'label': ") and told[5] == "  and 3 more"
    assert [line.split(":")[0].strip() for line in told[1:5]] == [f"sample {i}" for i in range(290, 294)]
    with pytest.raises(UserError, match=r"^data: sample 9: x is odd\. Even it; y is not there$") as once:
        data.batch([9])
    assert str(pickle.loads(pickle.dumps(once.value))) == str(once.value)  # as from a worker process
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.each == caught.value.each  # type: ignore[attr-defined]
