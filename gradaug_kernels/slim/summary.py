"""What a converted model is at each width: which layers are sliced and to what, and which are whole and why."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from .layers import FastSlimConv2d, SlimBatchNorm2d, SlimLinear
from .width import check_width, round_channels, slim_modules


class LayerSummary(NamedTuple):
    """One layer with parameters or buffers.

    name: its name in the model.
    kind: its class.
    channels: for each width (input channels or features, output channels or features); None for an input that only
        a call tells, and no pairs for a layer without a width.
    is_sliced: whether its output is narrower at a smaller width.
    whole: why its output is not; "" if it is.
    """

    name: str
    kind: str
    channels: tuple[tuple[int | None, int], ...]
    is_sliced: bool
    whole: str


class Summary(NamedTuple):
    """The layers of a model at some widths; its str is a table."""

    widths: tuple[float, ...]
    rows: tuple[LayerSummary, ...]

    def __str__(self) -> str:
        cells = [("layer", "kind", *(f"{width:g}" for width in self.widths), "whole")]
        for row in self.rows:
            pairs = [f"{'?' if a is None else a} -> {b}" for a, b in row.channels] or ["-"] * len(self.widths)
            cells.append((row.name or "(model)", row.kind, *pairs, row.whole))
        sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)) for row in cells)
        return "\n".join(line.rstrip() for line in lines)


def summary(model: nn.Module, widths: Sequence[float] = (1.0, 0.5)) -> Summary:
    """What each layer of a model with layers of adjustable width computes at `widths`, which sets none of them.

    >>> print(summary(convert(torchvision.models.resnet18()), (1.0, 0.5)))
    layer                  kind             1            0.5          whole
    conv1                  FastSlimConv2d   3 -> 64      3 -> 32
    bn1                    SlimBatchNorm2d  64 -> 64     32 -> 32
    ...
    fc                     SlimLinear       512 -> 1000  256 -> 1000  its output leaves the network

    Args:
        model: as `convert` made it, or with such layers put in by hand; of those only a call tells the input.
        widths: each in (0, 1].

    Returns:
        One row per layer that has parameters or buffers, in the order of `model.named_modules()`.

    Raises:
        ValueError: for a width outside (0, 1] or one that leaves a layer no channel, or a model without such layers.
    """
    slim_modules(model)
    widths = tuple(check_width(width) for width in widths)
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, FastSlimConv2d | SlimLinear | SlimBatchNorm2d):
            channels = tuple(_channels(module, width) for width in widths)
            whole = _why_whole(module)
            rows.append(LayerSummary(name, type(module).__name__, channels, not whole, whole))
        elif any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
            rows.append(LayerSummary(name, type(module).__name__, (), False, "not of adjustable width"))
    return Summary(widths, tuple(rows))


def _channels(layer: nn.Module, width: float) -> tuple[int | None, int]:
    """Input and output channels at a width."""
    described = vars(layer).get("_input_channels")
    inputs = None
    if described is not None:
        count, divisor, inner = described
        inputs = round_channels(count, width, divisor) * inner
    elif "_kept_whole" in vars(layer):
        inputs = _size(layer, False)
    if isinstance(layer, SlimBatchNorm2d):
        return inputs, round_channels(layer.num_features, width) if inputs is None else inputs
    outputs = _size(layer, True)
    return inputs, round_channels(outputs, width, layer.divisor) if layer.slim_out else outputs


def _size(layer: nn.Module, of_output: bool) -> int:
    if isinstance(layer, FastSlimConv2d):
        return layer.out_channels if of_output else layer.in_channels
    if isinstance(layer, SlimLinear):
        return layer.out_features if of_output else layer.in_features
    return layer.num_features


def _why_whole(layer: nn.Module) -> str:
    kept = vars(layer).get("_kept_whole")
    if kept is not None:
        return kept
    return "" if getattr(layer, "slim_out", True) else "slim_out=False"
