"""Tensors that end where a page that may not be read begins: reading beyond one ends the process.

Run as a program, it computes weight gradients whose vectors end beyond the last pixels of such images.
"""

import ctypes
import mmap

import torch

import gradaug_kernels as gk


def tensor_before_a_guard(floats: int) -> torch.Tensor:
    """[floats] float32, random. Its memory is never returned."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = mmap.PAGESIZE
    size = -(-4 * floats // page) * page
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, size + page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert libc.mprotect(start + size, page, 0) == 0
    memory = (ctypes.c_float * floats).from_address(start + size - 4 * floats)
    return torch.frombuffer(memory, dtype=torch.float32).normal_()


def image(n: int, c: int, h: int, w: int) -> torch.Tensor:
    """[n, c, h, w], NHWC."""
    return tensor_before_a_guard(n * c * h * w).view(n, h, w, c).permute(0, 3, 1, 2)


def check_weight_grad(dy: torch.Tensor, x: torch.Tensor, kernel: int) -> None:
    dweight = torch.zeros(dy.shape[1], x.shape[1], kernel, kernel)
    weight = torch.zeros_like(dweight).requires_grad_()
    gk.slim_conv2d(x, weight, padding=kernel // 2, weight_grad=dweight).backward(dy)
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, dy.double(), padding=kernel // 2)
    torch.testing.assert_close(dweight.double(), expected, rtol=1e-4, atol=1e-3)


if __name__ == "__main__":
    torch.manual_seed(0)
    for out in (5, 14, 61):
        check_weight_grad(image(2, out, 70, 40), image(2, 3, 70, 40), 3)
        check_weight_grad(image(2, out, 700, 1), image(2, 3, 700, 1), 3)
        pixel = tensor_before_a_guard(2 * out).view(2, out, 1, 1)
        check_weight_grad(pixel.expand(2, out, 70, 40), image(2, 3, 70, 40), 3)  # as the gradient of a mean over pixels
        for channels in (5, 37, 109):
            check_weight_grad(image(2, out, 20, 21), image(2, channels, 20, 21), 1)
            check_weight_grad(image(1, out, 9, 8), image(1, channels, 9, 8), 3)
