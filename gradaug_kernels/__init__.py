"""Kernels that read and write a sub-network's channels in place, and GradAug training on top of them.

>>> model = gradaug_kernels.convert(torchvision.models.resnet50())
>>> step = gradaug_kernels.GradAug(model, optimizer, num_subnets=3, min_width=0.9, resolutions=(224, 192, 160, 128))
>>> losses = step(images, targets)
"""

from . import _cuda_paths as _cuda_paths  # registers the kernels for CUDA tensors
from .accumulate import AccumulateIntoGrad
from .convert import convert
from .divergence import alpha_divergence, kl_divergence
from .fuse import fuse, fused_chains
from .gradaug import GradAug, StepLosses, SubnetDraw
from .nn import FastSlimConv2d, SlimBatchNorm2d, SlimLinear
from .ops import (
    slim_batch_norm,
    slim_conv2d,
    slim_conv2d_norm,
    slim_conv2d_statistics,
    slim_linear,
    slim_norm_conv2d,
    slim_norm_max_pool2d,
)
from .sampler import RandomChannels, RandomDepth, RandomLayerWidth, RandomWidth, Sampler
from .state import plain_state_dict
from .subnet import calibrate
from .summary import LayerSummary, Summary, summary
from .width import round_channels, set_width, use_width

__version__ = "0.1.0"

__all__ = [
    "AccumulateIntoGrad",
    "FastSlimConv2d",
    "GradAug",
    "LayerSummary",
    "RandomChannels",
    "RandomDepth",
    "RandomLayerWidth",
    "RandomWidth",
    "Sampler",
    "SlimBatchNorm2d",
    "SlimLinear",
    "StepLosses",
    "SubnetDraw",
    "Summary",
    "alpha_divergence",
    "calibrate",
    "convert",
    "fuse",
    "fused_chains",
    "kl_divergence",
    "plain_state_dict",
    "round_channels",
    "set_width",
    "slim_batch_norm",
    "slim_conv2d",
    "slim_conv2d_norm",
    "slim_conv2d_statistics",
    "slim_linear",
    "slim_norm_conv2d",
    "slim_norm_max_pool2d",
    "summary",
    "use_width",
]
