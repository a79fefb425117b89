"""Batch norm before and after a convolution, in the convolution's kernels (slim_conv2d.py), and what that takes beside:

coefficients [3, C]         of the norm of x: mean, scale = gamma / sqrt(var + eps), offset = beta
moments [3, tiles, C]       of each tile of pixels: mean, and the sum of squares about it; by the convolution, or by
                            a kernel of their own where a convolution had another path
mean, var [C]               the tiles' moments merged, in a fixed order and in float64
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import nhwc
from .launch import launch, vector_width
from .slim_conv2d import Norm, forward, input_grad, store_moments, weight_grad

_OPS = torch.ops.gradaug

# ---- the coefficients of a norm


@triton.jit(do_not_specialize=["C"], do_not_specialize_on_alignment=["mean", "var", "gamma", "beta"])
def norm_coefficients_kernel(
    mean,  # [C], float32, as var
    var,
    gamma,  # [>= C]; unread unless HAS_GAMMA
    beta,  # [>= C]; unread unless HAS_BETA
    coefficients,  # [3, C], float32, dense
    C,
    eps,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program makes the coefficients of BLOCK channels. Reads: their statistics and parameters. Keeps: the three
    # coefficients. Writes: each, once.
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    scale = tl.rsqrt(tl.load(var + c, mask=c < C, other=1.0) + eps)
    offset = tl.zeros((BLOCK,), tl.float32)
    if HAS_GAMMA:
        scale *= tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)
    if HAS_BETA:
        offset = tl.load(beta + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(coefficients + c, tl.load(mean + c, mask=c < C, other=0.0), mask=c < C)
    tl.store(coefficients + C + c, scale, mask=c < C)
    tl.store(coefficients + 2 * C + c, offset, mask=c < C)


def norm_of(mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, relu: bool, eps: float) -> Norm:
    """mean, var: [C], float32; gamma, beta: [F], F >= C, or None."""
    c = mean.shape[0]
    coefficients = torch.empty((3, c), dtype=torch.float32, device=mean.device)
    with torch.cuda.device_of(mean):
        launch(
            norm_coefficients_kernel,
            (triton.cdiv(c, 256),),
            **{
                "mean": mean.contiguous(),
                "var": var.contiguous(),
                "gamma": var if gamma is None else gamma.contiguous(),
                "beta": var if beta is None else beta.contiguous(),
            },
            **{"coefficients": coefficients, "C": c, "eps": eps},
            **{"HAS_GAMMA": gamma is not None, "HAS_BETA": beta is not None, "BLOCK": 256, "num_warps": 4},
        )
    return Norm(coefficients, relu)


# ---- statistics


@triton.jit(do_not_specialize=["M", "C", "pitch"])
def channel_moments_kernel(
    x,  # [M, C], rows of a pitch
    moments,  # [3, tiles, C], float32, dense
    M,  # N * H * W
    C,  # channels, in vectors, as the pitch
    pitch,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program makes the moments of BLOCK_N channels of one tile of BLOCK_M pixels.
    # Reads: the tile, once. Keeps: the tile. Writes: its moments of each channel.
    C, pitch = C * VEC, pitch * VEC
    tile = tl.program_id(0)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    rows = x + m.to(tl.int64) * pitch
    v = tl.load(rows[:, None] + c[None, :], mask=(m < M)[:, None] & (c < C)[None, :], other=0.0)
    store_moments(v, m < M, moments + tile * C, tl.num_programs(0) * C, c, c < C)


@triton.jit(do_not_specialize=["M", "tiles", "tile_size", "C"])
def merge_moments_kernel(
    moments,  # [3, tiles, C], float32, dense
    mean,  # [C], float32, as var
    var,
    M,  # pixels
    tiles,
    tile_size,  # pixels of a tile; the last one has the rest
    C,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program merges the moments of BLOCK_N channels. Reads: BLOCK_T tiles at a time, always in the same order.
    # Keeps: sums of the tiles' means about the first center, and of squares, in float64. Writes: mean and variance.
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    plane = tiles * C
    first_center = tl.load(moments + c, mask=c < C, other=0.0).to(tl.float64)
    sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float64)
    squares = tl.zeros((BLOCK_T, BLOCK_N), tl.float64)
    for first in range(0, tiles, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        count = tl.where(t < tiles, tl.minimum(tile_size, M - t * tile_size), 1).to(tl.float64)[:, None]
        inside = (t < tiles)[:, None] & (c < C)[None, :]
        element = moments + t[:, None] * C + c[None, :]
        center = tl.load(element, mask=inside, other=0.0).to(tl.float64)
        total = tl.load(element + plane, mask=inside, other=0.0).to(tl.float64)
        total_squares = tl.load(element + 2 * plane, mask=inside, other=0.0).to(tl.float64)
        d = tl.where(inside, center - first_center[None, :], 0.0)
        sums += total + count * d
        squares += total_squares + d * (2 * total + count * d)
    shift = tl.sum(sums, 0) / M  # [BLOCK_N]
    tl.store(mean + c, (first_center + shift).to(tl.float32), mask=c < C)
    tl.store(var + c, tl.maximum(tl.sum(squares, 0) / M - shift * shift, 0.0).to(tl.float32), mask=c < C)


def merge_moments(moments: Tensor, pixels: int, tile: int) -> tuple[Tensor, Tensor]:
    """mean, var [C] of `pixels` pixels from the moments [3, tiles, C] of tiles of `tile` pixels."""
    _, tiles, c = moments.shape
    mean, var = (torch.empty(c, dtype=torch.float32, device=moments.device) for _ in range(2))
    with torch.cuda.device_of(moments):
        launch(
            merge_moments_kernel,
            (triton.cdiv(c, 16),),
            **{"moments": moments, "mean": mean, "var": var, "M": pixels, "tiles": tiles, "tile_size": tile, "C": c},
            **{"BLOCK_T": 64, "BLOCK_N": 16, "num_warps": 4},
        )
    return mean, var


def slim_channel_statistics_triton(x):
    rows = nhwc(x).permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # [M, C]
    pixels, c = rows.shape
    if pixels == 0:
        return _zeros(c, x), _zeros(c, x)
    tile, vec = 128, vector_width((rows[:, :, None, None],), c)
    moments = torch.empty((3, triton.cdiv(pixels, tile), c), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        launch(
            channel_moments_kernel,
            (moments.shape[1], triton.cdiv(c, 32)),
            **{"x": rows, "moments": moments, "M": pixels, "C": c // vec, "pitch": rows.stride(0) // vec, "VEC": vec},
            **{"BLOCK_M": tile, "BLOCK_N": 32, "num_warps": 4},
        )
    return merge_moments(moments, pixels, tile)


def _zeros(channels: int, like: Tensor) -> Tensor:
    return torch.zeros(channels, dtype=torch.float32, device=like.device)


# ---- convolutions


def _y_and_statistics(output, statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y; mean and var [out] from its moments, or empty tensors."""
    y, moments, tile = output
    if moments is None:  # not wanted, or of an empty batch
        channels = y.shape[1] if statistics else 0
        return y, _zeros(channels, y), _zeros(channels, y)
    return y, *merge_moments(moments, y.numel() // y.shape[1], tile)


def slim_conv2d_statistics_triton(x, weight, bias, out_channels, stride, padding, dilation, groups):
    output = forward(x, weight, bias, out_channels, stride, padding, dilation, groups, statistics=True)
    return _y_and_statistics(output, True)


def slim_norm_conv2d_triton(x, mean, var, gamma, beta, batch_stats, relu, eps, weight, bias, out_channels, *rest):
    *geometry, statistics = rest
    mean, var = slim_channel_statistics_triton(x) if mean is None else (mean.clone(), var.clone())
    norm = norm_of(mean, var, gamma, beta, relu, eps)
    y, *found = _y_and_statistics(
        forward(x, weight, bias, out_channels, *geometry, norm=norm, statistics=statistics), statistics
    )
    return y, mean, var, *found


def slim_norm_conv2d_backward__triton(
    dy, x, mean, var, gamma, beta, batch_stats, relu, eps, weight, dweight, *rest, fused=("input_grad", "weight_grad")
):
    """fused: the directions whose convolution is this package's Triton kernel; the others get a copy of the norm's
    output, made for them.
    """
    *geometry, needs_dx, needs_dweight = rest
    norm = norm_of(mean, var, gamma, beta, relu, eps)
    activation = None
    if (needs_dweight and "weight_grad" not in fused) or (needs_dx and relu and "input_grad" not in fused):
        activation = _OPS.slim_batch_norm(x, gamma, beta, mean, var, None, relu, eps)[0]
    if needs_dweight and "weight_grad" in fused:
        weight_grad(dy, x, dweight, *geometry, norm=norm)
    elif needs_dweight:
        _OPS.slim_conv2d_weight_grad_(dy, activation, dweight, *geometry)
    if not needs_dx:
        return x.new_empty(0), mean.new_empty(0), mean.new_empty(0)
    mask = None
    if "input_grad" not in fused:
        mask = activation if relu else None
        da = _OPS.slim_conv2d_input_grad(dy, weight, x.shape, *geometry)
    elif relu:
        da = input_grad(dy, weight, x.shape, *geometry, x=x, coefficients=norm.coefficients)
    else:
        da = input_grad(dy, weight, x.shape, *geometry)
    dx, _, dgamma, dbeta = _OPS.slim_batch_norm_backward(da, x, mask, gamma, beta, mean, var, batch_stats, False, eps)
    return dx, dgamma, dbeta
