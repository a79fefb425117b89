"""The 15 + 4 common corruptions of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019 (arXiv 1903.12261), at 5 severities.

Written from the paper, with the constants of the benchmark's code for ImageNet-C and CIFAR-C. Two differences: the
frost is drawn (see `weather.frost`), and the images are not stored as JPEG in between, as ImageNet-C's are.
"""

import numpy as np

from . import blur, digital, noise, weather

COMMON = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
CONSTANTS = ("imagenet", "cifar")
SEVERITIES = (1, 2, 3, 4, 5)

_FUNCTIONS = {
    function.__name__: (function, strengths)
    for module in (noise, blur, weather, digital)
    for function, strengths in module.STRENGTHS.items()
}

__all__ = ["COMMON", "CONSTANTS", "EXTRA", "SEVERITIES", "corrupt"]


def corrupt(
    image: np.ndarray, name: str, severity: int, rng: np.random.RandomState, constants: str = "imagenet"
) -> np.ndarray:
    """One image with a corruption.

    image: [H, W, C], uint8, C of 3 or 1; a grey image is corrupted as a colour image of equal channels, and the result
    turned grey again. name: in COMMON or EXTRA; severity: 1 to 5; constants: "imagenet", meant for 224 pixels, or
    "cifar", for 32. rng: NumPy's RandomState, whose streams never change.

    Returns: uint8, the shape of image.
    Raises: ValueError for another shape or dtype, an unknown name or constants, or a severity outside 1 to 5.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"image must be uint8 [H, W, 3] or [H, W, 1], got {image.dtype} {list(image.shape)}")
    if name not in _FUNCTIONS:
        raise ValueError(f"corruption must be one of {', '.join(COMMON + EXTRA)}, got {name}")
    if constants not in CONSTANTS:
        raise ValueError(f"constants must be one of {', '.join(CONSTANTS)}, got {constants}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be from 1 to 5, got {severity}")
    function, strengths = _FUNCTIONS[name]
    x = np.repeat(image, 3, 2) / 255 if image.shape[2] == 1 else image / 255
    x = np.clip(function(x, strengths[constants][severity - 1], rng), 0, 1)
    if image.shape[2] == 1:
        x = (x @ np.array([0.299, 0.587, 0.114]))[..., None]
    # The benchmark rounds down; a pixel that is whole but for its last bits is not to lose one.
    return np.floor(x * 255 + 1e-4).astype(np.uint8)
