"""One small case of every kernel, forward and backward, on the CUDA device if there is one.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.kernels
"""

import sys

import torch
from torch import nn

import gradaug_kernels as gk

# (input channels, output channels, groups, kernel, stride) of full width: 1x1, 3x3, strided, depthwise, grouped.
CONVOLUTIONS = ((24, 40, 1, 1, 1), (24, 40, 1, 3, 1), (24, 40, 1, 3, 2), (24, 24, 24, 3, 1), (24, 48, 4, 3, 1))
WIDTH = 0.9  # odd numbers of channels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in DTYPES:
        for into, out, groups, kernel, stride in CONVOLUTIONS:
            conv = gk.FastSlimConv2d(into, out, kernel, stride, kernel // 2, groups=groups, device=device)
            channels = gk.round_channels(into, WIDTH, 1 if groups == 1 else into // groups)
            _run(conv, (2, channels, 9, 7), dtype)
            norm = gk.SlimBatchNorm2d(into, device=device)
            following = gk.SlimBatchNorm2d(out, device=device)
            _run(gk.fuse(nn.Sequential(norm, conv, following)), (2, channels, 9, 7), dtype)
        norm = gk.SlimBatchNorm2d(40, device=device)
        for residual, relu in ((False, False), (False, True), (True, True)):
            _run(norm, (2, gk.round_channels(40, WIDTH), 9, 7), dtype, residual, relu)
        _run(gk.SlimLinear(40, 10, device=device), (5, gk.round_channels(40, WIDTH)), dtype)
    print(f"{len(DTYPES) * (2 * len(CONVOLUTIONS) + 4)} cases on {device}")
    return 0


def _run(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, residual: bool = False, relu: bool = False):
    gk.set_width(layer, WIDTH)
    x = torch.randn(shape, device=next(layer.parameters()).device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    added = torch.randn_like(x).requires_grad_() if residual else None
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        x.requires_grad_()
        y = layer(x, added, relu) if isinstance(layer, gk.SlimBatchNorm2d) else layer(x)
    y.backward(torch.randn_like(y))


if __name__ == "__main__":
    sys.exit(main())
