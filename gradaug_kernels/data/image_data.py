"""What every data set of this package offers: two splits and what a network and a report need to know of them."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from .image_tensors import mix_seed


@dataclasses.dataclass(frozen=True)
class ImageData:
    """train, test: data sets with `len`, items (image [C, H, W] float32, target int), `subset(indices)` and
    `loader(batch_size, *, train=False, augment=None, seed=0, device="cpu", workers=0)`, whose loaders have
    `set_epoch(e)` and yield (images [B, C, H, W] float32, targets [B] int64) on the device; `targets` [N] int64;
    `mean` and `std`, C floats each, by which pixel values in [0, 1] are normalised.

    origin: where the images come from, in words; channels: of an image; size: height and width in pixels.
    """

    name: str
    origin: str
    classes: tuple[str, ...]
    channels: int
    size: int
    train: Any
    test: Any

    def hold_out(self, count, seed=0):
        """Move `count` random training images, chosen by `seed`, into the place of the test images.

        Settings can then be compared without looking at the test images. Returns: ImageData.
        """
        if not 0 < count < len(self.train):
            raise ValueError(f"holdout must be between 1 and {len(self.train) - 1} training images, got {count}")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(mix_seed(seed)))
        held, kept = order[:count], order[count:]
        return dataclasses.replace(self, train=self.train.subset(kept), test=self.train.subset(held))

    def part(self, fraction=1.0, per_class=0, seed=0):
        """The data set with fewer training images: a part of each class, chosen by `seed`.

        fraction: of each class's images, rounded, in (0, 1]; per_class: images of each class, in place of a fraction; 0
        takes the fraction. A larger part contains the smaller ones of the same seed. Returns: ImageData.
        Raises: ValueError where a class has fewer images than per_class, or would keep none.
        """
        if fraction == 1 and per_class == 0:
            return self
        generator = torch.Generator().manual_seed(mix_seed(seed))
        targets, kept = self.train.targets, []
        for label, name in enumerate(self.classes):
            members = (targets == label).nonzero().flatten()
            count = per_class or round(fraction * len(members))
            if not 0 < count <= len(members):
                expected = (
                    f"at most {len(members)}, the images of class {name}" if per_class else "at least 1 per class"
                )
                raise ValueError(f"images of a class must be {expected}, got {count}")
            kept.append(members[torch.randperm(len(members), generator=generator)[:count]])
        return dataclasses.replace(self, train=self.train.subset(torch.cat(kept).sort().values))


def cache_folder():
    """This package's own cache folder: $XDG_CACHE_HOME/gradaug_kernels, by default under ~/.cache.

    Raises: FileNotFoundError where neither is known.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "gradaug_kernels"
    except RuntimeError:
        raise FileNotFoundError("a cache folder must be given by XDG_CACHE_HOME or HOME, got neither") from None
