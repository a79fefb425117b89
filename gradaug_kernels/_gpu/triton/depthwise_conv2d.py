"""Depthwise convolution, sliced: one filter per channel, so there is no GEMM and every kernel is a weighted sum.

    y  [N, OH, OW, C]  = sum over taps of           x[n, oh*sh - ph + kh*dh, ow*sw - pw + kw*dw, c] * w[c, kh, kw]
    dx [N, H, W, C]    = sum over taps of          dy[n, (ih + ph - kh*dh) / sh, ..., c] * w[c, kh, kw]
    dw [C, 1, KH, KW] += sum over n, oh, ow of     dy[n, oh, ow, c] * x[n, oh*sh - ph + kh*dh, ..., c]

It serves groups = in channels = out channels; another channel multiplier is an ordinary grouped convolution. These
kernels are bound by memory: products and sums are float32 whatever the operands are.
"""

import math

import torch
import triton
import triton.language as tl

from ...ops._conv import memory_format
from ..layout import empty_nhwc, nhwc
from .launch import MULTIPROCESSORS, axes, launch, output_size_of, strides, vector_width
from .phases import phase_pixels
from .slim_conv2d import add_partials

# ---- forward


@triton.jit(
    do_not_specialize=[
        *("M", "C", "H", "W", "OH", "OW", "KH", "xn", "xh", "xw", "wc", "wh", "ww"),
        *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
    ]
)
def depthwise_conv2d_fwd_kernel(
    x,  # [N, H, W, C]
    w,  # [>= C, KH, KW]
    bias,  # [>= C]; unread unless HAS_BIAS
    y,  # [N, OH, OW, C], dense
    M,  # N * OH * OW
    C,  # in vectors, as are the strides of x
    H,
    W,
    OH,
    OW,
    KH,
    xn,
    xh,
    xw,
    wc,
    wh,
    ww,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    VEC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program makes a [BLOCK_M output pixels, BLOCK_C channels] tile.
    # Reads: the pixels under each tap, zero in the padding, and the taps of the channels; the taps of a row are
    # unrolled so that their loads are in flight together. Keeps: the tile's float32 sums. Writes: the tile, once.
    C = C * VEC
    xn, xh, xw = xn.to(tl.int64) * VEC, xh * VEC, xw * VEC
    blocks_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    m = (pid // blocks_c) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    c = (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    n, oh, ow = m // (OH * OW), m // OW % OH, m % OW
    ih0, iw0 = oh * stride_h - padding_h, ow * stride_w - padding_w
    x_tile = x + (n * xn + (ih0 * xh + iw0 * xw))[:, None] + c[None, :]  # [BLOCK_M, BLOCK_C]
    w_channels = w + c * wc  # [BLOCK_C]

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for kh in range(0, KH):
        ih = ih0 + kh * dilation_h
        for kw in tl.static_range(KW):
            iw = iw0 + kw * dilation_w
            inside = (m < M) & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            tap = kh * dilation_h * xh + kw * dilation_w * xw
            a = tl.load(x_tile + tap, mask=inside[:, None] & (c < C)[None, :], other=0.0)
            b = tl.load(w_channels + kh * wh + kw * ww, mask=c < C, other=0.0)
            acc += a.to(tl.float32) * b.to(tl.float32)[None, :]

    if HAS_BIAS:
        acc += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    y_tile = y + m.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(y_tile, acc.to(y.dtype.element_ty), mask=(m < M)[:, None] & (c < C)[None, :])


# ---- input gradient


@triton.jit(
    do_not_specialize=[
        *("N", "C", "H", "W", "OH", "OW", "KH", "KW", "yn", "yh", "yw", "wc", "wh", "ww"),
        *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w", "tap_step_h", "tap_step_w"),
    ]
)
def depthwise_conv2d_input_grad_kernel(
    dy,  # [N, OH, OW, C]
    w,  # [>= C, KH, KW]
    dx,  # [N, H, W, C], dense
    N,
    C,  # in vectors, as are the strides of dy
    H,
    W,
    OH,
    OW,
    KH,
    KW,
    yn,
    yh,
    yw,
    wc,
    wh,
    ww,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    tap_step_h,
    tap_step_w,
    VEC: tl.constexpr,
    TAPS_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program makes a [BLOCK_M input pixels, BLOCK_C channels] tile, for pixels that agree in
    # (pixel + padding) % stride: these are reached by the same taps, and no other row of taps is visited.
    # stride_h * stride_w such phases are grid axis 1.
    # Reads: the outputs that each tap brings to the pixels, zero outside the image, and the taps of the channels; the
    # TAPS_W taps of a row are unrolled. Keeps: the tile's float32 sums. Writes: the tile, zeros included.
    C = C * VEC
    yn, yh, yw = yn.to(tl.int64) * VEC, yh * VEC, yw * VEC
    phase = tl.program_id(1)
    ih0, rows, kh0, taps_h, oh0 = phase_pixels(phase // stride_w, H, KH, stride_h, padding_h, dilation_h, tap_step_h)
    iw0, columns, kw0, taps_w, ow0 = phase_pixels(phase % stride_w, W, KW, stride_w, padding_w, dilation_w, tap_step_w)
    M = N * rows * columns
    blocks_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    if (pid // blocks_c) * BLOCK_M >= M:  # the grid is sized for the largest phase
        return
    m = (pid // blocks_c) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    c = (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    n, row, column = m // (rows * columns), m // columns % rows, m % columns
    y_tile = dy + (n * yn + ((oh0 + row) * yh + (ow0 + column) * yw))[:, None] + c[None, :]  # [BLOCK_M, BLOCK_C]
    w_channels = w + c * wc  # [BLOCK_C]
    step_h, step_w = tap_step_h * dilation_h // stride_h, tap_step_w * dilation_w // stride_w  # outputs per tap visited

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for th in range(0, taps_h):
        oh = oh0 + row - th * step_h
        for tw in tl.static_range(TAPS_W):
            ow = ow0 + column - tw * step_w
            inside = (m < M) & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW) & (tw < taps_w)
            a = tl.load(
                y_tile - (th * step_h * yh + tw * step_w * yw), mask=inside[:, None] & (c < C)[None, :], other=0.0
            )
            tap = (kh0 + th * tap_step_h) * wh + (kw0 + tw * tap_step_w) * ww
            b = tl.load(w_channels + tap, mask=(c < C) & (tw < taps_w), other=0.0)
            acc += a.to(tl.float32) * b.to(tl.float32)[None, :]

    pixel = (n.to(tl.int64) * H + ih0 + row * stride_h) * W + iw0 + column * stride_w  # [BLOCK_M]
    dx_tile = dx + pixel[:, None] * C + c[None, :]
    tl.store(dx_tile, acc.to(dx.dtype.element_ty), mask=(m < M)[:, None] & (c < C)[None, :])


# ---- weight gradient


@triton.jit(
    do_not_specialize=[
        *("M", "M_split", "C", "H", "W", "OH", "OW", "KH", "KW", "yn", "yh", "yw", "xn", "xh", "xw"),
        *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
    ]
)
def depthwise_conv2d_weight_grad_kernel(
    dy,  # [N, OH, OW, C]
    x,  # [N, H, W, C]
    partials,  # [splits, C, KH, KW], float32, dense
    M,  # N * OH * OW
    M_split,  # pixels of one split
    C,  # in vectors, as are the strides
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
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program sums one tap of BLOCK_C channels over one split of the output pixels; the taps of the same pixels are
    # neighbours, so that dy and x come from the cache for all but the first.
    # Reads: for each chunk of BLOCK_M pixels, their dy and the x under the tap, zero in the padding.
    # Keeps: [BLOCK_M, BLOCK_C] float32 sums. Writes: their total over pixels, [BLOCK_C], as a partial sum.
    C = C * VEC
    yn, yh, yw = yn.to(tl.int64) * VEC, yh * VEC, yw * VEC
    xn, xh, xw = xn.to(tl.int64) * VEC, xh * VEC, xw * VEC
    taps = KH * KW
    pid, split = tl.program_id(0), tl.program_id(1)
    tap, c = pid % taps, (pid // taps) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    offset_h, offset_w = tap // KW * dilation_h - padding_h, tap % KW * dilation_w - padding_w

    start = split * M_split
    end = tl.minimum(start + M_split, M)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(start, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        n, oh, ow = m // (OH * OW), m // OW % OH, m % OW
        ih, iw = oh * stride_h + offset_h, ow * stride_w + offset_w
        inside = (m < end) & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        mask = inside[:, None] & (c < C)[None, :]
        a = tl.load(dy + (n * yn + (oh * yh + ow * yw))[:, None] + c[None, :], mask=mask, other=0.0)
        b = tl.load(x + (n * xn + (ih * xh + iw * xw))[:, None] + c[None, :], mask=mask, other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)

    tl.store(partials + (split.to(tl.int64) * C + c) * taps + tap, tl.sum(acc, 0), mask=c < C)


# ---- launchers


def depthwise_blocks(vec: int, itemsize: int) -> dict[str, int]:
    """16 elements per thread, two 16-byte loads of a half type; where loads are narrow 8, each with an address."""
    return {"BLOCK_M": 32 if vec * itemsize == 16 else 16, "BLOCK_C": 64, "num_warps": 4}


def _tiles(pixels, channels, blocks):
    return triton.cdiv(pixels, blocks["BLOCK_M"]) * triton.cdiv(channels, blocks["BLOCK_C"])


def _filters(weight) -> dict[str, int]:
    return dict(zip(("wc", "wh", "ww"), (weight.stride(d) for d in (0, 2, 3)), strict=True))


def depthwise_conv2d_triton(x, weight, bias, out_channels, stride, padding, dilation, groups):
    n, c, h, w = x.shape
    kh, kw = weight.shape[2:]
    oh, ow = output_size_of(x, weight, stride, padding, dilation)
    y = empty_nhwc(x, n, c, oh, ow)
    if y.numel() > 0:
        a = nhwc(x)
        vec = vector_width((a, y), c)
        blocks = depthwise_blocks(vec, x.dtype.itemsize)
        with torch.cuda.device_of(x):
            launch(
                depthwise_conv2d_fwd_kernel,
                (_tiles(n * oh * ow, c, blocks),),
                **{
                    "x": a,
                    "w": weight,
                    "bias": weight if bias is None else bias.contiguous(),
                    "y": y,
                    "M": n * oh * ow,
                },
                **{"C": c // vec, "H": h, "W": w, "OH": oh, "OW": ow, "KH": kh, "KW": kw},
                **strides(a, vec, "xn", "xh", "xw"),
                **_filters(weight),
                **axes(stride, padding, dilation),
                **{"VEC": vec, "HAS_BIAS": bias is not None},
                **blocks,
            )
    return y.contiguous(memory_format=memory_format(x, weight))


def depthwise_conv2d_input_grad_triton(dy, weight, input_size, stride, padding, dilation, groups):
    n, c, h, w = input_size
    kh, kw = weight.shape[2:]
    oh, ow = dy.shape[2:]
    dx = empty_nhwc(dy, n, c, h, w)
    if dx.numel() > 0:
        a = nhwc(dy)
        vec = vector_width((a, dx), c)
        blocks = depthwise_blocks(vec, dy.dtype.itemsize)
        tap_step_h, tap_step_w = (stride[axis] // math.gcd(stride[axis], dilation[axis]) for axis in (0, 1))
        with torch.cuda.device_of(dy):
            launch(
                depthwise_conv2d_input_grad_kernel,
                (_tiles(n * triton.cdiv(h, stride[0]) * triton.cdiv(w, stride[1]), c, blocks), stride[0] * stride[1]),
                **{"dy": a, "w": weight, "dx": dx, "N": n},
                **{"C": c // vec, "H": h, "W": w, "OH": oh, "OW": ow, "KH": kh, "KW": kw},
                **strides(a, vec, "yn", "yh", "yw"),
                **_filters(weight),
                **axes(stride, padding, dilation),
                **{"tap_step_h": tap_step_h, "tap_step_w": tap_step_w},
                **{"VEC": vec, "TAPS_W": triton.cdiv(kw, tap_step_w)},
                **blocks,
            )
    return dx.contiguous(memory_format=memory_format(dy, weight))


def depthwise_conv2d_weight_grad__triton(dy, x, dweight, stride, padding, dilation, groups):
    if dy.numel() == 0:
        return
    n, c, h, w = x.shape
    oh, ow = dy.shape[2:]
    kh, kw = dweight.shape[2:]
    a, b = nhwc(dy), nhwc(x)
    vec = vector_width((a, b), c)
    blocks = depthwise_blocks(vec, x.dtype.itemsize)
    programs = triton.cdiv(c, blocks["BLOCK_C"]) * kh * kw
    # Eight programs per multiprocessor hide the latency of loads that nothing else hides.
    splits = max(1, min(8 * MULTIPROCESSORS // programs, triton.cdiv(n * oh * ow, 8 * blocks["BLOCK_M"])))
    share = triton.cdiv(n * oh * ow, splits)
    partials = torch.empty((splits, c, kh, kw, 1), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        launch(
            depthwise_conv2d_weight_grad_kernel,
            (programs, splits),
            **{"dy": a, "x": b, "partials": partials, "M": n * oh * ow, "M_split": share},
            **{"C": c // vec, "H": h, "W": w, "OH": oh, "OW": ow, "KH": kh, "KW": kw},
            **strides(a, vec, "yn", "yh", "yw"),
            **strides(b, vec, "xn", "xh", "xw"),
            **axes(stride, padding, dilation),
            **{"VEC": vec},
            **blocks,
        )
        add_partials(partials, dweight)
