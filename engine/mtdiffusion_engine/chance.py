"""What a training step leaves to chance, by the place of each sample in the step's batch.

Keyed by the seed, the step and that place alone: whichever process trains a sample, in whichever micro-batch, draws for
it what any other would.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtdiffusion import Draws, LossWeights, MultimodalDiffusion, left_to_denoise
from mtdiffusion_engine.subsets import ConditioningConfig

_CHANCE = 2  # tells these seeds from those of the order and of the augmentation


def noise_by_sample(seeds: Sequence[int], like: Tensor) -> Tensor:
    """N(0, I) in the shape, dtype and on the device of a tensor ``[B, ...]``, each row from a seed of its own."""
    noise = torch.empty_like(like)
    generator = torch.Generator(like.device)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return noise


class StepChance:
    """Draws for the samples of a step, each of which has something to denoise.

    Args:
        model: whose clocks and latent are drawn for.
        conditioning: what is shown to the network.
        weights: of the loss: what is read out counts as left to denoise.
        seed: of the run.
        batch: samples a step, in all processes and micro-batches together.
    """

    def __init__(
        self,
        model: MultimodalDiffusion,
        conditioning: ConditioningConfig,
        weights: LossWeights,
        seed: int,
        batch: int,
    ) -> None:
        self._model = model
        self._conditioning = conditioning
        self._weights = weights
        self._seed = seed
        self._batch = batch

    def draw(self, step: int, start: int, presence: Tensor) -> tuple[Tensor, Draws]:
        """For samples from place ``start`` of a step's batch: what of them is visible ``[count, N, h, w]``, on the
        CPU, and what their loss leaves to chance, the noise on the model's device.

        Args:
            presence: of these samples, ``[count, N]`` on the CPU, 0 where one lacks a modality.
        """
        model, count = self._model, len(presence)
        part = slice(start, start + count)
        seeds = np.random.SeedSequence((self._seed, _CHANCE, step)).generate_state(2 + self._batch, np.uint64) >> 1
        # What is small is drawn for the whole batch, whose clocks are spread evenly; the noise only where it is used.
        generator = torch.Generator().manual_seed(int(seeds[0]))
        latent = model.layout.latent
        clocks = model.law.draw(self._batch, len(model.names), generator)[part]
        # A law draws for all modalities; of a sample that lacks some, it may leave all the others clean.
        one = 1 - torch.rand(self._batch, 1, generator=torch.Generator().manual_seed(int(seeds[-1])))[part]
        noisy = ((clocks > 0) & (presence > 0)).any(1, keepdim=True)
        clocks = torch.where(noisy, clocks, one.to(clocks.dtype))
        readout = torch.rand(self._batch, generator=generator)[part]
        like = torch.empty((), device=model.device, dtype=model.dtype).expand(count, *latent.shape)
        draws = Draws(clocks, readout, noise_by_sample(seeds[1:-1][part].tolist(), like))

        def left(visible: Tensor) -> Tensor:
            return left_to_denoise(model, visible, presence, self._weights, draws)

        size = (latent.height, latent.width)
        visible = self._conditioning.draw(model.names, model.spatial, self._batch, size, generator, part, left)
        return visible, draws
