"""Linear layer with the first features of a full-width weight, read in place.

    y = x @ weight[:out_features, :F].T + bias[:out_features]

    x        [..., F]            any strides
    weight   [O, I]              the full width, F <= I
    bias     [O] or None
    y        [..., out_features]

The weight operand's leading dimension is the full I, whatever the slice. float32, float64, bfloat16 and float16, one
dtype for all, but for float32 weights and biases of a low-precision x on the CPU, which are rounded as they are read;
sums are at least float32. The gradient of weight has the full shape and is zero outside the slice;
`slim_linear_weight_grad_` adds that slice to a buffer instead.
"""

import math

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
    autocast_dtype,
    autocast_parameter,
    bias_grad,
    check_floating,
    check_gradient_buffer,
    check_gradients_beside,
    check_same_dtype_and_device,
    check_written,
    in_autocast,
)

_SMALL_WEIGHT = 128 * 1024  # elements that kernels round as they read them in less time than a cast takes


def check_slim_linear(x, weight, bias, out_features) -> None:
    """The contract of the arguments, for the operator and for its fake alike.

    Raises:
        ValueError: for shapes that do not fit. TypeError: for dtypes that are not floating or that differ.
    """
    if x.dim() < 1 or weight.dim() != 2:
        raise ValueError(f"x must be [..., F] and weight [O, I], got {x.dim()} and {weight.dim()} dimensions")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    check_same_dtype_and_device(x, weight=weight, bias=bias)
    _check_sizes(weight, x.shape[-1], out_features)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] < out_features):
        raise ValueError(f"bias must have at least {out_features} elements, got shape {tuple(bias.shape)}")


def _check_sizes(weight, in_features, out_features) -> None:
    if not 0 < in_features <= weight.shape[1]:
        raise ValueError(f"x must have between 1 and {weight.shape[1]} features, got {in_features}")
    if not 0 < out_features <= weight.shape[0]:
        raise ValueError(f"out_features must be in [1, {weight.shape[0]}], got {out_features}")


def check_slim_linear_input_grad(dy, weight, in_features) -> None:
    """As check_slim_linear, for the operator of the input gradient."""
    if dy.dim() < 1 or weight.dim() != 2:
        raise ValueError(f"dy must be [..., out] and weight [O, I], got {dy.dim()} and {weight.dim()} dimensions")
    check_floating("dy", dy)
    check_same_dtype_and_device(dy, name="dy", weight=weight)
    _check_sizes(weight, in_features, dy.shape[-1])


def check_slim_linear_weight_grad(dy, x, dweight) -> None:
    """As check_slim_linear, for the operators of the weight gradient. dweight: a buffer, or the weight itself."""
    if dy.dim() < 1 or x.dim() < 1 or dweight.dim() != 2:
        raise ValueError(
            "dy must be [..., out], x [..., F] and dweight [O, I], got "
            f"{dy.dim()}, {x.dim()} and {dweight.dim()} dimensions"
        )
    check_gradients_beside(x, dy, dweight)
    if dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"dy must have the shape of x but for its last dimension, {tuple(x.shape)}, got {tuple(dy.shape)}"
        )
    _check_sizes(dweight, x.shape[-1], dy.shape[-1])


# ---- forward: schema, reference, fake


def slim_linear_reference(x, weight, bias, out_features):
    check_slim_linear(x, weight, bias, out_features)
    weight = weight[:out_features, : x.shape[-1]].to(x.dtype)  # [out, F]
    return torch.nn.functional.linear(x, weight, None if bias is None else bias[:out_features].to(x.dtype))


def _fake(x, weight, bias, out_features):
    check_slim_linear(x, weight, bias, out_features)
    return x.new_empty(*x.shape[:-1], out_features)


_slim_linear = define(
    "slim_linear(Tensor x, Tensor weight, Tensor? bias, SymInt out_features) -> Tensor",
    slim_linear_reference,
    _fake,
)


# ---- input gradient


def slim_linear_input_grad_reference(dy, weight, in_features):
    check_slim_linear_input_grad(dy, weight, in_features)
    return dy @ weight[: dy.shape[-1], :in_features].to(dy.dtype)  # [..., F]


def _input_grad_fake(dy, weight, in_features):
    check_slim_linear_input_grad(dy, weight, in_features)
    return dy.new_empty(*dy.shape[:-1], in_features)


_slim_linear_input_grad = define(
    "slim_linear_input_grad(Tensor dy, Tensor weight, SymInt in_features) -> Tensor",
    slim_linear_input_grad_reference,
    _input_grad_fake,
)


# ---- weight gradient: added to the slice of a full-size buffer


def slim_linear_weight_grad__reference(dy, x, dweight):
    check_slim_linear_weight_grad(dy, x, dweight)
    check_written("dweight", dweight, dy=dy, x=x)
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])  # [N, out], [N, F]
    dweight[: dy.shape[1], : x.shape[1]] += dy.T @ x


_slim_linear_weight_grad_ = define(
    "slim_linear_weight_grad_(Tensor dy, Tensor x, Tensor(a!) dweight) -> ()",
    slim_linear_weight_grad__reference,
    check_slim_linear_weight_grad,
)


def _weight_grad_fake(dy, x, weight):
    check_slim_linear_weight_grad(dy, x, weight)
    return torch.empty_like(weight)


def slim_linear_weight_grad_composition(dy, x, weight):
    dw = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # [out, F]
    beyond = (weight.shape[1] - dw.shape[1], weight.shape[0] - dw.shape[0])
    return torch.nn.functional.pad(dw, (0, beyond[0], 0, beyond[1])).to(weight.dtype)


def slim_linear_weight_grad_reference(dy, x, weight):
    check_slim_linear_weight_grad(dy, x, weight)
    if (dy.shape[-1], x.shape[-1]) == weight.shape and dy.dtype == weight.dtype and weight.is_contiguous():
        return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # nothing is outside the slice
    dweight = torch.zeros_like(weight)
    _slim_linear_weight_grad_(dy, x, dweight)
    return dweight


_slim_linear_weight_grad = define(
    "slim_linear_weight_grad(Tensor dy, Tensor x, Tensor weight) -> Tensor",
    slim_linear_weight_grad_reference,
    _weight_grad_fake,
    composite=True,
)


# ---- autograd


def _setup_context(ctx, inputs, output):
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_size = None if bias is None else bias.shape[0]


def _gradients(ctx, saved, needs, dy, weight_grad):
    """The gradients of all inputs of the operator; that of weight is added to weight_grad, if that is a buffer."""
    x, weight = saved
    needs_x, needs_weight, needs_bias, _ = needs
    dx = dweight = dbias = None
    if needs_x:
        dx = _slim_linear_input_grad(dy, weight, x.shape[-1])
    if needs_weight and weight_grad is None:
        dweight = _slim_linear_weight_grad(dy, x, weight)
    elif needs_weight:
        _slim_linear_weight_grad_(dy, x, weight_grad)
    if needs_bias:
        dbias = bias_grad(dy, -1, ctx.bias_size)
    return dx, dweight, dbias, None


def _backward(ctx, saved, needs, dy):
    return _gradients(ctx, saved, needs, dy, None)


_apply = differentiable(_slim_linear, _setup_context, _backward, slim_linear_reference, cpp=True)
_apply_into_buffer = differentiable_into_buffer(_slim_linear, _setup_context, _gradients, cpp=True)
composed(_slim_linear_input_grad, slim_linear_input_grad_reference)
composed(_slim_linear_weight_grad, slim_linear_weight_grad_composition)
not_differentiable(_slim_linear_weight_grad_)


# ---- floating-point operations: each direction is a product of [N, F] and [F, out] or of their transposes

count_flops(_slim_linear, lambda x, weight, bias, out_features: 2 * math.prod(x) * out_features)
count_flops(_slim_linear_input_grad, lambda dy, weight, in_features: 2 * math.prod(dy) * in_features)
for _op in (_slim_linear_weight_grad, _slim_linear_weight_grad_):
    count_flops(_op, lambda dy, x, weight: 2 * math.prod(x) * dy[-1])


@autocast_rule(_slim_linear)
def _autocast(dtype, x, weight, bias, out_features):
    if weight.numel() > _SMALL_WEIGHT:
        weight = weight.to(dtype)  # once for both directions
    return x.to(dtype), autocast_parameter(dtype, weight), autocast_parameter(dtype, bias), out_features


# ---- public function


def slim_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_features: int | None = None,
    weight_grad: Tensor | None = None,
) -> Tensor:
    """Linear layer with `weight[:out_features, :F]`, read in place.

    Args:
        x: [..., F], floating point.
        weight: [O, I], dtype of x, or float32 on the CPU: the full-width weight, F <= I.
        bias: [O] or None, dtype of x, or float32 on the CPU.
        out_features: output features of the sub-network, at most O; None is O.
        weight_grad: [O, I], any floating dtype: the backward pass adds the weight's gradient to its slice, and
            autograd gets none. Of a parameter, which requires a gradient, that is its .grad. For a weight,
            which may be a low-precision copy, that requires none, nothing is added.

    Returns:
        [..., out_features], dtype of x.

    Raises:
        ValueError, TypeError: as `check_slim_linear`, when shapes or dtypes do not fit.
    """
    out_features = weight.shape[0] if out_features is None else out_features
    check_slim_linear(x, weight, bias, out_features)
    if weight_grad is not None:
        check_gradient_buffer(weight_grad, weight)
    if in_autocast(x):
        x, weight, bias, _ = _autocast(autocast_dtype(x), x, weight, bias, out_features)
    if weight_grad is not None:
        return _apply_into_buffer(x, weight, bias, out_features, weight_grad)
    return _apply(x, weight, bias, out_features)
