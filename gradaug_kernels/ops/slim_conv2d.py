"""Convolution with the first channels of a full-width weight, read in place.

    y = conv2d(x, weight[:out_channels, :C / groups], bias[:out_channels], stride, padding, dilation, groups)

where C is the number of channels of x. It is the layer of slimmable networks (Yu et al., ICLR 2019, section 3) that
GradAug samples its sub-networks from.

    x        [N, C, H, W]          any strides; NHWC (channels_last) is the layout the kernels are fast in
    weight   [O, I / G, KH, KW]    the full width; OHWI (channels_last) is the fast layout
    bias     [O] or None
    y        [N, out_channels, OH, OW], NHWC if x or weight is (torch's own rule), else NCHW

float32, float64, bfloat16 and float16; x, weight and bias share one dtype, but for float32 weights and biases of a
low-precision x on the CPU, which are rounded as they are read; sums are at least float32.
The gradient of weight has the full shape and is zero outside the slice. `slim_conv2d_weight_grad_` adds that slice to
a buffer of any floating dtype, so that a training step can gather the gradients of many sub-networks in `weight.grad`
without full-size temporaries.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_backward_flop, conv_flop_count

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
from ._conv import CONVOLUTION, OPTIONS, Options, convolution_arguments, memory_format, output_shape

_MOST = 2**31 - 1  # of stride, padding and dilation: what kernels reckon with stays far from 64 bits


def _slice(weight: Tensor, out_channels: int, in_channels: int, groups: int) -> Tensor:
    return weight[:out_channels, : in_channels // groups]  # [out, in / groups, KH, KW]


def check_slim_conv2d(x, weight, bias, out_channels, *options) -> None:
    """The contract of the arguments, for the operator and for its fake alike.

    Raises:
        ValueError: for shapes that do not fit. TypeError: for dtypes that are not floating or that differ.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {x.dim()} dimensions")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}; scale integer images to floats first")
    if weight.dim() != 4:
        raise ValueError(f"weight must be [O, I / groups, KH, KW], got {weight.dim()} dimensions")
    check_same_dtype_and_device(x, weight=weight, bias=bias)
    check_sizes(x.shape, weight.shape, out_channels, *options)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] < out_channels):
        raise ValueError(f"bias must have at least {out_channels} elements, got shape {tuple(bias.shape)}")


def check_sizes(x_size, weight_size, out_channels, *options) -> None:
    """The part of check_slim_conv2d that is about sizes: [N, C, H, W] and [O, I / groups, KH, KW]."""
    stride, padding, dilation, groups = options
    in_channels = x_size[1]
    if not 0 < out_channels <= weight_size[0]:
        raise ValueError(f"out_channels must be in [1, {weight_size[0]}], got {out_channels}")
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(f"groups must divide {in_channels} input and {out_channels} output channels, got {groups}")
    if in_channels < 1 or in_channels // groups > weight_size[1]:
        raise ValueError(
            f"x must have between 1 and {weight_size[1] * groups} channels "
            f"({weight_size[1]} for each of {groups} groups), got {in_channels}"
        )
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} must be two integers of at least {least}, got {tuple(pair)}")
        if max(pair) > _MOST:
            raise ValueError(f"{name} must be at most {_MOST}, got {tuple(pair)}")
    if weight_size[2] < 1 or weight_size[3] < 1:
        raise ValueError(f"the size of the kernel must be two integers of at least 1, got {tuple(weight_size[2:])}")
    if x_size[2] < 1 or x_size[3] < 1:
        raise ValueError(f"the size of the image must be two integers of at least 1, got {tuple(x_size[2:])}")
    for axis, size in enumerate(x_size[2:]):
        window = dilation[axis] * (weight_size[2 + axis] - 1) + 1
        if size + 2 * padding[axis] < window:
            raise ValueError(
                f"the padded image must be at least as large as the dilated kernel, {window}, "
                f"got {size + 2 * padding[axis]} along {'height' if axis == 0 else 'width'}"
            )


def _check_output_gradient(dy, x_size, weight, *options) -> None:
    check_sizes(x_size, weight.shape, dy.shape[1], *options)
    expected = output_shape(x_size, weight.shape, dy.shape[1], *options)
    if tuple(dy.shape) != expected:
        raise ValueError(f"dy must have the shape of the output, {expected}, got {tuple(dy.shape)}")


def check_slim_conv2d_input_grad(dy, weight, input_size, *options) -> None:
    """As check_slim_conv2d, for the operator of the input gradient."""
    if dy.dim() != 4 or weight.dim() != 4 or len(input_size) != 4:
        raise ValueError(
            "dy must be [N, out, OH, OW], weight [O, I / groups, KH, KW] and input_size four integers, got "
            f"{dy.dim()}, {weight.dim()} and {len(input_size)} of them"
        )
    check_floating("dy", dy)
    check_same_dtype_and_device(dy, name="dy", weight=weight)
    _check_output_gradient(dy, input_size, weight, *options)


def check_slim_conv2d_weight_grad(dy, x, dweight, *options) -> None:
    """As check_slim_conv2d, for the operators of the weight gradient. dweight: a buffer, or the weight itself."""
    if dy.dim() != 4 or x.dim() != 4 or dweight.dim() != 4:
        raise ValueError(
            "dy must be [N, out, OH, OW], x [N, C, H, W] and dweight [O, I / groups, KH, KW], got "
            f"{dy.dim()}, {x.dim()} and {dweight.dim()} dimensions"
        )
    check_gradients_beside(x, dy, dweight)
    _check_output_gradient(dy, x.shape, dweight, *options)


# ---- forward: schema, composition, reference, fake


def _for_torch(x: Tensor, stride) -> Tensor:
    """x as PyTorch's convolutions take it without fault on the CPU; csrc/cpu/slim_conv2d.cpp says which there are."""
    if x.device.type != "cpu":
        return x
    if x.shape[3] < stride[1]:
        x = x.double()
    return x.clone(memory_format=torch.contiguous_format) if 1 in x.shape else x  # its stride may be anything


def _is_one_column(x: Tensor, size: tuple, stride, groups: int) -> bool:
    """Outputs [N, out, OH, OW] that PyTorch's bfloat16 adds to what was in memory before (the same place says it)."""
    in_pieces = x.shape[1] == groups and size[1] > groups
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and in_pieces and stride[1] > 1 and size[3] == 1


def _weight_for_torch(w: Tensor, groups: int) -> Tensor:
    on_cpu_in_groups = w.device.type == "cpu" and groups > 1
    return w.clone(memory_format=torch.contiguous_format) if on_cpu_in_groups and 1 in w.shape[2:] else w


def slim_conv2d_composition(x, weight, bias, out_channels, *options):
    stride, _, _, groups = options
    size = output_shape(x.shape, weight.shape, out_channels, *options)
    image = _for_torch(x.double() if _is_one_column(x, size, stride, groups) else x, stride)
    bias = None if bias is None else bias[:out_channels].to(image.dtype)
    w = _weight_for_torch(_slice(weight, out_channels, x.shape[1], groups).to(image.dtype), groups)
    return torch.nn.functional.conv2d(image, w, bias, *options).to(x.dtype)


def slim_conv2d_reference(x, weight, *others):
    check_slim_conv2d(x, weight, *others)
    return slim_conv2d_composition(x, weight, *others).contiguous(memory_format=memory_format(x, weight))


def slim_conv2d_fake(x, weight, bias, out_channels, *options):
    check_slim_conv2d(x, weight, bias, out_channels, *options)
    y = x.new_empty(output_shape(x.shape, weight.shape, out_channels, *options))
    return y.contiguous(memory_format=memory_format(x, weight))


slim_conv2d_op = define(f"slim_conv2d(Tensor x, {CONVOLUTION}) -> Tensor", slim_conv2d_reference, slim_conv2d_fake)


# ---- input gradient


def slim_conv2d_input_grad_composition(dy, weight, input_size, *options):
    groups = Options(*options).groups
    w = _weight_for_torch(_slice(weight, dy.shape[1], input_size[1], groups).to(dy.dtype), groups)
    if dy.numel() > 0:
        return torch.nn.grad.conv2d_input(input_size, w, dy, *options)
    return dy.new_zeros(input_size)


def slim_conv2d_input_grad_reference(dy, weight, *others):
    check_slim_conv2d_input_grad(dy, weight, *others)
    dx = slim_conv2d_input_grad_composition(dy, weight, *others)
    return dx.contiguous(memory_format=memory_format(dy, weight))


def _input_grad_fake(dy, weight, input_size, *options):
    check_slim_conv2d_input_grad(dy, weight, input_size, *options)
    return dy.new_empty(input_size).contiguous(memory_format=memory_format(dy, weight))


slim_conv2d_input_grad_op = define(
    f"slim_conv2d_input_grad(Tensor dy, Tensor weight, SymInt[4] input_size, {OPTIONS}) -> Tensor",
    slim_conv2d_input_grad_reference,
    _input_grad_fake,
)


# ---- weight gradient: added to the slice of a full-size buffer


def slim_conv2d_weight_grad__reference(dy, x, dweight, *options):
    check_slim_conv2d_weight_grad(dy, x, dweight, *options)
    check_written("dweight", dweight, dy=dy, x=x)
    stride, _, _, groups = options
    target = _slice(dweight, dy.shape[1], x.shape[1], groups)  # [out, in / groups, KH, KW]
    if dy.numel() > 0:
        x = _for_torch(x, stride)
        target += torch.nn.grad.conv2d_weight(x, target.shape, dy.to(x.dtype), *options)


def _weight_grad_fake(dy, x, dweight, *options):
    check_slim_conv2d_weight_grad(dy, x, dweight, *options)
    return torch.empty_like(dweight)


slim_conv2d_weight_grad__op = define(
    f"slim_conv2d_weight_grad_(Tensor dy, Tensor x, Tensor(a!) dweight, {OPTIONS}) -> ()",
    slim_conv2d_weight_grad__reference,
    check_slim_conv2d_weight_grad,
)


def slim_conv2d_weight_grad_composition(dy, x, weight, *options):
    stride, _, _, groups = options
    size = _slice(weight, dy.shape[1], x.shape[1], groups).shape  # [out, in / groups, KH, KW]
    if dy.numel() == 0:
        return torch.zeros_like(weight)
    x = _for_torch(x, stride)
    dw = torch.nn.grad.conv2d_weight(x, size, dy.to(x.dtype), *options)
    beyond = (weight.shape[1] - size[1], weight.shape[0] - size[0])
    return torch.nn.functional.pad(dw, (0, 0, 0, 0, 0, beyond[0], 0, beyond[1])).to(weight.dtype)


def slim_conv2d_weight_grad_reference(dy, x, weight, *options):
    dweight = torch.zeros_like(weight)
    slim_conv2d_weight_grad__op(dy, x, dweight, *options)
    return dweight


slim_conv2d_weight_grad_op = define(
    f"slim_conv2d_weight_grad(Tensor dy, Tensor x, Tensor weight, {OPTIONS}) -> Tensor",
    slim_conv2d_weight_grad_reference,
    _weight_grad_fake,
    composite=True,
)


# ---- autograd


def save_for_gradients(ctx, inputs, output):
    x, weight, bias, _, *ctx.options = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_size = None if bias is None else bias.shape[0]


def slim_conv2d_gradients(ctx, saved, needs, dy, weight_grad):
    """The gradients of all inputs of the operator; that of weight is added to weight_grad, if that is a buffer."""
    x, weight = saved
    needs_x, needs_weight, needs_bias, *_ = needs
    dx = dweight = dbias = None
    if needs_weight and weight_grad is None:
        dweight = slim_conv2d_weight_grad_op(dy, x, weight, *ctx.options)
    elif needs_weight:
        slim_conv2d_weight_grad__op(dy, x, weight_grad, *ctx.options)
    if needs_x:  # last, so that it is still in the caches when the layer before reads it
        dx = slim_conv2d_input_grad_op(dy, weight, x.shape, *ctx.options)
    if needs_bias:
        dbias = bias_grad(dy, 1, ctx.bias_size)
    return dx, dweight, dbias, None, None, None, None, None


def _backward(ctx, saved, needs, dy):
    return slim_conv2d_gradients(ctx, saved, needs, dy, None)


_apply = differentiable(slim_conv2d_op, save_for_gradients, _backward, slim_conv2d_composition, cpp=True)
_apply_into_buffer = differentiable_into_buffer(slim_conv2d_op, save_for_gradients, slim_conv2d_gradients, cpp=True)
composed(slim_conv2d_input_grad_op, slim_conv2d_input_grad_composition)
composed(slim_conv2d_weight_grad_op, slim_conv2d_weight_grad_composition)
not_differentiable(slim_conv2d_weight_grad__op)


# ---- floating-point operations, those of PyTorch's convolution of the slice


def forward_flops(x, weight, bias, out_channels, *options) -> int:
    """Of the arguments of `slim_conv2d`, tensors as their shapes."""
    w = _sliced_shape(weight, out_channels, x[1], Options(*options).groups)
    return conv_flop_count(x, w, output_shape(x, weight, out_channels, *options))


def backward_flops(dy, x, weight, options, needs_dx: bool, needs_dweight: bool) -> int:
    """Of the gradients of x and of the slice of weight, from shapes."""
    groups = Options(*options).groups
    w = _sliced_shape(weight, dy[1], x[1], groups)
    geometry = (None, None, None, None, False, None, groups)  # bias, stride, padding, dilation, transposed, ...
    return conv_backward_flop(dy, x, w, *geometry, (needs_dx, needs_dweight, False), out_val=(x, w, None))


def _sliced_shape(weight, out_channels: int, in_channels: int, groups: int) -> tuple[int, ...]:
    return (out_channels, in_channels // groups, *weight[2:])


count_flops(slim_conv2d_op, forward_flops)
count_flops(slim_conv2d_input_grad_op, lambda dy, w, x, *options: backward_flops(dy, x, w, options, True, False))
for _op in (slim_conv2d_weight_grad_op, slim_conv2d_weight_grad__op):
    count_flops(_op, lambda dy, x, w, *options: backward_flops(dy, x, w, options, False, True))


@autocast_rule(slim_conv2d_op)
def cast_slim_conv2d(dtype, x, weight, bias, *others):
    """The operator's arguments inside autocast."""
    return x.to(dtype), autocast_parameter(dtype, weight), autocast_parameter(dtype, bias), *others


# ---- public function


def slim_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_channels: int | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    weight_grad: Tensor | None = None,
) -> Tensor:
    """Convolution with `weight[:out_channels, :C / groups]`, read in place.

    Args:
        x: [N, C, H, W], floating point, any strides.
        weight: [O, I / G, KH, KW], dtype of x, or float32 on the CPU: the full-width weight.
        bias: [O] or None, dtype of x, or float32 on the CPU.
        out_channels: output channels of the sub-network, at most O; None is O.
        stride, padding, dilation: in pixels, one integer or (vertical, horizontal).
        groups: groups of the sub-network; divides C and out_channels.
        weight_grad: [O, I / G, KH, KW], any floating dtype: the backward pass adds the weight's gradient to its slice,
            and autograd gets none. Of a parameter, which requires a gradient, that is its .grad. For a weight,
            which may be a low-precision copy, that requires none, nothing is added.

    Returns:
        [N, out_channels, OH, OW], dtype and memory format of x.

    Raises:
        ValueError, TypeError: as `check_slim_conv2d`, when shapes or dtypes do not fit.
    """
    convolution = convolution_arguments(weight, bias, out_channels, stride, padding, dilation, groups)
    check_slim_conv2d(x, *convolution)
    if weight_grad is not None:
        check_gradient_buffer(weight_grad, weight)
    if in_autocast(x):
        x, *convolution = cast_slim_conv2d(autocast_dtype(x), x, *convolution)
    if weight_grad is not None:
        return _apply_into_buffer(x, *convolution, weight_grad)
    return _apply(x, *convolution)
