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
from ._common import autocast_parameter, check_gradient_buffer, check_same_device, check_written, in_autocast
from .slim_batch_norm import (
    _full_width,
    _slim_batch_norm,
    _slim_batch_norm_backward,
    check_slim_batch_norm,
    check_slim_batch_norm_backward,
    slim_batch_norm_backward_composition,
    slim_batch_norm_composition,
)
from .slim_conv2d import _fake as _conv_fake
from .slim_conv2d import (
    _memory_format,
    _out_channels_and_geometry,
    _output_size,
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
from .slim_norm_conv2d import CONV, GEOMETRY, NORM, _statistics_fake, cast_norm, norm_grad_fakes, normalised


class _Inputs(NamedTuple):
    """The operator's arguments; and their gradients, None where there is none."""

    x: Any = None
    normalise: Any = None
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
    out_mean: Any = None
    out_var: Any = None
    out_gamma: Any = None
    out_beta: Any = None
    residual: Any = None
    out_relu: Any = None
    out_eps: Any = None

    @property
    def convolution(self) -> tuple:
        """What slim_conv2d takes after x."""
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return self.weight, self.bias, self.out_channels, *geometry

    @property
    def out_norm(self) -> tuple:
        """What slim_batch_norm takes after x."""
        statistics = (self.out_mean, self.out_var)
        return self.out_gamma, self.out_beta, *statistics, self.residual, self.out_relu, self.out_eps


# ---- forward: schema, reference, fake


def slim_conv2d_norm_reference(*inputs):
    i = _Inputs(*inputs)
    a, mean, var = i.x, i.x.new_empty(0), i.x.new_empty(0)
    if i.normalise:
        a, mean, var = _slim_batch_norm(i.x, i.gamma, i.beta, i.mean, i.var, None, i.relu, i.eps)
    return *_slim_batch_norm(_slim_conv2d(a, *i.convolution), *i.out_norm), mean, var


def check_slim_conv2d_norm(*inputs) -> None:
    """The contract of the arguments, for the operator and for its fake alike.

    Raises:
        ValueError: for shapes that do not fit. TypeError: for dtypes that are not floating or that differ.
    """
    i = _Inputs(*inputs)
    x, weight = i.x, i.weight
    check_slim_conv2d(x, *i.convolution)
    if i.normalise:
        check_slim_batch_norm(x, i.gamma, i.beta, i.mean, i.var, None, i.relu, i.eps, names=("gamma", "beta"))
    elif not (i.mean is i.var is i.gamma is i.beta is None):
        raise ValueError("mean, var, gamma and beta must be None where x is not normalised")
    size = [_output_size(x.shape[2 + a], weight.shape[2 + a], i.stride[a], i.padding[a], i.dilation[a]) for a in (0, 1)]
    c = x.new_empty(1).expand(x.shape[0], i.out_channels, *size)
    check_slim_batch_norm(c, *i.out_norm, names=("out_gamma", "out_beta"))


def _fake(*inputs):
    check_slim_conv2d_norm(*inputs)
    i = _Inputs(*inputs)
    norms = (i.mean, i.var, i.gamma, i.beta, i.out_mean, i.out_var, i.out_gamma, i.out_beta, i.residual)
    names = ("mean", "var", "gamma", "beta", "out_mean", "out_var", "out_gamma", "out_beta", "residual")
    check_same_device(i.x, **dict(zip(names, norms, strict=True)))
    c = _conv_fake(i.x, *i.convolution)
    mean, var = _statistics_fake(i.x) if i.normalise else (i.x.new_empty(0), i.x.new_empty(0))
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


class _BackwardInputs(NamedTuple):
    """The arguments of `slim_conv2d_norm_backward`; `slim_conv2d_norm_backward_` takes dweight after bias too."""

    dy: Tensor
    x: Tensor
    y: Tensor | None
    normalise: bool
    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    batch_stats: bool
    relu: bool
    eps: float
    weight: Tensor
    bias: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    out_mean: Tensor
    out_var: Tensor
    out_gamma: Tensor | None
    out_beta: Tensor | None
    out_batch_stats: bool
    out_eps: float
    needs_dx: bool
    needs_dweight: bool
    needs_dz: bool

    @classmethod
    def split(cls, arguments: tuple) -> tuple["_BackwardInputs", Tensor]:
        """Those of `slim_conv2d_norm_backward_` without dweight, and dweight."""
        return cls(*arguments[:_DWEIGHT], *arguments[_DWEIGHT + 1 :]), arguments[_DWEIGHT]

    def with_buffer(self, dweight: Tensor) -> tuple:
        return *self[:_DWEIGHT], dweight, *self[_DWEIGHT:]

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def norm(self) -> tuple:
        return self.mean, self.var, self.gamma, self.beta, self.batch_stats, self.relu, self.eps

    def out_norm_backward(self, c: Tensor) -> tuple:
        """The arguments of slim_batch_norm_backward for the norm of c."""
        parameters = (self.out_gamma, self.out_beta, self.out_mean, self.out_var)
        return self.dy, c, self.y, *parameters, self.out_batch_stats, self.needs_dz, self.out_eps

    def norm_backward(self, da: Tensor, a: Tensor) -> tuple:
        """The arguments of slim_batch_norm_backward for the norm of x."""
        parameters = (self.gamma, self.beta, self.mean, self.var)
        return da, self.x, a if self.relu else None, *parameters, self.batch_stats, False, self.eps


_DWEIGHT = _BackwardInputs._fields.index("bias") + 1


def slim_conv2d_norm_backward__reference(*arguments):
    i, dweight = _BackwardInputs.split(arguments)
    if i.needs_dweight:
        check_written("dweight", dweight, dy=i.dy, x=i.x)  # which is read after dweight is written
    a = i.x
    if i.normalise:
        a, *_ = _slim_batch_norm(i.x, i.gamma, i.beta, i.mean, i.var, None, i.relu, i.eps)
    c = _slim_conv2d(a, i.weight, i.bias, i.dy.shape[1], *i.geometry)
    dc, dz, dout_gamma, dout_beta = _slim_batch_norm_backward(*i.out_norm_backward(c))
    del c
    dbias = i.out_mean.new_empty(0) if i.bias is None else _full_width(dc.sum((0, 2, 3)), i.bias)
    if i.needs_dweight:
        _slim_conv2d_weight_grad_(dc, a, dweight, *i.geometry)
    dx, dgamma, dbeta = i.x.new_empty(0), i.mean.new_empty(0), i.mean.new_empty(0)
    if i.needs_dx:
        dx = _slim_conv2d_input_grad(dc, i.weight, i.x.shape, *i.geometry)
        del dc
        if i.normalise:
            dx, _, dgamma, dbeta = _slim_batch_norm_backward(*i.norm_backward(dx, a))
    return dx, dgamma, dbeta, dbias, dout_gamma, dout_beta, dz


def _gradient_fakes(i: _BackwardInputs, dweight: Tensor | None) -> tuple[Tensor, ...]:
    check_slim_conv2d(i.x, i.weight, i.bias, i.dy.shape[1], *i.geometry)
    check_slim_conv2d_weight_grad(i.dy, i.x, i.weight, *i.geometry)
    if i.normalise:
        check_slim_batch_norm(i.x, i.gamma, i.beta, i.mean, i.var, None, i.relu, i.eps, names=("gamma", "beta"))
    check_slim_batch_norm_backward(*i.out_norm_backward(i.dy))
    check_same_device(i.x, mean=i.mean, var=i.var, gamma=i.gamma, beta=i.beta, dweight=dweight)
    if i.normalise or not i.needs_dx:
        dx, dgamma, dbeta = norm_grad_fakes(i.x, i.mean, i.gamma, i.beta, i.needs_dx)
    else:
        dx, dgamma, dbeta = i.x.new_empty(i.x.shape), i.mean.new_empty(0), i.mean.new_empty(0)
        dx = dx.contiguous(memory_format=_memory_format(i.x, i.weight))
    dbias = i.out_mean.new_empty(0) if i.bias is None else torch.empty_like(i.bias)
    douts = (i.out_mean.new_empty(0) if p is None else torch.empty_like(p) for p in (i.out_gamma, i.out_beta))
    dz = i.dy.new_empty(0)
    if i.needs_dz:
        dz = i.dy.new_empty(i.dy.shape).contiguous(memory_format=_memory_format(i.x, i.weight))
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
    lambda *arguments: _gradient_fakes(*_BackwardInputs.split(arguments)),
    composite=True,
)


def slim_conv2d_norm_backward_reference(*arguments):
    i = _BackwardInputs(*arguments)
    dweight = torch.zeros_like(i.weight) if i.needs_dweight else i.weight.new_empty(0)
    return *_slim_conv2d_norm_backward_(*i.with_buffer(dweight)), dweight


def _backward_fake(*arguments):
    i = _BackwardInputs(*arguments)
    return *_gradient_fakes(i, None), torch.empty_like(i.weight) if i.needs_dweight else i.weight.new_empty(0)


_slim_conv2d_norm_backward = define(
    f"slim_conv2d_norm_backward({_BACKWARD}, {_BACKWARD_REST}) -> ({_GRADIENTS}, Tensor dweight)",
    slim_conv2d_norm_backward_reference,
    _backward_fake,
    composite=True,
)


# ---- autograd


def _setup_context(ctx, inputs, output):
    i = _Inputs(*inputs)
    y, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    parameters = (i.gamma, i.beta, i.weight, i.bias, i.out_gamma, i.out_beta)
    ctx.save_for_backward(i.x, y if i.out_relu else None, *parameters, *statistics)
    ctx.normalise, ctx.relu, ctx.eps, ctx.out_eps = i.normalise, i.relu, i.eps, i.out_eps
    ctx.geometry = (i.stride, i.padding, i.dilation, i.groups)
    ctx.batch_stats, ctx.out_batch_stats = i.batch_stats or i.mean is None, i.out_mean is None
    ctx.has_residual = i.residual is not None


def _gradients(ctx, saved, needs, dy, weight_grad):
    """The gradients of all inputs of the operator; that of weight is added to weight_grad, if that is a buffer."""
    if dy is None:
        return _Inputs()
    x, y, gamma, beta, weight, bias, out_gamma, out_beta, out_mean, out_var, mean, var = saved
    needs = _Inputs(*needs[: len(_Inputs._fields)])
    needs_dresidual = ctx.has_residual and needs.residual
    arguments = _BackwardInputs(
        *(dy, x, y, ctx.normalise, mean, var, gamma, beta, ctx.batch_stats, ctx.relu, ctx.eps),
        *(weight, bias, *ctx.geometry),
        *(out_mean, out_var, out_gamma, out_beta, ctx.out_batch_stats, ctx.out_eps),
        needs_dx=needs.x or needs.gamma or needs.beta,
        needs_dweight=needs.weight,
        needs_dz=needs_dresidual and y is not None,
    )
    if weight_grad is None:
        *gradients, dweight = _slim_conv2d_norm_backward(*arguments)
    else:
        gradients, dweight = _slim_conv2d_norm_backward_(*arguments.with_buffer(weight_grad)), None
    dx, dgamma, dbeta, dbias, dout_gamma, dout_beta, dz = gradients
    return _Inputs(
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


def slim_conv2d_norm_composition(*inputs):
    i = _Inputs(*inputs)
    a, mean, var = i.x, i.x.new_empty(0), i.x.new_empty(0)
    if i.normalise:
        a, mean, var = normalised(i.x, i.mean, i.var, i.gamma, i.beta, i.batch_stats, i.relu, i.eps)
    return *slim_batch_norm_composition(slim_conv2d_composition(a, *i.convolution), *i.out_norm), mean, var


def slim_conv2d_norm_backward_composition(*arguments):
    i = _BackwardInputs(*arguments)
    a = normalised(i.x, *i.norm)[0] if i.normalise else i.x
    c = slim_conv2d_composition(a, i.weight, i.bias, i.dy.shape[1], *i.geometry)
    dc, dz, dout_gamma, dout_beta = slim_batch_norm_backward_composition(*i.out_norm_backward(c))
    dbias = i.out_mean.new_empty(0) if i.bias is None else _full_width(dc.sum((0, 2, 3)), i.bias)
    dx, dgamma, dbeta, dweight = i.x.new_empty(0), i.mean.new_empty(0), i.mean.new_empty(0), i.weight.new_empty(0)
    if i.needs_dweight:
        dweight = slim_conv2d_weight_grad_composition(dc, a, i.weight, *i.geometry)
    if i.needs_dx:
        dx = slim_conv2d_input_grad_composition(dc, i.weight, i.x.shape, *i.geometry)
        if i.normalise:
            dx, _, dgamma, dbeta = slim_batch_norm_backward_composition(*i.norm_backward(dx, a))
    return dx, dgamma, dbeta, dbias, dout_gamma, dout_beta, dz, dweight


_apply = differentiable(_slim_conv2d_norm, _setup_context, _backward, slim_conv2d_norm_composition)
_apply_into_buffer = differentiable_into_buffer(_slim_conv2d_norm, _setup_context, _gradients)
composed(_slim_conv2d_norm_backward, slim_conv2d_norm_backward_composition)
not_differentiable(_slim_conv2d_norm_backward_)


# ---- floating-point operations: those of the convolution, which the backward pass computes again


def _backward_flops(i: _BackwardInputs) -> int:
    again = forward_flops(i.x, i.weight, i.bias, i.dy[1], *i.geometry)
    return again + backward_flops(i.dy, i.x, i.weight, i.groups, i.needs_dx, i.needs_dweight)


count_flops(_slim_conv2d_norm, lambda *inputs: forward_flops(inputs[0], *_Inputs(*inputs).convolution))
count_flops(_slim_conv2d_norm_backward, lambda *arguments: _backward_flops(_BackwardInputs(*arguments)))
count_flops(_slim_conv2d_norm_backward_, lambda *arguments: _backward_flops(_BackwardInputs.split(arguments)[0]))


@autocast_rule(_slim_conv2d_norm)
def _autocast(dtype, *inputs):
    i = _Inputs(*inputs)
    mean, var, gamma, beta = cast_norm(dtype, i.mean, i.var, i.gamma, i.beta)
    out_mean, out_var, out_gamma, out_beta = cast_norm(dtype, i.out_mean, i.out_var, i.out_gamma, i.out_beta)
    return i._replace(
        x=i.x.to(dtype),
        **{"mean": mean, "var": var, "gamma": gamma, "beta": beta},
        weight=autocast_parameter(dtype, i.weight),
        bias=autocast_parameter(dtype, i.bias),
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
