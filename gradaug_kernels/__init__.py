"""Kernels that read and write a sub-network's channels in place, and GradAug training on top of them.

>>> model = gradaug_kernels.convert(torchvision.models.resnet50())
>>> step = gradaug_kernels.GradAug(model, optimizer, num_subnets=3, min_width=0.9, resolutions=(224, 192, 160, 128))
>>> losses = step(images, targets)
"""

from . import _gpu as _gpu  # registers the kernels for CUDA tensors
from .gradaug.accumulate import AccumulateIntoGrad
from .gradaug.divergence import alpha_divergence, kl_divergence
from .gradaug.sampler import RandomChannels, RandomDepth, RandomLayerWidth, RandomWidth, Sampler
from .gradaug.step import GradAug, StepLosses, SubnetDraw
from .ops import (
    slim_batch_norm,
    slim_conv2d,
    slim_conv2d_norm,
    slim_conv2d_statistics,
    slim_linear,
    slim_norm_conv2d,
    slim_norm_max_pool2d,
)
from .slim.calibrate import calibrate
from .slim.convert import convert
from .slim.fuse import fuse, fused_chains
from .slim.layers import FastSlimConv2d, SlimBatchNorm2d, SlimLinear
from .slim.state_dict import plain_state_dict
from .slim.summary import LayerSummary, Summary, summary
from .slim.width import round_channels, set_width, use_width

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
