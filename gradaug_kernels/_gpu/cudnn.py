"""Convolution by cuDNN, which wants dense filters: the slice is packed into an OHWI copy for each call.

The copy is skipped where the slice is the whole weight. ATen calls cuDNN, keeps its plans, and serves what it does not.
"""

import torch

from ..ops._conv import memory_format
from .layout import nhwc


def _packed(weight, out_channels, in_channels):
    return weight[:out_channels, :in_channels].contiguous(memory_format=torch.channels_last)


def _backward(dy, x, w, stride, padding, dilation, groups, mask):
    return torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, padding, dilation, False, [0, 0], groups, [*mask, False]
    )


def slim_conv2d_cudnn(x, weight, bias, out_channels, stride, padding, dilation, groups):
    w = _packed(weight, out_channels, x.shape[1] // groups)
    bias = None if bias is None else bias[:out_channels]
    y = torch.nn.functional.conv2d(nhwc(x), w, bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=memory_format(x, weight))


def slim_conv2d_input_grad_cudnn(dy, weight, input_size, stride, padding, dilation, groups):
    fmt = memory_format(dy, weight)
    if dy.numel() == 0:
        return dy.new_zeros(input_size).contiguous(memory_format=fmt)
    w = _packed(weight, dy.shape[1], input_size[1] // groups)
    x = dy.new_empty(1).expand(input_size)  # only its shape is read
    dx = _backward(nhwc(dy), x, w, stride, padding, dilation, groups, (True, False))[0]
    return dx.contiguous(memory_format=fmt)


def slim_conv2d_weight_grad__cudnn(dy, x, dweight, stride, padding, dilation, groups):
    if dy.numel() == 0:
        return
    target = dweight[: dy.shape[1], : x.shape[1] // groups]  # [out, in / groups, KH, KW]
    w = dy.new_empty(1).expand(target.shape)  # only its shape is read
    target += _backward(nhwc(dy), nhwc(x), w, stride, padding, dilation, groups, (False, True))[1]
