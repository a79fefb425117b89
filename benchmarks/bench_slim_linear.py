"""Layer benchmark of slim_linear: SlimLinear against a linear layer that slices its weight."""

import math

from torch import nn

import gradaug_kernels as gk

from .cases import Layer
from .eager import EagerLinear

UNIT = "GFLOP/s"


def eager(layer: Layer) -> nn.Module:
    module = EagerLinear(**dict(layer.arguments))
    module.width, module.divisor, module.slim_out = layer.width, layer.divisor, layer.slim_out
    return module


def ours(layer: Layer) -> nn.Module:
    module = gk.SlimLinear(**dict(layer.arguments), divisor=layer.divisor, slim_out=layer.slim_out)
    gk.set_width(module, layer.width)
    return module


def work(layer: Layer) -> dict[str, float]:
    """Floating-point operations: two per multiply-add; backward is the weight gradient and, if needed, the input's."""
    forward = 2 * math.prod(layer.y) * layer.x[-1]
    return {"forward": forward, "backward": forward * (2 if layer.needs_dx else 1)}


def test_slim_linear(benchmark, layer_benchmark, stage, provider):
    layer_benchmark(benchmark, stage, provider)
