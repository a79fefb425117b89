"""How a kernel's numbers are judged: beside PyTorch's own error in the same dtype, against float64."""

import torch
from torch import Tensor


def assert_as_accurate(
    ours: Tensor, torchs: Tensor, exact: Tensor, gradient: bool = False, sharing: int = 1, terms: float = 0.0
) -> None:
    """`ours` and `torchs`, results of one computation, against `exact` (float64): at most twice PyTorch's error.

    The root-mean-square and the largest error are compared, with an eighth of a unit in the last place to spare for the
    first and one unit for the second (an exact PyTorch result may be luck, and so may the largest of a few), or half a
    unit of `terms`, the size of what cancels in a sum. PyTorch's root-mean-square is that of n errors, which tells its
    size to one part in sqrt(2 n): for few values the bound is that of the largest error. A gradient must also point as
    well in the right direction, as far as `terms` tells it, and be no more biased towards or away from zero, which
    hides under any elementwise tolerance; `sharing` values have a rounding in common (all of a channel have its scale).
    """
    assert ours.shape == exact.shape
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    eps = torch.finfo(torchs.dtype).eps
    ours, torchs = ours.double(), torchs.double()
    for name, measure, units, uncertainty in (
        ("rms", lambda e: float(e.square().mean().sqrt()), 1 / 8, (2 * exact.numel()) ** -0.5),
        ("largest", lambda e: float(e.abs().max()), 1, 0),
    ):
        spare = eps * max(units * measure(exact), terms / 2)
        got, allowed = measure(ours - exact), 2 * (1 + uncertainty) * measure(torchs - exact) + spare
        assert got <= allowed, f"{name} error must be at most {allowed:.3e}, got {got:.3e}"
    if gradient:
        size = float(exact.square().mean().sqrt())
        cancelled = min(1.0, eps * terms / 2 / size) if size > 0 else 0.0
        got, allowed = _lost_cosine(ours, exact), 2 * _lost_cosine(torchs, exact) + eps**2 + cancelled**2 / 2
        assert got <= allowed, f"1 - cosine must be at most {allowed:.3e}, got {got:.3e}"
        # n errors without any bias have a mean of about their size divided by the square root of n.
        noise = 3 * (sharing * (ours - exact).square().sum()).sqrt() / exact.abs().sum().clamp_min(1e-300)
        got, allowed = _bias(ours, exact), 2 * _bias(torchs, exact) + float(noise) + eps / 50
        assert got <= allowed, f"relative bias must be at most {allowed:.3e}, got {got:.3e}"


def _lost_cosine(a: Tensor, exact: Tensor) -> float:
    """1 - cosine, as half the squared distance of the unit vectors: exact where 1 - cos would cancel."""
    if exact.norm() == 0:
        return float(a.norm() > 0)
    return float((a / a.norm() - exact / exact.norm()).square().sum() / 2)


def _bias(a: Tensor, exact: Tensor) -> float:
    """The mean error in the direction of the value's sign, relative to the mean magnitude."""
    magnitude = exact.abs().sum()
    return float(((a - exact) * exact.sign()).sum().abs() / magnitude) if magnitude > 0 else 0.0
