"""Augmentations of a batch that mix or erase: Mixup, CutMix and RandomErasing, by torchvision's transforms v2."""

import torch
from torch import Tensor

from .._torchvision import torchvision_module
from ..recipes.config import RegularizeConfig


class BatchAugmentation:
    """Applies what [regularize] asks for to (images [N, C, H, W], targets [N]); draws from torch's global generator.

    With Mixup or CutMix the targets become probabilities [N, classes]. Where both are on, each batch takes one of them.
    """

    def __init__(self, config: RegularizeConfig, num_classes: int):
        self.erasing = _v2("RandomErasing", config.random_erasing) if config.random_erasing > 0 else None
        mixing = []
        if config.mixup > 0:
            mixing.append(_v2("MixUp", alpha=config.mixup, num_classes=num_classes))
        if config.cutmix > 0:
            mixing.append(_v2("CutMix", alpha=config.cutmix, num_classes=num_classes))
        self.mixing = _v2("RandomChoice", mixing) if mixing else None
        self.mix_probability = config.mix_probability

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.erasing is not None:
            images = torch.stack([self.erasing(image) for image in images])
        if self.mixing is not None and torch.rand(()) < self.mix_probability:
            images, targets = self.mixing(images, targets)
        return images.contiguous(memory_format=torch.channels_last), targets


def _v2(name, *args, **options):
    return getattr(torchvision_module("transforms.v2"), name)(*args, **options)
