"""Images in folders, one per class, as ImageNet is stored: root/train/<class>/*.jpg and root/val/<class>/*.jpg."""

import contextlib
import os
import stat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from .._torchvision import torchvision_module
from .image_data import ImageData
from .image_tensors import mix_seed

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
DEEP = ("I", "F")  # and I;16, I;16B, ...: Pillow's modes of more than 8 bits
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, pixel values in [0, 1]


class Lighting(nn.Module):
    """PCA colour noise: adds eigenvectors * (alpha * eigenvalues), alpha ~ Normal(0, scale), one alpha per image.

    Krizhevsky et al. 2012, section 4.1; eigenvalues and eigenvectors of ImageNet's colours for values in [0, 1], so
    the image must be in that range: [3, H, W] float, before normalisation. The result is not clipped.
    """

    EIGENVALUES = (0.2175, 0.0188, 0.0045)
    EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, image):
        if not image.is_floating_point():
            raise ValueError(f"image must be floating point in [0, 1], got {image.dtype}")
        alpha = torch.randn(3, dtype=image.dtype) * self.scale
        noise = image.new_tensor(self.EIGENVECTORS) @ (alpha * image.new_tensor(self.EIGENVALUES))  # [3]
        return image + noise[:, None, None]


class Folder:
    """The image files of root/<class>/, at any depth, as torchvision's ImageFolder lists them.

    Names that begin with a dot, and __MACOSX, are neither classes nor images. Raises: FileNotFoundError where a class
    has no images; ValueError for a link that leads to nothing or back to a folder that holds it, and for an image that
    is no file, but a pipe, a socket or a device.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise FileNotFoundError(f"data folder must hold {root.name}/<class>/<image files>, got no folder {root}")
        self.classes = sorted(entry.name for entry in _visible(root) if entry.is_dir())
        files = [sorted(_image_files(str(root / name), ())) for name in self.classes]
        empty = [name for name, found in zip(self.classes, files, strict=True) if not found]
        if empty or not files:
            got = f"none in {', '.join(empty[:3])}" if empty else "no class folder"
            raise FileNotFoundError(f"{root} must hold one folder of images per class, got {got}")
        self.samples = [(path, target) for target, found in enumerate(files) for _, path in found]
        self.targets = [target for _, target in self.samples]

    def __len__(self):
        return len(self.samples)


def _visible(folder):
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]


def _image_files(folder, above):
    """(folder, path) of the images at any depth. above: (device, inode) of the folders that hold it."""
    status = os.stat(folder)
    above = (*above, (status.st_dev, status.st_ino))
    if above[-1] in above[:-1]:
        raise ValueError(f"no link in a data folder may lead back to a folder that holds it, got {folder}")
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _image_files(entry.path, above)
        elif entry.name.lower().endswith(EXTENSIONS):
            if not entry.is_file():
                kind = "a link to no file" if entry.is_symlink() else "a pipe, a socket or a device"
                raise ValueError(f"every image must be a file, got {kind}, {entry.path}")
            yield folder, entry.path


def read_image(path: str) -> Image.Image | torch.Tensor:
    """An image file, upright as its EXIF orientation says: in mode RGB, or float32 [3, H, W] in [0, 1] where it has
    more than 8 bits. Transparent pixels are put on white; of an animation the first frame is taken.

    16 bits are divided by 65535; floating-point values must be in [0, 1].
    Raises: ValueError naming the file where it cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("no file")
        with Image.open(path) as image:
            image.load()
            with contextlib.suppress(Exception):  # damaged metadata does not spoil the pixels
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith(DEEP):
                return _deep(np.asarray(image))
            if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead to
        raise ValueError(f"every image file must be readable, got {path}: {error or type(error).__name__}") from None


def _deep(values):
    """Values [H, W] of 16 bits, or floating-point ones in [0, 1]. Returns: [3, H, W] float32 in [0, 1]."""
    largest = 1 if values.dtype.kind == "f" else 65535
    if not (values.min() >= 0 and values.max() <= largest):
        raise ValueError(f"values must be from 0 to {largest}, got {values.min()} to {values.max()}")
    return torch.from_numpy(values.astype(np.float32) / largest).expand(3, -1, -1)


class FolderImages(Dataset):
    """Images read from files: item i is (image [3, size, size] float32, normalised; target int), not augmented.

    Item (e, i) is image i with the augmentations of epoch e, which depend on (seed, e, i) alone.
    """

    def __init__(self, folder, augmented, plain, indices=None, seed=0):
        self.folder, self.augmented, self.plain, self.seed = folder, augmented, plain, seed
        self.indices = torch.arange(len(folder)) if indices is None else indices
        self.mean, self.std = MEAN, STD

    @property
    def targets(self):
        """[N], int64."""
        return torch.tensor(self.folder.targets)[self.indices]

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (None, key)
        path, target = self.folder.samples[self.indices[index]]
        image = read_image(path)
        if epoch is None:
            return self.plain(image), target
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            torch.manual_seed(mix_seed(self.seed, epoch, index))
            return self.augmented(image), target

    def subset(self, indices):
        """The images at `indices` ([M], int64), as a data set of their own."""
        return FolderImages(self.folder, self.augmented, self.plain, self.indices[indices], self.seed)

    def loader(self, batch_size, *, train=False, augment=None, seed=0, device="cpu", workers=0):
        """A loader of batches on `device`; see FolderLoader. workers: processes that read and decode the files."""
        dataset = FolderImages(self.folder, self.augmented, self.plain, self.indices, seed)
        return FolderLoader(dataset, batch_size, train=train, augment=augment, device=device, workers=workers)


class EpochSampler(Sampler):
    """Yields the keys of FolderImages: (epoch, index) where augmented, index otherwise; shuffled by (seed, epoch)."""

    def __init__(self, count, seed, shuffle, augment):
        self.count, self.seed, self.shuffle, self.augment, self.epoch = count, seed, shuffle, augment, 0

    def __len__(self):
        return self.count

    def __iter__(self):
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator) if self.shuffle else torch.arange(self.count)
        return iter([(self.epoch, index) if self.augment else index for index in order.tolist()])


class FolderLoader:
    """Iterates over (images [B, 3, H, W] float32 channels_last, targets [B] int64) on `device`.

    The arguments, set_epoch and the dependence on (seed, epoch) alone are as for BatchLoader.
    """

    def __init__(self, dataset, batch_size, *, train=False, augment=None, device="cpu", workers=0):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if train and batch_size > len(dataset):
            raise ValueError(f"batch_size must be at most {len(dataset)}, the number of images, got {batch_size}")
        self.device = torch.device(device)
        augment = train if augment is None else augment
        self.sampler = EpochSampler(len(dataset), dataset.seed, shuffle=train, augment=augment)
        self.loader = DataLoader(
            dataset,
            batch_size,
            sampler=self.sampler,
            drop_last=train,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else starting an epoch would draw from the global one
        )

    def set_epoch(self, epoch):
        self.sampler.epoch = epoch

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for images, targets in self.loader:
            images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            yield images, targets.to(self.device, non_blocking=True)


def image_folder(
    root: str | Path | None = None,
    *,
    size: int = 224,
    min_area: float = 0.08,
    color_jitter: float = 0.4,
    lighting: float = 0.1,
) -> ImageData:
    """The images under root/train/<class> and root/val/<class> (or root/test/<class>).

    Training images: random crop of at least `min_area` of the area, resized to `size` pixels; horizontal flip;
    brightness, contrast and saturation by a factor in 1 +- color_jitter; PCA lighting. The published ImageNet setting.
    Test images: shorter side resized to size * 256 / 224, centre crop of `size`.

    Returns: ImageData. Raises: FileNotFoundError when a folder, or a class in it, has no images; ValueError for options
    out of their range, and for links and files that `Folder` refuses.
    """
    if size < 1 or not 0 < min_area <= 1 or color_jitter < 0 or lighting < 0:
        raise ValueError(
            "size must be at least 1, min_area in (0, 1], color_jitter and lighting at least 0, "
            f"got {size}, {min_area}, {color_jitter} and {lighting}"
        )
    if root is None:
        raise FileNotFoundError("image_folder must be given its data folder (--data FOLDER), got none")
    test = "test" if not (Path(root) / "val").is_dir() and (Path(root) / "test").is_dir() else "val"
    train_folder, test_folder = Folder(Path(root) / "train"), Folder(Path(root) / test)
    if test_folder.classes != train_folder.classes:
        differing = sorted(set(test_folder.classes) ^ set(train_folder.classes))
        raise ValueError(f"{root}/train and {root}/{test} must hold the same classes, got {differing[0]} in one only")
    v2 = torchvision_module("transforms.v2")
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augmented = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(size, scale=(min_area, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(color_jitter, color_jitter, color_jitter),
            finish[0],
            Lighting(lighting),
            finish[1],
        ]
    )
    plain = v2.Compose([v2.ToImage(), v2.Resize(size * 256 // 224, antialias=True), v2.CenterCrop(size), *finish])
    return ImageData(
        name="image_folder",
        origin=f"from {root}",
        classes=tuple(train_folder.classes),
        channels=3,
        size=size,
        train=FolderImages(train_folder, augmented, plain),
        test=FolderImages(test_folder, augmented, plain),
    )
