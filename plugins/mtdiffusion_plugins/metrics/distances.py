"""Distances of a set of features to the training split's: Fréchet, kernel, precision and recall, memorisation.

The features are those of a named network, and the metrics carry its name (``fid_judge``, ``kid_inception``): figures of
two networks cannot be compared.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_BLOCK = 1024  # rows of a pairwise matrix held at a time: 40 MB against 5,000 columns

_SAME, _ROUNDING = 1e-5, 1e-6
"""Features nearer to one another than these shares of the training features' spread (root mean square distance to their
mean) or size (root mean square norm) are those of one sample that is there repeatedly: the first is well below what
tells two pictures apart, the second what a network in float32 makes of one picture in two batches."""


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, equation 6).

    |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), with the means μ and the covariances Σ of the two sets: in squared
    units of the features, 0 for equal sets, lower is better. It falls as sets grow, also between samples of one
    distribution: compare sets of one size, and features of one network alone.

    Args:
        a: ``[n, D]``, n ≥ 2, of whatever network or formula; for D beyond n the distance is defined, and means little.
        b: ``[m, D]``, m ≥ 2.

    Raises:
        ValueError: if a set has fewer than two samples, or the two have not the same D.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            "frechet_distance: expected features [n, D] and [m, D] of at least two samples each, found "
            f"{list(a.shape)} and {list(b.shape)}"
        )
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(nn.Module):
        num_features = a.shape[1]

        def forward(self, x: Tensor) -> Tensor:
            return x

    # Of several processes the first one judges alone: to wait here for the others would be for ever.
    fid = FrechetInceptionDistance(feature=Given(), input_img_size=(a.shape[1], 1, 1), sync_on_compute=False)
    fid.set_dtype(torch.float64)
    fid.update(a.double(), real=True)
    fid.update(b.double(), real=False)
    return float(fid.compute())


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    """Sum over all pairs of k(x, y) = (x·y / D + 1)³, the kernel of KID."""
    return sum(((part @ b.T) / a.shape[1] + 1).pow_(3).sum().item() for part in torch.split(a, _BLOCK))


def _mean_kernel_within(x: Tensor) -> float:
    """Mean of the kernel over pairs of different samples of ``[n, D]``, n ≥ 2."""
    diagonal = (x.square().mean(1) + 1).pow(3).sum().item()
    return (_kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))


def _nearest_distances(x: Tensor, count: int, tolerance: float) -> Tensor:
    """Distances of each sample of ``[n, D]`` to the ``count`` nearest that differ from it, ascending: ``[n, count]``.

    Samples within ``tolerance`` of one another are one sample, which is its own neighbour no more often than it would
    be were it there once. ∞ where there are fewer others.
    """
    places = torch.arange(len(x))
    nearest = _nearest_others(x, x, places, count)
    if not bool((nearest[:, :1] <= tolerance).any()):  # nothing is repeated, as a rule
        return nearest
    own = torch.cat(
        [
            torch.where(torch.cdist(x[rows], x) <= tolerance, places, len(x)).amin(1).minimum(rows)
            for rows in torch.split(places, _BLOCK)
        ]
    )  # [n]: the first sample that is the same
    distinct, own = torch.unique(own[own], return_inverse=True)
    return _nearest_others(x, x[distinct], own, count)


def _nearest_others(x: Tensor, candidates: Tensor, own: Tensor, count: int) -> Tensor:
    """Distances of ``x [n, D]`` to the ``count`` nearest of ``candidates [m, D]`` but those at ``own [n]``, ascending:
    ``[n, count]``, ∞ where there are fewer."""
    found = x.new_full((len(x), count), torch.inf)
    some = min(count, len(candidates))
    for rows in torch.split(torch.arange(len(x)), _BLOCK):
        distances = torch.cdist(x[rows], candidates)
        distances[torch.arange(len(rows)), own[rows]] = torch.inf
        found[rows, :some] = distances.topk(some, largest=False).values
    return found


class TrainingFeatures:
    """The training split's features and what of the distances depends on them alone.

    Args:
        features: ``[N, D]``, N ≥ 1.
        extractor: the network's name, as the metrics carry it.
        neighbours: k of precision and recall.
    """

    def __init__(self, features: Tensor, extractor: str, neighbours: int) -> None:
        self.features = features.double()
        self.extractor = extractor
        self.neighbours = neighbours
        self._mean_kernel = _mean_kernel_within(self.features) if len(features) > 1 else math.nan
        # Distances do not change when all features move together, and lose fewer digits near the origin.
        self._centre = self.features.mean(0)
        centred = self.features - self._centre
        spread, size = (x.square().sum(1).mean().sqrt().item() for x in (centred, self.features))
        self._tolerance = max(_SAME * spread, _ROUNDING * size)
        nearest = _nearest_distances(centred, neighbours, self._tolerance)
        self._radius = nearest[:, -1]  # [N]: ∞ for all if there are no more than k that differ
        self._typical_nearest = nearest[:, 0].median().item()

    @property
    def directions(self) -> dict[str, str]:
        """Which way the metrics are better; memorisation has none, it should be as for held-out data."""
        better = {"fid": "lower", "kid": "lower", "precision": "higher", "recall": "higher"}
        return {f"{metric}_{self.extractor}": direction for metric, direction in better.items()}

    def metrics(self, features: Tensor) -> dict[str, float]:
        """Of samples' features ``[n, D]``, n ≥ 1, each under its name and the extractor's; NaN where undefined.

        - ``fid``: :func:`frechet_distance`; undefined for n = 1 or N = 1. Biased: it falls as n grows.
        - ``kid``: the squared maximum mean discrepancy of the kernel (x·y / D + 1)³, unbiased (Bińkowski et al. 2018);
          undefined for n = 1 or N = 1. It is taken over all samples at once: averaging over subsets saves memory and
          adds variance, without changing the expectation. It can be negative.
        - ``precision``: the share of samples within the k-nearest-neighbour ball of a training sample; ``recall``: the
          share of training samples within that of a sample (Kynkäänniemi et al. 2019, equation 2). Precision is
          undefined where there are no k training samples beside one, recall for n ≤ k.
        - ``memorisation``: the median distance to the nearest training sample, over the median distance of training
          samples to the nearest other one. Independent samples of the same distribution have about 1, copies 0. The
          network has seen the training samples: read it against that of held-out data. Undefined if all training
          samples are the same.

        A neighbour is a sample that differs: where one picture is there with each of many sounds, the nearest other
        one is not the picture itself. Radii would be 0 else, and tell of the repetition instead of the pictures. The
        balls of more than k samples of which at most k differ (a generator that has collapsed) have radius 0.
        """
        x = features.double()
        count, train = len(x), self.features
        found = dict.fromkeys(("fid", "kid", "precision", "recall", "memorisation"), math.nan)
        if count > 1 and len(train) > 1:
            found["fid"] = frechet_distance(train, x)
            across = _kernel_sum(x, train) / (count * len(train))
            found["kid"] = self._mean_kernel + _mean_kernel_within(x) - 2 * across
        x = x - self._centre
        train = train - self._centre
        radius = x.new_zeros(count, 1)
        if count > self.neighbours:
            radius = _nearest_distances(x, self.neighbours, self._tolerance)[:, -1:]
            radius = radius.where(radius.isfinite(), 0)
        nearest = x.new_empty(count)
        precise = torch.empty(count, dtype=torch.bool)  # within the ball of a training sample
        recalled = torch.zeros(len(train), dtype=torch.bool)  # within the ball of a sample
        for rows in torch.split(torch.arange(count), _BLOCK):
            distances = torch.cdist(x[rows], train)
            nearest[rows] = distances.amin(1)
            precise[rows] = (distances <= self._radius).any(1)
            recalled |= (distances <= radius[rows]).any(0)
        if math.isfinite(self._typical_nearest):
            found["memorisation"] = nearest.median().item() / self._typical_nearest
        if bool(self._radius.isfinite().all()):
            found["precision"] = precise.double().mean().item()
        if count > self.neighbours:
            found["recall"] = recalled.double().mean().item()
        return {f"{metric}_{self.extractor}": value for metric, value in found.items()}
