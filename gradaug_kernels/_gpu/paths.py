"""Who serves a convolution of CUDA tensors: one rule, `path_for`, which every call goes through.

    gemm         a strided matrix product by cuBLAS (gemm.py): 1x1, stride 1, no padding, no groups
    depthwise    direct Triton kernels (triton/depthwise_conv2d.py)
    triton       implicit GEMM in Triton (triton/slim_conv2d.py)
    cpp          implicit GEMM in CUDA C++ (csrc/cuda/slim_conv2d.cu), where it was built
    cudnn        cuDNN on a packed copy of the slice (cudnn.py)

GRADAUG_CUDA=triton, cpp or cudnn takes that path wherever it exists (triton: with gemm and depthwise); `auto` takes
what `gradaug tune` measured on this card for the bucket of the shape (_tuning/<card>.json), else `default_path`.
Linear layers are gemm always. Batch norm has one CUDA kernel, in C++, which registers itself. A batch norm before or
after a convolution (ops/slim_norm_conv2d.py) is part of the convolution's kernel on the path triton, but for exact
float32; elsewhere the two are called one after the other.
"""

import functools
import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch

from .._library import cuda_choice, cuda_cpp_kernel, use_kernel
from ..ops._common import check_floating, check_gradients_beside, check_same_dtype_and_device, check_written
from ..ops._conv import output_size
from ..ops.slim_batch_norm import check_slim_batch_norm
from ..ops.slim_conv2d import check_sizes
from ..ops.slim_conv2d_statistics import slim_channel_statistics_reference, slim_conv2d_statistics_reference
from ..ops.slim_linear import check_slim_linear, check_slim_linear_input_grad, check_slim_linear_weight_grad
from ..ops.slim_norm_conv2d import slim_norm_conv2d_backward__reference, slim_norm_conv2d_reference
from . import cudnn, gemm

_OPS = torch.ops.gradaug
TUNING = Path(__file__).with_name("_tuning")
DIRECTIONS = ("forward", "input_grad", "weight_grad")
_LIMIT = 2**31 - 2**16  # what a kernel may count in 32 bits, a last tile included
_GRID_LIMIT = 2**16  # groups times residues of the stride are one axis of a grid


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
        oh, ow = (
            (size + 2 * self.padding[a] - self.dilation[a] * (kernel - 1) - 1) // self.stride[a] + 1
            for a, size, kernel in ((0, self.h, self.kh), (1, self.w, self.kw))
        )
        return self.n * oh * ow

    @property
    def depthwise(self) -> bool:
        return self.groups == self.c == self.o and self.groups > 1

    @property
    def whole(self) -> bool:
        """Whether the slice is the whole weight."""
        return self.o == self.full_o and self.c // self.groups == self.full_c


# ---- the rule


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def candidates(geometry: Geometry) -> list[str]:
    """The paths that can do this convolution here."""
    g = geometry
    paths = []
    dense_1x1 = g.kh == g.kw == g.groups == 1 and g.stride == (1, 1) and g.padding == (0, 0)
    # cuBLAS obeys the setting for matrix products; where that for convolutions differs, it is not asked.
    same_precision = g.dtype != torch.float32 or _tf32(torch.backends.cudnn.conv) == _tf32(torch.backends.cuda.matmul)
    if dense_1x1 and same_precision:
        paths.append("gemm")
    weights = g.full_o * g.full_c * g.kh * g.kw
    countable = max(g.pixels, g.n * g.h * g.w, g.h * g.w * g.c, g.h * g.w * g.o, weights) < _LIMIT
    countable = countable and g.groups * g.stride[0] * g.stride[1] < _GRID_LIMIT
    if has_triton() and g.dtype != torch.float64 and countable:
        paths.append("depthwise" if g.depthwise else "triton")
    if "cpp" in paths_built() and countable:
        paths.append("cpp")
    return [*paths, "cudnn"]


def default_path(geometry: Geometry, among: list[str]) -> str:
    """The choice of `auto` for a shape that no table of this card has.

    gemm and depthwise wherever they exist: no packing, and nothing planned per shape. cuDNN where it has nothing to
    pack and its plans repeat (the whole weight), where there are too few channels for tensor cores (groups, and fewer
    than 16: image stems), and for exact float32, which has no tensor cores. Otherwise a slice, and with random widths
    always a new one: triton, or cpp without Triton.
    """
    g = geometry
    for path in ("gemm", "depthwise"):
        if path in among:
            return path
    exact = g.dtype == torch.float32 and not _tf32(torch.backends.cudnn.conv)
    if g.whole or exact or g.groups > 1 or min(g.c, g.o) < 16:
        return "cudnn"
    return next(path for path in ("triton", "cpp", "cudnn") if path in among)


def path_for(geometry: Geometry, choice: str | None = None, table: dict[str, str] | None = None) -> str:
    """The path of a convolution.

    Args:
        choice: a value of GRADAUG_CUDA other than "reference"; None is that of the environment.
        table: for "auto": bucket -> path, as `gradaug tune` measured on the card.
    """
    choice = choice or cuda_choice()
    among = candidates(geometry)
    if choice == "auto":
        measured = table and table.get(bucket(geometry))
        return measured if measured in among else default_path(geometry, among)
    preferred = ("gemm", "depthwise", "triton") if choice == "triton" else (choice,)
    return next((path for path in preferred if path in among), "cudnn")


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


def _tf32(setting) -> bool:
    return setting.fp32_precision == "tf32"


# ---- tables


def card_name(device: torch.device) -> str:
    """The file name of a card's table: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


@functools.cache
def table_of(device: torch.device) -> dict[str, str]:
    """What `gradaug tune` measured on this card: bucket -> path. Empty where it did not run."""
    path = TUNING / f"{card_name(device)}.json"
    return json.loads(path.read_text())["paths"] if path.exists() else {}


# ---- kernels


@functools.cache
def paths_built() -> dict[str, dict[str, object]]:
    """path -> direction -> kernel with the operator's own signature."""

    def kernels(module, stem, suffix):
        names = (f"{stem}_{suffix}", f"{stem}_input_grad_{suffix}", f"{stem}_weight_grad__{suffix}")
        return dict(zip(DIRECTIONS, (getattr(module, name) for name in names), strict=True))

    paths = {"gemm": kernels(gemm, "slim_conv2d", "gemm"), "cudnn": kernels(cudnn, "slim_conv2d", "cudnn")}
    if has_triton():
        for path, name in (("triton", "slim_conv2d"), ("depthwise", "depthwise_conv2d")):
            paths[path] = kernels(importlib.import_module(f"gradaug_kernels._gpu.triton.{name}"), name, "triton")
    cpp = [cuda_cpp_kernel(op) for op in _CONVOLUTIONS]
    if all(cpp):
        paths["cpp"] = dict(zip(DIRECTIONS, cpp, strict=True))
    return paths


def _path(geometry: Geometry, device: torch.device) -> str:
    return path_for(geometry, table=table_of(device) if cuda_choice() == "auto" else None)


def _serve(geometry: Geometry, device: torch.device):
    return paths_built()[_path(geometry, device)][geometry.direction]


def _geometry(direction, x_size, dtype, weight, out_channels, stride, padding, dilation, groups) -> Geometry:
    if len(x_size) != 4 or weight.dim() != 4:
        raise ValueError(
            "x must be [N, C, H, W] and weight [O, I / groups, KH, KW], "
            f"got {len(x_size)} and {weight.dim()} dimensions"
        )
    (n, c, h, w), (full_o, full_c, kh, kw) = x_size, weight.shape
    options = (tuple(stride), tuple(padding), tuple(dilation), groups)
    return Geometry(direction, dtype, n, c, h, w, out_channels, full_c, full_o, kh, kw, *options)


@functools.lru_cache(4096)
def _check_sizes(geometry: Geometry, dy_size: torch.Size | None) -> None:
    """The kernels trust the sizes, and operators may be called without the functions that check them."""
    g = geometry
    options = (g.stride, g.padding, g.dilation)
    check_sizes((g.n, g.c, g.h, g.w), (g.full_o, g.full_c, g.kh, g.kw), g.o, *options, g.groups)
    if dy_size is not None:
        size = (output_size(*axis) for axis in zip((g.h, g.w), (g.kh, g.kw), *options, strict=True))
        expected = (g.n, g.o, *size)
        if dy_size != expected:
            raise ValueError(f"dy must have the shape of the output, {expected}, got {tuple(dy_size)}")


def _check_forward(geometry, x, weight, bias) -> None:
    check_floating("x", x)
    check_same_dtype_and_device(x, weight=weight, bias=bias)
    _check_sizes(geometry, None)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] < geometry.o):
        raise ValueError(f"bias must have at least {geometry.o} elements, got shape {tuple(bias.shape)}")


def _check_weight_grad(geometry, dy, x, dweight) -> None:
    check_gradients_beside(x, dy, dweight)
    check_written("dweight", dweight, dy=dy, x=x)
    _check_sizes(geometry, dy.shape)


def _out_channels(dy) -> int:
    if dy.dim() != 4:
        raise ValueError(f"dy must be [N, out, OH, OW], got {dy.dim()} dimensions")
    return dy.shape[1]


def _slim_conv2d(x, weight, bias, out_channels, *options):
    geometry = _geometry("forward", x.shape, x.dtype, weight, out_channels, *options)
    _check_forward(geometry, x, weight, bias)
    return _serve(geometry, x.device)(x, weight, bias, out_channels, *options)


def _slim_conv2d_input_grad(dy, weight, input_size, *options):
    geometry = _geometry("input_grad", input_size, dy.dtype, weight, _out_channels(dy), *options)
    check_floating("dy", dy)
    check_same_dtype_and_device(dy, name="dy", weight=weight)
    _check_sizes(geometry, dy.shape)
    return _serve(geometry, dy.device)(dy, weight, input_size, *options)


def _slim_conv2d_weight_grad_(dy, x, dweight, *options):
    geometry = _geometry("weight_grad", x.shape, x.dtype, dweight, _out_channels(dy), *options)
    _check_weight_grad(geometry, dy, x, dweight)
    _serve(geometry, x.device)(dy, x, dweight, *options)


def _slim_linear_input_grad(dy, weight, in_features):
    check_slim_linear_input_grad(dy, weight, in_features)
    return gemm.slim_linear_input_grad_gemm(dy, weight, in_features)


def _slim_linear_weight_grad_(dy, x, dweight):
    check_slim_linear_weight_grad(dy, x, dweight)
    check_written("dweight", dweight, dy=dy, x=x)
    gemm.slim_linear_weight_grad__gemm(dy, x, dweight)


def _slim_linear(x, weight, bias, out_features):
    check_slim_linear(x, weight, bias, out_features)
    return gemm.slim_linear_gemm(x, weight, bias, out_features)


def _slim_conv2d_statistics(x, weight, bias, out_channels, *options):
    geometry = _geometry("forward", x.shape, x.dtype, weight, out_channels, *options)
    _check_forward(geometry, x, weight, bias)
    fused = _fuses(geometry, x.device)
    kernel = _fused().slim_conv2d_statistics_triton if fused else slim_conv2d_statistics_reference
    return kernel(x, weight, bias, out_channels, *options)


def _slim_norm_conv2d(x, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, out_channels, *rest):
    *options, _ = rest
    geometry = _geometry("forward", x.shape, x.dtype, weight, out_channels, *options)
    _check_forward(geometry, x, weight, bias)
    check_slim_batch_norm(x, gamma, beta, mean, var, None, relu, eps, names=("gamma", "beta"))
    fused = _fuses(geometry, x.device)
    kernel = _fused().slim_norm_conv2d_triton if fused else slim_norm_conv2d_reference
    return kernel(x, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, out_channels, *rest)


def _slim_norm_conv2d_backward_(dy, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, dweight, *rest):
    *options, needs_dx, needs_dweight = rest
    geometry = _geometry("input_grad", x.shape, x.dtype, weight, _out_channels(dy), *options)
    check_slim_batch_norm(x, gamma, beta, mean, var, None, relu, eps, names=("gamma", "beta"))
    if needs_dx:
        check_same_dtype_and_device(x, weight=weight, dy=dy)
        _check_sizes(geometry, dy.shape)
    if needs_dweight:
        full = _geometry("input_grad", x.shape, x.dtype, dweight, dy.shape[1], *options)
        _check_weight_grad(full, dy, x, dweight)
    directions = ("input_grad", "weight_grad")
    fused = [d for d in directions if _fuses(geometry._replace(direction=d), x.device)]
    arguments = (dy, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, dweight, *rest)
    if not fused:
        return slim_norm_conv2d_backward__reference(*arguments)
    return _fused().slim_norm_conv2d_backward__triton(*arguments, fused=fused)


def _slim_channel_statistics(x):
    check_slim_batch_norm(x, None, None, None, None, None, False, 0.0)
    exact = x.dtype == torch.float64  # which Triton's kernel does not sum
    return (slim_channel_statistics_reference if exact else _fused().slim_channel_statistics_triton)(x)


def _fuses(geometry: Geometry, device: torch.device) -> bool:
    """Whether the convolution's kernel does the norms beside it. Exact float32 leaves it no registers for that."""
    exact = geometry.dtype == torch.float32 and not _tf32(torch.backends.cudnn.conv)
    return _path(geometry, device) == "triton" and not exact


def _fused():
    return importlib.import_module("gradaug_kernels._gpu.triton.slim_norm_conv2d")


_CONVOLUTIONS = {
    _OPS.slim_conv2d.default: _slim_conv2d,
    _OPS.slim_conv2d_input_grad.default: _slim_conv2d_input_grad,
    _OPS.slim_conv2d_weight_grad_.default: _slim_conv2d_weight_grad_,
}
_NORMED_CONVOLUTIONS = {
    _OPS.slim_channel_statistics.default: _slim_channel_statistics,
    _OPS.slim_conv2d_statistics.default: _slim_conv2d_statistics,
    _OPS.slim_norm_conv2d.default: _slim_norm_conv2d,
    _OPS.slim_norm_conv2d_backward_.default: _slim_norm_conv2d_backward_,
}
_LINEARS = {
    _OPS.slim_linear.default: _slim_linear,
    _OPS.slim_linear_input_grad.default: _slim_linear_input_grad,
    _OPS.slim_linear_weight_grad_.default: _slim_linear_weight_grad_,
}


def register() -> None:
    """Take over the CUDA key, as GRADAUG_CUDA says. Called once, when the package is imported.

    Raises:
        ImportError: if GRADAUG_CUDA names a kernel that is not here.
    """
    choice = cuda_choice()
    if choice == "reference":
        return
    if choice in ("triton", "cpp") and choice not in paths_built():
        raise ImportError(
            f"GRADAUG_CUDA={choice} needs "
            f"{'the package triton' if choice == 'triton' else 'the CUDA extension, which was not built'}; "
            f"found {', '.join(paths_built())}"
        )
    backend = "+".join(paths_built()) if choice == "auto" else choice
    for op, kernel in _CONVOLUTIONS.items():
        use_kernel(op, kernel, "cuda", backend)
    for op, kernel in _LINEARS.items():
        use_kernel(op, kernel, "cuda", "gemm")
    if has_triton() and choice in ("auto", "triton"):
        for op, kernel in _NORMED_CONVOLUTIONS.items():
            use_kernel(op, kernel, "cuda", "triton")


register()
