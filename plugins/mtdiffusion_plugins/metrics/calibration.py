"""Calibration of categorical predictions."""

from __future__ import annotations

from torch import Tensor


def expected_calibration_error(logits: Tensor, truth: Tensor) -> float:
    """|confidence − accuracy| of the most likely class, mean over 15 bins of confidence weighted by their counts.

    Guo et al. 2017.

    Args:
        logits: ``[B, K, ...]``.
        truth: class indices ``[B, ...]``.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    # Probabilities, not logits: torchmetrics takes logits that happen to lie in [0, 1] for probabilities.
    error = multiclass_calibration_error(logits.softmax(1), truth, num_classes=logits.shape[1], n_bins=15, norm="l1")
    return error.item()
