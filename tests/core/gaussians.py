"""Jointly Gaussian modalities: the optimal heads, the true conditionals and −log p(X) are known in closed form.

The model built here is a real :class:`MultimodalDiffusion`; only its backbone is replaced by the exact posterior of all
modalities given what a network would be shown. Any distance between a sampler's law and the true law is then the
sampler's own. With Gaussian modalities a sample is an affine map of the noise drawn, so that law is computed, not
estimated (:class:`NoiseBasis`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from attrs import frozen
from torch import Tensor
from torch.distributions import MultivariateNormal

import mtdiffusion.model
import mtdiffusion.sampler
from mtdiffusion import (
    Backbone,
    ClockLaw,
    Decoder,
    DiffusionProcess,
    Encoder,
    Features,
    FeatureSpec,
    LatentSpec,
    Layout,
    Modality,
    MultimodalDiffusion,
    OwnLayout,
    Params,
    Retention,
    SamplerSettings,
    SharedLayout,
    SNRMatched,
    WeightSchedule,
    sample,
)
from mtdiffusion.layout import noise_level


class LinearEncoder(Encoder):
    """x ``[B, d]`` -> matrix · x, as a code ``[B, c, H, W]``."""

    def __init__(self, latent: LatentSpec, matrix: Tensor) -> None:
        super().__init__(latent)
        self.register_buffer("matrix", matrix)
        self.matrix: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.matrix.T).reshape(-1, *self.latent.shape)


class GaussianDecoder(Decoder):
    """p(x | .) = N(mean, LLᵀ), both read from the feature vector that the exact backbone wrote for this modality."""

    def __init__(self, start: int, dims: int) -> None:
        super().__init__()
        self.start = start
        self.dims = dims

    def forward(self, features: Features) -> Params:
        d = self.dims
        own = features.vector[:, self.start : self.start + d + d * d]
        return {"mean": own[:, :d], "tril": own[:, d:].reshape(-1, d, d)}

    def nll(self, params: Params, x: Tensor) -> Tensor:
        return -MultivariateNormal(params["mean"], scale_tril=params["tril"]).log_prob(x)

    def expected_encoding(self, params: Params, encoder: Encoder) -> Tensor:
        return encoder(params["mean"])

    def mode(self, params: Params) -> Tensor:
        return params["mean"]

    def sample(self, params: Params, generator: torch.Generator | None = None) -> Tensor:
        mean = params["mean"]
        noise = torch.randn(mean.shape, dtype=mean.dtype, generator=generator)
        return mean + torch.einsum("bij,bj->bi", params["tril"], noise)


class VectorModality(Modality):
    """x ``[B, d]``; what only an application needs (pictures, files, metrics) is left out."""

    def __init__(self, encoder: Encoder, decoder: Decoder, dims: int) -> None:
        super().__init__(encoder, decoder)
        self.dims = dims

    def check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.dims:
            raise ValueError(f"vector: expected [batch, {self.dims}], found {list(x.shape)}")

    def placeholder(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.dims)

    def render(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def metrics(self, generated: Tensor, truth: Tensor) -> dict[str, float]:
        raise NotImplementedError

    def parse(self, text: str) -> Tensor:
        raise NotImplementedError

    def write(self, x: Tensor, folder: Path, stem: str) -> Path:
        raise NotImplementedError


@frozen(eq=False)
class JointGaussian:
    """N(mean, covariance) over several named vectors."""

    dims: Mapping[str, int]
    mean: Tensor
    covariance: Tensor

    @classmethod
    def random(cls, dims: Mapping[str, int], seed: int = 0) -> JointGaussian:
        """Correlated, with unit variances and means of about 0.5."""
        generator = torch.Generator().manual_seed(seed)
        total = sum(dims.values())
        factor = torch.randn(total, total, generator=generator, dtype=torch.float64)
        covariance = factor @ factor.T + 0.5 * torch.eye(total, dtype=torch.float64)
        scale = covariance.diagonal().rsqrt()
        mean = 0.5 * torch.randn(total, generator=generator, dtype=torch.float64)
        return cls(dims, mean, covariance * scale[:, None] * scale)

    def index(self, names: list[str] | tuple[str, ...]) -> Tensor:
        """Places of some modalities in the joint vector."""
        places, start = {}, 0
        for name, d in self.dims.items():
            places[name] = torch.arange(start, start + d)
            start += d
        return torch.cat([places[n] for n in names]) if names else torch.zeros(0, dtype=torch.long)

    def split(self, x: Tensor) -> dict[str, Tensor]:
        """Joint vectors ``[B, D]`` by name."""
        return dict(zip(self.dims, x.split(list(self.dims.values()), 1), strict=True))

    def draw(self, batch: int, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(batch, len(self.mean), generator=generator, dtype=torch.float64)
        return self.split(self.mean + noise @ torch.linalg.cholesky(self.covariance).T)

    def nll(self, x: Mapping[str, Tensor]) -> Tensor:
        return -MultivariateNormal(self.mean, self.covariance).log_prob(torch.cat([x[n] for n in self.dims], 1))

    def conditional(self, observed: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and covariance of all that is not observed, in order, given one value ``[d]`` of each that is."""
        known = self.index([n for n in self.dims if n in observed])
        rest = self.index([n for n in self.dims if n not in observed])
        cross = self.covariance[rest][:, known]
        gain = torch.linalg.solve(self.covariance[known][:, known], cross.T).T
        value = torch.cat([observed[n] for n in self.dims if n in observed]) if observed else self.mean[:0]
        mean = self.mean[rest] + gain @ (value - self.mean[known])
        return mean, self.covariance[rest][:, rest] - gain @ cross.T

    def proper_subsets(self) -> Iterator[tuple[str, ...]]:
        """Every choice of observed modalities that leaves something to generate, the empty one first."""
        return itertools.chain.from_iterable(itertools.combinations(self.dims, k) for k in range(len(self.dims)))


class ExactBackbone(Backbone):
    """The exact posterior of all modalities given what a network is shown.

    Of a layout of own channels that is z and the clocks; of a shared one, z, the clock, the observed aggregate and
    flags. Its feature vector is, modality after modality, the posterior mean and the Cholesky factor of its covariance.
    """

    def __init__(self, joint: JointGaussian, process: DiffusionProcess, encoders: Mapping[str, LinearEncoder]) -> None:
        super().__init__()
        self.joint, self.process = joint, process
        layout = process.layout
        blocks = []
        for name, d in joint.dims.items():
            codes = {other: torch.zeros(d, *layout.share(other).shape, dtype=torch.float64) for other in joint.dims}
            codes[name] = encoders[name](torch.eye(d, dtype=torch.float64))
            blocks.append(layout.meet(torch.ones(1, len(joint.dims), 1, 1), codes).flatten(1).T)
        self.embedding = torch.cat(blocks, 1)  # [C·H·W, D]: what z holds of x
        self.owner = torch.repeat_interleave(torch.arange(len(joint.dims)), torch.tensor(list(joint.dims.values())))
        every = torch.arange(process.steps + 1)[:, None].expand(-1, len(joint.dims))
        self.levels = noise_level(process.signal(every), process.variance(every))  # [T + 1, N]
        shared = process.signal(every).square().mean(1).sqrt()
        self.shared_levels = noise_level(shared, process.variance(every[:, 0]))
        self.features = FeatureSpec(1, layout.latent.height, layout.latent.width, feature_width(joint))
        self._known: dict[tuple[float, ...], tuple[Tensor, Tensor]] = {}

    def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
        n, shared = len(self.joint.dims), self.process.layout.shared_clock
        told = torch.cat([noise[:, None], vector[:, : 2 * n]], 1) if shared else vector[:, 16 * n : 17 * n]
        shown = z[:, : self.process.layout.latent.channels * (1 + shared)]
        out = z.new_zeros(z.shape[0], self.features.vector)
        cases, which = torch.unique(told, dim=0, return_inverse=True)
        for i, case in enumerate(cases):
            rows = which == i
            constant, gain = self._affine(case, shown.shape[1:])
            out[rows] = constant + shown[rows].flatten(1) @ gain
        return Features(z.new_zeros(z.shape[0], 1, *z.shape[2:]), out)

    def _affine(self, case: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Features as constant ``[G]`` + what is shown, flat, · gain ``[shape, G]``; found once for what is told."""
        key = tuple(case.tolist())
        if key not in self._known:
            units = torch.eye(shape.numel(), dtype=torch.float64)
            shown = torch.cat([torch.zeros_like(units[:1]), units]).reshape(-1, *shape)
            features = (self._from_aggregate if self.process.layout.shared_clock else self._from_blocks)(shown, case)
            self._known[key] = features[0], features[1:] - features[0]
        return self._known[key]

    def _from_blocks(self, z: Tensor, levels: Tensor) -> Tensor:
        """From each modality's z ``[B, C, H, W]`` at its own noise level ``[N]``; at 0 it is the code itself."""
        t = (self.levels - levels).abs().argmin(0)
        signal, variance = self.process.signal(t[None])[0], self.process.variance(t[None])[0]
        over = self.process.layout.spread
        spread = over((signal.square() + variance).sqrt()[None, :, None, None])
        z = (z * spread).flatten(1)  # undo c_in
        places = z.shape[1] // spread.shape[1]
        noise = over(variance[None, :, None, None]).flatten().repeat_interleave(places)
        matrix = self.embedding * signal[self.owner]
        mean, covariance = self.joint.mean, self.joint.covariance
        for rows in (noise == 0, noise > 0):  # what is exact first: nothing small is then added to it
            mean, covariance = _condition(mean, covariance, matrix[rows], z[:, rows], noise[rows])
        return self._parts(mean, covariance)

    def _from_aggregate(self, shown: Tensor, told: Tensor) -> Tensor:
        """From z beside the observed aggregate ``[B, 2 C, H, W]``; told are the noise level, flags and presence."""
        n = len(self.joint.dims)
        (z, aggregate), flags, presence = shown.chunk(2, 1), told[1 : n + 1], told[n + 1 :]
        assert bool(((flags == 0) | (flags == 1)).all()), "this oracle sees a modality whole or not at all"
        t = int((self.shared_levels - told[0]).abs().argmin())
        signal = self.process.signal_table[t] * presence
        variance = self.process.variance(torch.tensor(t))
        z = (z * (signal.square().sum() + variance).sqrt()).flatten(1)  # undo c_in
        seen = self.embedding * flags[self.owner]
        mean, covariance = _condition(self.joint.mean, self.joint.covariance, seen, aggregate.flatten(1))
        mean, covariance = _condition(mean, covariance, self.embedding * signal[self.owner], z, variance)
        return self._parts(mean.expand(len(z), -1), covariance)

    def _parts(self, mean: Tensor, covariance: Tensor) -> Tensor:
        parts = []
        for name, d in self.joint.dims.items():
            at = self.joint.index([name])
            tril = torch.linalg.cholesky(covariance[at][:, at] + 1e-14 * torch.eye(d, dtype=torch.float64))
            parts += [mean[:, at], tril.flatten().expand(len(mean), -1)]
        return torch.cat(parts, 1)


def _condition(
    mean: Tensor, covariance: Tensor, matrix: Tensor, y: Tensor, variance: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean ``[B, D]`` and covariance of x ~ N(mean, covariance) given y = matrix · x + N(0, variance), the variance one
    number or one for each of y's."""
    noise = torch.as_tensor(variance, dtype=torch.float64).expand(len(matrix))
    spread = matrix @ covariance @ matrix.T + noise.diag()
    gain = covariance @ matrix.T @ torch.linalg.pinv(spread, rtol=1e-11, hermitian=True)
    posterior = covariance - gain @ matrix @ covariance
    return mean + (y - mean @ matrix.T) @ gain.T, (posterior + posterior.T) / 2


def feature_width(joint: JointGaussian) -> int:
    return sum(d + d * d for d in joint.dims.values())


THREE = {"pose": 2, "depth": 1, "sound": 2}
"""Three modalities: enough for none, one and two to be observed."""


def gaussian_model(
    layout: str = "own",
    *,
    joint: JointGaussian | None = None,
    retention: Retention | None = None,
    schedule: WeightSchedule | None = None,
    steps: int = 1000,
    law: ClockLaw | None = None,
    epsilon_head: bool = False,
) -> tuple[MultimodalDiffusion, JointGaussian]:
    """A model with the optimal heads, in float64, and the distribution of its data.

    ``layout="own"`` gives each modality channels of its own; ``"shared"`` adds all up in the same, where the codes
    overlap (they are not orthogonal) but can still be told apart.
    """
    joint = joint or JointGaussian.random(THREE)
    space: Layout
    if layout == "own":
        space = OwnLayout({n: (d + 1) // 2 for n, d in joint.dims.items()}, 1, 2)
    else:
        space = SharedLayout(tuple(joint.dims), LatentSpec((sum(joint.dims.values()) + 2) // 2, 1, 2))
    generator = torch.Generator().manual_seed(5)
    encoders = {}
    for name, d in joint.dims.items():
        rows = space.share(name).numel
        matrix, _ = torch.linalg.qr(torch.randn(rows, d, generator=generator, dtype=torch.float64))
        encoders[name] = LinearEncoder(space.share(name), matrix * (rows / d) ** 0.5)
    retention = retention or Retention.from_curve("cosine", steps, len(joint.dims))
    process = DiffusionProcess.build(retention, schedule or SNRMatched("cosine"), space)
    modalities, start = {}, 0
    for name, d in joint.dims.items():
        modalities[name] = VectorModality(encoders[name], GaussianDecoder(start, d), d)
        start += d + d * d
    backbone = ExactBackbone(joint, process, encoders)
    model = MultimodalDiffusion(modalities, backbone, process, law, epsilon_head=epsilon_head)
    return model.double(), joint


class NoiseBasis:
    """Stands in for ``standard_normal``: sample 0 gets zeros, sample 1 + j the j-th unit vector of all noise drawn.

    For a sampler that is affine in its noise, sample 0 is then the exact mean and the differences from it are the
    columns of a factor of the exact covariance: no Monte Carlo error, for the price of ``batch`` samples.

    Args:
        draws: how often noise is drawn, each time ``numel`` numbers a sample.
        more: samples more than that, with zeros: for what else is random in what the sampler is given.
    """

    def __init__(self, draws: int, numel: int, more: int = 0) -> None:
        self.draws, self.numel, self.more, self.drawn = draws, numel, more, 0

    @classmethod
    def of(
        cls, monkeypatch: pytest.MonkeyPatch, model: MultimodalDiffusion, settings: SamplerSettings, more: int = 0
    ) -> NoiseBasis:
        """For one run of :func:`sample`, in place of all noise that it draws."""
        noisy = settings.noise > 0
        basis = cls(1 + settings.steps * noisy, model.layout.latent.numel, more)
        for module in (mtdiffusion.model, mtdiffusion.sampler):
            monkeypatch.setattr(module, "standard_normal", basis)
        return basis

    @property
    def batch(self) -> int:
        return 1 + self.draws * self.numel + self.more

    def __call__(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.zeros_like(like).flatten(1)
        at = torch.arange(self.numel)
        noise[1 + self.drawn * self.numel + at, at] = 1
        self.drawn += 1
        return noise.reshape(like.shape)

    @staticmethod
    def law(x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[D]`` and covariance ``[D, D]`` of what the sampler returns."""
        factor = x[1:] - x[0]
        return x[0], factor.T @ factor


def sampled_law(
    monkeypatch: pytest.MonkeyPatch,
    model: MultimodalDiffusion,
    settings: SamplerSettings,
    given: Mapping[str, Tensor],
    path: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all that is sampled, in order, given one value ``[d]`` of each modality observed."""
    basis = NoiseBasis.of(monkeypatch, model, settings)
    observed = {name: x.expand(basis.batch, -1) for name, x in given.items()}
    out = sample(model, basis.batch, observed=observed, settings=settings, path=path)
    assert basis.drawn == basis.draws
    return basis.law(torch.cat([out[name] for name in model.names if name not in given], 1))


NOISE: dict[str, float | None] = {"ancestral": None, "ddim": 0.0, "dpmpp_2m": 0.0}
"""η by which a solver is what its name says in the literature: the two that can do without noise do."""


def sampling_errors(
    monkeypatch: pytest.MonkeyPatch,
    model: MultimodalDiffusion,
    joint: JointGaussian,
    settings: SamplerSettings,
    subsets: Iterable[tuple[str, ...]] | None = None,
    path: Tensor | None = None,
) -> dict[tuple[str, ...], tuple[float, float]]:
    """By observed subset (default: all), the worst error of the mean, in standard deviations of the data, and the
    covariance's, relative in the Frobenius norm."""
    value = {name: x[0] for name, x in joint.draw(1, seed=3).items()}
    errors = {}
    for subset in joint.proper_subsets() if subsets is None else subsets:
        given = {name: value[name] for name in subset}
        mean, covariance = sampled_law(monkeypatch, model, settings, given, path)
        true_mean, true_covariance = joint.conditional(given)
        relative = (covariance - true_covariance).norm() / true_covariance.norm()
        errors[subset] = ((mean - true_mean).abs().max().item(), relative.item())
    return errors
