"""Exact values with a bound on what rounding may add to them: the arithmetic of the operators in float64.

An `Approx` is what a formula gives in exact arithmetic, and how far from it a kernel may end that sums in `unit`
roundings and stores what the contract says it stores. Each function here passes the bounds of its arguments on, so that
the bound of a result is one of the whole computation; a wrong or a missing term lies orders of magnitude beyond it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SLACK = 4  # on every sum's bound: transforms of tiles and other orders of summation
PIXELS = (0, 2, 3)


@dataclass
class Approx:
    """float64 tensors of one shape: the exact value and the largest error allowed."""

    value: Tensor
    error: Tensor

    @staticmethod
    def of(tensor: Tensor) -> "Approx":
        value = tensor.detach().double().contiguous()
        return Approx(value, torch.zeros_like(value))

    def size(self) -> Tensor:
        """At least as large as the magnitude of any value within the bound."""
        return self.value.abs() + self.error

    def stored(self, dtype: torch.dtype) -> "Approx":
        """Beyond the largest number of the dtype anything may come, infinity above all."""
        info = torch.finfo(dtype)
        error = self.error + info.eps * self.size() + info.smallest_normal * info.eps
        return Approx(self.value, error.where(self.size() <= info.max, torch.inf))

    def __getitem__(self, index) -> "Approx":
        return Approx(self.value[index], self.error[index])

    def __add__(self, other: "Approx") -> "Approx":
        return Approx(self.value + other.value, self.error + other.error)


def unit(dtype: torch.dtype) -> float:
    """Of the sums of an operator on `dtype`: at least float32."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def _largest(t: Tensor) -> Tensor | float:
    return t.max() if t.numel() else 0.0


def _channels(v: Tensor) -> Tensor:
    return v[:, None, None]


# ---- convolution and linear layer: `terms` is the largest sum of the magnitudes of terms


def _bilinear(function, a: Approx, b: Approx, terms: int, u: float) -> Approx:
    """function(a, b), linear in each argument, whose values are sums of `terms` products."""
    value = function(a.value, b.value)
    magnitude = function(a.size(), b.size())
    error = magnitude - function(a.value.abs(), b.value.abs()) if (a.error.any() or b.error.any()) else 0.0
    return Approx(value, error + SLACK * (terms + 4) * u * _largest(magnitude) + torch.zeros_like(value))


def conv2d(x: Approx, weight: Approx, bias: Approx | None, geometry, u: float) -> Approx:
    """geometry: stride, padding, dilation, groups."""
    y = _bilinear(lambda a, b: _conv2d(a, b, *geometry), x, weight, weight.value[0].numel(), u)
    if bias is None:
        return y
    value = y.value + _channels(bias.value)
    return Approx(value, y.error + _channels(bias.error) + u * (y.size() + _channels(bias.size())))


def conv2d_input_grad(dy: Approx, weight: Approx, size, geometry, u: float) -> Approx:
    def function(dy, weight):
        return _conv2d_backward(dy, dy.new_empty(size), weight, *geometry)[0]

    per_group = weight.value.shape[0] // geometry[3]
    return _bilinear(function, dy, weight, per_group * weight.value[0, 0].numel(), u)


def conv2d_weight_grad(dy: Approx, x: Approx, size, geometry, u: float) -> Approx:
    def function(dy, x):
        return _conv2d_backward(dy, x, x.new_empty(size), *geometry)[1]

    return _bilinear(function, dy, x, dy.value.numel() // max(1, dy.value.shape[1]), u)


def _conv2d(x: Tensor, w: Tensor, stride, padding, dilation, groups) -> Tensor:
    if x.numel() > 0:
        return F.conv2d(x, w, None, stride, padding, dilation, groups)
    # PyTorch refuses images without rows or columns, which padding alone makes outputs of.
    sizes = (
        (x.shape[2 + a] + 2 * padding[a] - dilation[a] * (w.shape[2 + a] - 1) - 1) // stride[a] + 1 for a in (0, 1)
    )
    return x.new_zeros(x.shape[0], w.shape[0], *sizes)


def _conv2d_backward(dy: Tensor, x: Tensor, w: Tensor, stride, padding, dilation, groups) -> tuple[Tensor, Tensor]:
    if dy.numel() == 0 or x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(w)
    arguments = (dy, x, w, None, stride, padding, dilation, False, [0, 0], groups, [True, True, False])
    return torch.ops.aten.convolution_backward(*arguments)[:2]


def linear(x: Approx, weight: Approx, bias: Approx | None, u: float) -> Approx:
    """x [N, F], weight [out, F]."""
    y = _bilinear(lambda a, b: a @ b.T, x, weight, x.value.shape[1], u)
    if bias is None:
        return y
    return Approx(y.value + bias.value, y.error + bias.error + u * (y.size() + bias.size()))


def matmul(a: Approx, b: Approx, u: float) -> Approx:
    return _bilinear(torch.matmul, a, b, a.value.shape[-1], u)


def channel_sum(x: Approx, u: float) -> Approx:
    """Over all but dimension 1."""
    dims = [d for d in range(x.value.dim()) if d != 1]
    terms = x.value.numel() // max(1, x.value.shape[1])
    return Approx(x.value.sum(dims), x.error.sum(dims) + SLACK * (terms + 4) * u * x.size().sum(dims))


# ---- batch norm


@dataclass
class Normed:
    """What the backward pass needs of a batch norm's forward pass."""

    z: Approx  # before the ReLU, [N, C, H, W]
    x_hat: Approx
    mean: Approx  # [C]
    var: Approx
    rstd: Approx
    largest: Tensor  # [C]: of the magnitudes of x


def moments(x: Approx, u: float) -> tuple[Approx, Approx]:
    """Mean and biased variance of each channel; zeros for no values."""
    channels = x.value.shape[1]
    count = x.value.numel() // max(1, channels)
    if count == 0:
        zeros = x.value.new_zeros(channels)
        return Approx(zeros, zeros), Approx(zeros, zeros)
    rounding = SLACK * (count + 4) * u
    largest, error = x.size().amax(PIXELS), x.error.amax(PIXELS)
    mean, var = x.value.mean(PIXELS), x.value.var(PIXELS, correction=0)
    mean_error = error + rounding * largest
    std = var.sqrt()
    var_error = 2 * std * error + rounding * (var + std * largest) + (error + rounding * largest).square()
    return Approx(mean, mean_error), Approx(var, var_error)


def batch_norm(x: Approx, given, gamma: Approx | None, beta: Approx | None, residual, eps: float, u: float) -> Normed:
    """given: mean and var, or None for those of x."""
    mean, var = given or moments(x, u)
    largest = x.size().amax(PIXELS) if x.value.numel() else torch.zeros_like(mean.value)
    largest = largest + mean.size()
    rstd = (var.value + eps).rsqrt()
    highest = ((var.value - var.error).clamp_min(0) + eps).rsqrt()
    rstd = Approx(rstd, highest - rstd + 4 * u * rstd)
    d = x.value - _channels(mean.value)
    d_error = x.error + _channels(mean.error + 4 * u * largest)
    x_hat = d * _channels(rstd.value)
    x_hat = Approx(x_hat, d_error * _channels(rstd.size()) + d.abs() * _channels(rstd.error) + 4 * u * x_hat.abs())
    z = x_hat
    if gamma is not None:
        z = Approx(z.value * _channels(gamma.value), z.error * _channels(gamma.value.abs()) + 2 * u * z.size())
    for other in (None if beta is None else Approx(*map(_channels, (beta.value, beta.error))), residual):
        if other is not None:
            value = z.value + other.value
            z = Approx(value, z.error + other.error + 2 * u * (z.size() + other.size()))
    # x * scale + shift, scale and shift rounded
    scale = rstd.size() * (1 if gamma is None else gamma.value.abs())
    z = Approx(z.value, z.error + 4 * u * (z.size() + _channels(scale * largest)))
    return Normed(z, x_hat, mean, var, rstd, largest)


def relu(z: Approx) -> Approx:
    return Approx(z.value.relu(), z.error)


def relu_backward(dy: Approx, z: Approx) -> Approx:
    """Where z may have either sign, the gradient may be there or not."""
    passes = z.value > 0
    unclear = z.value.abs() <= z.error
    return Approx(dy.value * passes, torch.where(unclear, dy.size(), dy.error * passes))


def batch_norm_backward(
    dz: Approx, norm: Normed, gamma: Approx | None, batch_stats: bool, u: float
) -> tuple[Approx, Approx, Approx]:
    """dx [N, C, H, W], dgamma and dbeta [C]."""
    count = dz.value.numel() // max(1, dz.value.shape[1])
    x_hat, rstd = norm.x_hat, norm.rstd
    sum_dz = channel_sum(dz, u)
    product = Approx(dz.value * x_hat.value, dz.size() * x_hat.size() - dz.value.abs() * x_hat.value.abs())
    sum_dz_x_hat = channel_sum(product, u)
    # As a sum of dz * x, from which that of dz * mean is taken.
    spare = SLACK * (count + 4) * u * norm.largest * rstd.size() * dz.size().sum(PIXELS)
    sum_dz_x_hat = Approx(sum_dz_x_hat.value, sum_dz_x_hat.error + spare)
    value, error, magnitude = dz.value, dz.error, dz.size()
    if batch_stats and count:
        a, b = (Approx(_channels(s.value / count), _channels(s.error / count)) for s in (sum_dz, sum_dz_x_hat))
        value = value - a.value - x_hat.value * b.value
        b_error = x_hat.size() * b.size() - x_hat.value.abs() * b.value.abs()
        error = error + a.error + b_error
        from_x = _channels(norm.largest * rstd.size()) * b.size()
        magnitude = magnitude + a.size() + x_hat.size() * b.size() + from_x
    scale, scale_error = rstd.value, rstd.error
    if gamma is not None:
        scale, scale_error = scale * gamma.value, scale_error * gamma.value.abs()
    scale_error = scale_error + 2 * u * scale.abs()
    error = (error + 8 * u * magnitude) * _channels(scale.abs() + scale_error) + magnitude * _channels(scale_error)
    return Approx(value * _channels(scale), error), sum_dz_x_hat, sum_dz


# ---- max pooling


def windows(x: Tensor, kernel, stride, padding, outside: float) -> Tensor:
    """[KH * KW, N, C, OH, OW]: every pixel of every window."""
    size = [(x.shape[2 + a] + 2 * padding[a] - kernel[a]) // stride[a] + 1 for a in (0, 1)]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=outside)
    rows, columns = ((count - 1) * step + 1 for count, step in zip(size, stride, strict=True))
    places = [(i, j) for i in range(kernel[0]) for j in range(kernel[1])]
    return torch.stack([x[:, :, i : i + rows : stride[0], j : j + columns : stride[1]] for i, j in places])


def max_pool(x: Approx, kernel, stride, padding) -> Approx:
    window = (kernel, stride, padding)
    return Approx(windows(x.value, *window, -torch.inf).amax(0), windows(x.error, *window, 0.0).amax(0))


def max_pool_backward(dy: Approx, x: Approx, source: Tensor, kernel, stride, padding, u: float) -> Approx:
    """The first maximum of a window takes its gradient; any that rounding may make the maximum takes it or not.

    source: what x was computed of. Of pixels that are equal there the first is the maximum: they are rounded alike.
    """
    window = (kernel, stride, padding)
    values, errors = windows(x.value, *window, -torch.inf), windows(x.error, *window, 0.0)
    first = values.max(0, keepdim=True)
    chosen = (values == first.values).to(torch.int8).argmax(0, keepdim=True)
    sources = windows(source, *window, torch.nan)
    alike = sources == sources.gather(0, chosen)
    highest = values.gather(0, chosen) - errors.gather(0, chosen)
    possible = (values + errors >= highest) & ~alike
    possible |= alike & possible.any(0)
    at = torch.zeros_like(values).scatter_(0, chosen, 1.0)
    pixel = torch.arange(1, x.value.numel() + 1, dtype=torch.float64).view(x.value.shape)
    places = windows(pixel, *window, 0.0).long()  # 0 is outside the image
    value, error, magnitude = torch.zeros(3, x.value.numel() + 1, dtype=torch.float64)
    value.index_add_(0, places.flatten(), (at * dy.value).flatten())
    error.index_add_(0, places.flatten(), (at * dy.error + possible * dy.size()).flatten())
    magnitude.index_add_(0, places.flatten(), (at * dy.size()).flatten())
    error += SLACK * (values.shape[0] + 4) * u * magnitude
    return Approx(value[1:].view(x.value.shape), error[1:].view(x.value.shape))
