"""Data sets: Fashion-MNIST (also embedded in the package), CIFAR-10 and CIFAR-100, and folders of images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._names import nearest
from . import cifar, fashion_mnist, image_folder
from .image_data import ImageData
from .image_tensors import BatchLoader, ImageTensors

DATASETS = {
    "fashion-mnist": fashion_mnist.fashion_mnist,
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "image_folder": image_folder.image_folder,
}

__all__ = ["DATASETS", "BatchLoader", "ImageData", "ImageTensors", "find", "load"]


def find(name: str) -> Callable[..., ImageData]:
    """The function that loads data set `name`. Raises: ValueError naming the nearest for an unknown name."""
    if name not in DATASETS:
        raise ValueError(nearest("data set", name, DATASETS))
    return DATASETS[name]


def load(name: str, root: str | Path | None = None, **options: Any) -> ImageData:
    """Load a data set.

    name: "fashion-mnist", "cifar10", "cifar100" or "image_folder"; root: its folder, or None for the data set's own
    places; options: the keyword options of the function of that name, such as `download` (False).
    Returns: ImageData with the splits `train` and `test`.
    """
    return find(name)(root, **options)
