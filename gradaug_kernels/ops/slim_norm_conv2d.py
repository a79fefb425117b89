"""Convolution of a batch norm's output, which is never stored: the link of a chain conv, norm, ReLU, conv, norm, ...

    a     = relu?(batch_norm(x; mean, var, gamma[:C], beta[:C]))                           ops/slim_batch_norm.py
    y     = conv2d(a, weight[:out_channels, :C / groups], bias[:out_channels], ...)        ops/slim_conv2d.py
    y_mean, y_var = mean and biased variance of each channel of y, where `statistics` asks for them

x is the raw output of the convolution before, mean and var its statistics. Padding is of a: padded pixels are 0. Only
x, statistics and parameters are saved for the backward pass, which makes a again: of each convolution one tensor is
kept, where a norm and a convolution of their own keep two. The statistics of y are what the batch norm after it needs;
a kernel can sum them while it has y in registers.

    x              [N, C, H, W]            any strides
    mean, var      [C]                     float32; float64 where x is; not differentiable
    gamma, beta    [F] or None             F >= C; float32, or the dtype of x
    weight, bias   as in slim_conv2d       the dtype of x
    y_mean, y_var  [out_channels] or [0]   as mean and var

Where mean and var are the batch's, dx includes what flows through them (`batch_stats`; slim_batch_norm.py has the
formula), whoever computed them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._library import (
    autocast_rule,
    composed,
    count_flops,
    define,
    differentiable,
    differentiable_into_buffer,
    not_differentiable,
)
from ._common import autocast_parameter, bias_grad, check_gradient_buffer, check_same_device, check_written, in_autocast
from .slim_batch_norm import (
    _slim_batch_norm,
    _slim_batch_norm_backward,
    _stats_dtype,
    check_slim_batch_norm,
    check_slim_batch_norm_backward,
    slim_batch_norm_backward_composition,
    slim_batch_norm_composition,
)
from .slim_conv2d import _autocast as _conv_autocast
from .slim_conv2d import _fake as _conv_fake
from .slim_conv2d import _gradients as _conv_gradients
from .slim_conv2d import (
    _memory_format,
    _out_channels_and_geometry,
    _slim_conv2d,
    _slim_conv2d_input_grad,
    _slim_conv2d_weight_grad_,
    backward_flops,
    check_slim_conv2d,
    check_slim_conv2d_weight_grad,
    forward_flops,
    slim_conv2d_composition,
    slim_conv2d_input_grad_composition,
    slim_conv2d_weight_grad_composition,
)
from .slim_conv2d import _setup_context as _conv_setup_context

NORM = "Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, bool batch_stats, bool relu, float eps"
GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
CONV = f"Tensor weight, Tensor? bias, SymInt out_channels, {GEOMETRY}"


def check_slim_norm_conv2d(x, mean, var, gamma, beta, relu, eps, weight, bias, out_channels, *geometry) -> None:
    """The contract of the arguments, for the operator and for its fake alike.

    Raises:
        ValueError: for shapes that do not fit. TypeError: for dtypes that are not floating or that differ.
    """
    check_slim_conv2d(x, weight, bias, out_channels, *geometry)
    check_slim_batch_norm(x, gamma, beta, mean, var, None, relu, eps, names=("gamma", "beta"))


# ---- statistics of an activation


def slim_channel_statistics_reference(x):
    # Whatever kernel of batch norm serves the device; of its results the statistics alone.
    return _slim_batch_norm(x, None, None, None, None, None, False, 0.0)[1:]


def _statistics_fake(x):
    mean = x.new_empty(x.shape[1], dtype=_stats_dtype(x))
    return mean, torch.empty_like(mean)


_slim_channel_statistics = define(
    "slim_channel_statistics(Tensor x) -> (Tensor mean, Tensor var)",
    slim_channel_statistics_reference,
    _statistics_fake,
    composite=True,
)


def _statistics_composition(x):
    return slim_batch_norm_composition(x, None, None, None, None, None, False, 0.0)[1:]


composed(_slim_channel_statistics, _statistics_composition)


def _statistics(y: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [out] of y, or two empty tensors."""
    if wanted:
        return _slim_channel_statistics(y)
    return y.new_empty(0, dtype=_stats_dtype(y)), y.new_empty(0, dtype=_stats_dtype(y))


# ---- a plain convolution and the statistics of its output


def slim_conv2d_statistics_reference(x, weight, bias, out_channels, stride, padding, dilation, groups):
    y = _slim_conv2d(x, weight, bias, out_channels, stride, padding, dilation, groups)
    return y, *_slim_channel_statistics(y)


def _conv2d_statistics_fake(x, *arguments):
    y = _conv_fake(x, *arguments)
    return y, *_statistics_fake(y)


_slim_conv2d_statistics = define(
    f"slim_conv2d_statistics(Tensor x, {CONV}) -> (Tensor y, Tensor mean, Tensor var)",
    slim_conv2d_statistics_reference,
    _conv2d_statistics_fake,
    composite=True,
)


def _conv2d_statistics_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    _conv_setup_context(ctx, inputs, output[0])


def _conv2d_statistics_gradients(ctx, saved, needs, dy, weight_grad):
    return (None,) * 8 if dy is None else _conv_gradients(ctx, saved, needs, dy, weight_grad)


def _conv2d_statistics_backward(ctx, saved, needs, dy, *_):
    return _conv2d_statistics_gradients(ctx, saved, needs, dy, None)


def _conv2d_statistics_composition(*arguments):
    y = slim_conv2d_composition(*arguments)
    return y, *_statistics_composition(y)


_apply_statistics = differentiable(
    _slim_conv2d_statistics, _conv2d_statistics_setup, _conv2d_statistics_backward, _conv2d_statistics_composition
)
_apply_statistics_into_buffer = differentiable_into_buffer(
    _slim_conv2d_statistics, _conv2d_statistics_setup, _conv2d_statistics_gradients
)
autocast_rule(_slim_conv2d_statistics)(_conv_autocast)
count_flops(_slim_conv2d_statistics, forward_flops)


# ---- norm and convolution: schema, reference, fake


def slim_norm_conv2d_reference(x, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, out_channels, *rest):
    *geometry, statistics = rest
    activation, mean, var = _slim_batch_norm(x, gamma, beta, mean, var, None, relu, eps)
    y = _slim_conv2d(activation, weight, bias, out_channels, *geometry)
    return y, mean, var, *_statistics(y, statistics)


def _fake(x, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, out_channels, *rest):
    *geometry, statistics = rest
    check_slim_norm_conv2d(x, mean, var, gamma, beta, relu, eps, weight, bias, out_channels, *geometry)
    check_same_device(x, mean=mean, var=var, gamma=gamma, beta=beta)
    y = _conv_fake(x, weight, bias, out_channels, *geometry)
    mean, var = _statistics_fake(x)
    if statistics:
        return y, mean, var, *_statistics_fake(y)
    return y, mean, var, mean.new_empty(0), mean.new_empty(0)


_slim_norm_conv2d = define(
    f"slim_norm_conv2d(Tensor x, {NORM}, {CONV}, bool statistics) "
    "-> (Tensor y, Tensor mean, Tensor var, Tensor y_mean, Tensor y_var)",
    slim_norm_conv2d_reference,
    _fake,
    composite=True,
)


# ---- backward: one operator, so that a is made once and cannot be taken for something worth saving by a compiler.
# The weight's gradient is added to the slice of a full-size buffer. What is not needed is an empty tensor.


def slim_norm_conv2d_backward__reference(dy, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, dweight, *rest):
    *geometry, needs_dx, needs_dweight = rest
    if needs_dweight:
        check_written("dweight", dweight, x=x)  # which is read after dweight is written
    activation = None
    if needs_dweight or (needs_dx and relu):
        activation = _slim_batch_norm(x, gamma, beta, mean, var, None, relu, eps)[0]
    if needs_dweight:
        _slim_conv2d_weight_grad_(dy, activation, dweight, *geometry)
    if not needs_dx:
        return x.new_empty(0), mean.new_empty(0), mean.new_empty(0)
    da = _slim_conv2d_input_grad(dy, weight, x.shape, *geometry)
    dx, _, dgamma, dbeta = _slim_batch_norm_backward(
        da, x, activation if relu else None, gamma, beta, mean, var, batch_stats, False, eps
    )
    return dx, dgamma, dbeta


def norm_grad_fakes(x, mean, gamma, beta, needs_dx):
    """dx, dgamma, dbeta, empty where not needed."""
    if not needs_dx:
        return x.new_empty(0), mean.new_empty(0), mean.new_empty(0)
    dx = x.new_empty(x.shape).contiguous(memory_format=_memory_format(x))
    return dx, *(mean.new_empty(0) if p is None else torch.empty_like(p) for p in (gamma, beta))


def _backward__fake(dy, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, dweight, *rest):
    check_slim_conv2d_weight_grad(dy, x, weight, *rest[:4])
    check_slim_batch_norm_backward(x, x, None, gamma, beta, mean, var, batch_stats, False, eps)
    check_same_device(x, dweight=dweight)
    *_, needs_dx, _ = rest
    return norm_grad_fakes(x, mean, gamma, beta, needs_dx)


_BACKWARD_NORM = "Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, bool batch_stats, bool relu, float eps"

_slim_norm_conv2d_backward_ = define(
    f"slim_norm_conv2d_backward_(Tensor dy, Tensor x, {_BACKWARD_NORM}, Tensor weight, Tensor(a!) dweight, {GEOMETRY}, "
    "bool needs_dx, bool needs_dweight) -> (Tensor dx, Tensor dgamma, Tensor dbeta)",
    slim_norm_conv2d_backward__reference,
    _backward__fake,
    composite=True,
)


def slim_norm_conv2d_backward_reference(dy, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, *rest):
    *_, needs_dweight = rest
    dweight = torch.zeros_like(weight) if needs_dweight else weight.new_empty(0)
    norm = (mean, var, gamma, beta, batch_stats, relu, eps)
    return *_slim_norm_conv2d_backward_(dy, x, *norm, weight, dweight, *rest), dweight


def _backward_fake(dy, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, *rest):
    dweight = torch.empty_like(weight) if rest[-1] else weight.new_empty(0)
    norm = (mean, var, gamma, beta, batch_stats, relu, eps)
    return *_backward__fake(dy, x, *norm, weight, dweight, *rest), dweight


_slim_norm_conv2d_backward = define(
    f"slim_norm_conv2d_backward(Tensor dy, Tensor x, {_BACKWARD_NORM}, Tensor weight, {GEOMETRY}, "
    "bool needs_dx, bool needs_dweight) -> (Tensor dx, Tensor dgamma, Tensor dbeta, Tensor dweight)",
    slim_norm_conv2d_backward_reference,
    _backward_fake,
    composite=True,
)


# ---- autograd


class _Inputs(NamedTuple):
    """The operator's arguments; and their gradients, None where there is none."""

    x: Any = None
    mean: Any = None
    var: Any = None
    gamma: Any = None
    beta: Any = None
    batch_stats: Any = None
    relu: Any = None
    eps: Any = None
    weight: Any = None
    bias: Any = None
    out_channels: Any = None
    stride: Any = None
    padding: Any = None
    dilation: Any = None
    groups: Any = None
    statistics: Any = None


def _setup_context(ctx, inputs, output):
    given = _Inputs(*inputs)
    _, mean, var, *y_statistics = output
    ctx.mark_non_differentiable(mean, var, *y_statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(given.x, mean, var, given.gamma, given.beta, given.weight)
    ctx.batch_stats, ctx.relu, ctx.eps = given.batch_stats or given.mean is None, given.relu, given.eps
    ctx.geometry = (given.stride, given.padding, given.dilation, given.groups)
    ctx.bias_size = None if given.bias is None else given.bias.shape[0]


def _gradients(ctx, saved, needs, dy, weight_grad):
    """The gradients of all inputs of the operator; that of weight is added to weight_grad, if that is a buffer."""
    if dy is None:
        return _Inputs()
    x, mean, var, gamma, beta, weight = saved
    needs = _Inputs(*needs[: len(_Inputs._fields)])
    needed = (needs.x or needs.gamma or needs.beta, needs.weight)
    norm = (mean, var, gamma, beta, ctx.batch_stats, ctx.relu, ctx.eps)
    if weight_grad is None:
        dx, dgamma, dbeta, dweight = _slim_norm_conv2d_backward(dy, x, *norm, weight, *ctx.geometry, *needed)
    else:
        dx, dgamma, dbeta = _slim_norm_conv2d_backward_(dy, x, *norm, weight, weight_grad, *ctx.geometry, *needed)
        dweight = None
    return _Inputs(
        x=dx if needs.x else None,
        gamma=dgamma if needs.gamma else None,
        beta=dbeta if needs.beta else None,
        weight=dweight if needs.weight else None,
        bias=bias_grad(dy, 1, ctx.bias_size) if needs.bias else None,
    )


def _backward(ctx, saved, needs, dy, *_):
    return _gradients(ctx, saved, needs, dy, None)


def slim_norm_conv2d_composition(x, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, out_channels, *rest):
    *geometry, statistics = rest
    activation, mean, var = normalised(x, mean, var, gamma, beta, batch_stats, relu, eps)
    y = slim_conv2d_composition(activation, weight, bias, out_channels, *geometry)
    if statistics:
        return y, mean, var, *_statistics_composition(y)
    return y, mean, var, mean.new_empty(0), mean.new_empty(0)


def normalised(x, mean, var, gamma, beta, batch_stats, relu, eps) -> tuple[Tensor, Tensor, Tensor]:
    """The activation, composed of PyTorch's operators, and the statistics used: those of x are functions of it."""
    statistics = (None, None) if batch_stats else (mean, var)
    return slim_batch_norm_composition(x, gamma, beta, *statistics, None, relu, eps)


def slim_norm_conv2d_backward_composition(dy, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, *rest):
    *geometry, needs_dx, needs_dweight = rest
    activation, *_ = normalised(x, mean, var, gamma, beta, batch_stats, relu, eps)
    dx, dgamma, dbeta, dweight = x.new_empty(0), mean.new_empty(0), mean.new_empty(0), weight.new_empty(0)
    if needs_dweight:
        dweight = slim_conv2d_weight_grad_composition(dy, activation, weight, *geometry)
    if needs_dx:
        da = slim_conv2d_input_grad_composition(dy, weight, x.shape, *geometry)
        mask = activation if relu else None
        dx, _, dgamma, dbeta = slim_batch_norm_backward_composition(
            da, x, mask, gamma, beta, mean, var, batch_stats, False, eps
        )
    return dx, dgamma, dbeta, dweight


_apply = differentiable(_slim_norm_conv2d, _setup_context, _backward, slim_norm_conv2d_composition, cpp=True)
_apply_into_buffer = differentiable_into_buffer(_slim_norm_conv2d, _setup_context, _gradients, cpp=True)
composed(_slim_norm_conv2d_backward, slim_norm_conv2d_backward_composition)
not_differentiable(_slim_norm_conv2d_backward_)


# ---- floating-point operations: those of the convolution


def _backward_flops(dy, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, *rest):
    *_, groups, needs_dx, needs_dweight = rest
    return backward_flops(dy, x, weight, groups, needs_dx, needs_dweight)


def _forward_flops(*inputs):
    i = _Inputs(*inputs)
    return forward_flops(i.x, i.weight, i.bias, i.out_channels, i.stride, i.padding, i.dilation, i.groups)


count_flops(_slim_norm_conv2d, _forward_flops)
count_flops(_slim_norm_conv2d_backward, _backward_flops)
count_flops(_slim_norm_conv2d_backward_, _backward_flops)


@autocast_rule(_slim_norm_conv2d)
def _autocast(dtype, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, *rest):
    mean, var, gamma, beta = cast_norm(dtype, mean, var, gamma, beta)
    weight, bias = autocast_parameter(dtype, weight), autocast_parameter(dtype, bias)
    return x.to(dtype), mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, *rest


def cast_norm(dtype: torch.dtype, mean, var, gamma, beta) -> list[Tensor | None]:
    """Statistics and parameters for an x that autocast casts to dtype: float32, or as they are where dtype allows."""
    allowed = ((torch.float32,), (torch.float32,), (torch.float32, dtype), (torch.float32, dtype))
    return [
        tensor if tensor is None or tensor.dtype in dtypes else tensor.float()
        for tensor, dtypes in zip((mean, var, gamma, beta), allowed, strict=True)
    ]


# ---- public functions


class NormConv(NamedTuple):
    """What slim_norm_conv2d returns."""

    y: Tensor  # [N, out_channels, OH, OW]
    mean: Tensor  # [C] of x, as used
    var: Tensor
    y_mean: Tensor | None  # [out_channels] of y, where asked for
    y_var: Tensor | None


def slim_norm_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_channels: int | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    batch_stats: bool = False,
    relu: bool = False,
    eps: float = 1e-5,
    statistics: bool = False,
    weight_grad: Tensor | None = None,
) -> NormConv:
    """`slim_conv2d(relu?(slim_batch_norm(x, gamma, beta, mean, var)), weight, ...)`, keeping nothing in between.

    Args:
        x: [N, C, H, W], floating point, any strides: what the convolution before wrote.
        weight, bias, out_channels, stride, padding, dilation, groups, weight_grad: as `slim_conv2d`.
        gamma, beta: [F], F >= C, float32 or dtype of x; None is 1 and 0.
        mean, var: [C], float32 (float64 for float64 x): statistics to normalise with; None takes the batch's.
        batch_stats: mean and var are those of x, so that the backward pass differentiates through them.
        relu: apply a ReLU after the norm.
        eps: added to the variance.
        statistics: return the mean and biased variance of each channel of y too.

    Returns:
        y [N, out_channels, OH, OW] in the dtype of x, the statistics that were used, and those of y or None.

    Raises:
        ValueError, TypeError: as `check_slim_norm_conv2d`, when shapes or dtypes do not fit.
    """
    out_channels, geometry = _out_channels_and_geometry(weight, out_channels, stride, padding, dilation, groups)
    norm = (mean, var, gamma, beta)
    check_slim_norm_conv2d(x, *norm, relu, eps, weight, bias, out_channels, *geometry)
    arguments = (x, *norm, batch_stats, relu, eps, weight, bias, out_channels, *geometry, statistics)
    if weight_grad is not None:
        check_gradient_buffer(weight_grad, weight)
    if in_autocast(x):
        arguments = _autocast(torch.get_autocast_dtype(x.device.type), *arguments)
    output = _apply(*arguments) if weight_grad is None else _apply_into_buffer(*arguments, weight_grad)
    return NormConv(*output[:3], *(output[3:] if statistics else (None, None)))


def slim_conv2d_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_channels: int | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`slim_conv2d` and the mean and biased variance [out_channels] of each channel of its result.

    Args, Raises: as `slim_conv2d`.
    """
    out_channels, geometry = _out_channels_and_geometry(weight, out_channels, stride, padding, dilation, groups)
    check_slim_conv2d(x, weight, bias, out_channels, *geometry)
    if weight_grad is not None:
        check_gradient_buffer(weight_grad, weight)
    if in_autocast(x):
        x, weight, bias = _conv_autocast(torch.get_autocast_dtype(x.device.type), x, weight, bias)
    if weight_grad is None:
        return _apply_statistics(x, weight, bias, out_channels, *geometry)
    return _apply_statistics_into_buffer(x, weight, bias, out_channels, *geometry, weight_grad)
