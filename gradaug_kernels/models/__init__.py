"""Networks as plain PyTorch modules; `gradaug_kernels.convert` makes them slimmable."""

from collections.abc import Callable
from typing import Any

from torch import nn

from .._names import nearest
from .._torchvision import torchvision_module
from . import cifar_resnet, pyramidnet, wide_resnet
from .cifar_resnet import CifarResNet
from .pyramidnet import PyramidNet
from .residual import ResidualBlock, ResidualStage
from .wide_resnet import WideResNet

MODELS = {
    "cifar_resnet": cifar_resnet.cifar_resnet,
    "wide_resnet": wide_resnet.wide_resnet,
    "pyramidnet": pyramidnet.pyramidnet,
}

__all__ = [
    "MODELS",
    "CifarResNet",
    "PyramidNet",
    "ResidualBlock",
    "ResidualStage",
    "WideResNet",
    "build_model",
    "find",
]


def find(name: str) -> Callable[..., nn.Module]:
    """The function (num_classes, in_channels, **options) that builds model `name`.

    name: a key of MODELS, or "torchvision/<name>" for a classification network of torchvision.
    Raises: ValueError naming the nearest for an unknown name.
    """
    if name in MODELS:
        return MODELS[name]
    models = torchvision_module("models")
    # Only classification networks take (num_classes) alone and return logits.
    known = {f"torchvision/{key}": key for key in models.list_models(module=models)}
    if name not in known:
        raise ValueError(nearest("model", name, [*MODELS, *known]))

    def build(num_classes, in_channels=3):
        if in_channels != 3:
            raise ValueError(f"{name} must be given images of 3 channels, got {in_channels}")
        return models.get_model(known[name], weights=None, num_classes=num_classes)

    return build


def build_model(name: str, num_classes: int, in_channels: int = 3, **options: Any) -> nn.Module:
    """Build a network with random weights.

    name: "cifar_resnet" (options depth, base_width, stem_stride), "wide_resnet" (depth, widen_factor, dropout),
    "pyramidnet" (depth, alpha, bottleneck) or "torchvision/resnet50" and the like; images: [N, in_channels, H, W];
    logits: [N, num_classes].
    """
    return find(name)(num_classes, in_channels, **options)
