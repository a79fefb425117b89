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

from .._library import autocast_rule, define, differentiable, differentiable_into_buffer, differentiable_once
from ._common import autocast_parameter, check_gradient_buffer, check_same_device, check_written, in_autocast
from .slim_batch_norm import (
    _full_width,
    _slim_batch_norm,
    _slim_batch_norm_backward,
    check_slim_batch_norm,
    check_slim_batch_norm_backward,
)
from .slim_conv2d import _fake as _conv_fake
from .slim_conv2d import (
    _memory_format,
    _out_channels_and_geometry,
    _output_size,
    _slim_conv2d,
    _slim_conv2d_input_grad,
    _slim_conv2d_weight_grad_,
    check_slim_conv2d,
    check_slim_conv2d_weight_grad,
)
from .slim_norm_conv2d import CONV, GEOMETRY, NORM, _statistics_fake, cast_norm, norm_grad_fakes


def _activation(x, normalise, mean, var, gamma, beta, relu, eps) -> tuple[Tensor, Tensor, Tensor]:
    """a, and the statistics of x that were used: empty tensors where nothing is normalised."""
    if normalise:
        return _slim_batch_norm(x, gamma, beta, mean, var, None, relu, eps)
    return x, x.new_empty(0), x.new_empty(0)


# ---- forward: schema, reference, fake


def slim_conv2d_norm_reference(
    x, normalise, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, out_channels, *rest
):
    *geometry, out_mean, out_var, out_gamma, out_beta, residual, out_relu, out_eps = rest
    a, mean, var = _activation(x, normalise, mean, var, gamma, beta, relu, eps)
    c = _slim_conv2d(a, weight, bias, out_channels, *geometry)
    return *_slim_batch_norm(c, out_gamma, out_beta, out_mean, out_var, residual, out_relu, out_eps), mean, var


def check_slim_conv2d_norm(
    x, normalise, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, out_channels, *rest
) -> None:
    """The contract of the arguments, for the operator and for its fake alike.

    Raises:
        ValueError: for shapes that do not fit. TypeError: for dtypes that are not floating or that differ.
    """
    *geometry, out_mean, out_var, out_gamma, out_beta, residual, out_relu, out_eps = rest
    check_slim_conv2d(x, weight, bias, out_channels, *geometry)
    if normalise:
        check_slim_batch_norm(x, gamma, beta, mean, var, None, relu, eps, names=("gamma", "beta"))
    elif not (mean is var is gamma is beta is None):
        raise ValueError("mean, var, gamma and beta must be None where x is not normalised")
    size = [_output_size(x.shape[2 + a], weight.shape[2 + a], *(pair[a] for pair in geometry[:3])) for a in (0, 1)]
    c = x.new_empty(1).expand(x.shape[0], out_channels, *size)
    check_slim_batch_norm(
        c, out_gamma, out_beta, out_mean, out_var, residual, out_relu, out_eps, names=("out_gamma", "out_beta")
    )


def _fake(*arguments):
    check_slim_conv2d_norm(*arguments)
    x, normalise, *_, weight, bias, out_channels = arguments[:12]
    norm, out_norm = arguments[2:6], arguments[16:21]
    names = ("mean", "var", "gamma", "beta", "out_mean", "out_var", "out_gamma", "out_beta", "residual")
    check_same_device(x, **dict(zip(names, (*norm, *out_norm), strict=True)))
    c = _conv_fake(x, weight, bias, out_channels, *arguments[12:16])
    mean, var = _statistics_fake(x) if normalise else (x.new_empty(0), x.new_empty(0))
    return c, *_statistics_fake(c), mean, var


_slim_conv2d_norm = define(
    f"slim_conv2d_norm(Tensor x, bool normalise, {NORM}, {CONV}, Tensor? out_mean, Tensor? out_var, "
    "Tensor? out_gamma, Tensor? out_beta, Tensor? residual, bool out_relu, float out_eps) "
    "-> (Tensor y, Tensor out_mean, Tensor out_var, Tensor mean, Tensor var)",
    slim_conv2d_norm_reference,
    _fake,
    composite=True,
)


# ---- backward: one operator, as in slim_norm_conv2d.py. What is not needed is an empty tensor.


def slim_conv2d_norm_backward__reference(
    dy, x, y, normalise, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, dweight, *rest
):
    *geometry, out_mean, out_var, out_gamma, out_beta, out_batch_stats, out_eps, needs_dx, needs_dweight, needs_dz = (
        rest
    )
    if needs_dweight:
        check_written("dweight", dweight, dy=dy, x=x)  # which is read after dweight is written
    statistics = (mean, var) if normalise else (None, None)
    a = _activation(x, normalise, *statistics, gamma, beta, relu, eps)[0]
    c = _slim_conv2d(a, weight, bias, dy.shape[1], *geometry)
    dc, dz, dout_gamma, dout_beta = _slim_batch_norm_backward(
        dy, c, y, out_gamma, out_beta, out_mean, out_var, out_batch_stats, needs_dz, out_eps
    )
    del c
    dbias = out_mean.new_empty(0) if bias is None else _full_width(dc.sum((0, 2, 3)), bias)
    if needs_dweight:
        _slim_conv2d_weight_grad_(dc, a, dweight, *geometry)
    dx, dgamma, dbeta = x.new_empty(0), mean.new_empty(0), mean.new_empty(0)
    if needs_dx:
        dx = _slim_conv2d_input_grad(dc, weight, x.shape, *geometry)
        del dc
        if normalise:
            mask = a if relu else None
            dx, _, dgamma, dbeta = _slim_batch_norm_backward(
                dx, x, mask, gamma, beta, mean, var, batch_stats, False, eps
            )
    return dx, dgamma, dbeta, dbias, dout_gamma, dout_beta, dz


def _backward__fake(dy, x, y, normalise, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, dweight, *rest):
    out_mean, out_var, out_gamma, out_beta, out_batch_stats, out_eps, needs_dx, _, needs_dz = rest[4:]
    check_slim_conv2d(x, weight, bias, dy.shape[1], *rest[:4])
    check_slim_conv2d_weight_grad(dy, x, weight, *rest[:4])
    if normalise:
        check_slim_batch_norm(x, gamma, beta, mean, var, None, relu, eps, names=("gamma", "beta"))
    out_norm = (out_gamma, out_beta, out_mean, out_var)
    check_slim_batch_norm_backward(dy, dy, y, *out_norm, out_batch_stats, needs_dz, out_eps)
    check_same_device(x, mean=mean, var=var, gamma=gamma, beta=beta, dweight=dweight)
    if normalise or not needs_dx:
        dx, dgamma, dbeta = norm_grad_fakes(x, mean, gamma, beta, needs_dx)
    else:
        dx, dgamma, dbeta = x.new_empty(x.shape), mean.new_empty(0), mean.new_empty(0)
        dx = dx.contiguous(memory_format=_memory_format(x, weight))
    dbias = out_mean.new_empty(0) if bias is None else torch.empty_like(bias)
    douts = (out_mean.new_empty(0) if p is None else torch.empty_like(p) for p in (out_gamma, out_beta))
    dz = dy.new_empty(dy.shape).contiguous(memory_format=_memory_format(x, weight)) if needs_dz else dy.new_empty(0)
    return dx, dgamma, dbeta, dbias, *douts, dz


_BACKWARD = (
    "Tensor dy, Tensor x, Tensor? y, bool normalise, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, "
    "bool batch_stats, bool relu, float eps, Tensor weight, Tensor? bias"
)
_BACKWARD_REST = (
    f"{GEOMETRY}, Tensor out_mean, Tensor out_var, Tensor? out_gamma, Tensor? out_beta, bool out_batch_stats, "
    "float out_eps, bool needs_dx, bool needs_dweight, bool needs_dz"
)
_GRADIENTS = "Tensor dx, Tensor dgamma, Tensor dbeta, Tensor dbias, Tensor dout_gamma, Tensor dout_beta, Tensor dz"

_slim_conv2d_norm_backward_ = define(
    f"slim_conv2d_norm_backward_({_BACKWARD}, Tensor(a!) dweight, {_BACKWARD_REST}) -> ({_GRADIENTS})",
    slim_conv2d_norm_backward__reference,
    _backward__fake,
    composite=True,
)


def slim_conv2d_norm_backward_reference(*arguments):
    *before, weight, bias = arguments[:13]
    rest = arguments[13:]
    dweight = torch.zeros_like(weight) if rest[-2] else weight.new_empty(0)
    return *_slim_conv2d_norm_backward_(*before, weight, bias, dweight, *rest), dweight


def _backward_fake(*arguments):
    weight, rest = arguments[11], arguments[13:]
    dweight = torch.empty_like(weight) if rest[-2] else weight.new_empty(0)
    return *_backward__fake(*arguments[:13], dweight, *rest), dweight


_slim_conv2d_norm_backward = define(
    f"slim_conv2d_norm_backward({_BACKWARD}, {_BACKWARD_REST}) -> ({_GRADIENTS}, Tensor dweight)",
    slim_conv2d_norm_backward_reference,
    _backward_fake,
    composite=True,
)


# ---- autograd


def _setup_context(ctx, inputs, output):
    x, ctx.normalise, given_mean, _, gamma, beta, batch_stats, ctx.relu, ctx.eps, weight, bias, _, *rest = inputs
    *ctx.geometry, given_out_mean, _, out_gamma, out_beta, residual, out_relu, ctx.out_eps = rest
    y, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y if out_relu else None, gamma, beta, weight, bias, out_gamma, out_beta, *statistics)
    ctx.batch_stats, ctx.out_batch_stats = batch_stats or given_mean is None, given_out_mean is None
    ctx.has_residual = residual is not None


def _gradients(ctx, dy, weight_grad):
    """The gradients of all inputs of the operator; that of weight is added to weight_grad, if that is a buffer."""
    if dy is None:
        return (None,) * 23
    x, y, gamma, beta, weight, bias, out_gamma, out_beta, out_mean, out_var, mean, var = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needs_dx, needs_dresidual = needs[0] or needs[4] or needs[5], ctx.has_residual and needs[20]
    before = (dy, x, y, ctx.normalise, mean, var, gamma, beta, ctx.batch_stats, ctx.relu, ctx.eps, weight, bias)
    after = (*ctx.geometry, out_mean, out_var, out_gamma, out_beta, ctx.out_batch_stats, ctx.out_eps, needs_dx)
    needs_dz = needs_dresidual and y is not None
    if weight_grad is None:
        *gradients, dweight = _slim_conv2d_norm_backward(*before, *after, needs[9], needs_dz)
    else:
        gradients, dweight = _slim_conv2d_norm_backward_(*before, weight_grad, *after, True, needs_dz), None
    dx, dgamma, dbeta, dbias, dout_gamma, dout_beta, dz = gradients
    dresidual = (dy if y is None else dz) if needs_dresidual else None
    found = {0: dx, 4: dgamma, 5: dbeta, 9: dweight, 10: dbias, 18: dout_gamma, 19: dout_beta, 20: dresidual}
    return tuple(found.get(i) if needs[i] else None for i in range(23))


def _backward(ctx, dy, *_):
    return _gradients(ctx, dy, None)


_apply = differentiable(_slim_conv2d_norm, _setup_context, _backward)
_apply_into_buffer = differentiable_into_buffer(_slim_conv2d_norm, _setup_context, _gradients)
differentiable_once(_slim_conv2d_norm_backward)


@autocast_rule(_slim_conv2d_norm)
def _autocast(dtype, x, normalise, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, *rest):
    *conv, out_mean, out_var, out_gamma, out_beta, residual, out_relu, out_eps = rest
    return (
        *(x.to(dtype), normalise, *cast_norm(dtype, mean, var, gamma, beta), batch_stats, relu, eps),
        *(autocast_parameter(dtype, weight), autocast_parameter(dtype, bias), *conv),
        *(*cast_norm(dtype, out_mean, out_var, out_gamma, out_beta), residual, out_relu, out_eps),
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
    out_channels, geometry = _out_channels_and_geometry(weight, out_channels, stride, padding, dilation, groups)
    arguments = (
        *(x, normalise, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, out_channels, *geometry),
        *(out_mean, out_var, out_gamma, out_beta, residual, out_relu, out_eps),
    )
    if in_autocast(x):
        arguments = _autocast(torch.get_autocast_dtype(x.device.type), *arguments)
    check_slim_conv2d_norm(*arguments)
    if weight_grad is None:
        return _apply(*arguments)
    check_gradient_buffer(weight_grad, weight)
    return _apply_into_buffer(*arguments, weight_grad)
