"""What the CUDA key of an operator calls: it checks the arguments and hands them to the kernel of their path.

Linear layers are gemm always. Batch norm has one CUDA kernel, in C++, which registers itself. A batch norm before or
after a convolution (ops/slim_norm_conv2d.py) is part of the convolution's kernel on the path triton, but for exact
float32; elsewhere the two are called one after the other.
"""

import functools
import importlib

import torch

from .._library import cuda_choice, use_kernel
from ..ops._common import check_floating, check_gradients_beside, check_same_dtype_and_device, check_written
from ..ops._conv import output_size
from ..ops.slim_batch_norm import check_slim_batch_norm
from ..ops.slim_conv2d import check_sizes
from ..ops.slim_conv2d_statistics import slim_channel_statistics_reference, slim_conv2d_statistics_reference
from ..ops.slim_linear import check_slim_linear, check_slim_linear_input_grad, check_slim_linear_weight_grad
from ..ops.slim_norm_conv2d import slim_norm_conv2d_backward__reference, slim_norm_conv2d_reference
from . import gemm
from .paths import OLDEST, Geometry, card_of, has_triton, is_exact_float32, path_for, paths_built

_OPS = torch.ops.gradaug


def path_on(geometry: Geometry, device: torch.device) -> str:
    return path_for(geometry, card=card_of(device))


def kernel_for(geometry: Geometry, device: torch.device):
    return paths_built()[path_on(geometry, device)][geometry.direction]


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
    return kernel_for(geometry, x.device)(x, weight, bias, out_channels, *options)


def _slim_conv2d_input_grad(dy, weight, input_size, *options):
    geometry = _geometry("input_grad", input_size, dy.dtype, weight, _out_channels(dy), *options)
    check_floating("dy", dy)
    check_same_dtype_and_device(dy, name="dy", weight=weight)
    _check_sizes(geometry, dy.shape)
    return kernel_for(geometry, dy.device)(dy, weight, input_size, *options)


def _slim_conv2d_weight_grad_(dy, x, dweight, *options):
    geometry = _geometry("weight_grad", x.shape, x.dtype, dweight, _out_channels(dy), *options)
    _check_weight_grad(geometry, dy, x, dweight)
    kernel_for(geometry, x.device)(dy, x, dweight, *options)


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
    fused = fuses_norms(geometry, x.device)
    kernel = norm_kernels().slim_conv2d_statistics_triton if fused else slim_conv2d_statistics_reference
    return kernel(x, weight, bias, out_channels, *options)


def _slim_norm_conv2d(x, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, out_channels, *rest):
    *options, _ = rest
    geometry = _geometry("forward", x.shape, x.dtype, weight, out_channels, *options)
    _check_forward(geometry, x, weight, bias)
    check_slim_batch_norm(x, gamma, beta, mean, var, None, relu, eps, names=("gamma", "beta"))
    fused = fuses_norms(geometry, x.device)
    kernel = norm_kernels().slim_norm_conv2d_triton if fused else slim_norm_conv2d_reference
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
    fused = [d for d in directions if fuses_norms(geometry._replace(direction=d), x.device)]
    arguments = (dy, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, dweight, *rest)
    if not fused:
        return slim_norm_conv2d_backward__reference(*arguments)
    return norm_kernels().slim_norm_conv2d_backward__triton(*arguments, fused=fused)


def _slim_channel_statistics(x):
    check_slim_batch_norm(x, None, None, None, None, None, False, 0.0)
    by_triton = x.dtype != torch.float64 and card_of(x.device).capability >= OLDEST
    return (norm_kernels().slim_channel_statistics_triton if by_triton else slim_channel_statistics_reference)(x)


def fuses_norms(geometry: Geometry, device: torch.device) -> bool:
    """Whether the convolution's kernel does the norms beside it. Exact float32 leaves it no registers for that."""
    return path_on(geometry, device) == "triton" and not is_exact_float32(geometry.dtype)


def norm_kernels():
    return importlib.import_module("gradaug_kernels._gpu.triton.slim_norm_conv2d")


CONVOLUTIONS = {
    _OPS.slim_conv2d.default: _slim_conv2d,
    _OPS.slim_conv2d_input_grad.default: _slim_conv2d_input_grad,
    _OPS.slim_conv2d_weight_grad_.default: _slim_conv2d_weight_grad_,
}
NORMED_CONVOLUTIONS = {
    _OPS.slim_channel_statistics.default: _slim_channel_statistics,
    _OPS.slim_conv2d_statistics.default: _slim_conv2d_statistics,
    _OPS.slim_norm_conv2d.default: _slim_norm_conv2d,
    _OPS.slim_norm_conv2d_backward_.default: _slim_norm_conv2d_backward_,
}
LINEARS = {
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
    for op, kernel in CONVOLUTIONS.items():
        use_kernel(op, kernel, "cuda", backend)
    for op, kernel in LINEARS.items():
        use_kernel(op, kernel, "cuda", "gemm")
    if has_triton() and choice in ("auto", "triton"):
        for op, kernel in NORMED_CONVOLUTIONS.items():
            use_kernel(op, kernel, "cuda", "triton")


register()
