"""Batches travel as they are stored, and are then what they always were."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._dynamo.utils import counters

from mtdiffusion import Dataset, LatentSpec
from mtdiffusion_engine.augmentation import Augmentation, AugmentationConfig
from mtdiffusion_engine.data import Batch, ModalityData, StepSampler, training_batches, values_of
from mtdiffusion_engine.experiment import Experiment, build_model, structure_experiment
from mtdiffusion_engine.tally import Tally
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_plugins.mask import MaskConfig
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.configs import DatasetConfig
from tests.engine.tiny import ToyData, toy

SIZE, CLASSES = 16, 11
REGISTRY = Registry.discover()


def experiment(data: Mapping[str, object], **training: object) -> Experiment:
    tables = {
        "data": data,
        "latent": {"height": 4, "width": 4},
        "modalities": {
            "image": {"kind": "image", "size": SIZE},
            "mask": {"kind": "mask", "size": SIZE, "classes": CLASSES},
            "label": {"kind": "label", "classes": CLASSES},
        },
        "backbone": {"kind": "unet", "channels": 8, "multipliers": [1], "heads": 0, "vector": 8},
        "training": {"steps": 4, "batch_size": 6, "warmup": 1, "log_every": 1, "sample_every": 0, **training},
    }
    return structure_experiment(tables, REGISTRY, "test")


def folder(root: Path, lacking: bool = False) -> dict[str, object]:
    """Pictures and masks of 16 × 16, some samples without one of them."""
    rng = np.random.default_rng(0)
    for name in ("image", "mask"):
        (root / name).mkdir(parents=True)
    for index in range(12):
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(root / "image" / f"{index}.png")
        if not lacking or index % 3:
            Image.fromarray(rng.integers(0, CLASSES, (SIZE, SIZE), np.uint8)).save(root / "mask" / f"{index}.png")
    (root / "label.csv").write_text("stem,value\n" + "".join(f"{i},{i % CLASSES}\n" for i in range(12)))
    fields = {"image": "image", "mask": "mask", "label": "label"}
    return {"kind": "folder", "root": str(root), "fields": fields, "allow_missing": ["mask"], "test_fraction": 0}


def seen(config: DatasetConfig | Dataset, of: Experiment) -> ModalityData:
    model = build_model(of)
    dataset = config if isinstance(config, Dataset) else config.build("train")
    return ModalityData(dataset, {name: model.modality(name) for name in model.names})


def turns(data: ModalityData, augmentation: AugmentationConfig | None = None, workers: int = 0) -> list[Batch]:
    augment = Augmentation.of(augmentation, data.modalities) if augmentation else None
    return list(training_batches(data, StepSampler(len(data), 6, 0, 0, 4), workers, augment))


def plainly(data: ModalityData, augmentation: AugmentationConfig | None = None) -> list[Batch]:
    """The same batches of values, as of modalities that know nothing of what is stored."""
    for modality in data.modalities.values():
        modality.stored_dtypes = ()
    return turns(data, augmentation)


def require_same(stored: list[Batch], plain: list[Batch], data: ModalityData) -> None:
    """That they are the same to the bit, where samples have what they hold."""
    for one, other in zip(stored, plain, strict=True):
        assert torch.equal(one.presence, other.presence)
        there = {name: one.presence[:, i] > 0 for i, name in enumerate(data.modalities)}
        for name, x in values_of(data.modalities, one.x).items():
            assert x.dtype == other.x[name].dtype
            assert torch.equal(x[there[name]], other.x[name][there[name]]), name


@pytest.mark.parametrize("kind", ["shapes", "scenes", "folder"])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_what_is_stored_are_those_of_values_to_the_bit(kind: str, workers: int, tmp_path: Path) -> None:
    data = {"kind": kind, "size": SIZE, "count": 12} if kind != "folder" else folder(tmp_path / "data")
    of = experiment(data)
    stored = turns(seen(of.data, of), workers=workers)
    assert {batch.x["image"].dtype for batch in stored} == {batch.x["mask"].dtype for batch in stored} == {torch.uint8}
    other = seen(of.data, of)
    taken = {name: modality.stored_dtypes for name, modality in other.modalities.items()}
    plain = plainly(other)
    assert {batch.x["image"].dtype for batch in plain} == {torch.float32}
    for name, dtypes in taken.items():
        other.modalities[name].stored_dtypes = dtypes
    require_same(stored, plain, other)


def test_a_packed_data_set_is_given_as_it_is_stored(tmp_path: Path) -> None:
    pytest.importorskip("litdata")
    from mtdiffusion_plugins.datasets.litdata import LitDataConfig

    source = experiment(folder(tmp_path / "data")).data.build("train")
    LitDataConfig.pack({"train": source}, tmp_path)
    of = experiment({"kind": "litdata", "root": str(tmp_path)})
    stored = turns(seen(of.data, of))
    assert {batch.x["image"].dtype for batch in stored} == {torch.uint8}
    require_same(stored, plainly(seen(source, of)), seen(source, of))


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """Samples that lack a modality among them, and whole batches."""
    weights = []
    for stored in (True, False):
        of = experiment(folder(tmp_path / f"data-{stored}", lacking=True), batch_size=2)
        trainer = Trainer(of, tmp_path / f"run-{stored}", REGISTRY, device="cpu", on_message=lambda _: None)
        if not stored:
            for modality in trainer.data.modalities.values():
                modality.stored_dtypes = ()
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_batch_whose_samples_all_lack_a_modality_is_in_the_form_of_the_others(tmp_path: Path) -> None:
    of = experiment(folder(tmp_path / "data", lacking=True))
    data = seen(of.data, of)
    source = data.stored()
    data.collate(source.gather([1, 2]), stored=True)
    lacking = [index for index in range(12) if "mask" not in data.dataset[index]]
    batch = data.collate(source.gather(lacking), stored=True)
    assert batch.x["mask"].dtype == torch.uint8 and not batch.presence[:, 1].any()


def test_what_is_blended_is_augmented_as_values_and_what_is_moved_as_it_is_stored(tmp_path: Path) -> None:
    of = experiment(folder(tmp_path / "data"))
    for config, dtype in (
        (AugmentationConfig(flip=0.5, vertical_flip=0.5), torch.uint8),
        (AugmentationConfig(crop=0.5), torch.float32),
        (AugmentationConfig(hue=0.2), torch.float32),
    ):
        data = seen(of.data, of)
        stored = turns(data, config)
        assert {batch.x["image"].dtype for batch in stored} == {dtype}
        assert {batch.x["mask"].dtype for batch in stored} == {torch.uint8}
        require_same(stored, plainly(seen(of.data, of), config), data)


def test_a_stored_mask_of_too_many_classes_is_refused_and_named(tmp_path: Path) -> None:
    of = experiment(folder(tmp_path / "data"))
    Image.fromarray(np.full((SIZE, SIZE), 200, np.uint8)).save(tmp_path / "data/mask/5.png")
    with pytest.raises(UserError, match=r"5 \(.*expected values from 0 to 10, found \[200\]"):
        turns(seen(of.data, of))


def test_pictures_that_a_data_set_gives_as_bytes_unasked_are_refused_as_before() -> None:
    class Bytes(ToyData):
        def __getitem__(self, index: int) -> dict[str, Tensor | str]:
            return {**super().__getitem__(index), "image": torch.zeros(1, 4, 4, dtype=torch.uint8)}

    with pytest.raises(UserError, match=r"expected a floating-point dtype, found torch\.uint8"):
        seen(Bytes(11, "", -1), toy()).batch([0])


class Measured(ToyData):
    """A third party's: pictures as int16 of its own meaning."""

    def stored(self, dtypes: Mapping[str, Collection[torch.dtype]]) -> Dataset:
        taken = torch.int16 in dtypes.get("image", ())
        return _Halves(11, "", -1) if taken else self


class _Halves(Measured):
    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        return {**super().__getitem__(index), "image": torch.full((1, 4, 4), index - 5, dtype=torch.int16)}


def test_a_third_partys_modality_says_what_a_third_partys_data_set_stores() -> None:
    data = seen(Measured(11, "", -1), toy())
    image = data.modalities["image"]
    image.stored_dtypes = (torch.int16,)
    image.from_stored = lambda stored: stored.float() / 5  # type: ignore[method-assign]
    image.check_stored = lambda stored: image.check(image.from_stored(stored))  # type: ignore[method-assign]
    batch = data.collate(data.stored().gather([0, 10]), stored=True)
    assert batch.x["image"].dtype == torch.int16
    assert data.values(batch).x["image"][:, 0, 0, 0].tolist() == [-1, 1]


def test_a_field_that_two_modalities_read_is_stored_as_both_take_it() -> None:
    of = toy()
    model = build_model(of)
    mask, latent = model.modality("mask"), LatentSpec(1, 4, 4)
    other = MaskConfig(size=4).build(latent, model.backbone.features)
    other.field, other.stored_dtypes = "mask", ()
    asked: list[Mapping[str, Collection[torch.dtype]]] = []

    class Asked(ToyData):
        def stored(self, dtypes: Mapping[str, Collection[torch.dtype]]) -> Dataset:
            asked.append(dtypes)
            return self

    ModalityData(Asked(11, "", -1), {"mask": mask, "other": other}).stored()
    other.stored_dtypes = (torch.uint8,)
    ModalityData(Asked(11, "", -1), {"mask": mask, "other": other}).stored()
    assert asked == [{}, {"mask": {torch.uint8}}]


@pytest.mark.long
def test_a_compiled_step_makes_values_in_its_one_graph(tmp_path: Path) -> None:
    of = experiment({"kind": "shapes", "size": SIZE, "count": 12})
    trainer = Trainer(of, tmp_path / "run", REGISTRY, evaluated=False, device="cpu", on_message=lambda _: None)
    torch._dynamo.reset()
    counters.clear()
    trainer.objective.compile(backend="aot_eager", dynamic=False)
    batches, tally = trainer.batches(3), Tally(trainer.accelerator)
    for _ in range(3):
        trainer.advance(batches, tally)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
