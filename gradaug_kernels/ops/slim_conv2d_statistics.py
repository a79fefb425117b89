"""Convolution and the statistics of its result, which the batch norm after it needs.

    y           = conv2d(x, weight[:out_channels, :C / groups], bias[:out_channels], ...)      ops/slim_conv2d.py
    mean, var   = mean and biased variance of each channel of y

A kernel can sum them while it has y in registers. `slim_channel_statistics` is the second line alone.

    x, weight, bias, y   as in slim_conv2d
    mean, var            [out_channels]   float32; float64 where x is; not differentiable
"""

from torch import Tensor

from .._library import autocast_rule, composed, count_flops, define, differentiable, differentiable_into_buffer
from ._common import autocast_dtype, check_gradient_buffer, in_autocast
from ._conv import CONVOLUTION, convolution_arguments
from ._norm import statistics_fake
from .slim_batch_norm import slim_batch_norm_composition, slim_batch_norm_op
from .slim_conv2d import (
    cast_slim_conv2d,
    check_slim_conv2d,
    forward_flops,
    save_for_gradients,
    slim_conv2d_composition,
    slim_conv2d_fake,
    slim_conv2d_gradients,
    slim_conv2d_op,
)

_AS_THEY_ARE = (None, None, None, None, None, False, 0.0)  # a batch norm whose statistics alone are of use


# ---- statistics of an activation


def slim_channel_statistics_reference(x):
    return slim_batch_norm_op(x, *_AS_THEY_ARE)[1:]  # whatever kernel of batch norm serves the device


def slim_channel_statistics_composition(x):
    return slim_batch_norm_composition(x, *_AS_THEY_ARE)[1:]


slim_channel_statistics_op = define(
    "slim_channel_statistics(Tensor x) -> (Tensor mean, Tensor var)",
    slim_channel_statistics_reference,
    statistics_fake,
    composite=True,
)
composed(slim_channel_statistics_op, slim_channel_statistics_composition)


# ---- a convolution and those of its result: schema, reference, fake


def slim_conv2d_statistics_reference(x, *convolution):
    y = slim_conv2d_op(x, *convolution)
    return y, *slim_channel_statistics_op(y)


def _fake(x, *convolution):
    y = slim_conv2d_fake(x, *convolution)
    return y, *statistics_fake(y)


_slim_conv2d_statistics = define(
    f"slim_conv2d_statistics(Tensor x, {CONVOLUTION}) -> (Tensor y, Tensor mean, Tensor var)",
    slim_conv2d_statistics_reference,
    _fake,
    composite=True,
)


# ---- autograd


def _setup_context(ctx, inputs, output):
    y, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    save_for_gradients(ctx, inputs, y)


def _gradients(ctx, saved, needs, dy, weight_grad):
    return (None,) * len(needs) if dy is None else slim_conv2d_gradients(ctx, saved, needs, dy, weight_grad)


def _backward(ctx, saved, needs, dy, *_):
    return _gradients(ctx, saved, needs, dy, None)


def slim_conv2d_statistics_composition(x, *convolution):
    y = slim_conv2d_composition(x, *convolution)
    return y, *slim_channel_statistics_composition(y)


_apply = differentiable(_slim_conv2d_statistics, _setup_context, _backward, slim_conv2d_statistics_composition)
_apply_into_buffer = differentiable_into_buffer(_slim_conv2d_statistics, _setup_context, _gradients)
autocast_rule(_slim_conv2d_statistics)(cast_slim_conv2d)
count_flops(_slim_conv2d_statistics, forward_flops)


# ---- public function


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
    convolution = convolution_arguments(weight, bias, out_channels, stride, padding, dilation, groups)
    check_slim_conv2d(x, *convolution)
    if weight_grad is not None:
        check_gradient_buffer(weight_grad, weight)
    if in_autocast(x):
        x, *convolution = cast_slim_conv2d(autocast_dtype(x), x, *convolution)
    if weight_grad is None:
        return _apply(x, *convolution)
    return _apply_into_buffer(x, *convolution, weight_grad)
