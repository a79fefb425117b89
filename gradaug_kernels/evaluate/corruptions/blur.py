"""Blur: x [H, W, 3] in [0, 1], strength c, rng; the result need not be clipped."""

import numpy as np
from scipy import ndimage

from . import _filters


def gaussian_blur(x, c, rng):
    """c: standard deviation in pixels."""
    return _filters.gaussian(x, c)


def defocus_blur(x, c, rng):
    """c: radius of the disk, and standard deviation of its soft edge, in pixels."""
    return ndimage.correlate(x, _filters.disk_kernel(*c)[:, :, None], mode="mirror")


def glass_blur(x, c, rng):
    """c: standard deviation of the blur before and after; reach of the displacement in pixels; passes.

    From the lower right corner on, each pixel takes the value of a random near one, which may have changed already:
    the benchmark's code means to swap the two, and assigns both the same.
    """
    sigma, reach, passes = c
    pixels = (_filters.gaussian(x, sigma) * 255).astype(np.uint8)
    height, width = x.shape[:2]
    rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
    for _ in range(passes):
        right, down = rng.randint(-reach, reach, size=(len(rows) * len(columns), 2)).T.tolist()
        positions = ((row, column) for row in rows for column in columns)
        for (row, column), dx, dy in zip(positions, right, down, strict=True):
            pixels[row, column] = pixels[row + dy, column + dx]
    return _filters.gaussian(pixels / 255, sigma)


def motion_blur(x, c, rng):
    """c: radius and standard deviation in pixels."""
    return _filters.motion_blur(x, *c, rng.uniform(-45, 45))


def zoom_blur(x, c, rng):
    """c: largest factor (excluded) and step; the mean of the image and of it at all factors from 1 on."""
    factors = np.arange(1, *c)
    return (x + sum(_filters.zoom(x, factor) for factor in factors)) / (len(factors) + 1)


STRENGTHS = {
    gaussian_blur: {"imagenet": (1, 2, 3, 4, 6), "cifar": (0.4, 0.6, 0.7, 0.8, 1)},
    defocus_blur: {
        "imagenet": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    },
    glass_blur: {
        "imagenet": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        "cifar": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    },
    motion_blur: {
        "imagenet": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "cifar": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    },
    zoom_blur: {
        "imagenet": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        "cifar": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    },
}
