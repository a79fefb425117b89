"""Images in folders, one per class, as ImageNet is stored: root/train/<class>/*.jpg and root/val/<class>/*.jpg."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from .._torchvision import torchvision_module
from .image_data import ImageData
from .image_tensors import mix_seed

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
        try:
            image = self.folder.loader(path)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"every image file must be readable, got {path}: {error}") from None
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

    Returns: ImageData. Raises: FileNotFoundError when a folder, or a class in it, has no images.
    """
    if root is None:
        raise FileNotFoundError("image_folder must be given its data folder (--data FOLDER), got none")
    test = "test" if not (Path(root) / "val").is_dir() and (Path(root) / "test").is_dir() else "val"
    train_folder, test_folder = _open(Path(root) / "train"), _open(Path(root) / test)
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


def _open(folder):
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder must hold {folder.name}/<class>/<image files>, got no folder {folder}")
    datasets = torchvision_module("datasets")
    try:
        return datasets.ImageFolder(folder)
    except FileNotFoundError:
        empty = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and not _has_images(path)]
        found = f"none in {', '.join(empty[:3])}" if empty else "no class folder"
        raise FileNotFoundError(f"{folder} must hold one folder of images per class, got {found}") from None


def _has_images(folder):
    known = torchvision_module("datasets.folder").IMG_EXTENSIONS
    return any(path.suffix.lower() in known for path in folder.rglob("*"))
