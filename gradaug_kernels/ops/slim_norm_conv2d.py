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

from typing import NamedTuple

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
from ._common import (
    arguments_of,
    autocast_dtype,
    autocast_parameter,
    bias_grad,
    check_gradient_buffer,
    check_same_device,
    check_written,
    in_autocast,
)
from ._conv import CONVOLUTION, OPTIONS, Convolution, Options, convolution_arguments
from ._norm import (
    NORM,
    NORM_BACKWARD,
    cast_norm,
    norm_gradients_fake,
    norm_gradients_of,
    norm_of,
    normalised,
    statistics_fake,
)
from .slim_batch_norm import (
    check_slim_batch_norm,
    check_slim_batch_norm_backward,
    slim_batch_norm_backward_composition,
    slim_batch_norm_backward_op,
    slim_batch_norm_op,
)
from .slim_conv2d import (
    backward_flops,
    check_slim_conv2d,
    check_slim_conv2d_weight_grad,
    forward_flops,
    slim_conv2d_composition,
    slim_conv2d_fake,
    slim_conv2d_input_grad_composition,
    slim_conv2d_input_grad_op,
    slim_conv2d_op,
    slim_conv2d_weight_grad__op,
    slim_conv2d_weight_grad_composition,
)
from .slim_conv2d_statistics import slim_channel_statistics_composition, slim_channel_statistics_op

SCHEMA = (
    f"slim_norm_conv2d(Tensor x, {NORM}, {CONVOLUTION}, bool statistics) "
    "-> (Tensor y, Tensor mean, Tensor var, Tensor y_mean, Tensor y_var)"
)
Arguments = arguments_of(SCHEMA)


def check_slim_norm_conv2d(x, norm, convolution) -> None:
    """The contract of the arguments, for the operator and for its fake alike.

    norm, convolution: what slim_batch_norm and slim_conv2d take after x.

    Raises:
        ValueError: for shapes that do not fit. TypeError: for dtypes that are not floating or that differ.
    """
    check_slim_conv2d(x, *convolution)
    check_slim_batch_norm(x, *norm, names=("gamma", "beta"))


# ---- forward: reference, fake


def slim_norm_conv2d_reference(*arguments):
    a = Arguments(*arguments)
    activation, mean, var = slim_batch_norm_op(a.x, *norm_of(a))
    y = slim_conv2d_op(activation, *Convolution.of(a))
    if a.statistics:
        return y, mean, var, *slim_channel_statistics_op(y)
    return y, mean, var, mean.new_empty(0), mean.new_empty(0)


def _fake(*arguments):
    a = Arguments(*arguments)
    check_slim_norm_conv2d(a.x, norm_of(a), Convolution.of(a))
    check_same_device(a.x, mean=a.mean, var=a.var, gamma=a.gamma, beta=a.beta)
    y = slim_conv2d_fake(a.x, *Convolution.of(a))
    mean, var = statistics_fake(a.x)
    if a.statistics:
        return y, mean, var, *statistics_fake(y)
    return y, mean, var, mean.new_empty(0), mean.new_empty(0)


_slim_norm_conv2d = define(SCHEMA, slim_norm_conv2d_reference, _fake, composite=True)


# ---- backward: one operator, so that a is made once and cannot be taken for something worth saving by a compiler.
# The weight's gradient is added to the slice of a full-size buffer. What is not needed is an empty tensor.

_GRADIENTS = "Tensor dx, Tensor dgamma, Tensor dbeta"
BACKWARD_SCHEMA = (
    f"slim_norm_conv2d_backward(Tensor dy, Tensor x, {NORM_BACKWARD}, Tensor weight, {OPTIONS}, "
    f"bool needs_dx, bool needs_dweight) -> ({_GRADIENTS}, Tensor dweight)"
)
BACKWARD__SCHEMA = (
    f"slim_norm_conv2d_backward_(Tensor dy, Tensor x, {NORM_BACKWARD}, Tensor weight, Tensor(a!) dweight, {OPTIONS}, "
    f"bool needs_dx, bool needs_dweight) -> ({_GRADIENTS})"
)
BackwardArguments = arguments_of(BACKWARD_SCHEMA)
BufferArguments = arguments_of(BACKWARD__SCHEMA)


def slim_norm_conv2d_backward__reference(*arguments):
    a = BufferArguments(*arguments)
    if a.needs_dweight:
        check_written("dweight", a.dweight, x=a.x)  # which is read after dweight is written
    activation = None
    if a.needs_dweight or (a.needs_dx and a.relu):
        activation, *_ = slim_batch_norm_op(a.x, *norm_of(a))
    if a.needs_dweight:
        slim_conv2d_weight_grad__op(a.dy, activation, a.dweight, *Options.of(a))
    if not a.needs_dx:
        return a.x.new_empty(0), a.mean.new_empty(0), a.mean.new_empty(0)
    da = slim_conv2d_input_grad_op(a.dy, a.weight, a.x.shape, *Options.of(a))
    norm = norm_gradients_of(a, activation if a.relu else None)
    dx, _, dgamma, dbeta = slim_batch_norm_backward_op(da, a.x, *norm)
    return dx, dgamma, dbeta


def _backward__fake(*arguments):
    a = BufferArguments(*arguments)
    check_slim_conv2d_weight_grad(a.dy, a.x, a.weight, *Options.of(a))
    check_slim_batch_norm_backward(a.x, a.x, *norm_gradients_of(a, None))
    check_same_device(a.x, dweight=a.dweight)
    return norm_gradients_fake(a.x, a.mean, a.gamma, a.beta, a.needs_dx)


_slim_norm_conv2d_backward_ = define(
    BACKWARD__SCHEMA, slim_norm_conv2d_backward__reference, _backward__fake, composite=True
)


def slim_norm_conv2d_backward_reference(*arguments):
    a = BackwardArguments(*arguments)
    dweight = torch.zeros_like(a.weight) if a.needs_dweight else a.weight.new_empty(0)
    return *_slim_norm_conv2d_backward_(*BufferArguments(dweight=dweight, **a._asdict())), dweight


def _backward_fake(*arguments):
    a = BackwardArguments(*arguments)
    dweight = torch.empty_like(a.weight) if a.needs_dweight else a.weight.new_empty(0)
    return *_backward__fake(*BufferArguments(dweight=dweight, **a._asdict())), dweight


_slim_norm_conv2d_backward = define(
    BACKWARD_SCHEMA, slim_norm_conv2d_backward_reference, _backward_fake, composite=True
)


# ---- autograd


def _setup_context(ctx, inputs, output):
    given = Arguments(*inputs)
    _, mean, var, *y_statistics = output
    ctx.mark_non_differentiable(mean, var, *y_statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(given.x, mean, var, given.gamma, given.beta, given.weight)
    ctx.batch_stats, ctx.relu, ctx.eps = given.batch_stats or given.mean is None, given.relu, given.eps
    ctx.options = Options.of(given)
    ctx.bias_size = None if given.bias is None else given.bias.shape[0]


def _gradients(ctx, saved, needs, dy, weight_grad):
    """The gradients of all inputs of the operator; that of weight is added to weight_grad, if that is a buffer."""
    if dy is None:
        return Arguments()
    x, mean, var, gamma, beta, weight = saved
    needs = Arguments(*needs)
    needed = (needs.x or needs.gamma or needs.beta, needs.weight)
    norm = (mean, var, gamma, beta, ctx.batch_stats, ctx.relu, ctx.eps)
    if weight_grad is None:
        dx, dgamma, dbeta, dweight = _slim_norm_conv2d_backward(dy, x, *norm, weight, *ctx.options, *needed)
    else:
        dx, dgamma, dbeta = _slim_norm_conv2d_backward_(dy, x, *norm, weight, weight_grad, *ctx.options, *needed)
        dweight = None
    return Arguments(
        x=dx if needs.x else None,
        gamma=dgamma if needs.gamma else None,
        beta=dbeta if needs.beta else None,
        weight=dweight if needs.weight else None,
        bias=bias_grad(dy, 1, ctx.bias_size) if needs.bias else None,
    )


def _backward(ctx, saved, needs, dy, *_):
    return _gradients(ctx, saved, needs, dy, None)


def slim_norm_conv2d_composition(*arguments):
    a = Arguments(*arguments)
    activation, mean, var = normalised(a)
    y = slim_conv2d_composition(activation, *Convolution.of(a))
    if a.statistics:
        return y, mean, var, *slim_channel_statistics_composition(y)
    return y, mean, var, mean.new_empty(0), mean.new_empty(0)


def slim_norm_conv2d_backward_composition(*arguments):
    a = BackwardArguments(*arguments)
    activation, *_ = normalised(a)
    dx, dgamma, dbeta = a.x.new_empty(0), a.mean.new_empty(0), a.mean.new_empty(0)
    dweight = a.weight.new_empty(0)
    if a.needs_dweight:
        dweight = slim_conv2d_weight_grad_composition(a.dy, activation, a.weight, *Options.of(a))
    if a.needs_dx:
        da = slim_conv2d_input_grad_composition(a.dy, a.weight, a.x.shape, *Options.of(a))
        norm = norm_gradients_of(a, activation if a.relu else None)
        dx, _, dgamma, dbeta = slim_batch_norm_backward_composition(da, a.x, *norm)
    return dx, dgamma, dbeta, dweight


_apply = differentiable(_slim_norm_conv2d, _setup_context, _backward, slim_norm_conv2d_composition, cpp=True)
_apply_into_buffer = differentiable_into_buffer(_slim_norm_conv2d, _setup_context, _gradients, cpp=True)
composed(_slim_norm_conv2d_backward, slim_norm_conv2d_backward_composition)
not_differentiable(_slim_norm_conv2d_backward_)


# ---- floating-point operations: those of the convolution


def _forward_flops(*arguments):
    a = Arguments(*arguments)
    return forward_flops(a.x, *Convolution.of(a))


def _backward_flops(a):
    return backward_flops(a.dy, a.x, a.weight, Options.of(a), a.needs_dx, a.needs_dweight)


count_flops(_slim_norm_conv2d, _forward_flops)
count_flops(_slim_norm_conv2d_backward, lambda *arguments: _backward_flops(BackwardArguments(*arguments)))
count_flops(_slim_norm_conv2d_backward_, lambda *arguments: _backward_flops(BufferArguments(*arguments)))


@autocast_rule(_slim_norm_conv2d)
def _autocast(dtype, *arguments):
    a = Arguments(*arguments)
    mean, var, gamma, beta = cast_norm(dtype, a.mean, a.var, a.gamma, a.beta)
    weight, bias = autocast_parameter(dtype, a.weight), autocast_parameter(dtype, a.bias)
    return a._replace(x=a.x.to(dtype), mean=mean, var=var, gamma=gamma, beta=beta, weight=weight, bias=bias)


# ---- public function


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
    convolution = convolution_arguments(weight, bias, out_channels, stride, padding, dilation, groups)
    check_slim_norm_conv2d(x, (gamma, beta, mean, var, None, relu, eps), convolution)
    arguments = (x, mean, var, gamma, beta, batch_stats, relu, eps, *convolution, statistics)
    if weight_grad is not None:
        check_gradient_buffer(weight_grad, weight)
    if in_autocast(x):
        arguments = _autocast(autocast_dtype(x), *arguments)
    output = _apply(*arguments) if weight_grad is None else _apply_into_buffer(*arguments, weight_grad)
    return NormConv(*output[:3], *(output[3:] if statistics else (None, None)))
