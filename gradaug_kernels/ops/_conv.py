"""What the operators with a convolution share: its arguments, the sizes of its images, and their layout.

A convolution's arguments are `x, *convolution`, where convolution is a `Convolution`, and end in its `options`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

OPTIONS = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
CONVOLUTION = f"Tensor weight, Tensor? bias, SymInt out_channels, {OPTIONS}"


class Options(NamedTuple):
    """What an operator of a convolution takes last: of the sub-network, in pixels."""

    stride: Sequence[int]  # vertical, horizontal
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @classmethod
    def of(cls, arguments: Any) -> "Options":
        """Those among the arguments of an operator."""
        return cls(arguments.stride, arguments.padding, arguments.dilation, arguments.groups)


class Convolution(NamedTuple):
    """What `slim_conv2d` takes after x."""

    weight: Any
    bias: Any
    out_channels: int
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @classmethod
    def of(cls, arguments: Any) -> "Convolution":
        """Those among the arguments of an operator."""
        a = arguments
        return cls(a.weight, a.bias, a.out_channels, a.stride, a.padding, a.dilation, a.groups)


def convolution_arguments(weight, bias, out_channels, stride, padding, dilation, groups) -> tuple:
    """A `Convolution`'s, from those of a public function: one integer stands for two, None for all channels."""
    pairs = [[v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation)]
    return weight, bias, weight.shape[0] if out_channels is None else out_channels, *pairs, groups


def output_size(size, kernel, stride, padding, dilation):
    """Along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def output_shape(x_size, weight_size, out_channels, stride, padding, dilation, _) -> tuple:
    """[N, out_channels, OH, OW] from those of x [N, C, H, W] and the full-width weight [O, I / groups, KH, KW]."""
    axes = zip(x_size[2:], weight_size[2:], stride, padding, dilation, strict=True)
    return (x_size[0], out_channels, *(output_size(*axis) for axis in axes))


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """NHWC if one of the tensors is, as torch's convolutions choose."""
    nhwc = any(suggest_memory_format(tensor) == torch.channels_last for tensor in tensors)
    return torch.channels_last if nhwc else torch.contiguous_format
