"""Noise: x [H, W, 3] in [0, 1], strength c, rng; the result need not be clipped."""

import numpy as np


def gaussian_noise(x, c, rng):
    """c: standard deviation."""
    return x + rng.normal(size=x.shape, scale=c)


def shot_noise(x, c, rng):
    """c: photons of a white pixel."""
    return rng.poisson(x * c) / c


def impulse_noise(x, c, rng):
    """c: the part of the values that turn black or white."""
    hit = rng.random_sample(x.shape) <= c
    return np.where(hit, rng.random_sample(x.shape) <= 0.5, x)


def speckle_noise(x, c, rng):
    """c: standard deviation, as a part of the value."""
    return x + x * rng.normal(size=x.shape, scale=c)


STRENGTHS = {
    gaussian_noise: {"imagenet": (0.08, 0.12, 0.18, 0.26, 0.38), "cifar": (0.04, 0.06, 0.08, 0.09, 0.10)},
    shot_noise: {"imagenet": (60, 25, 12, 5, 3), "cifar": (500, 250, 100, 75, 50)},
    impulse_noise: {"imagenet": (0.03, 0.06, 0.09, 0.17, 0.27), "cifar": (0.01, 0.02, 0.03, 0.05, 0.07)},
    speckle_noise: {"imagenet": (0.15, 0.2, 0.35, 0.45, 0.6), "cifar": (0.06, 0.1, 0.12, 0.16, 0.2)},
}
