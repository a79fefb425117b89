"""Which path computes a convolution on the CPU, or each layer of a model, and why those before it do not apply."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ..ops import conv_paths as cpu_paths
from ..ops.conv_paths import DIRECTIONS
from ..ops.slim_conv2d import check_sizes
from .layers import FastSlimConv2d, SlimLinear
from .width import use_width


class Convolution(NamedTuple):
    """As `slim_conv2d`'s arguments; full: channels of the weight (out, in of a group)."""

    shape: tuple[int, int, int, int]
    out: int
    full: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def options(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups

    def check(self) -> None:
        """Raises: ValueError for sizes that do not fit each other."""
        check_sizes(self.shape, (*self.full, *self.kernel), self.out, *self.options)


def explain_convolution(conv: Convolution, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Who computes a convolution of NHWC images: {direction, pixels, path, rejected: {path: why}}.

    pixels: those of the result that the path computes, "rows 1 of 2, columns 0 of 2"; "" for all.

    Raises:
        ImportError: where the native library was not built. ValueError: for sizes that do not fit each other.
    """
    conv.check()
    x = torch.empty(conv.shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    weight = torch.empty((*conv.full, *conv.kernel), dtype=dtype, device="meta")
    weight = weight.contiguous(memory_format=torch.channels_last)
    rows = []
    for direction in DIRECTIONS:
        verdicts = cpu_paths.conv_paths(direction, x, weight, conv.out, *conv.options)
        choices = {pixels: _choice(verdicts, pixels) for pixels in cpu_paths.chosen(verdicts)}
        first = next(iter(choices.values()))
        if all(choice == first for choice in choices.values()):
            choices = {"": first}
        for pixels, choice in choices.items():
            rows.append({"direction": direction, "pixels": pixels} | choice)
    return rows


def _choice(verdicts, pixels) -> dict[str, Any]:
    """The path of these pixels, and why not those before it."""
    of_pixels = [verdict for verdict in verdicts if verdict.pixels == pixels]
    taken = next(i for i, verdict in enumerate(of_pixels) if not verdict.reason)
    rejected = {verdict.path: verdict.reason for verdict in of_pixels[:taken]}
    return {"path": of_pixels[taken].path, "rejected": rejected}


def explain_model(
    model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, widths: tuple[float, ...]
) -> list[dict[str, Any]]:
    """For each convolution and linear layer of a converted model: {layer, direction: [path at each width]}, on the CPU.

    Nothing is computed. Of a layer that is called several times, the first call counts; parameters are float32.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for width in widths:
        for layer, call in _calls(model, shape, dtype, width).items():
            rows = found.setdefault(layer, {direction: [] for direction in DIRECTIONS})
            for direction in DIRECTIONS:
                rows[direction].append(_path(direction, *call))
    return [{"layer": layer, **rows} for layer, rows in found.items()]


def _calls(model, shape, dtype, width) -> dict[str, tuple]:
    """layer -> (function, x, weight, its other arguments), tensors without memory."""
    found: dict[str, tuple] = {}

    def record(name):
        def hook(layer, args, result):
            if name in found:
                return
            if isinstance(layer, SlimLinear):
                found[name] = (cpu_paths.linear_paths, _like(args[0], dtype), _like(layer.weight), result.shape[-1])
            else:
                (weight, _, *options), _ = layer._arguments(args[0])
                found[name] = (cpu_paths.conv_paths, _like(layer._padded(args[0]), dtype), _like(weight), *options)

        return hook

    named = [(n, m) for n, m in model.named_modules() if isinstance(m, FastSlimConv2d | SlimLinear)]
    handles = [module.register_forward_hook(record(name)) for name, module in named]
    try:
        with torch.no_grad(), use_width(model, width), FakeTensorMode(allow_non_fake_inputs=True):
            model(torch.empty(shape).contiguous(memory_format=torch.channels_last))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device="meta")


def _path(direction, function, x, *arguments) -> str:
    """The paths of all pixels, each once."""
    paths = cpu_paths.chosen(function(direction, x, *arguments)).values()
    return "+".join(dict.fromkeys(paths))
