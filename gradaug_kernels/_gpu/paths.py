"""Who serves a convolution of CUDA tensors: PATHS, the list of paths in order, each with its conditions.

    gemm         a strided matrix product by cuBLAS (gemm.py): 1x1, stride 1, no padding, no groups
    depthwise    direct Triton kernels (triton/depthwise_conv2d.py)
    triton       implicit GEMM in Triton (triton/slim_conv2d.py)
    cpp          CUDA C++, where it was built; which of its kernels: csrc/cuda/conv/paths.cuh
    cudnn        cuDNN on a packed copy of the slice (cudnn.py)

`path_for` is the rule that every call goes through, and `explain` is the same with the reasons. Forward, input gradient
and weight gradient have one list; what `gradaug tune` measured can tell them apart.

GRADAUG_CUDA=triton, cpp or cudnn takes that path wherever it exists (triton: with gemm and depthwise); `auto` takes
what `gradaug tune` measured on this card for the bucket of the shape (_tuning/<card>.json), else the first path of the
list all of whose conditions hold.
"""

import functools
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path as File
from types import MappingProxyType
from typing import NamedTuple

import torch

from .._library import cuda_choice, cuda_cpp_kernel
from . import cudnn, gemm

_OPS = torch.ops.gradaug
TUNING = File(__file__).with_name("_tuning")
DIRECTIONS = ("forward", "input_grad", "weight_grad")
OLDEST = (8, 0)  # compute capability that Triton and csrc/cuda compile for


class Geometry(NamedTuple):
    """One convolution of a sub-network, in one direction."""

    direction: str
    dtype: torch.dtype
    n: int
    c: int  # input channels
    h: int
    w: int
    o: int  # output channels
    full_c: int  # input channels of a group at full width
    full_o: int
    kh: int
    kw: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def pixels(self) -> int:
        """N * OH * OW."""
        oh = (self.h + 2 * self.padding[0] - self.dilation[0] * (self.kh - 1) - 1) // self.stride[0] + 1
        ow = (self.w + 2 * self.padding[1] - self.dilation[1] * (self.kw - 1) - 1) // self.stride[1] + 1
        return self.n * oh * ow

    @property
    def depthwise(self) -> bool:
        return self.groups == self.c == self.o and self.groups > 1

    @property
    def whole(self) -> bool:
        """Whether the slice is the whole weight."""
        return self.o == self.full_o and self.c // self.groups == self.full_c


class Card(NamedTuple):
    """What the rule asks of a graphics card."""

    capability: tuple[int, int] = OLDEST
    measured: Mapping[str, str] = MappingProxyType({})  # bucket -> path, by `gradaug tune`


UNMEASURED = Card()  # any that the kernels are for, before `gradaug tune`


# ---- conditions


class Condition(NamedTuple):
    holds: Callable[[Geometry, Card], bool]
    otherwise: str  # the reason against a path where it does not hold


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_exact_float32(dtype: torch.dtype) -> bool:
    """Whether torch's setting for convolutions keeps all digits of float32, which tensor cores cannot."""
    return dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32"


def _is_dense_1x1(g: Geometry, card: Card) -> bool:
    return g.kh == g.kw == g.groups == 1 and g.stride == (1, 1) and g.padding == (0, 0)


def _has_one_precision(g: Geometry, card: Card) -> bool:
    """cuBLAS obeys the setting for matrix products; where that for convolutions differs, it is not asked."""
    if g.dtype != torch.float32:
        return True
    conv, matmul = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    return (conv == "tf32") == (matmul == "tf32")


def _is_countable(g: Geometry, card: Card) -> bool:
    """By the kernels, in 32 bits, a last tile included; groups times phases of the stride are one axis of a grid."""
    most, area = 2**31 - 2**16, g.h * g.w
    images = area * g.n < most and area * g.c < most and area * g.o < most and g.pixels < most
    return images and g.full_o * g.full_c * g.kh * g.kw < most and g.groups * g.stride[0] * g.stride[1] < 2**16


DENSE_1X1 = Condition(_is_dense_1x1, "it is not 1x1 of stride 1 without padding and groups")
ONE_PRECISION = Condition(_has_one_precision, "torch's settings of float32 differ for convolutions and matrix products")
DEPTHWISE = Condition(lambda g, card: g.depthwise, "it is not depthwise: groups, input and output channels differ")
NOT_DEPTHWISE = Condition(lambda g, card: not g.depthwise, "it is depthwise")
TRITON = Condition(lambda g, card: has_triton(), "the package triton is not installed")
BUILT = Condition(lambda g, card: "cpp" in paths_built(), "the CUDA extension was not built")
SM80 = Condition(lambda g, card: card.capability >= OLDEST, "the card is older than compute capability 8.0")
NOT_FLOAT64 = Condition(lambda g, card: g.dtype != torch.float64, "Triton's kernels have no float64")
COUNTABLE = Condition(_is_countable, "its sizes exceed what the kernels count in 32 bits")
SLICE = Condition(
    lambda g, card: not g.whole, "the slice is the whole weight: cuDNN packs nothing and its plans repeat"
)
TENSOR_CORES = Condition(lambda g, card: not is_exact_float32(g.dtype), "exact float32 has no tensor cores")
UNGROUPED = Condition(lambda g, card: g.groups == 1, "groups leave tensor cores too few channels")
CHANNELS = Condition(lambda g, card: g.c >= 16 and g.o >= 16, "fewer than 16 channels are too few for tensor cores")


# ---- the list


class Path(NamedTuple):
    able: tuple[Condition, ...] = ()  # it can do the convolution here
    preferred: tuple[Condition, ...] = ()  # `auto` asks these first, where nothing was measured


# gemm and depthwise wherever they exist: no packing, and nothing planned per shape. Of the others cuDNN, but for a
# slice that fills tensor cores, which with random widths is always a new one.
_NEW_GEMM = (SLICE, UNGROUPED, CHANNELS, TENSOR_CORES)
PATHS = {
    "gemm": Path(able=(DENSE_1X1, ONE_PRECISION)),
    "depthwise": Path(able=(DEPTHWISE, TRITON, SM80, NOT_FLOAT64, COUNTABLE)),
    "triton": Path(able=(NOT_DEPTHWISE, TRITON, SM80, NOT_FLOAT64, COUNTABLE), preferred=_NEW_GEMM),
    "cpp": Path(able=(BUILT, SM80, COUNTABLE), preferred=_NEW_GEMM),
    "cudnn": Path(),
}
_ABLE = {name: path.able for name, path in PATHS.items()}
_BY_DEFAULT = {name: path.preferred + path.able for name, path in PATHS.items()}
# GRADAUG_CUDA -> the paths that it allows beside cudnn, which can do everything; references call cuDNN too.
ALLOWED = {"triton": ("gemm", "depthwise", "triton"), "cpp": ("cpp",), "cudnn": (), "reference": ()}


# ---- the rule


def explain(geometry: Geometry, choice: str | None = None, card: Card = UNMEASURED) -> list[tuple[str, str | None]]:
    """(path, why it is not taken) for the paths of the list up to the one that is taken, whose reason is None.

    No GPU is needed: `card_of` has the card of a device, and a `Card` may be any.

    Args:
        choice: a value of GRADAUG_CUDA; None is that of the environment.
    """
    choice = choice or cuda_choice()
    measured = _measured(geometry, card) if choice == "auto" and card.measured else None
    by_default = choice == "auto" and measured is None
    found = []
    for name, conditions in (_BY_DEFAULT if by_default else _ABLE).items():
        reason = _unmet(conditions, geometry, card)
        if reason is None and not by_default:
            reason = _why_another(name, choice, measured)
        found.append((name, reason))
        if reason is None:
            break
    return found


def path_for(geometry: Geometry, choice: str | None = None, card: Card = UNMEASURED) -> str:
    """The path of a convolution; arguments as in `explain`."""
    return explain(geometry, choice, card)[-1][0]


def candidates(geometry: Geometry, card: Card = UNMEASURED) -> list[str]:
    """The paths that can do this convolution here."""
    return [name for name, conditions in _ABLE.items() if _unmet(conditions, geometry, card) is None]


def _unmet(conditions: tuple[Condition, ...], geometry: Geometry, card: Card) -> str | None:
    for holds, otherwise in conditions:
        if not holds(geometry, card):
            return otherwise
    return None


def _why_another(name: str, choice: str, measured: str | None) -> str | None:
    """Why a path that can do the convolution is not taken: by what was measured, or else by GRADAUG_CUDA."""
    if measured is not None:
        return None if name == measured else f"`gradaug tune` measured {measured} to be faster on this card"
    return None if name in (*ALLOWED[choice], "cudnn") else f"GRADAUG_CUDA={choice} does not allow it"


def _measured(geometry: Geometry, card: Card) -> str | None:
    """The path that the card's table has for a convolution, None if it has none that can do it here."""
    name = card.measured.get(bucket(geometry))
    return name if name in _ABLE and _unmet(_ABLE[name], geometry, card) is None else None


# ---- tables


def bucket(geometry: Geometry) -> str:
    """What a table distinguishes: kinds, and sizes by powers of two.

    Channels count by the vector loads they allow too: divisible by 8, by 2 or by neither.
    """
    g = geometry
    per_group = (g.c // g.groups, g.o // g.groups)
    vector = next(v for v in (8, 2, 1) if not any(channels % v for channels in per_group))
    kind = "depthwise" if g.depthwise else "grouped" if g.groups > 1 else "dense"
    sizes = " ".join(f"{k}{(v - 1).bit_length()}" for k, v in zip("iop", (*per_group, g.pixels), strict=True))
    return (
        f"{g.direction} {str(g.dtype).removeprefix('torch.')} {kind} {g.kh}x{g.kw} "
        f"stride {max(g.stride)} dilation {max(g.dilation)} {'whole' if g.whole else 'slice'} vector {vector} {sizes}"
    )


def card_name(device: torch.device) -> str:
    """The file name of a card's table: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def measured_on(name: str) -> dict[str, str]:
    """What `gradaug tune` measured on a card: bucket -> path. Empty where it did not run."""
    path = TUNING / f"{name}.json"
    return json.loads(path.read_text())["paths"] if path.exists() else {}


@functools.cache
def card_of(device: torch.device) -> Card:
    return Card(torch.cuda.get_device_capability(device), measured_on(card_name(device)))


# ---- kernels


@functools.cache
def paths_built() -> dict[str, dict[str, Callable]]:
    """path -> direction -> kernel with the operator's own signature."""

    def kernels(module, stem, suffix):
        names = (f"{stem}_{suffix}", f"{stem}_input_grad_{suffix}", f"{stem}_weight_grad__{suffix}")
        return dict(zip(DIRECTIONS, (getattr(module, name) for name in names), strict=True))

    paths = {"gemm": kernels(gemm, "slim_conv2d", "gemm"), "cudnn": kernels(cudnn, "slim_conv2d", "cudnn")}
    if has_triton():
        for path, name in (("triton", "slim_conv2d"), ("depthwise", "depthwise_conv2d")):
            paths[path] = kernels(importlib.import_module(f"gradaug_kernels._gpu.triton.{name}"), name, "triton")
    operators = (_OPS.slim_conv2d, _OPS.slim_conv2d_input_grad, _OPS.slim_conv2d_weight_grad_)
    cpp = [cuda_cpp_kernel(operator.default) for operator in operators]
    if all(cpp):
        paths["cpp"] = dict(zip(DIRECTIONS, cpp, strict=True))
    return paths
