"""Small data sets held in memory as one uint8 tensor, and the vectorised loader over them.

A batch is cropped, flipped and normalised by a handful of tensor operations, so that one CPU core keeps up with a
small network. The order and the augmentations of epoch e depend on (seed, e) alone: a resumed run sees what the
uninterrupted one does.
"""

import math

import numpy as np
import torch
from torch.utils.data import Dataset

PADDING = 4  # pixels that the random crop may move by, He et al. 2015, section 4.2


def mix_seed(*integers):
    """One 63-bit seed from several non-negative integers; nearby arguments give unrelated seeds."""
    return int(np.random.SeedSequence(integers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def reflect(index, size):
    """Reflect positions outside [0, size) at the edge pixels, as padding_mode="reflect" does.

    index: int64, any shape, values in (-size, 2 * size - 1). Returns: the same shape, values in [0, size).
    """
    return (size - 1) - ((size - 1) - index.abs()).abs()


class ImageTensors(Dataset):
    """Images and targets in memory.

    images: [N, H, W, C], uint8; targets: [N], int64; mean, std: C floats each, of pixel values in [0, 1].
    Item i is (image [C, H, W] float32, normalised; target int).
    """

    def __init__(self, images, targets, mean, std):
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")
        if len(images) != len(targets):
            raise ValueError(f"targets must have {len(images)} entries, one per image, got {len(targets)}")
        if not len(mean) == len(std) == images.shape[3]:
            raise ValueError(f"mean and std must have {images.shape[3]} entries, got {len(mean)} and {len(std)}")
        self.images, self.targets, self.mean, self.std = images, targets, tuple(mean), tuple(std)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.normalise(self.images[index : index + 1])[0], int(self.targets[index])

    def normalise(self, images):
        """images: [N, H, W, C], uint8. Returns: [N, C, H, W], float32, channels_last."""
        mean = torch.tensor(self.mean, device=images.device)  # [C]
        std = torch.tensor(self.std, device=images.device)  # [C]
        return (images.float() * (1 / (255 * std)) - mean / std).permute(0, 3, 1, 2)

    def subset(self, indices):
        """The images at `indices` ([M], int64), as a data set of their own."""
        return ImageTensors(self.images[indices], self.targets[indices], self.mean, self.std)

    def to(self, device):
        """The same data set with its tensors on `device`."""
        return ImageTensors(self.images.to(device), self.targets.to(device), self.mean, self.std)

    def loader(self, batch_size, *, train=False, augment=None, seed=0, device="cpu", workers=0):
        """A loader of batches on `device`; see BatchLoader. `workers` is for data sets read from files: unused here."""
        return BatchLoader(self.to(device), batch_size, train=train, augment=augment, seed=seed)


class BatchLoader:
    """Iterates over (images [B, C, H, W] float32 normalised channels_last, targets [B] int64) on the data set's device.

    train: shuffle, and leave out the last batch when it is not full; otherwise the stored order, every image.
    augment: reflect-pad by 4, random crop, random horizontal flip; by default what `train` says.
    set_epoch(e) selects the epoch; iterating twice without it repeats the same batches. The draws are made on the CPU,
    so every device sees the same ones.
    """

    def __init__(self, dataset, batch_size, *, train=False, augment=None, seed=0):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if train and batch_size > len(dataset):
            raise ValueError(f"batch_size must be at most {len(dataset)}, the number of images, got {batch_size}")
        self.dataset, self.batch_size, self.train, self.seed = dataset, batch_size, train, seed
        self.augment = train if augment is None else augment
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.dataset) // self.batch_size if self.train else math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self):
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        count = len(self.dataset)
        order = torch.randperm(count, generator=generator) if self.train else torch.arange(count)  # [N]
        for batch in range(len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]  # [B]
            images = self._crop(index, generator) if self.augment else self.dataset.images[self._on_device(index)]
            yield self.dataset.normalise(images), self.dataset.targets[self._on_device(index)]

    def _on_device(self, index):
        return index.to(self.dataset.images.device)

    def _crop(self, index, generator):
        """index: [B]. Returns: the images [B, H, W, C], uint8, each moved by up to 4 pixels and flipped by a coin."""
        height, width = self.dataset.images.shape[1:3]
        shift = torch.randint(-PADDING, PADDING + 1, (2, len(index), 1), generator=generator)  # [2, B, 1]
        flip = torch.randint(0, 2, (len(index), 1), generator=generator, dtype=torch.bool)  # [B, 1]
        rows = reflect(torch.arange(height) + shift[0], height)  # [B, H]
        columns = reflect(torch.arange(width) + shift[1], width)  # [B, W]
        columns = torch.where(flip, columns.flip(1), columns)  # [B, W]
        # One gather does padding, crop and flip: [B, 1, 1], [B, H, 1] and [B, 1, W] select [B, H, W, C].
        index, rows, columns = index[:, None, None], rows[:, :, None], columns[:, None, :]
        return self.dataset.images[self._on_device(index), self._on_device(rows), self._on_device(columns)]
