"""Layer benchmark of slim_conv2d: FastSlimConv2d against a convolution that slices its weight."""

import math

from torch import nn

import gradaug_kernels as gk

from .cases import Layer
from .eager import EagerConv2d

UNIT = "GFLOP/s"


def eager(layer: Layer) -> nn.Module:
    module = EagerConv2d(**dict(layer.arguments))
    module.width, module.divisor, module.slim_out = layer.width, layer.divisor, layer.slim_out
    return module


def ours(layer: Layer) -> nn.Module:
    module = gk.FastSlimConv2d(**dict(layer.arguments), divisor=layer.divisor, slim_out=layer.slim_out)
    gk.set_width(module, layer.width)
    return module


def work(layer: Layer) -> dict[str, float]:
    """Floating-point operations: two per multiply-add; backward is the weight gradient and, if needed, the input's."""
    options = dict(layer.arguments)
    full_group = options["in_channels"] // options["groups"]
    in_per_group = layer.x[1] if options["groups"] == 1 else full_group
    forward = 2 * math.prod(layer.y) * in_per_group * math.prod(options["kernel_size"])
    return {"forward": forward, "backward": forward * (2 if layer.needs_dx else 1)}


def test_slim_conv2d(benchmark, layer_benchmark, stage, provider):
    layer_benchmark(benchmark, stage, provider)
