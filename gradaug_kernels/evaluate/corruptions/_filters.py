"""What several corruptions are made of: blurs, zoom and fractal noise."""

import math

import numpy as np
from scipy import ndimage


def gaussian(x, sigma, mode="nearest", truncate=4.0):
    """Gaussian blur of the first two axes of x [H, W] or [H, W, C]; sigma in pixels."""
    return ndimage.gaussian_filter(x, (sigma, sigma, 0)[: x.ndim], mode=mode, truncate=truncate)


def disk_kernel(radius, sigma):
    """A disk of `radius` pixels, of sum 1, softened by a Gaussian over 3 or 5 pixels. Returns: [K, K]."""
    reach = max(radius, 8)
    axis = np.arange(-reach, reach + 1) if radius > 8 else np.arange(-8, 9)
    disk = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float64)
    taps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    weights /= weights.sum()
    disk /= disk.sum()
    for direction in (0, 1):
        disk = ndimage.correlate1d(disk, weights, direction, mode="mirror")
    return disk


def motion_blur(x, radius, sigma, angle):
    """Half a Gaussian along a line, of 2 radius + 1 taps; the edge pixels go on outside of the image.

    x: [H, W] or [H, W, C]; radius, sigma: pixels; angle: degrees. This is ImageMagick's motion blur, which the
    benchmark used.
    """
    width = 2 * radius + 1
    weights = np.exp(-(np.arange(width) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    rows, columns = np.arange(x.shape[0]), np.arange(x.shape[1])
    blurred = np.zeros(x.shape)
    for tap, weight in enumerate(weights):
        down = math.ceil(tap * math.sin(math.radians(angle)) - 0.5)
        right = math.ceil(tap * math.cos(math.radians(angle)) - 0.5)
        row = np.clip(rows + down, 0, len(rows) - 1)
        column = np.clip(columns + right, 0, len(columns) - 1)
        blurred += weight * x[row[:, None], column]
    return blurred


def zoom(x, factor):
    """The middle of x [H, W, C], magnified by factor >= 1 to the size of x, linearly interpolated."""
    height, width = x.shape[:2]
    kept = [math.ceil(size / factor) for size in (height, width)]
    top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
    enlarged = ndimage.zoom(x[top : top + kept[0], left : left + kept[1]], (factor, factor, 1), order=1)
    top, left = (enlarged.shape[0] - height) // 2, (enlarged.shape[1] - width) // 2
    return enlarged[top : top + height, left : left + width]


def plasma(size, decay, rng):
    """A fractal height map by the diamond-square algorithm on a torus. Returns: [size, size] in [0, 1].

    size: a power of two; decay: by which the random displacement shrinks as the distance between points halves.
    """
    heights, step, amplitude = np.zeros((size, size)), size, 100.0

    def displaced(total):  # the mean of four neighbours and a random displacement
        return total / 4 + amplitude * rng.uniform(-amplitude, amplitude, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = displaced(pairs + np.roll(pairs, -1, 1))
        centres, corners = heights[half::step, half::step], heights[::step, ::step]
        above = centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1)
        heights[::step, half::step] = displaced(above)
        beside = centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0)
        heights[half::step, ::step] = displaced(beside)
        step, amplitude = half, amplitude / decay
    heights -= heights.min()
    return heights / heights.max()


def plasma_for(x, decay, rng):
    """`plasma` cut to the size of x [H, W, C]. Returns: [H, W]."""
    size = 1 << (max(x.shape[:2]) - 1).bit_length()
    return plasma(size, decay, rng)[: x.shape[0], : x.shape[1]]


def luminance(x):
    """x: [H, W, 3]. Returns: [H, W], the grey value of each pixel (ITU-R BT.601)."""
    return x @ np.array([0.299, 0.587, 0.114])
