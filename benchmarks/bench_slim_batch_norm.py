"""Layer benchmark of slim_batch_norm: batch norm, residual add and ReLU in one, against the three calls of PyTorch."""

import math

from torch import nn
from torch.nn import functional as F

import gradaug_kernels as gk

from .cases import Layer
from .eager import EagerBatchNorm2d

UNIT = "GB/s"


class EagerChain(nn.Module):
    """bn(x), then += residual, then an in-place ReLU: what torchvision's blocks do."""

    def __init__(self, bn: nn.Module, relu: bool):
        super().__init__()
        self.bn = bn
        self.relu = relu

    def forward(self, x, residual=None):
        y = self.bn(x)
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True) if self.relu else y


class SlimChain(EagerChain):
    """The same in one call."""

    def forward(self, x, residual=None):
        return self.bn(x, residual, self.relu)


def eager(layer: Layer) -> nn.Module:
    bn = EagerBatchNorm2d(**dict(layer.arguments))
    bn.width = layer.width
    return EagerChain(bn, layer.relu)


def ours(layer: Layer) -> nn.Module:
    bn = gk.SlimBatchNorm2d(**dict(layer.arguments))
    gk.set_width(bn, layer.width)
    return SlimChain(bn, layer.relu)


def work(layer: Layer, itemsize: int) -> dict[str, float]:
    """Bytes if each tensor moved once: x, residual, y forward; dy, x, y (for the ReLU), dx, dresidual backward."""
    tensor = math.prod(layer.x) * itemsize
    forward = 2 + layer.residual
    return {"forward": forward * tensor, "backward": (3 + layer.relu + (layer.residual and layer.relu)) * tensor}


def test_slim_batch_norm(benchmark, layer_benchmark, stage, provider):
    layer_benchmark(benchmark, stage, provider)
