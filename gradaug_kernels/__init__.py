"""Kernels that read and write a sub-network's channels in place, and GradAug training on top of them."""

from .ops import slim_batch_norm, slim_conv2d, slim_linear

__version__ = "0.1.0"

__all__ = ["slim_batch_norm", "slim_conv2d", "slim_linear"]
