"""The correctness gate: no speed-up is printed for a result that is not as good as PyTorch's own.

A provider passes where its distance from a float64 reference is at most twice that of plain PyTorch in the same dtype.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Gate(NamedTuple):
    """green, and the worst tensor: its relative error and plain PyTorch's."""

    green: bool
    worst: str
    error: float
    torch_error: float

    def __str__(self) -> str:
        return f"{'green' if self.green else 'RED'}: {self.worst} {self.error:.1e}, PyTorch {self.torch_error:.1e}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the 2-norm, in float64; infinite for another shape or a NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    return error.nan_to_num(nan=float("inf"), posinf=float("inf")).item()


def check(
    actual: Mapping[str, Tensor],
    pytorch: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    slack: Mapping[str, float] | None = None,
) -> Gate:
    """Compare the named results of a provider with plain PyTorch's and the float64 reference.

    slack: added to the allowed error of a result, for what PyTorch may compute exactly by chance; float32's eps where
        none is given.
    """
    worst, gate = 0.0, None
    for name, expected in reference.items():
        error, torch_error = relative_error(actual[name], expected), relative_error(pytorch[name], expected)
        share = error / (2 * torch_error + (slack or {}).get(name, torch.finfo(torch.float32).eps))
        if gate is None or share > worst:
            worst, gate = share, Gate(share <= 1, name, error, torch_error)
    return gate


def speedups(
    median_ms: Mapping[str, float],
    gate: Gate,
    ours: str = "ours",
    baselines: Sequence[str] = ("eager", "compile", "eager8"),
) -> tuple[float | None, float | None]:
    """How many times faster ours is than plain eager and than the best baseline; None where not measured or red."""
    measured = [median_ms[name] for name in baselines if name in median_ms]
    if not gate.green or ours not in median_ms or not measured:
        return None, None
    return (
        median_ms["eager"] / median_ms[ours] if "eager" in median_ms else None,
        min(measured) / median_ms[ours],
    )
