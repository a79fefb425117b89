"""Layouts that the CUDA paths read in place: activations with adjacent channels (NHWC), weights likewise (OHWI)."""

import torch
from torch import Tensor


def nhwc(x: Tensor) -> Tensor:
    """x itself where its channels are adjacent in memory (any pitch), else a channels_last copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=torch.channels_last)


def empty_nhwc(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    return torch.empty((n, c, h, w), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def slice_ohwi(weight: Tensor, out_channels: int, in_channels: int) -> Tensor:
    """The slice [out, in, KH, KW] in place where input channels are adjacent in memory, else a packed OHWI copy."""
    return nhwc(weight[:out_channels, :in_channels])
