"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32x32 pixels, read by torchvision."""

from pathlib import Path

import torch

from .._torchvision import torchvision_module
from .image_data import ImageData, cache_folder
from .image_tensors import ImageTensors

# Of the 50,000 training images, pixel values in [0, 1].
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def cifar10(root: str | Path | None = None, *, download: bool = False) -> ImageData:
    """CIFAR-10 from `root` (the folder that holds cifar-10-batches-py; by default the cache folder).

    Returns: ImageData. Raises: FileNotFoundError when it is not there and `download` is False.
    """
    return _cifar("cifar10", root, download)


def cifar100(root: str | Path | None = None, *, download: bool = False) -> ImageData:
    """CIFAR-100 from `root` (the folder that holds cifar-100-python; by default the cache folder).

    Returns: ImageData. Raises: FileNotFoundError when it is not there and `download` is False.
    """
    return _cifar("cifar100", root, download)


def _cifar(name, root, download):
    datasets = torchvision_module("datasets")
    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = cache_folder() if root is None else Path(root)
    if folder.name == dataset.base_folder:
        folder = folder.parent
    mean, std = STATISTICS[name]
    splits = []
    for train in (True, False):
        try:
            stored = dataset(str(folder), train=train, download=download)
        except (OSError, RuntimeError) as error:
            got = f"{folder}: {error}" if download else f"{folder} without it; data.download=true fetches it"
            raise FileNotFoundError(f"data folder must hold {dataset.base_folder}, undamaged, got {got}") from None
        images = torch.from_numpy(stored.data)  # [N, 32, 32, 3]
        splits.append(ImageTensors(images, torch.tensor(stored.targets), mean, std))
    return ImageData(
        name=name,
        origin=f"from {folder}",
        classes=tuple(stored.classes),
        channels=3,
        size=32,
        train=splits[0],
        test=splits[1],
    )
