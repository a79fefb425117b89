"""PyTorch's batch norm, add and ReLU on the slices of a BatchNormCase: the baseline and, in float64, the oracle."""

import torch
import torch.nn.functional as F
from support.accuracy import assert_as_accurate
from support.cases import BatchNormCase
from torch import Tensor

EPS = 1e-5


def torch_batch_norm(case: BatchNormCase, tensors: dict[str, Tensor | None]) -> Tensor:
    """y [N, C, H, W]; `tensors` as the case's."""
    weight, bias = (None if tensors[n] is None else tensors[n][: case.channels] for n in ("weight", "bias"))
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        bias = bias.to(weight.dtype)
    x = tensors["x"]
    if tensors["mean"] is not None:
        y = F.batch_norm(x, tensors["mean"], tensors["var"], weight, bias, eps=EPS)
    elif x.numel() == case.channels:  # PyTorch refuses to normalise one value
        y = torch.zeros_like(x) * x + (0 if bias is None else bias.to(x.dtype)[:, None, None])
    else:
        y = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    if tensors["residual"] is not None:
        y = y + tensors["residual"]
    return y.relu() if case.relu else y


def assert_statistics(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Beside those with which PyTorch's batch norm updates its running statistics."""
    exact, count = x.double(), x.numel() // x.shape[1]
    if count == 1:
        assert torch.equal(mean, x[0, :, 0, 0].float())
        assert torch.equal(var, torch.zeros_like(var))
        return
    torch_mean, torch_var = torch.zeros_like(mean), torch.zeros_like(var)
    F.batch_norm(x, torch_mean, torch_var, training=True, momentum=1.0, eps=EPS)
    assert_as_accurate(mean, torch_mean, exact.mean((0, 2, 3)))
    assert_as_accurate(var * (count / (count - 1)), torch_var, exact.var((0, 2, 3)))
