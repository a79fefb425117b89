"""Fashion-MNIST: 28x28 grey images of ten kinds of clothing (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747).

MIT licence. Padded with black to 32x32, so that CIFAR networks and the resolutions 32, 28, 24 run unchanged.
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from .._torchvision import torchvision_module
from ._idx import find_idx, idx_bytes, read_idx
from .image_data import ImageData, cache_folder
from .image_tensors import ImageTensors

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
MEAN, STD = (0.2190,), (0.3318,)  # of the 60,000 padded training images, pixel values in [0, 1]

PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
EMBEDDED_FOLDER = Path(__file__).parent / "fashion_mnist_subset"  # made by tools/make_fashion_mnist_subset.py


def fashion_mnist(root: str | Path | None = None, *, source: str = "auto", download: bool = False) -> ImageData:
    """Fashion-MNIST from the first of: the folder `root`; Debian's package `dataset-fashion-mnist`, unpacked into a
    cache folder; torchvision's download into `root` or the cache folder, only with `download`; the 4,000 + 1,000
    images embedded in this package.

    root: a folder with the four IDX files, plain, .gz or .xz, directly or under FashionMNIST/raw as of torchvision.
    source: "auto" follows that order; "embedded" takes the embedded images unless `root` is given.
    Returns: ImageData. Raises: FileNotFoundError when `root` lacks a file, ValueError when a file is damaged.
    """
    if source not in ("auto", "embedded"):
        raise ValueError(f'source must be "auto" or "embedded", got "{source}"')
    folder, origin = _find(root, source, download)
    return ImageData(
        name="fashion-mnist",
        origin=origin,
        classes=CLASSES,
        channels=1,
        size=32,
        train=_read(folder, "train"),
        test=_read(folder, "test"),
    )


def _find(root, source, download):
    """The folder to read, and in words where its images come from."""
    if root is not None:
        folders = (Path(root), Path(root) / "FashionMNIST" / "raw")
        complete = next((folder for folder in folders if not _missing(folder)), None)
        if complete is None and not download:
            missing = min((_missing(folder) for folder in folders), key=len)
            raise FileNotFoundError(
                f"data folder must hold Fashion-MNIST's four IDX files, got {root} without {', '.join(missing)}"
            )
        folder = complete or _download(root)
        return folder, f"from {folder}"
    if source == "auto" and not _missing(PACKAGE_FOLDER):
        return _unpack(PACKAGE_FOLDER), "from Debian's dataset-fashion-mnist"
    if source == "auto" and download:
        return _download(cache_folder()), "downloaded by torchvision"
    return EMBEDDED_FOLDER, "embedded in the package"


def _missing(folder):
    return [name for names in FILES.values() for name in names if find_idx(folder, name) is None]


def _unpack(package):
    """Decompress the package's files into the cache folder once; where that is not writable, read the package itself.

    Each file appears under its name only when complete, so that an interrupted or parallel run leaves nothing broken.
    """
    try:
        cache = cache_folder() / "fashion-mnist"
        cache.mkdir(parents=True, exist_ok=True)
        for name in (name for names in FILES.values() for name in names):
            if (cache / name).is_file():
                continue
            content = idx_bytes(read_idx(find_idx(package, name)))
            with tempfile.NamedTemporaryFile(dir=cache, prefix=f".{name}.", delete=False) as file:
                try:
                    file.write(content)
                    file.close()
                    os.replace(file.name, cache / name)
                except BaseException:
                    os.unlink(file.name)
                    raise
        return cache
    except OSError:
        return package


def _download(root):
    datasets = torchvision_module("datasets")
    try:
        datasets.FashionMNIST(root, train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"Fashion-MNIST must be downloadable into {root}, got: {error}") from None
    return Path(root) / "FashionMNIST" / "raw"


def _read(folder, split):
    images_name, targets_name = FILES[split]
    images = torch.from_numpy(read_idx(find_idx(folder, images_name)))  # [N, 28, 28]
    targets = torch.from_numpy(read_idx(find_idx(folder, targets_name)))  # [N]
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"{folder}/{images_name} must hold images of 28x28 pixels, got shape {list(images.shape)}")
    if targets.ndim != 1 or (targets >= len(CLASSES)).any():
        raise ValueError(f"{folder}/{targets_name} must hold one class from 0 to 9 per image, got others")
    images = F.pad(images, (2, 2, 2, 2))  # [N, 32, 32]
    return ImageTensors(images.unsqueeze(3), targets.long(), MEAN, STD)
