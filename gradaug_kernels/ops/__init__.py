"""The differentiable operators, on tensors. Each file is one operator; see _library.py for how it finds a kernel."""

from .slim_batch_norm import slim_batch_norm
from .slim_conv2d import slim_conv2d
from .slim_conv2d_norm import slim_conv2d_norm
from .slim_conv2d_statistics import slim_conv2d_statistics
from .slim_linear import slim_linear
from .slim_norm_conv2d import slim_norm_conv2d
from .slim_norm_max_pool2d import slim_norm_max_pool2d

__all__ = [
    "slim_batch_norm",
    "slim_conv2d",
    "slim_conv2d_norm",
    "slim_conv2d_statistics",
    "slim_linear",
    "slim_norm_conv2d",
    "slim_norm_max_pool2d",
]
