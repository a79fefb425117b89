"""Digital: x [H, W, 3] in [0, 1], strength c, rng; the result need not be clipped."""

import io

import numpy as np
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage

from . import _filters


def contrast(x, c, rng):
    """c: factor of the distance to each channel's mean."""
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * c + mean


def elastic_transform(x, c, rng):
    """c: length and smoothness of the local displacements, and reach of the affine one, as parts of the image's size.

    Three points move by up to the reach, and the image with them; then each pixel moves by smoothed noise.
    """
    height, width = x.shape[:2]
    length, sigma, reach = (part * min(height, width) for part in c)
    centre, square = np.array([height // 2, width // 2]), min(height, width) // 3
    before = np.array([centre + square, [centre[0] + square, centre[1] - square], centre - square])  # [3, (x, y)]
    after = before + rng.uniform(-reach, reach, size=(3, 2))
    # The inverse map, (x, y) of the result to (x, y) of the image, from the three pairs of points.
    inverse = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)  # [3, 2]
    matrix, offset = inverse[:2].T[::-1, ::-1], inverse[2, ::-1]  # of (row, column)
    moved = np.stack(
        [ndimage.affine_transform(channel, matrix, offset, order=1, mode="mirror") for channel in np.moveaxis(x, 2, 0)],
        axis=2,
    )
    dx, dy = (
        _filters.gaussian(rng.uniform(-1, 1, size=(height, width)), sigma, "reflect", truncate=3) * length
        for _ in range(2)
    )
    rows, columns = np.mgrid[:height, :width]
    where = np.stack([rows + dy, columns + dx])  # [2, H, W]
    return np.stack(
        [ndimage.map_coordinates(channel, where, order=1, mode="reflect") for channel in np.moveaxis(moved, 2, 0)],
        axis=2,
    )


def pixelate(x, c, rng):
    """c: factor of the resolution."""
    height, width = x.shape[:2]
    small = _to_pil(x).resize((int(width * c), int(height * c)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255


def jpeg_compression(x, c, rng):
    """c: JPEG quality, 1 to 95."""
    file = io.BytesIO()
    _to_pil(x).save(file, "JPEG", quality=c)
    return np.asarray(Image.open(file)) / 255


def saturate(x, c, rng):
    """c: factor of, and summand to, the saturation of hue, saturation and value."""
    hsv = rgb_to_hsv(x)
    hsv[..., 1] = np.clip(hsv[..., 1] * c[0] + c[1], 0, 1)
    return hsv_to_rgb(hsv)


def _to_pil(x):
    return Image.fromarray(np.round(x * 255).astype(np.uint8))


def _of(size, *strengths):
    """Displacements in pixels of images of `size` pixels, as parts of that size."""
    return tuple(tuple(pixels / size for pixels in strength) for strength in strengths)


STRENGTHS = {
    contrast: {"imagenet": (0.4, 0.3, 0.2, 0.1, 0.05), "cifar": (0.75, 0.5, 0.4, 0.3, 0.15)},
    elastic_transform: {
        # The benchmark's constants are parts of 244 pixels, applied to images of 224.
        "imagenet": _of(
            224,
            (244 * 2, 244 * 0.7, 244 * 0.1),
            (244 * 2, 244 * 0.08, 244 * 0.2),
            (244 * 0.05, 244 * 0.01, 244 * 0.02),
            (244 * 0.07, 244 * 0.01, 244 * 0.02),
            (244 * 0.12, 244 * 0.01, 244 * 0.02),
        ),
        "cifar": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    },
    pixelate: {"imagenet": (0.6, 0.5, 0.4, 0.3, 0.25), "cifar": (0.95, 0.9, 0.85, 0.75, 0.65)},
    jpeg_compression: {"imagenet": (25, 18, 15, 10, 7), "cifar": (80, 65, 58, 50, 40)},
    saturate: {
        "imagenet": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        "cifar": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    },
}
