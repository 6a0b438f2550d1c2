"""The loss of held-out samples in training: whether a model learns what it will be asked, or its data by heart."""

from __future__ import annotations

import torch

from mtdiffusion import LossWeights, MultimodalDiffusion, composite_loss
from mtdiffusion_engine.chance import StepChance
from mtdiffusion_engine.data import ModalityData, derive_seed
from mtdiffusion_engine.subsets import ConditioningConfig

SAMPLES = 256
"""How many held-out samples are looked at, at most."""
_WATCHED = 3  # tells its seeds from those of training


class HeldOutLoss:
    """The loss of held-out samples: always the same ones, with the same noise, clocks and observations.

    Args:
        data: the split, of which a random part is taken if it is large.
        seed: of the run.
        batch: samples at a time.

    Attributes:
        what: a sentence's name for the samples.
    """

    def __init__(
        self, data: ModalityData, conditioning: ConditioningConfig, weights: LossWeights, seed: int, batch: int
    ) -> None:
        self._data, self._conditioning, self._weights = data, conditioning, weights
        self._seed, self._batch = derive_seed(seed, _WATCHED), batch
        generator = torch.Generator().manual_seed(self._seed)
        self._rows = sorted(torch.randperm(len(data), generator=generator)[:SAMPLES].tolist())
        self.what = f"{len(self._rows)} samples of {data.what}"

    @torch.no_grad()
    def of(self, model: MultimodalDiffusion) -> dict[str, float]:
        """Means by name, as :meth:`mtdiffusion.LossTerms.sums` has them, of a model in evaluation mode."""
        chance = StepChance(model, self._conditioning, self._weights, self._seed, len(self._rows))
        sums: dict[str, torch.Tensor] = {}
        for start in range(0, len(self._rows), self._batch):
            rows = self._rows[start : start + self._batch]
            batch = self._data.batch(rows)
            visible, draws = chance.draw(0, start, batch.presence)
            batch = batch.to(model.device)
            terms = composite_loss(model, batch.x, self._weights, visible=visible, presence=batch.presence, draws=draws)
            for name, pair in terms.sums().items():
                sums[name] = sums[name] + pair if name in sums else pair
        found = {name: pair.tolist() for name, pair in sums.items()}
        return {name: total / count for name, (total, count) in found.items() if count > 0}
