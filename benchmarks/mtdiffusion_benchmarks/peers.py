"""Other libraries beside ours, on pictures of 32 × 32 alone: a training step as their documentation has it, and what
evaluations of the network cost in sampling. Networks have equally many parameters, within a twentieth, and see batches
of the same data, of which ours alone are fetched sample by sample; what networks of one size compute differs.

- diffusers: the example of unconditional training (UNet2DModel, DDPMScheduler, EMAModel, Accelerate).
- denoising-diffusion-pytorch: its Unet in its GaussianDiffusion, trained as its Trainer does, with its EMA.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve
from torch import Tensor, nn
from torch.nn import functional as F

from mtdiffusion import SamplerSettings, sample
from mtdiffusion_benchmarks.timing import (
    EVALUATIONS,
    STEPS,
    Contender,
    Setting,
    count_parameters,
    ours,
    train_ours,
)
from mtdiffusion_engine.experiment import structure_experiment
from mtdiffusion_engine.trainer import Trainer
from mtdiffusion_registry import Registry

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DDPMScheduler

SIDE = 32
EQUAL = 0.05
"""How far sizes may be apart, as a share of ours."""
LONG = 100_000
"""Steps over which diffusers' example takes its learning rate to 0, by a cosine."""
ADAMW: Mapping[str, Any] = {"betas": (0.95, 0.999), "weight_decay": 1e-6}
"""Of diffusers' example, beside the learning rate."""
DRAWN = 16
"""Samples of a turn of sampling: less than elsewhere, as these networks work at every pixel."""


def our_tables(setting: Setting) -> dict[str, Any]:
    """The configuration of an image, every pixel a place of the latent, and a U-Net of the peers' size."""
    backbone: dict[str, Any] = {"channels": 32, "multipliers": [1, 2, 4], "attention": [2], "vector": 64}
    if setting.large:
        backbone = {"channels": 136, "multipliers": [1, 2, 2, 2], "blocks": 2, "attention": [1]}
    return {
        "data": {"kind": "shapes", "size": SIDE, "count": 256, "test_count": 8},
        "latent": {"height": SIDE, "width": SIDE},
        "modalities": {"image": {"kind": "image", "size": SIDE}},
        "backbone": {"kind": "unet", **backbone},
        "conditioning": {"partial": 0.0},  # the peers fill no holes
        "training": {"batch_size": setting.batch},
    }


def _our_trainer(folder: Path, registry: Registry, setting: Setting) -> Trainer:
    return ours(structure_experiment(our_tables(setting), registry, "peers"), folder, registry, setting)


def _ours_beside(
    name: str, network: nn.Module, train: Callable[[], object], draw: Callable[[], object], trainer: Trainer
) -> list[Contender]:
    """Four contenders: theirs and ours, training and sampling.

    Raises:
        RuntimeError: if the networks are not equally large.
    """
    mine, other = count_parameters(trainer.model), count_parameters(network)
    if abs(other - mine) > EQUAL * mine:
        raise RuntimeError(f"{name}: its network has {other:,} parameters and ours {mine:,}: they cannot be compared")
    trained = STEPS * trainer.config.batch_size
    settings = SamplerSettings(EVALUATIONS, "ancestral")
    own = partial(sample, trainer.averaged_model, DRAWN, settings=settings)
    training, sampling = f"{name}, training", f"{name}, sampling"
    return [
        Contender(training, train, images=trained, parameters=other),
        Contender(f"ours beside {training}", train_ours(trainer), training, images=trained, parameters=mine),
        Contender(sampling, draw, images=DRAWN, parameters=other),
        Contender(f"ours beside {sampling}", own, sampling, images=DRAWN, parameters=mine),
    ]


def _pictures(trainer: Trainer, setting: Setting) -> Callable[[], Tensor]:
    """Batches ``[B, 3, 32, 32]`` in [−1, 1] of what ours trains on, that are on the device."""
    every = trainer.data.batch(range(len(trainer.data))).x["image"].to(setting.device)
    return lambda: every[torch.randint(len(every), (setting.batch,), device=setting.device)]


def diffusers_network(large: bool) -> nn.Module:
    """Its U-Net; large, the one that DDPM (Ho et al. 2020) has for CIFAR-10."""
    from diffusers import UNet2DModel

    if large:
        return UNet2DModel(
            sample_size=SIDE,
            layers_per_block=2,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=64,
        )
    return UNet2DModel(
        sample_size=SIDE,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )


def diffusers_training(
    network: nn.Module,
    scheduler: DDPMScheduler,
    accelerator: Accelerator,
    setting: Setting,
    *,
    rate: float = 1e-4,
    warmup: int = 500,
    generator: torch.Generator | None = None,
) -> Callable[[Tensor], None]:
    """An optimizer step on clean pictures ``[B, 3, 32, 32]``, as its example of unconditional training has it.

    Args:
        rate: peak of the learning rate, reached after ``warmup`` steps.
        generator: of noise and times, on the device; None: torch's own.
    """
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, **ADAMW)
    rates = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=warmup, num_training_steps=LONG)
    run = torch.compile(network, dynamic=False) if setting.compile else network
    times = scheduler.config.num_train_timesteps

    def step(clean: Tensor) -> None:
        noise = torch.randn(clean.shape, device=clean.device, generator=generator)
        t = torch.randint(times, (len(clean),), device=clean.device, generator=generator)
        with setting.autocast:
            predicted = run(scheduler.add_noise(clean, noise, t), t).sample
        accelerator.backward(F.mse_loss(predicted.float(), noise))
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    return step


def beside_diffusers(folder: Path, registry: Registry, setting: Setting) -> list[Contender]:
    """diffusers, and ours."""
    from diffusers import DDPMScheduler

    trainer = _our_trainer(folder / "beside-diffusers", registry, setting)
    pictures = _pictures(trainer, setting)
    network = diffusers_network(setting.large).to(setting.device)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    step = diffusers_training(network, scheduler, trainer.accelerator, setting)

    def train() -> None:
        network.train()
        for _ in range(STEPS):
            step(pictures())

    @torch.no_grad()
    def draw() -> Tensor:
        network.eval()
        scheduler.set_timesteps(EVALUATIONS)
        z = torch.randn(DRAWN, 3, SIDE, SIDE, device=setting.device)
        for t in scheduler.timesteps:
            z = scheduler.step(network(z, t).sample, t, z).prev_sample
        return z

    return _ours_beside("diffusers", network, train, draw, trainer)


def denoising_diffusion_network(large: bool) -> nn.Module:
    """Its U-Net; large, the one of its documentation."""
    from denoising_diffusion_pytorch import Unet

    return (
        Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=True)
        if large
        else Unet(32, dim_mults=(1, 2, 4), flash_attn=True)
    )


def beside_denoising_diffusion(folder: Path, registry: Registry, setting: Setting) -> list[Contender]:
    """denoising-diffusion-pytorch, and ours."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    trainer = _our_trainer(folder / "beside-denoising-diffusion", registry, setting)
    pictures, accelerator = _pictures(trainer, setting), trainer.accelerator
    network = denoising_diffusion_network(setting.large)
    diffusion = GaussianDiffusion(network, image_size=SIDE, timesteps=1000, sampling_timesteps=EVALUATIONS)
    diffusion.to(setting.device)
    average = EMA(diffusion, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    if setting.compile:
        network.compile(dynamic=False)

    def train() -> None:
        diffusion.train()
        for _ in range(STEPS):
            with setting.autocast:
                loss = diffusion((pictures() + 1) / 2)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(diffusion.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update()

    def draw() -> Any:
        average.ema_model.eval()
        with torch.inference_mode(), redirect_stderr(io.StringIO()):  # it draws a bar
            return average.ema_model.sample(batch_size=DRAWN)

    return _ours_beside("denoising-diffusion-pytorch", network, train, draw, trainer)


def in_bfloat16(
    name: str, make: Callable[[Path, Registry, Setting], list[Contender]], target: float
) -> Callable[[Path, Registry, Setting], list[Contender]]:
    """Training in bfloat16 beside another library's in float32, as its documentation has it, and beside its own in
    bfloat16.

    Args:
        make: that library's of :func:`beside_diffusers` and its like.
        target: the share of its time in float32 that is wanted at most.
    """

    def contenders(folder: Path, registry: Registry, setting: Setting) -> list[Contender]:
        theirs = make(folder / "float32", registry, setting)[0]
        theirs_half, half = make(folder / "bfloat16", registry, evolve(setting, precision="bfloat16"))[:2]
        theirs_half.name = f"{name} in bfloat16, training"
        again = copy(half)
        half.name, half.against, half.target = f"ours in bfloat16 beside {theirs.name}", theirs.name, target
        again.name, again.against, again.seconds = f"ours beside {theirs_half.name}", theirs_half.name, []
        return [theirs, half, theirs_half, again]

    return contenders
