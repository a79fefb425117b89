"""Which path of csrc/cpu/conv/paths.cpp computes a convolution on this CPU, and why the others do not.

For `gradaug info`, tests, and benchmarks that time one path beside another. Nothing here is used by the operators.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

DIRECTIONS = ("forward", "input_grad", "weight_grad")
_OPS = torch.ops.gradaug


class Verdict(NamedTuple):
    """What the list says about a path.

    pixels: those of the result that it was asked for, "rows 1 of 2, columns 0 of 2"; "" for all.
    path: its name.
    cannot: why it cannot compute the convolution; "" if it can.
    loses: why another is chosen though it could; "" if none is.
    """

    pixels: str
    path: str
    cannot: str
    loses: str

    @property
    def reason(self) -> str:
        return self.cannot or self.loses


def conv_paths(
    direction: str, x: Tensor, weight: Tensor, out_channels: int, stride, padding, dilation, groups: int
) -> list[Verdict]:
    """The verdicts on all paths, in order, for each set of pixels that is computed by itself.

    Args:
        direction: one of DIRECTIONS.
        x, weight: as `slim_conv2d`'s; their shapes, strides and dtypes matter, and their device may be "meta". The
            output's gradient has the layout that the forward gives; the weight's is added to a buffer like weight.

    Raises:
        ImportError: where the native library was not built. ValueError: for arguments that do not fit.
    """
    _check_built()
    return _verdicts(_OPS._conv_paths(direction, x, weight, out_channels, stride, padding, dilation, groups))


def linear_paths(direction: str, x: Tensor, weight: Tensor, out_features: int) -> list[Verdict]:
    """The same for `slim_linear`."""
    _check_built()
    return _verdicts(_OPS._linear_paths(direction, x, weight, out_features))


def chosen(verdicts: list[Verdict]) -> dict[str, str]:
    """pixels -> the path that computes them: the first that can and does not lose."""
    found: dict[str, str] = {}
    for verdict in verdicts:
        if not verdict.reason:
            found.setdefault(verdict.pixels, verdict.path)
    return found


@contextlib.contextmanager
def recorded_paths() -> Iterator[list[str]]:
    """The list that the block is given holds, when it ends, the names of the paths that ran in it, in order."""
    with _watch("") as taken:
        yield taken


@contextlib.contextmanager
def forced_path(name: str) -> Iterator[list[str]]:
    """In the block every convolution and linear layer on the CPU takes this path; the list is as `recorded_paths`'.

    Where it cannot, the operator raises ValueError and says why. Blocks do not nest.
    """
    with _watch(name) as taken:
        yield taken


@contextlib.contextmanager
def _watch(forced):
    _check_built()
    taken: list[str] = []
    _OPS._watch_conv_paths(forced)
    try:
        yield taken
    finally:
        taken += _OPS._unwatch_conv_paths()


def _check_built() -> None:
    if not hasattr(_OPS, "_conv_paths"):
        raise ImportError("the paths of a convolution need the native library of the CPU, which was not built")


def _verdicts(lines: list[str]) -> list[Verdict]:
    return [Verdict(*lines[i : i + 4]) for i in range(0, len(lines), 4)]
