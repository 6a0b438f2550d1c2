"""Distances of a set of features to the training split's: Fréchet, kernel, precision and recall, memorisation.

The features are those of a named network, and the metrics carry its name (``fid_judge``, ``kid_inception``): figures of
two networks cannot be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BLOCK = 1024  # rows of a pairwise matrix held at a time: 40 MB against 5,000 columns


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features ``[n, D]`` and ``[m, D]`` (Heusel et al. 2017)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(nn.Module):
        num_features = a.shape[1]

        def forward(self, x: Tensor) -> Tensor:
            return x

    fid = FrechetInceptionDistance(feature=Given(), input_img_size=(a.shape[1], 1, 1))
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


def _nearest_distances(x: Tensor, count: int) -> Tensor:
    """Distances of each sample of ``[n, D]`` to the ``count`` < n nearest others, ascending: ``[n, count]``."""
    rows = []
    for start in range(0, len(x), _BLOCK):
        distances = torch.cdist(x[start : start + _BLOCK], x)
        distances[torch.arange(len(distances)), torch.arange(start, start + len(distances))] = torch.inf  # itself
        rows.append(distances.topk(count, largest=False).values)
    return torch.cat(rows)


class TrainingFeatures:
    """The training split's features and what of the distances depends on them alone.

    Args:
        features: ``[N, D]``.
        extractor: the network's name, as the metrics carry it.
        neighbours: k of precision and recall.
    """

    def __init__(self, features: Tensor, extractor: str, neighbours: int) -> None:
        self.features = features.double()
        self.extractor = extractor
        self.neighbours = neighbours
        count = len(features)
        self._mean_kernel = _mean_kernel_within(self.features) if count > 1 else None
        # Distances do not change when all features move together, and lose fewer digits near the origin.
        self._centre = self.features.mean(0)
        nearest = _nearest_distances(self.features - self._centre, min(neighbours, count - 1))
        self._radius = nearest[:, -1] if count > neighbours else None
        self._typical_nearest = nearest[:, 0].median().item() if count > 1 else 0.0

    @property
    def directions(self) -> dict[str, str]:
        """Which way the metrics are better; memorisation has none, it should be as for held-out data."""
        better = {"fid": "lower", "kid": "lower", "precision": "higher", "recall": "higher"}
        return {f"{metric}_{self.extractor}": direction for metric, direction in better.items()}

    def metrics(self, features: Tensor) -> dict[str, float]:
        """Of samples' features ``[n, D]``, each under its name and the extractor's; what n cannot support is left out.

        - ``fid``: :func:`frechet_distance`, n ≥ 2. Biased: it falls as n grows.
        - ``kid``: the squared maximum mean discrepancy of the kernel (x·y / D + 1)³, unbiased (Bińkowski et al. 2018),
          n ≥ 2. It is taken over all samples at once: averaging over subsets saves memory and adds variance, without
          changing the expectation. It can be negative.
        - ``precision``: the share of samples within the k-nearest-neighbour ball of a training sample; ``recall``: the
          share of training samples within that of a sample, n > k (Kynkäänniemi et al. 2019).
        - ``memorisation``: the median distance to the nearest training sample, over the median distance of training
          samples to the nearest other one. Independent samples of the same distribution have about 1, copies 0. The
          network has seen the training samples: read it against that of held-out data.
        """
        x = features.double()
        count, train = len(x), self.features
        found: dict[str, float] = {}
        if count > 1 and self._mean_kernel is not None:
            found["fid"] = frechet_distance(train, x)
            across = _kernel_sum(x, train) / (count * len(train))
            found["kid"] = self._mean_kernel + _mean_kernel_within(x) - 2 * across
        x = x - self._centre
        distances = torch.cdist(x, train - self._centre)  # [n, N]
        if self._radius is not None:
            found["precision"] = (distances <= self._radius).any(1).double().mean().item()
            if count > self.neighbours:
                radius = _nearest_distances(x, self.neighbours)[:, -1:]
                found["recall"] = (distances <= radius).any(0).double().mean().item()
        if self._typical_nearest > 0:
            found["memorisation"] = distances.amin(1).median().item() / self._typical_nearest
        return {f"{metric}_{self.extractor}": value for metric, value in found.items()}
