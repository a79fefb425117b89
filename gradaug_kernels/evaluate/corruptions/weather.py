"""Weather: x [H, W, 3] in [0, 1], strength c, rng; the result need not be clipped."""

import numpy as np
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from scipy import ndimage

from . import _filters


def snow(x, c, rng):
    """c: mean, standard deviation and magnification of the flakes' noise; threshold below which there is none; radius
    and standard deviation of their motion blur in pixels; the part of the image that is not whitened."""
    mean, deviation, magnification, threshold, radius, sigma, kept = c
    flakes = rng.normal(size=x.shape[:2], loc=mean, scale=deviation)
    flakes = _filters.zoom(flakes[..., None], magnification)[..., 0]  # [H, W]
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))
    flakes = _filters.motion_blur(flakes, radius, sigma, rng.uniform(-135, -45))
    flakes = (np.round(flakes * 255) / 255)[..., None]  # [H, W, 1]
    whitened = np.maximum(x, _filters.luminance(x)[..., None] * 1.5 + 0.5)
    return kept * x + (1 - kept) * whitened + flakes + np.rot90(flakes, 2)


def frost(x, c, rng):
    """c: weights of the image and of the frost.

    The benchmark lays photographs of frost over the image. They do not come with this package: the frost here is drawn,
    bright ridges of fractal noise in a cold white, so its errors are no match for published ones.
    """
    ridges = 1 - 2 * np.abs(_filters.plasma_for(x, 1.4, rng) - 0.5)  # [H, W], 1 where the noise crosses its middle
    veil = _filters.plasma_for(x, 1.8, rng)
    ice = np.clip(0.75 * ridges**3 + 0.45 * veil, 0, 1)[..., None]  # [H, W, 1]
    return c[0] * x + c[1] * ice * np.array([0.86, 0.94, 1.0])


def fog(x, c, rng):
    """c: thickness; decay of the fractal noise."""
    brightest = x.max()
    return (x + c[0] * _filters.plasma_for(x, c[1], rng)[..., None]) * brightest / (brightest + c[0])


def brightness(x, c, rng):
    """c: added to the value of hue, saturation and value."""
    hsv = rgb_to_hsv(x)
    hsv[..., 2] = np.clip(hsv[..., 2] + c, 0, 1)
    return hsv_to_rgb(hsv)


def spatter(x, c, rng):
    """c: mean and standard deviation of the liquid's noise; its blur in pixels; threshold below which there is none;
    strength (of water) or blur (of mud); whether it is mud."""
    mean, deviation, sigma, threshold, strength, mud = c
    liquid = _filters.gaussian(rng.normal(size=x.shape[:2], loc=mean, scale=deviation), sigma)  # [H, W]
    liquid = np.where(liquid < threshold, 0, liquid)
    if mud:
        cover = _filters.gaussian((liquid > threshold).astype(np.float64), strength)
        cover = np.where(cover < 0.8, 0, cover)[..., None]  # [H, W, 1]
        return x * (1 - cover) + cover * np.array([63, 42, 20]) / 255
    liquid = (liquid * 255).astype(np.uint8)
    distance = np.minimum(ndimage.distance_transform_edt(~_edges(liquid)), 20)  # pixels, to the next edge of a drop
    distance = _equalised(ndimage.uniform_filter(distance, 3, mode="mirror").astype(np.uint8))
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief = np.clip(ndimage.correlate(distance.astype(np.float64), emboss, mode="mirror"), 0, 255)
    water = liquid * np.round(ndimage.uniform_filter(relief, 3, mode="mirror"))
    if water.max() > 0:
        water = strength * water / water.max()
    return x + water[..., None] * np.array([175, 238, 238]) / 255


def _edges(image, low=50, high=150):
    """Canny's edges (1986): maxima of the gradient across its direction, above `high` or linked to one that is.

    image: [H, W], uint8. Returns: [H, W], bool.
    """
    image = image.astype(np.int64)
    dy, dx = ndimage.sobel(image, 0, mode="nearest"), ndimage.sobel(image, 1, mode="nearest")
    size = np.abs(dx) + np.abs(dy)
    padded = np.pad(size, 1)

    def neighbour(down, right):
        return padded[1 + down : 1 + down + size.shape[0], 1 + right : 1 + right + size.shape[1]]

    flat, steep = np.tan(np.pi / 8) * np.abs(dx), np.tan(3 * np.pi / 8) * np.abs(dx)
    horizontal, vertical = np.abs(dy) < flat, np.abs(dy) > steep
    falling = (dx >= 0) == (dy >= 0)  # the gradient points to the lower right or the upper left
    before = np.where(falling, neighbour(-1, -1), neighbour(-1, 1))
    after = np.where(falling, neighbour(1, 1), neighbour(1, -1))
    before = np.where(horizontal, neighbour(0, -1), np.where(vertical, neighbour(-1, 0), before))
    after = np.where(horizontal, neighbour(0, 1), np.where(vertical, neighbour(1, 0), after))
    diagonal = ~horizontal & ~vertical
    crest = (size > before) & ((size > after) | ((size == after) & ~diagonal))
    weak = crest & (size > low)
    linked, _ = ndimage.label(weak, np.ones((3, 3)))
    strong = np.unique(linked[weak & (size > high)])
    return np.isin(linked, strong[strong > 0])


def _equalised(image):
    """image: [H, W], uint8. Returns: the same with a flat histogram from 0 to 255."""
    counts = np.bincount(image.ravel(), minlength=256)
    below = counts.cumsum() - counts[image.min()]  # pixels up to each value, the darkest left out
    if below[-1] == 0:
        return image
    return np.clip(np.round(255 * below / below[-1]), 0, 255).astype(np.uint8)[image]


STRENGTHS = {
    snow: {
        "imagenet": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "cifar": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    },
    frost: {
        "imagenet": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        "cifar": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    },
    fog: {
        "imagenet": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        "cifar": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    },
    brightness: {"imagenet": (0.1, 0.2, 0.3, 0.4, 0.5), "cifar": (0.05, 0.1, 0.15, 0.2, 0.3)},
    spatter: {
        "imagenet": (
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ),
        "cifar": (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
    },
}
