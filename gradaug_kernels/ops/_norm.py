"""What the operators share that normalise x where they read it: relu?(batch_norm(x; mean, var, gamma[:C], beta[:C])).

Their arguments have `NORM` among them, by the names in it.
"""

from typing import Any

import torch
from torch import Tensor

from ._conv import memory_format
from .slim_batch_norm import slim_batch_norm_composition, stats_dtype

NORM = "Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, bool batch_stats, bool relu, float eps"
NORM_BACKWARD = NORM.replace("? mean", " mean").replace("? var", " var")  # those that were used


def norm_of(arguments: Any) -> tuple:
    """What slim_batch_norm takes after x."""
    a = arguments
    return a.gamma, a.beta, a.mean, a.var, None, a.relu, a.eps


def norm_gradients_of(arguments: Any, y: Tensor | None) -> tuple:
    """What slim_batch_norm_backward takes after the gradient of its result and x. y: that result, if it had a ReLU."""
    a = arguments
    return y, a.gamma, a.beta, a.mean, a.var, a.batch_stats, False, a.eps


def normalised(arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The activation, composed of PyTorch's operators, and the statistics used: those of x are functions of it."""
    a = arguments
    mean, var = (None, None) if a.batch_stats else (a.mean, a.var)
    return slim_batch_norm_composition(a.x, a.gamma, a.beta, mean, var, None, a.relu, a.eps)


def statistics_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C]."""
    mean = x.new_empty(x.shape[1], dtype=stats_dtype(x))
    return mean, torch.empty_like(mean)


def norm_gradients_fake(x, mean, gamma, beta, needs_dx) -> tuple[Tensor, ...]:
    """dx, dgamma, dbeta, empty where not needed."""
    if not needs_dx:
        return x.new_empty(0), mean.new_empty(0), mean.new_empty(0)
    dx = x.new_empty(x.shape).contiguous(memory_format=memory_format(x))
    return dx, *(mean.new_empty(0) if p is None else torch.empty_like(p) for p in (gamma, beta))


def cast_norm(dtype: torch.dtype, mean, var, gamma, beta) -> list[Tensor | None]:
    """Statistics and parameters for an x that autocast casts to dtype: float32, or as they are where dtype allows."""
    if dtype == torch.float64:
        return [mean, var, gamma, beta]
    allowed = ((torch.float32,), (torch.float32,), (torch.float32, dtype), (torch.float32, dtype))
    return [
        tensor if tensor is None or tensor.dtype in dtypes else tensor.float()
        for tensor, dtypes in zip((mean, var, gamma, beta), allowed, strict=True)
    ]
