"""Linear layers and 1x1 convolutions as matrix products on the strided slice of the full-width weight.

    y  [M, out] = x [M, in] @ W[:out, :in].T        dx = dy @ W[:out, :in]        dW[:out, :in] += dy.T @ x

M is the number of rows, N * H * W of an NHWC image. BLAS takes each operand with its leading dimension, for the weight
that of the full width, so ATen hands the views on as they are: it copies only a matrix with neither stride equal to 1.
The weight gradient is accumulated by the product itself (beta = 1) straight into the slice.
"""

import torch
from torch import Tensor

from ..ops._conv import memory_format
from .layout import nhwc


def add_product_(target: Tensor, a: Tensor, b: Tensor) -> None:
    """target += a @ b; target may be a slice of a wider matrix, and of a wider dtype, which then keeps all digits."""
    if target.dtype == a.dtype:
        target.addmm_(a, b)
    elif target.dtype == torch.float32:
        target += torch.mm(a, b, out_dtype=torch.float32)
    else:
        target += a @ b


# ---- linear


def slim_linear_gemm(x, weight, bias, out_features):
    w = weight[:out_features, : x.shape[-1]]  # [out, F]
    return torch.nn.functional.linear(x, w, None if bias is None else bias[:out_features])


def slim_linear_input_grad_gemm(dy, weight, in_features):
    return dy @ weight[: dy.shape[-1], :in_features]


def slim_linear_weight_grad__gemm(dy, x, dweight):
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])  # [M, out], [M, F]
    add_product_(dweight[: dy.shape[1], : x.shape[1]], dy.T, x)


# ---- 1x1 convolution of stride 1, without padding and groups


def rows_of(x: Tensor) -> Tensor:
    return nhwc(x).permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # [N * H * W, C]


def image_of(rows: Tensor, n: int, h: int, w: int) -> Tensor:
    return rows.view(n, h, w, rows.shape[1]).permute(0, 3, 1, 2)  # [N, C, H, W], NHWC


def slim_conv2d_gemm(x, weight, bias, out_channels, stride, padding, dilation, groups):
    n, c, h, w = x.shape
    y = slim_linear_gemm(rows_of(x), weight[:, :c, 0, 0], bias, out_channels)
    return image_of(y, n, h, w).contiguous(memory_format=memory_format(x, weight))


def slim_conv2d_input_grad_gemm(dy, weight, input_size, stride, padding, dilation, groups):
    n, c, h, w = input_size
    dx = slim_linear_input_grad_gemm(rows_of(dy), weight[:, :, 0, 0], c)
    return image_of(dx, n, h, w).contiguous(memory_format=memory_format(dy, weight))


def slim_conv2d_weight_grad__gemm(dy, x, dweight, stride, padding, dilation, groups):
    slim_linear_weight_grad__gemm(rows_of(dy), rows_of(x), dweight[:, :, 0, 0])
