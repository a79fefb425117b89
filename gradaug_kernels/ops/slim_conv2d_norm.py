"""Convolution and the batch norm after it, whose input is not stored: the end of a chain, computed again in backward.

    a = relu?(batch_norm(x; mean, var, gamma[:C], beta[:C]))  where `normalise`, else x
    c = conv2d(a, weight[:out_channels, :C / groups], bias[:out_channels], ...)
    y = relu?(batch_norm(c; out_mean, out_var, out_gamma[:out_channels], out_beta[:out_channels]) + residual?)

Neither a nor c is saved for the backward pass, which costs it the convolution once more: worth it for a 1x1
convolution to many channels, such as the last of a bottleneck block, whose c is the largest tensor of the block.

    x, mean, var, gamma, beta, weight, bias    as in slim_norm_conv2d
    residual, y                                [N, out_channels, OH, OW], the dtype of x
    out_mean, out_var                          [out_channels]; None takes those of c
    out_gamma, out_beta                        [F] or None, F >= out_channels; float32, or the dtype of x
"""

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
    check_gradient_buffer,
    check_same_device,
    check_written,
    in_autocast,
)
from ._conv import CONVOLUTION, OPTIONS, Convolution, Options, convolution_arguments, memory_format, output_shape
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
    full_width,
    slim_batch_norm_backward_composition,
    slim_batch_norm_backward_op,
    slim_batch_norm_composition,
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

SCHEMA = (
    f"slim_conv2d_norm(Tensor x, bool normalise, {NORM}, {CONVOLUTION}, Tensor? out_mean, Tensor? out_var, "
    "Tensor? out_gamma, Tensor? out_beta, Tensor? residual, bool out_relu, float out_eps) "
    "-> (Tensor y, Tensor out_mean, Tensor out_var, Tensor mean, Tensor var)"
)
Arguments = arguments_of(SCHEMA)


def _out_norm_of(a) -> tuple:
    """What slim_batch_norm takes after c."""
    return a.out_gamma, a.out_beta, a.out_mean, a.out_var, a.residual, a.out_relu, a.out_eps


# ---- forward: reference, fake


def slim_conv2d_norm_reference(*arguments):
    a = Arguments(*arguments)
    activation, mean, var = a.x, a.x.new_empty(0), a.x.new_empty(0)
    if a.normalise:
        activation, mean, var = slim_batch_norm_op(a.x, *norm_of(a))
    c = slim_conv2d_op(activation, *Convolution.of(a))
    return *slim_batch_norm_op(c, *_out_norm_of(a)), mean, var


def check_slim_conv2d_norm(*arguments) -> None:
    """The contract of the arguments, for the operator and for its fake alike.

    Raises:
        ValueError: for shapes that do not fit. TypeError: for dtypes that are not floating or that differ.
    """
    a = Arguments(*arguments)
    check_slim_conv2d(a.x, *Convolution.of(a))
    if a.normalise:
        check_slim_batch_norm(a.x, *norm_of(a), names=("gamma", "beta"))
    elif not (a.mean is a.var is a.gamma is a.beta is None):
        raise ValueError("mean, var, gamma and beta must be None where x is not normalised")
    c = a.x.new_empty(1).expand(output_shape(a.x.shape, a.weight.shape, a.out_channels, *Options.of(a)))
    check_slim_batch_norm(c, *_out_norm_of(a), names=("out_gamma", "out_beta"))


def _fake(*arguments):
    check_slim_conv2d_norm(*arguments)
    a = Arguments(*arguments)
    others = {name: getattr(a, name) for name in ("mean", "var", "gamma", "beta", "residual")}
    others |= {name: getattr(a, name) for name in ("out_mean", "out_var", "out_gamma", "out_beta")}
    check_same_device(a.x, **others)
    c = slim_conv2d_fake(a.x, *Convolution.of(a))
    mean, var = statistics_fake(a.x) if a.normalise else (a.x.new_empty(0), a.x.new_empty(0))
    return c, *statistics_fake(c), mean, var


_slim_conv2d_norm = define(SCHEMA, slim_conv2d_norm_reference, _fake, composite=True)


# ---- backward: one operator, as in slim_norm_conv2d.py. What is not needed is an empty tensor.

_BACKWARD = f"Tensor dy, Tensor x, Tensor? y, bool normalise, {NORM_BACKWARD}, Tensor weight, Tensor? bias"
_BACKWARD_REST = (
    f"{OPTIONS}, Tensor out_mean, Tensor out_var, Tensor? out_gamma, Tensor? out_beta, bool out_batch_stats, "
    "float out_eps, bool needs_dx, bool needs_dweight, bool needs_dz"
)
_GRADIENTS = "Tensor dx, Tensor dgamma, Tensor dbeta, Tensor dbias, Tensor dout_gamma, Tensor dout_beta, Tensor dz"
BACKWARD_SCHEMA = f"slim_conv2d_norm_backward({_BACKWARD}, {_BACKWARD_REST}) -> ({_GRADIENTS}, Tensor dweight)"
BACKWARD__SCHEMA = f"slim_conv2d_norm_backward_({_BACKWARD}, Tensor(a!) dweight, {_BACKWARD_REST}) -> ({_GRADIENTS})"
BackwardArguments = arguments_of(BACKWARD_SCHEMA)
BufferArguments = arguments_of(BACKWARD__SCHEMA)


def _out_norm_gradients_of(a, c: Tensor) -> tuple:
    """What slim_batch_norm_backward takes for the norm of c."""
    norm = (a.out_gamma, a.out_beta, a.out_mean, a.out_var, a.out_batch_stats)
    return a.dy, c, a.y, *norm, a.needs_dz, a.out_eps


def slim_conv2d_norm_backward__reference(*arguments):
    a = BufferArguments(*arguments)
    if a.needs_dweight:
        check_written("dweight", a.dweight, dy=a.dy, x=a.x)  # which is read after dweight is written
    activation = slim_batch_norm_op(a.x, *norm_of(a))[0] if a.normalise else a.x
    c = slim_conv2d_op(activation, a.weight, a.bias, a.dy.shape[1], *Options.of(a))
    dc, dz, dout_gamma, dout_beta = slim_batch_norm_backward_op(*_out_norm_gradients_of(a, c))
    del c
    dbias = a.out_mean.new_empty(0) if a.bias is None else full_width(dc.sum((0, 2, 3)), a.bias)
    if a.needs_dweight:
        slim_conv2d_weight_grad__op(dc, activation, a.dweight, *Options.of(a))
    dx, dgamma, dbeta = a.x.new_empty(0), a.mean.new_empty(0), a.mean.new_empty(0)
    if a.needs_dx:
        dx = slim_conv2d_input_grad_op(dc, a.weight, a.x.shape, *Options.of(a))
        del dc
        if a.normalise:
            norm = norm_gradients_of(a, activation if a.relu else None)
            dx, _, dgamma, dbeta = slim_batch_norm_backward_op(dx, a.x, *norm)
    return dx, dgamma, dbeta, dbias, dout_gamma, dout_beta, dz


def _backward__fake(*arguments):
    a = BufferArguments(*arguments)
    check_slim_conv2d(a.x, a.weight, a.bias, a.dy.shape[1], *Options.of(a))
    check_slim_conv2d_weight_grad(a.dy, a.x, a.weight, *Options.of(a))
    if a.normalise:
        check_slim_batch_norm(a.x, *norm_of(a), names=("gamma", "beta"))
    check_slim_batch_norm_backward(*_out_norm_gradients_of(a, a.dy))
    check_same_device(a.x, mean=a.mean, var=a.var, gamma=a.gamma, beta=a.beta, dweight=a.dweight)
    fmt = memory_format(a.x, a.weight)
    if a.normalise or not a.needs_dx:
        dx, dgamma, dbeta = norm_gradients_fake(a.x, a.mean, a.gamma, a.beta, a.needs_dx)
    else:
        dx, dgamma, dbeta = a.x.new_empty(a.x.shape), a.mean.new_empty(0), a.mean.new_empty(0)
        dx = dx.contiguous(memory_format=fmt)
    dbias = a.out_mean.new_empty(0) if a.bias is None else torch.empty_like(a.bias)
    douts = (a.out_mean.new_empty(0) if p is None else torch.empty_like(p) for p in (a.out_gamma, a.out_beta))
    dz = a.dy.new_empty(a.dy.shape).contiguous(memory_format=fmt) if a.needs_dz else a.dy.new_empty(0)
    return dx, dgamma, dbeta, dbias, *douts, dz


_slim_conv2d_norm_backward_ = define(
    BACKWARD__SCHEMA, slim_conv2d_norm_backward__reference, _backward__fake, composite=True
)


def slim_conv2d_norm_backward_reference(*arguments):
    a = BackwardArguments(*arguments)
    dweight = torch.zeros_like(a.weight) if a.needs_dweight else a.weight.new_empty(0)
    return *_slim_conv2d_norm_backward_(*BufferArguments(dweight=dweight, **a._asdict())), dweight


def _backward_fake(*arguments):
    a = BackwardArguments(*arguments)
    dweight = torch.empty_like(a.weight) if a.needs_dweight else a.weight.new_empty(0)
    return *_backward__fake(*BufferArguments(dweight=dweight, **a._asdict())), dweight


_slim_conv2d_norm_backward = define(
    BACKWARD_SCHEMA, slim_conv2d_norm_backward_reference, _backward_fake, composite=True
)


# ---- autograd


def _setup_context(ctx, inputs, output):
    given = Arguments(*inputs)
    y, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    parameters = (given.gamma, given.beta, given.weight, given.bias, given.out_gamma, given.out_beta)
    ctx.save_for_backward(given.x, y if given.out_relu else None, *parameters, *statistics)
    ctx.normalise, ctx.relu, ctx.eps, ctx.out_eps = given.normalise, given.relu, given.eps, given.out_eps
    ctx.options = Options.of(given)
    ctx.batch_stats, ctx.out_batch_stats = given.batch_stats or given.mean is None, given.out_mean is None
    ctx.has_residual = given.residual is not None


def _gradients(ctx, saved, needs, dy, weight_grad):
    """The gradients of all inputs of the operator; that of weight is added to weight_grad, if that is a buffer."""
    if dy is None:
        return Arguments()
    x, y, gamma, beta, weight, bias, out_gamma, out_beta, out_mean, out_var, mean, var = saved
    needs = Arguments(*needs)
    needs_dresidual = ctx.has_residual and needs.residual
    arguments = BackwardArguments(
        *(dy, x, y, ctx.normalise, mean, var, gamma, beta, ctx.batch_stats, ctx.relu, ctx.eps),
        *(weight, bias, *ctx.options),
        *(out_mean, out_var, out_gamma, out_beta, ctx.out_batch_stats, ctx.out_eps),
        needs_dx=needs.x or needs.gamma or needs.beta,
        needs_dweight=needs.weight,
        needs_dz=needs_dresidual and y is not None,
    )
    if weight_grad is None:
        *gradients, dweight = _slim_conv2d_norm_backward(*arguments)
    else:
        arguments = BufferArguments(dweight=weight_grad, **arguments._asdict())
        gradients, dweight = _slim_conv2d_norm_backward_(*arguments), None
    dx, dgamma, dbeta, dbias, dout_gamma, dout_beta, dz = gradients
    return Arguments(
        x=dx if needs.x else None,
        gamma=dgamma if needs.gamma else None,
        beta=dbeta if needs.beta else None,
        weight=dweight if needs.weight else None,
        bias=dbias if needs.bias else None,
        out_gamma=dout_gamma if needs.out_gamma else None,
        out_beta=dout_beta if needs.out_beta else None,
        residual=(dy if y is None else dz) if needs_dresidual else None,
    )


def _backward(ctx, saved, needs, dy, *_):
    return _gradients(ctx, saved, needs, dy, None)


def slim_conv2d_norm_composition(*arguments):
    a = Arguments(*arguments)
    activation, mean, var = normalised(a) if a.normalise else (a.x, a.x.new_empty(0), a.x.new_empty(0))
    c = slim_conv2d_composition(activation, *Convolution.of(a))
    return *slim_batch_norm_composition(c, *_out_norm_of(a)), mean, var


def slim_conv2d_norm_backward_composition(*arguments):
    a = BackwardArguments(*arguments)
    activation = normalised(a)[0] if a.normalise else a.x
    c = slim_conv2d_composition(activation, a.weight, a.bias, a.dy.shape[1], *Options.of(a))
    dc, dz, dout_gamma, dout_beta = slim_batch_norm_backward_composition(*_out_norm_gradients_of(a, c))
    dbias = a.out_mean.new_empty(0) if a.bias is None else full_width(dc.sum((0, 2, 3)), a.bias)
    dx, dgamma, dbeta, dweight = a.x.new_empty(0), a.mean.new_empty(0), a.mean.new_empty(0), a.weight.new_empty(0)
    if a.needs_dweight:
        dweight = slim_conv2d_weight_grad_composition(dc, activation, a.weight, *Options.of(a))
    if a.needs_dx:
        dx = slim_conv2d_input_grad_composition(dc, a.weight, a.x.shape, *Options.of(a))
        if a.normalise:
            norm = norm_gradients_of(a, activation if a.relu else None)
            dx, _, dgamma, dbeta = slim_batch_norm_backward_composition(dx, a.x, *norm)
    return dx, dgamma, dbeta, dbias, dout_gamma, dout_beta, dz, dweight


_apply = differentiable(_slim_conv2d_norm, _setup_context, _backward, slim_conv2d_norm_composition)
_apply_into_buffer = differentiable_into_buffer(_slim_conv2d_norm, _setup_context, _gradients)
composed(_slim_conv2d_norm_backward, slim_conv2d_norm_backward_composition)
not_differentiable(_slim_conv2d_norm_backward_)


# ---- floating-point operations: those of the convolution, which the backward pass computes again


def _forward_flops(*arguments):
    a = Arguments(*arguments)
    return forward_flops(a.x, *Convolution.of(a))


def _backward_flops(a):
    again = forward_flops(a.x, a.weight, a.bias, a.dy[1], *Options.of(a))
    return again + backward_flops(a.dy, a.x, a.weight, Options.of(a), a.needs_dx, a.needs_dweight)


count_flops(_slim_conv2d_norm, _forward_flops)
count_flops(_slim_conv2d_norm_backward, lambda *arguments: _backward_flops(BackwardArguments(*arguments)))
count_flops(_slim_conv2d_norm_backward_, lambda *arguments: _backward_flops(BufferArguments(*arguments)))


@autocast_rule(_slim_conv2d_norm)
def _autocast(dtype, *arguments):
    a = Arguments(*arguments)
    mean, var, gamma, beta = cast_norm(dtype, a.mean, a.var, a.gamma, a.beta)
    out_mean, out_var, out_gamma, out_beta = cast_norm(dtype, a.out_mean, a.out_var, a.out_gamma, a.out_beta)
    return a._replace(
        x=a.x.to(dtype),
        **{"mean": mean, "var": var, "gamma": gamma, "beta": beta},
        weight=autocast_parameter(dtype, a.weight),
        bias=autocast_parameter(dtype, a.bias),
        **{"out_mean": out_mean, "out_var": out_var, "out_gamma": out_gamma, "out_beta": out_beta},
    )


# ---- public function


def slim_conv2d_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_channels: int | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    normalise: bool = False,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    batch_stats: bool = False,
    relu: bool = False,
    eps: float = 1e-5,
    out_gamma: Tensor | None = None,
    out_beta: Tensor | None = None,
    out_mean: Tensor | None = None,
    out_var: Tensor | None = None,
    residual: Tensor | None = None,
    out_relu: bool = False,
    out_eps: float = 1e-5,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Convolution, batch norm, residual add and ReLU; backward computes the convolution's result again.

    Args:
        x: [N, C, H, W], floating point, any strides.
        weight, bias, out_channels, stride, padding, dilation, groups, weight_grad: as `slim_conv2d`.
        normalise: x is normalised first, as in `slim_norm_conv2d`, whose gamma ... eps these are.
        out_gamma, out_beta, out_mean, out_var, residual, out_relu, out_eps: of the batch norm after the convolution, as
            `slim_batch_norm`'s weight, bias, mean, var, residual, relu, eps.

    Returns:
        y [N, out_channels, OH, OW] in the dtype of x; the statistics [out_channels] of the convolution's result and [C]
        of x that were used, the latter empty where x is not normalised.

    Raises:
        ValueError, TypeError: as `check_slim_conv2d_norm`, when shapes or dtypes do not fit.
    """
    convolution = convolution_arguments(weight, bias, out_channels, stride, padding, dilation, groups)
    arguments = (
        *(x, normalise, mean, var, gamma, beta, batch_stats, relu, eps, *convolution),
        *(out_mean, out_var, out_gamma, out_beta, residual, out_relu, out_eps),
    )
    if in_autocast(x):
        arguments = _autocast(autocast_dtype(x), *arguments)
    check_slim_conv2d_norm(*arguments)
    if weight_grad is None:
        return _apply(*arguments)
    check_gradient_buffer(weight_grad, weight)
    return _apply_into_buffer(*arguments, weight_grad)
