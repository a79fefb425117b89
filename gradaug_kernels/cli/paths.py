"""How `gradaug info` asks who computes a convolution, or each layer of a model, and prints it."""

from collections.abc import Iterator
from typing import Any

import torch

from .._gpu import paths as gpu_paths
from .._library import cuda_choice
from ..slim.paths import Convolution, explain_convolution

DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
SYNTAX = "N,C,H,W,O,KERNEL[,STRIDE[,PADDING[,DILATION[,GROUPS]]]]"
_NAMES = {"forward": "forward", "input_grad": "input gradient", "weight_grad": "weight gradient"}


def parse_convolution(text: str, full: str | None = None) -> Convolution:
    """A convolution as SYNTAX says; a kernel, stride, padding or dilation is one integer or two, "3x5".

    full: "C,O", the channels at full width; None: those of the convolution.

    Raises:
        ValueError: for another text.
    """
    fields = text.split(",")
    if not 6 <= len(fields) <= 10:
        raise ValueError(f"--conv must be {SYNTAX}, got {text}")
    n, c, h, w, out = (_integer("--conv", text, field) for field in fields[:5])
    pairs = [_pair(text, field) for field in fields[5:9]]
    groups = _integer("--conv", text, fields[9]) if len(fields) == 10 else 1
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    full_c, full_o = c, out
    if full is not None:
        channels = full.split(",")
        if len(channels) != 2:
            raise ValueError(f"--full must be C,O, got {full}")
        full_c, full_o = (_integer("--full", full, field) for field in channels)
    return Convolution((n, c, h, w), out, (full_o, full_c // groups), *pairs, groups=groups)


def parse_images(text: str) -> tuple[int, int, int, int]:
    """N,C,H,W. Raises: ValueError for another text."""
    fields = text.split(",")
    if len(fields) != 4:
        raise ValueError(f"--images must be N,C,H,W, got {text}")
    n, c, h, w = (_integer("--images", text, field) for field in fields)
    if min(n, c, h, w) < 1:
        raise ValueError(f"--images must have integers of at least 1, got {text}")
    return n, c, h, w


def _integer(option, text, field) -> int:
    if not field.isascii() or not field.isdigit():
        raise ValueError(f"{option} must have integers of at least 0 between commas, got {text}")
    return int(field)


def _pair(text, field) -> tuple[int, int]:
    values = [_integer("--conv", text, value) for value in field.split("x")]
    if len(values) > 2:
        raise ValueError(f"--conv must have one integer or two, such as 3x5, for an axis' option, got {field}")
    return values[0], values[-1]


def explain_on(device: str, conv: Convolution, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The rows of `explain_convolution` with their device; of a GPU what the rule says, whether there is one or not."""
    if device == "cpu":
        return [{"device": device} | row for row in explain_convolution(conv, dtype)]
    conv.check()
    return [_on_cuda(direction, dtype, conv) for direction in gpu_paths.DIRECTIONS]


def _on_cuda(direction, dtype, conv) -> dict[str, Any]:
    full_o, full_c = conv.full
    sizes = (*conv.shape, conv.out, full_c, full_o, *conv.kernel)
    geometry = gpu_paths.Geometry(direction, dtype, *sizes, *conv.options)
    row = {"device": "cuda", "direction": direction, "pixels": ""}
    choice = cuda_choice()
    if choice == "reference":
        return row | {"path": "reference", "rejected": {}}
    card = gpu_paths.card_of(torch.device("cuda", 0)) if torch.cuda.is_available() else gpu_paths.UNMEASURED
    *rejected, (path, _) = gpu_paths.explain(geometry, choice, card)
    return row | {"path": path, "rejected": dict(rejected)}


def format_convolution(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        pixels = f", {row['pixels']}" if row["pixels"] else ""
        yield f"  {row['device']} {_NAMES[row['direction']]}{pixels}: {row['path']}"
        yield from (f"    not {path}: {why}" for path, why in row["rejected"].items())


def format_model(rows: list[dict[str, Any]]) -> Iterator[str]:
    cells = [("layer", *_NAMES.values())]
    for row in rows:
        of_directions = (row[direction] for direction in _NAMES)
        cells.append((row["layer"], *(" | ".join(dict.fromkeys(paths)) for paths in of_directions)))
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  " + "  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip()
