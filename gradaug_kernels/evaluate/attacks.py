"""Adversarial images within an L-infinity ball: FGSM (Goodfellow et al. 2015) and PGD (Madry et al. 2018).

Images are pixel values in [0, 1]: the ball and the clipping are in what the network is shown, before normalisation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OnPixels(nn.Module):
    """A network on pixel values [N, C, H, W] in [0, 1]: normalises, then calls `model`."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])  # [C, 1, 1]
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model((pixels - self.mean) / self.std)


def fgsm(model: nn.Module, pixels: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """One step of epsilon along the sign of the loss's gradient.

    model: pixel values to logits, in evaluation mode; pixels: [N, C, H, W] in [0, 1]; targets: [N].
    Returns: pixels moved by at most epsilon each, in [0, 1].
    """
    return _step(model, pixels, pixels, targets, epsilon, epsilon)


def pgd(
    model: nn.Module,
    pixels: Tensor,
    targets: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`steps` steps of `step_size`, each followed by a projection onto the ball of epsilon and onto [0, 1].

    generator: draws a start in the ball, uniformly, on the CPU; None starts at the images. Else as `fgsm`.
    """
    attacked = pixels
    if generator is not None:
        noise = torch.rand(pixels.shape, generator=generator, dtype=pixels.dtype) * (2 * epsilon) - epsilon
        attacked = (pixels + noise.to(pixels.device)).clamp(0, 1)
    for _ in range(steps):
        attacked = _step(model, attacked, pixels, targets, step_size, epsilon)
    return attacked


def _step(model, attacked, pixels, targets, step_size, epsilon):
    attacked = attacked.detach().requires_grad_()
    loss = F.cross_entropy(model(attacked), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, attacked)
    moved = attacked.detach() + step_size * gradient.sign()
    return (pixels + (moved - pixels).clamp(-epsilon, epsilon)).clamp(0, 1)
