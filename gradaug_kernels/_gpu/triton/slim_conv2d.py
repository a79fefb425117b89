"""Sliced convolution as an implicit GEMM: the im2col matrix exists only tile by tile, on chip.

    y  [N, OH, OW, O]     = sum over taps, c of        x[n, oh*sh - ph + kh*dh, ow*sw - pw + kw*dw, c] * w[o, kh, kw, c]
    dx [N, H, W, C]       = sum over taps, o of       dy[n, (ih + ph - kh*dh) / sh, ..., o] * w[o, kh, kw, c]
    dw [O, KH, KW, C]    += sum over n, oh, ow of     dy[n, oh, ow, o] * x[n, oh*sh - ph + kh*dh, ..., c]

Activations are NHWC, weights OHWI. w and dw are the first channels of full-width buffers, addressed by their strides.
Sums are float32 whatever the operands are; float32 operands are multiplied as tf32 or exactly, as torch's setting for
convolutions says. Groups are one grid axis: a group is the same convolution between other channels.
The weight gradient splits its long sum over pixels among programs. Each writes a partial sum, and a second kernel adds
these in a fixed order to the buffer, so that equal inputs give equal bits.

The kernels also do their part of a batch norm before the convolution (NORM: x is normalised as it is loaded; MASK: dx
is zeroed where the ReLU after the norm was) and of one after it (STATISTICS: moments of each tile of y), for the
launchers of slim_norm_conv2d.py. Coefficients of a norm are [3, G * C]: x -> (x - mean) * scale + offset. What is not
asked for is not compiled in.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops._conv import memory_format
from ..layout import empty_nhwc, nhwc, slice_ohwi
from .launch import MULTIPROCESSORS, axes, largest_tile, launch, output_size_of, strides, vector_width
from .phases import phase_pixels

# ---- forward


@triton.jit
def normalised(x, inside, coefficients, channels, channel, valid, RELU: tl.constexpr):
    # x [rows, columns], columns being channels, as the batch norm and its ReLU leave it, in float32; zero outside.
    mean = tl.load(coefficients + channel, mask=valid, other=0.0)  # [columns]
    scale = tl.load(coefficients + channels + channel, mask=valid, other=0.0)
    offset = tl.load(coefficients + 2 * channels + channel, mask=valid, other=0.0)
    z = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + offset[None, :]
    if RELU:
        z = tl.maximum(z, 0.0)
    return tl.where(inside[:, None], z, 0.0)


@triton.jit(
    do_not_specialize=[
        *("M", "C", "O", "H", "W", "OH", "OW", "KH", "KW", "xn", "xh", "xw", "wo", "wh", "ww", "y_pitch"),
        *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
    ]
)
def slim_conv2d_fwd_kernel(
    x,  # [N, H, W, G * C]
    w,  # [>= G * O, KH, KW, >= C]
    bias,  # [>= G * O]; unread unless HAS_BIAS
    coefficients,  # [3, G * C], float32: mean, scale, offset of the norm of x; unread unless NORM
    y,  # [N, OH, OW, G * O], dense
    moments,  # [3, tiles of pixels, G * O], float32, as store_moments has them; unwritten unless STATISTICS
    M,  # N * OH * OW
    C,  # input channels of a group, in vectors, as are O and the strides
    O,  # output channels of a group  # noqa: E741
    H,
    W,
    OH,
    OW,
    KH,
    KW,
    xn,
    xh,
    xw,
    wo,
    wh,
    ww,
    y_pitch,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    VEC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    RELU: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program makes a [BLOCK_M output pixels, BLOCK_N output channels] tile of one group; programs that share pixels
    # are neighbours, so that x comes from the cache for all but the first.
    # Reads: for each chunk of BLOCK_K input channels and each tap, the pixels under the tap, zero in the padding, and
    # the weights of the tap. Taps are the inner loop: the nine of a 3x3 kernel read almost the same lines of x.
    # Keeps: the tile's float32 sums. Writes: the tile, once, and its moments of each channel.
    C, O, y_pitch = C * VEC, O * VEC, y_pitch * VEC  # noqa: E741
    xn, xh, xw = xn.to(tl.int64) * VEC, xh * VEC, xw * VEC
    wo, wh, ww = wo * VEC, wh * VEC, ww * VEC
    blocks_n = tl.cdiv(O, BLOCK_N)
    pid, group = tl.program_id(0), tl.program_id(1)
    m = (pid // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]

    n, oh, ow = m // (OH * OW), m // OW % OH, m % OW
    ih0, iw0 = oh * stride_h - padding_h, ow * stride_w - padding_w  # the pixel under tap (0, 0), maybe in the padding
    x_rows = x + group * C + n * xn + (ih0 * xh + iw0 * xw)  # [BLOCK_M]
    w_columns = w + (group * O + o) * wo  # [BLOCK_N]

    taps = KH * KW
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, taps * tl.cdiv(C, BLOCK_K)):
        c = (i // taps) * BLOCK_K + k
        kh, kw = i % taps // KW, i % taps % KW
        ih, iw = ih0 + kh * dilation_h, iw0 + kw * dilation_w
        inside = (m < M) & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        x_offsets = kh * dilation_h * xh + kw * dilation_w * xw + c  # [BLOCK_K]
        a = tl.load(x_rows[:, None] + x_offsets[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        if NORM:
            channels = tl.num_programs(1) * C
            a = normalised(a, inside, coefficients, channels, group * C + c, c < C, RELU).to(x.dtype.element_ty)
        w_offsets = kh * wh + kw * ww + c  # [BLOCK_K]
        b = tl.load(w_columns[None, :] + w_offsets[:, None], mask=(o < O)[None, :] & (c < C)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if HAS_BIAS:
        acc += tl.load(bias + group * O + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    y_tile = y + m.to(tl.int64)[:, None] * y_pitch + (group * O + o)[None, :]
    tl.store(y_tile, acc.to(y.dtype.element_ty), mask=(m < M)[:, None] & (o < O)[None, :])
    if STATISTICS:
        channels = tl.num_programs(1) * O
        tile = pid // blocks_n
        store_moments(
            acc.to(y.dtype.element_ty),
            m < M,
            moments + tile * channels,
            tl.cdiv(M, BLOCK_M) * channels,
            group * O + o,
            o < O,
        )


@triton.jit
def store_moments(y, inside, moments, plane, channel, valid):
    # Of the rows of y [rows, columns] that are inside, at least one, for each column: a center near the mean, and the
    # sums of the differences from it and of their squares. Large means blur neither, nor does the center's rounding.
    v = tl.where(inside[:, None], y.to(tl.float32), 0.0)
    center = column_sums(v) / tl.sum(inside.to(tl.float32), 0)  # [columns]
    d = tl.where(inside[:, None], v - center[None, :], 0.0)
    tl.store(moments + channel, center, mask=valid)
    tl.store(moments + plane + channel, column_sums(d), mask=valid)
    tl.store(moments + 2 * plane + channel, column_sums(d * d), mask=valid)


@triton.jit
def column_sums(v):
    # v: [32 k, columns]. In three steps, so that the order in which a backend adds the rows of one matters little.
    rows: tl.constexpr = v.shape[0] // 32
    return tl.sum(tl.sum(tl.sum(tl.reshape(v, (8, 4, rows, v.shape[1])), 0), 0), 0)


# ---- input gradient


@triton.jit(
    do_not_specialize=[
        *("N", "C", "O", "H", "W", "OH", "OW", "KH", "KW", "yn", "yh", "yw", "wo", "wh", "ww", "x_pitch"),
        *("xn", "xh", "xw"),
        *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w", "tap_step_h", "tap_step_w"),
    ]
)
def slim_conv2d_input_grad_kernel(
    dy,  # [N, OH, OW, G * O]
    w,  # [>= G * O, KH, KW, >= C]
    dx,  # [N, H, W, G * C], dense
    x,  # [N, H, W, G * C]; unread unless MASK, as are its strides
    coefficients,  # [3, G * C], float32: mean, scale, offset of the norm of x; unread unless MASK
    N,
    C,  # input channels of a group, in vectors, as are O and the strides
    O,  # output channels of a group  # noqa: E741
    H,
    W,
    OH,
    OW,
    KH,
    KW,
    yn,
    yh,
    yw,
    wo,
    wh,
    ww,
    x_pitch,
    xn,
    xh,
    xw,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    tap_step_h,
    tap_step_w,
    VEC: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program makes a [BLOCK_M input pixels, BLOCK_N input channels] tile of one group, for pixels that agree in
    # (pixel + padding) % stride: these are reached by the same taps, and no other tap is visited. stride_h * stride_w
    # such phases, times the groups, are grid axis 1.
    # Reads: for each chunk of BLOCK_K output channels and each tap, the outputs that the tap brings to the pixels, zero
    # outside the image, and the weights of the tap; with MASK also the tile of x, to zero dx where the ReLU of its norm
    # did. Keeps: the tile's float32 sums. Writes: the tile, zeros included.
    C, O, x_pitch = C * VEC, O * VEC, x_pitch * VEC  # noqa: E741
    yn, yh, yw = yn.to(tl.int64) * VEC, yh * VEC, yw * VEC
    wo, wh, ww = wo * VEC, wh * VEC, ww * VEC
    phases = stride_h * stride_w
    group, phase = tl.program_id(1) // phases, tl.program_id(1) % phases
    ih0, rows, kh0, taps_h, oh0 = phase_pixels(phase // stride_w, H, KH, stride_h, padding_h, dilation_h, tap_step_h)
    iw0, columns, kw0, taps_w, ow0 = phase_pixels(phase % stride_w, W, KW, stride_w, padding_w, dilation_w, tap_step_w)
    M = N * rows * columns
    blocks_n = tl.cdiv(C, BLOCK_N)
    pid = tl.program_id(0)
    if (pid // blocks_n) * BLOCK_M >= M:  # the grid is sized for the largest phase
        return
    m = (pid // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    c = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]

    n, row, column = m // (rows * columns), m // columns % rows, m % columns
    y_rows = dy + group * O + n * yn + ((oh0 + row) * yh + (ow0 + column) * yw)  # [BLOCK_M]
    w_columns = w + group * O * wo + c  # [BLOCK_N]
    step_h, step_w = tap_step_h * dilation_h // stride_h, tap_step_w * dilation_w // stride_w  # outputs per tap visited

    taps = taps_h * taps_w
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, taps * tl.cdiv(O, BLOCK_K)):
        o = (i // taps) * BLOCK_K + k
        th, tw = i % taps // taps_w, i % taps % taps_w
        oh, ow = oh0 + row - th * step_h, ow0 + column - tw * step_w
        inside = (m < M) & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
        y_offsets = o - th * step_h * yh - tw * step_w * yw  # [BLOCK_K]
        a = tl.load(y_rows[:, None] + y_offsets[None, :], mask=inside[:, None] & (o < O)[None, :], other=0.0)
        w_offsets = o * wo + (kh0 + th * tap_step_h) * wh + (kw0 + tw * tap_step_w) * ww  # [BLOCK_K]
        b = tl.load(w_columns[None, :] + w_offsets[:, None], mask=(c < C)[None, :] & (o < O)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if MASK:
        ih, iw = ih0 + row * stride_h, iw0 + column * stride_w
        x_rows = x + group * C + n * (xn.to(tl.int64) * VEC) + (ih * (xh * VEC) + iw * (xw * VEC))  # [BLOCK_M]
        a = tl.load(x_rows[:, None] + c[None, :], mask=(m < M)[:, None] & (c < C)[None, :], other=0.0)
        channels = tl.num_programs(1) // phases * C
        z = normalised(a, m < M, coefficients, channels, group * C + c, c < C, False)
        acc = tl.where(z > 0, acc, 0.0)
    pixel = (n.to(tl.int64) * H + ih0 + row * stride_h) * W + iw0 + column * stride_w  # [BLOCK_M]
    dx_tile = dx + pixel[:, None] * x_pitch + (group * C + c)[None, :]
    tl.store(dx_tile, acc.to(dx.dtype.element_ty), mask=(m < M)[:, None] & (c < C)[None, :])


# ---- weight gradient


@triton.jit(
    do_not_specialize=[
        *("M", "M_split", "C", "O", "H", "W", "OH", "OW", "KH", "KW", "yn", "yh", "yw", "xn", "xh", "xw"),
        *("ds", "do", "dc", "dh", "dw"),
        *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
    ]
)
def slim_conv2d_weight_grad_kernel(
    dy,  # [N, OH, OW, G * O]
    x,  # [N, H, W, G * C]
    coefficients,  # [3, G * C], float32: mean, scale, offset of the norm of x; unread unless NORM
    dweight,  # [splits, >= G * O, >= C, KH, KW], strides ds, do, dc, dh, dw: partial sums, or the gradient itself
    M,  # N * OH * OW
    M_split,  # pixels of one split
    C,  # input channels of a group, in vectors, as are O and the strides of dy and x
    O,  # output channels of a group  # noqa: E741
    H,
    W,
    OH,
    OW,
    KH,
    KW,
    yn,
    yh,
    yw,
    xn,
    xh,
    xw,
    ds,
    do,
    dc,
    dh,
    dw,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    VEC: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program makes a [BLOCK_M output channels, BLOCK_N input channels] tile of one tap of one group, summed over
    # one split of the output pixels; programs that share pixels are neighbours.
    # Reads: for each chunk of BLOCK_K pixels, their dy and the x under the tap, zero in the padding.
    # Keeps: the tile's float32 sums.
    # Writes: the tile as a partial sum, or, where one split has all pixels (ADD), adds it to the gradient.
    C, O = C * VEC, O * VEC  # noqa: E741
    yn, yh, yw = yn.to(tl.int64) * VEC, yh * VEC, yw * VEC
    xn, xh, xw = xn.to(tl.int64) * VEC, xh * VEC, xw * VEC
    blocks_n, blocks_m = tl.cdiv(C, BLOCK_N), tl.cdiv(O, BLOCK_M)
    pid, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o = (pid // blocks_n % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    tap = pid // (blocks_n * blocks_m)
    kh, kw = tap // KW, tap % KW
    offset_h, offset_w = kh * dilation_h - padding_h, kw * dilation_w - padding_w

    start = split * M_split
    end = tl.minimum(start + M_split, M)
    y_columns = dy + group * O + o  # [BLOCK_M]
    x_columns = x + group * C + c  # [BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        n, oh, ow = m // (OH * OW), m // OW % OH, m % OW
        ih, iw = oh * stride_h + offset_h, ow * stride_w + offset_w
        inside = (m < end) & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        y_rows = n * yn + (oh * yh + ow * yw)
        a = tl.load(y_rows[:, None] + y_columns[None, :], mask=(m < end)[:, None] & (o < O)[None, :], other=0.0)
        x_rows = n * xn + (ih * xh + iw * xw)
        b = tl.load(x_rows[:, None] + x_columns[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        if NORM:
            channels = tl.num_programs(2) * C
            b = normalised(b, inside, coefficients, channels, group * C + c, c < C, RELU).to(x.dtype.element_ty)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)

    tile = dweight + split * ds.to(tl.int64) + (kh * dh + kw * dw + group * O * do)
    tile = tile + (o[:, None] * do + c[None, :] * dc)
    written = (o < O)[:, None] & (c < C)[None, :]
    if ADD:
        total = acc + tl.load(tile, mask=written)  # in float32, or float64 where the gradient is
        tl.store(tile, total.to(dweight.dtype.element_ty), mask=written)
    else:
        tl.store(tile, acc, mask=written)


@triton.jit(do_not_specialize=["splits", "count", "C", "KH", "KW", "do", "dc", "dh", "dw"])
def slim_conv2d_weight_grad_reduce_kernel(
    partials,  # [splits, O, KH, KW, C], float32, dense
    dweight,  # [>= O, >= C, KH, KW], strides do, dc, dh, dw
    splits,
    count,  # O * KH * KW * C
    C,
    KH,
    KW,
    do,
    dc,
    dh,
    dw,
    BLOCK: tl.constexpr,
):
    # One program adds BLOCK elements of the slice.
    # Reads: their partial sums, split after split, always in the same order, and the gradient gathered so far.
    # Keeps: the float32 sums. Writes: the sums added to the gradient, in its dtype.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        acc += tl.load(partials + split * count.to(tl.int64) + i, mask=i < count, other=0.0)
    c, kw, kh, o = i % C, i // C % KW, i // (C * KW) % KH, i // (C * KW * KH)
    element = dweight + (o * do + c * dc + kh * dh + kw * dw)
    total = acc + tl.load(element, mask=i < count)
    tl.store(element, total.to(dweight.dtype.element_ty), mask=i < count)


# ---- launch parameters: a plain function of shape buckets


def input_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied, by torch's own setting for convolutions; half types are always exact."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def forward_blocks(
    rows: int, columns: int, depth: int, vec: int, dtype: torch.dtype, precision: str, normed: bool = False
) -> dict[str, int]:
    """Tile sizes of the forward and of the input gradient.

    Args:
        rows: pixels. columns: channels written. depth: channels summed over per tap. vec: elements of one load.
        normed: whether a norm is applied to what is loaded.

    Tensor cores: the column tile that wastes least; 128 pixels, or 64 where that leaves multiprocessors idle; 128 bytes
    of depth, or 64 where that wastes less. Three stages of the largest tile are 96 KiB of shared memory, which every
    GPU since sm_80 has; two where a norm sends the tile through registers to shared memory once more. Where loads are
    narrow, tiles are small: each load takes a register for its address.
    Exact float32 has no tensor cores and keeps its sums in registers: 64 x 32 by 16.
    """
    narrow = vec * dtype.itemsize < 16
    if dtype == torch.float32 and precision == "ieee":
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 8 if narrow else 4, "num_stages": 2}
    block_n = 64 if narrow else largest_tile(columns, (64, 128))
    full = triton.cdiv(rows, 128) * triton.cdiv(columns, block_n) >= MULTIPROCESSORS
    block_m = 128 if full and not narrow else 64
    block_k = (32 if narrow else largest_tile(depth, (32, 64))) * 2 // dtype.itemsize
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": 4 if block_m * block_n < 128 * 64 and not narrow and dtype != torch.float32 else 8,
        "num_stages": 2 if normed and block_m * block_n == 128 * 128 else 3,
    }


def weight_grad_blocks(o: int, c: int, filters: int, vec: int, dtype: torch.dtype, precision: str) -> dict[str, int]:
    """Tile sizes of the weight gradient.

    Args:
        o, c: output and input channels of a group. filters: taps times groups, each with tiles of its own.

    The channel tiles that waste least, and 128 bytes of pixels at a time. 128 x 128 only where that leaves so few tiles
    that pixels are split: a tile that adds to the gradient itself holds both in registers. Float32, narrow loads and
    exact float32 take small tiles, as in `forward_blocks`.
    """
    narrow = vec * dtype.itemsize < 16
    if dtype == torch.float32 and precision == "ieee":
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    small = narrow or dtype == torch.float32
    block_m, block_n = (64 if small else largest_tile(channels, (64, 128)) for channels in (o, c))
    if triton.cdiv(o, block_m) * triton.cdiv(c, block_n) * filters > MULTIPROCESSORS:
        block_n = 64
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": (64 if narrow else 128) // dtype.itemsize,
        "num_warps": 8 if block_m * block_n >= 128 * 64 else 4,
        "num_stages": 3,
    }


def pixel_splits(tiles: int, pixels: int, block: int) -> tuple[int, int]:
    """How many programs share a sum over pixels, and the pixels of each, a multiple of block.

    Two programs per multiprocessor, but at least 8 blocks for each, and at most 64 so that adding them up stays cheap.
    """
    splits = max(1, min(2 * MULTIPROCESSORS // tiles, triton.cdiv(pixels, 8 * block), 64))
    share = triton.cdiv(triton.cdiv(pixels, splits), block) * block
    return triton.cdiv(pixels, share), share


# ---- launchers


class Norm(NamedTuple):
    """The batch norm and ReLU of a convolution's input, for the kernels."""

    coefficients: Tensor  # [3, C], float32: mean, scale, offset
    relu: bool


def slim_conv2d_triton(x, weight, bias, out_channels, stride, padding, dilation, groups):
    return forward(x, weight, bias, out_channels, stride, padding, dilation, groups)[0]


def forward(x, weight, bias, out_channels, stride, padding, dilation, groups, norm=None, statistics=False):
    """y; and its moments [3, tiles, out_channels] and the pixels of a tile, where statistics are wanted.

    norm: of x, or None.
    """
    n, channels, h, w = x.shape
    kh, kw = weight.shape[2:]
    oh, ow = output_size_of(x, weight, stride, padding, dilation)
    y = empty_nhwc(x, n, out_channels, oh, ow)
    c, o = channels // groups, out_channels // groups
    moments, tile = None, 0
    if y.numel() > 0:
        a, b = nhwc(x), slice_ohwi(weight, out_channels, c)
        vec = vector_width((a, b, y), c, o)
        precision = input_precision(x.dtype)
        blocks = forward_blocks(n * oh * ow, o, c, vec, x.dtype, precision, norm is not None)
        tile = blocks["BLOCK_M"]
        tiles_m = triton.cdiv(n * oh * ow, tile)
        if statistics:
            moments = torch.empty((3, tiles_m, out_channels), dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            launch(
                slim_conv2d_fwd_kernel,
                (tiles_m * triton.cdiv(o, blocks["BLOCK_N"]), groups),
                **{"x": a, "w": b, "bias": b if bias is None else bias.contiguous(), "y": y, "M": n * oh * ow},
                **{"coefficients": norm.coefficients if norm else b, "moments": y if moments is None else moments},
                **{"C": c // vec, "O": o // vec, "H": h, "W": w, "OH": oh, "OW": ow, "KH": kh, "KW": kw},
                **strides(a, vec, "xn", "xh", "xw"),
                **strides(b, vec, "wo", "wh", "ww"),
                **{"y_pitch": out_channels // vec, "VEC": vec, "HAS_BIAS": bias is not None, "PRECISION": precision},
                **{"NORM": norm is not None, "RELU": norm is not None and norm.relu, "STATISTICS": statistics},
                **axes(stride, padding, dilation),
                **blocks,
            )
    return y.contiguous(memory_format=memory_format(x, weight)), moments, tile


def slim_conv2d_input_grad_triton(dy, weight, input_size, stride, padding, dilation, groups):
    return input_grad(dy, weight, input_size, stride, padding, dilation, groups)


def input_grad(dy, weight, input_size, stride, padding, dilation, groups, x=None, coefficients=None):
    """dx. x, coefficients: zero dx where a ReLU did, after a norm of x with these coefficients [3, C]."""
    n, channels, h, w = input_size
    kh, kw = weight.shape[2:]
    out_channels, oh, ow = dy.shape[1:]
    dx = empty_nhwc(dy, n, channels, h, w)
    c, o = channels // groups, out_channels // groups
    if dx.numel() > 0:
        a, b = nhwc(dy), slice_ohwi(weight, out_channels, c)
        masked = dx if x is None else nhwc(x)
        vec = vector_width((a, b, dx, masked), c, o)
        precision = input_precision(dy.dtype)
        largest_phase = n * triton.cdiv(h, stride[0]) * triton.cdiv(w, stride[1])
        blocks = forward_blocks(largest_phase, c, o, vec, dy.dtype, precision)
        tiles = triton.cdiv(largest_phase, blocks["BLOCK_M"]) * triton.cdiv(c, blocks["BLOCK_N"])
        with torch.cuda.device_of(dy):
            launch(
                slim_conv2d_input_grad_kernel,
                (tiles, groups * stride[0] * stride[1]),
                **{"dy": a, "w": b, "dx": dx, "x": masked, "coefficients": b if x is None else coefficients, "N": n},
                **{"C": c // vec, "O": o // vec, "H": h, "W": w, "OH": oh, "OW": ow, "KH": kh, "KW": kw},
                **strides(a, vec, "yn", "yh", "yw"),
                **strides(b, vec, "wo", "wh", "ww"),
                **strides(masked, vec, "xn", "xh", "xw"),
                **{"x_pitch": channels // vec, "VEC": vec, "MASK": x is not None, "PRECISION": precision},
                **axes(stride, padding, dilation),
                tap_step_h=stride[0] // math.gcd(stride[0], dilation[0]),
                tap_step_w=stride[1] // math.gcd(stride[1], dilation[1]),
                **blocks,
            )
    return dx.contiguous(memory_format=memory_format(dy, weight))


def slim_conv2d_weight_grad__triton(dy, x, dweight, stride, padding, dilation, groups):
    weight_grad(dy, x, dweight, stride, padding, dilation, groups)


def weight_grad(dy, x, dweight, stride, padding, dilation, groups, norm=None) -> None:
    """Adds to dweight. norm: of x, or None."""
    if dy.numel() == 0:
        return
    n, channels, h, w = x.shape
    out_channels, oh, ow = dy.shape[1:]
    kh, kw = dweight.shape[2:]
    c, o = channels // groups, out_channels // groups
    a, b = nhwc(dy), nhwc(x)
    vec = vector_width((a, b), c, o)
    precision = input_precision(x.dtype)
    blocks = weight_grad_blocks(o, c, kh * kw * groups, vec, x.dtype, precision)
    tiles = triton.cdiv(o, blocks["BLOCK_M"]) * triton.cdiv(c, blocks["BLOCK_N"]) * kh * kw
    splits, share = pixel_splits(tiles * groups, n * oh * ow, blocks["BLOCK_K"])
    with torch.cuda.device_of(x):
        if splits == 1:
            target = dweight[None]  # [1, O, C, KH, KW]
        else:
            partials = torch.empty((splits, out_channels, kh, kw, c), dtype=torch.float32, device=x.device)
            target = partials.permute(0, 1, 4, 2, 3)  # [splits, O, C, KH, KW]
        launch(
            slim_conv2d_weight_grad_kernel,
            (tiles, splits, groups),
            **{"dy": a, "x": b, "coefficients": norm.coefficients if norm else b, "dweight": target},
            **{"M": n * oh * ow, "M_split": share, "NORM": norm is not None, "RELU": norm is not None and norm.relu},
            **{"C": c // vec, "O": o // vec, "H": h, "W": w, "OH": oh, "OW": ow, "KH": kh, "KW": kw},
            **strides(a, vec, "yn", "yh", "yw"),
            **strides(b, vec, "xn", "xh", "xw"),
            **dict(zip(("ds", "do", "dc", "dh", "dw"), target.stride(), strict=True)),
            **{"VEC": vec, "ADD": splits == 1, "PRECISION": precision},
            **axes(stride, padding, dilation),
            **blocks,
        )
        if splits > 1:
            add_partials(partials, dweight)


def add_partials(partials, dweight) -> None:
    """dweight[:O, :C] += partials.sum(0), in a fixed order; partials: [splits, O, KH, KW, C], float32."""
    splits, _, kh, kw, c = partials.shape
    count = partials[0].numel()
    launch(
        slim_conv2d_weight_grad_reduce_kernel,
        (triton.cdiv(count, 512),),
        **{"partials": partials, "dweight": dweight, "splits": splits, "count": count, "C": c, "KH": kh, "KW": kw},
        **dict(zip(("do", "dc", "dh", "dw"), dweight.stride(), strict=True)),
        **{"BLOCK": 512, "num_warps": 4},
    )
