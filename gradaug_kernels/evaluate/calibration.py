"""Expected calibration error: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3."""

from typing import NamedTuple

import torch
from torch import Tensor


class CalibrationBin(NamedTuple):
    """The images whose confidence is in (low, high]."""

    low: float
    high: float
    count: int
    accuracy: float  # part that is right; 0 in an empty bin
    confidence: float  # mean; 0 in an empty bin


def expected_calibration_error(
    confidence: Tensor, correct: Tensor, bins: int = 15
) -> tuple[float, list[CalibrationBin]]:
    """sum over bins of count / N * |accuracy - confidence|, with bins of equal width, and the bins.

    confidence: [N], probability of the predicted class; correct: [N], whether that is the target.
    """
    index = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1  # (0, 1 / bins] is the first
    counts = index.bincount(minlength=bins)
    right = torch.zeros(bins, dtype=torch.double).index_add(0, index, correct.double())
    sure = torch.zeros(bins, dtype=torch.double).index_add(0, index, confidence.double())
    table = [
        CalibrationBin(b / bins, (b + 1) / bins, n, r / max(n, 1), s / max(n, 1))
        for b, (n, r, s) in enumerate(zip(counts.tolist(), right.tolist(), sure.tolist(), strict=True))
    ]
    error = (right - sure).abs().sum().item() / len(confidence)
    return error, table
