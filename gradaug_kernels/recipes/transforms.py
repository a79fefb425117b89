"""Named transforms of the sub-networks' images, through torchvision's transforms v2.

A batch arrives normalised. Each image is transformed on its own; those that need pixel values get them: rescaled to
uint8, transformed, and normalised again.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._torchvision import torchvision_module


def _scale(v2, size):
    return v2.RandomAffine(0, scale=(0.75, 1.25), interpolation=v2.InterpolationMode.BILINEAR)


def _rotation(v2, size):
    return v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR)


def _crop(v2, size):
    return v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)


GEOMETRIC = {"scale": _scale, "rotation": _rotation, "crop": _crop}
PIXELS = {"rand_augment": "RandAugment", "trivial_augment": "TrivialAugmentWide"}
NAMES = (*GEOMETRIC, *PIXELS)


class PerImage:
    """Applies a transform of one image [C, H, W] to each image of a batch [N, C, H, W], with draws of its own."""

    def __init__(self, transform: Callable[[Tensor], Tensor]):
        self.transform = transform

    def __call__(self, images: Tensor) -> Tensor:
        transformed = torch.stack([self.transform(image) for image in images])
        return transformed.contiguous(memory_format=torch.channels_last)


class OnPixels:
    """Applies a transform of uint8 images to normalised ones. mean, std: of the channels, pixel values in [0, 1].

    torchvision's automatic augmentations know images of one or three channels. What normalisation they see is rounded
    to the 256 values of a byte, and clipped to them.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor], mean: Sequence[float], std: Sequence[float]):
        self.transform, self.mean, self.std = transform, mean, std

    def __call__(self, image: Tensor) -> Tensor:
        mean, std = (image.new_tensor(values)[:, None, None] for values in (self.mean, self.std))  # [C, 1, 1]
        pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return (self.transform(pixels).to(image.dtype) / 255 - mean) / std


def named_transform(name: str, size: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """A transform of a normalised batch [N, C, size, size], of the same shape.

    name: "scale" (by 0.75 to 1.25), "rotation" (up to 15 degrees), "crop" (half to all of the area, resized),
    "rand_augment" (Cubuk et al. 2020, two operations of magnitude 9) or "trivial_augment" (Mueller and Hutter 2021).
    """
    v2 = torchvision_module("transforms.v2")
    if name in GEOMETRIC:
        return PerImage(GEOMETRIC[name](v2, size))
    return PerImage(OnPixels(getattr(v2, PIXELS[name])(), mean, std))
