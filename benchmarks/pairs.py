"""Two layers that ours runs in one operator, as a network calls them one after the other."""

import math

from torch import nn

from gradaug_kernels.slim.fused_chain import run_chain

from . import bench_slim_batch_norm, bench_slim_conv2d
from .cases import Layer


class Pooling:
    """The benchmark of a max pooling, which is nn.MaxPool2d for everyone."""

    @staticmethod
    def eager(layer: Layer) -> nn.Module:
        return nn.MaxPool2d(**dict(layer.arguments))

    ours = eager


BENCHES = {"slim_batch_norm": bench_slim_batch_norm, "slim_conv2d": bench_slim_conv2d, "max_pool2d": Pooling}


class EagerPair(nn.Module):
    """One after the other."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x, residual=None):
        x = self.first(x)
        return self.second(x) if residual is None else self.second(x, residual)


class SlimPair(EagerPair):
    """As `fuse` runs them; the result of a convolution before a batch norm is computed again in the backward pass."""

    def forward(self, x, residual=None):
        parts = (self.first, self.second)
        layers = tuple(part.bn if isinstance(part, bench_slim_batch_norm.SlimChain) else part for part in parts)
        relus = tuple(getattr(part, "relu", False) for part in parts)
        return run_chain(x, residual, layers, relus, recompute=True)


def eager(layer: Layer) -> nn.Module:
    return EagerPair(*(BENCHES[part.op].eager(part) for part in layer.parts))


def ours(layer: Layer) -> nn.Module:
    return SlimPair(*(BENCHES[part.op].ours(part) for part in layer.parts))


def convolution_work(layer: Layer) -> dict[str, float]:
    """Floating-point operations of the convolution, without those that are repeated."""
    (convolution,) = (part for part in layer.parts if part.op == "slim_conv2d")
    return bench_slim_conv2d.work(convolution)


def pooling_work(layer: Layer, itemsize: int) -> dict[str, float]:
    """Bytes if each tensor moved once: x and y forward; dy, x, y and dx backward."""
    x, y = (math.prod(shape) * itemsize for shape in (layer.x, layer.y))
    return {"forward": x + y, "backward": 2 * (x + y)}
