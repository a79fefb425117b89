"""PyTorch's batch norm, ReLU and convolution of the slices of a ConvCase: the baseline and, in float64, the oracle."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from support.accuracy import assert_as_accurate
from support.cases import ConvCase
from torch import Tensor

EPS = 1e-5


@dataclass(frozen=True)
class NormOptions:
    """The norm before the convolution of a ConvCase."""

    relu: bool = True
    given: bool = False  # normalise with given statistics instead of the batch's
    affine: bool = True
    center: float = 0.5  # the data's mean
    spread: float = 1.5  # and standard deviation

    def tensors(self, case: ConvCase, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """x [N, C, H, W]; gamma, beta [F], NaN from C on; mean, var [C]; weight, bias as the case's."""
        x, weight, bias = case.tensors(dtype)
        wide = torch.empty_strided(x.shape, x.stride(), dtype=torch.float64)
        x = wide.copy_(x.double() * self.spread + self.center).to(dtype)  # keeps the strides
        stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(2)
        c = case.channels[0]
        values = torch.randn(4, c, generator=generator, dtype=torch.float64)
        gamma, beta = torch.full((2, c + 3), torch.nan, dtype=stats_dtype) if self.affine else (None, None)
        if self.affine:
            gamma[:c], beta[:c] = 1 + values[0] / 2, values[1] / 2
        mean = var = None
        if self.given:
            mean = (self.center + values[2] / 2).to(stats_dtype)
            var = (self.spread**2 * (values[3].square() + 0.5)).to(stats_dtype)
        return x, gamma, beta, mean, var, weight, bias


def options_for(case: ConvCase) -> NormOptions:
    """Variants of the norm, spread over the cases; given statistics where PyTorch refuses to take the batch's."""
    number = sum(map(ord, case.name))
    n, (h, w) = case.batch, case.size
    return NormOptions(relu=number % 3 > 0, given=n * h * w < 2 or number % 4 == 0, affine=number % 5 > 0)


def torch_norm_conv(
    case: ConvCase, options: NormOptions, x, gamma, beta, mean, var, weight, bias
) -> tuple[Tensor, Tensor]:
    """y [N, out, OH, OW] and the norm's output [N, C, H, W], in the dtype of x."""
    gamma, beta = (None if p is None else p[: case.channels[0]] for p in (gamma, beta))
    if mean is None:
        a = F.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)
    else:
        a = F.batch_norm(x, mean, var, gamma, beta, eps=EPS)
    bias = None if bias is None else bias[: case.out_channels]
    return F.conv2d(a.relu() if options.relu else a, case.slice(weight), bias, *case.geometry), a


def torch_results(case: ConvCase, options: NormOptions, dy: Tensor, *tensors: Tensor | None) -> dict[str, Tensor]:
    """y and the gradients dx [N, C, H, W], dw [out, in / groups, KH, KW], dgamma and dbeta [C], in the dtype of x.

    And dz [N, C, H, W], that of the norm's output, with the sizes of the terms that it is a sum of, dz_terms.
    """
    x, gamma, beta, mean, var, weight, bias = tensors
    leaves = {"dx": x, "dgamma": gamma, "dbeta": beta, "dw": case.slice(weight)}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items() if t is not None}
    full = {"dx": x, "dgamma": gamma, "dbeta": beta} | leaves
    # The slice takes the whole weight's place: slicing it again changes nothing.
    y, z = torch_norm_conv(case, options, full["dx"], full["dgamma"], full["dbeta"], mean, var, leaves["dw"], bias)
    gradients = torch.autograd.grad(y, [*leaves.values(), z], dy)
    found = dict(zip([*leaves, "dz"], gradients, strict=True))
    found["dz_terms"] = torch.nn.grad.conv2d_input(x.shape, case.slice(weight).abs(), dy.abs(), *case.geometry)
    for name in ("dgamma", "dbeta"):
        if name in found:
            found[name] = found[name][: case.channels[0]]
    return {"y": y.detach(), **found}


def assert_moments(y: Tensor, mean: Tensor, var: Tensor) -> None:
    """Statistics of y as it is stored, beside those that PyTorch's batch norm takes."""
    count = y.numel() // y.shape[1]
    torch_mean, torch_var = torch.zeros_like(mean), torch.zeros_like(var)
    if count > 1:
        F.batch_norm(y, torch_mean, torch_var, training=True, momentum=1.0, eps=EPS)
    else:
        torch_mean = y[0, :, 0, 0].to(mean.dtype)
    exact = y.double()
    # The values of a channel cancel in its mean.
    assert_as_accurate(mean, torch_mean, exact.mean((0, 2, 3)), terms=float(exact.abs().mean()))
    torch_var *= (count - 1) / count
    assert_as_accurate(var, torch_var, exact.var((0, 2, 3), correction=0))


def check_results(case: ConvCase, options: NormOptions, x: Tensor, ours, torchs, exact) -> None:
    """Results under the names of `torch_results`, judged as accuracy.py says."""
    channels = case.channels[0]
    for name, result in ours.items():
        judged = {}
        if name in ("dgamma", "dbeta"):
            # Sums over a channel, which may cancel: of sums that may, and that were rounded to the dtype of x.
            sizes = (float(exact[of].square().sum((0, 2, 3)).sqrt().max()) for of in ("dz_terms", "dz"))
            judged["terms"] = max(a * b for a, b in zip(sizes, (1, _eps(x) / _eps(torchs[name])), strict=True))
        elif name != "y":  # all values of an input channel have the rounding of its scale in common
            judged = {"gradient": True, "sharing": max(1, exact[name].numel() // channels)}
        if name == "dx" and not options.given and x.numel() // channels <= 4:
            # Of dz, little is left after what few values have in common: the unit is that of dz.
            std = (x.double().var((0, 2, 3), correction=0) + EPS).sqrt()[:, None, None]
            judged["terms"] = float((exact["dz"] / std).square().mean().sqrt())
        assert_as_accurate(result, torchs[name], exact[name], **judged)


def _eps(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps
