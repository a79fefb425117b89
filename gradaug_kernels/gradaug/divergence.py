"""What a sub-network learns from the full network: divergences between its class probabilities and the teacher's."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def kl_divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """KL(teacher || softmax(logits)), summed over classes, averaged over the batch and the places of an image.

    Args:
        teacher: [N, classes, ...], probabilities, held constant.
        logits: [N, classes, ...].
    """
    summed = F.kl_div(F.log_softmax(logits, dim=1), teacher, reduction="sum")
    return summed / (logits.shape[0] * logits.shape[2:].numel())


def alpha_divergence(
    teacher: Tensor, logits: Tensor, alphas: Sequence[float] = (-1.0, 1.0), clip: float = 5.0
) -> Tensor:
    """The largest of some alpha-divergences from p = teacher to q = softmax(logits), averaged over batch and places.

        D_a(p || q) = sum q ((p / q)^a - 1) / (a (a - 1));  D_1 = KL(p || q)
        gradient of D_a = -sum q (p / q)^a / a grad(log q)

    Wang et al., "AlphaNet: Improved Training of Supernets with Alpha-Divergence", ICML 2021: a negative alpha punishes
    a student that is sure where the teacher is not, a positive one the opposite, and each image, or place in it, takes
    the larger of the two. (p / q)^a is clipped from above, in the value and in the gradient; the gradient of D_1 has no
    ratio to clip.

    Args:
        teacher: [N, classes, ...], probabilities, held constant.
        logits: [N, classes, ...].
        alphas: each neither 0 nor empty; as published, -1 and 1.
        clip: the largest (p / q)^a.

    Raises:
        ValueError: for no alpha, alpha 0, or a clip that is not positive.
    """
    if not alphas or 0 in alphas:
        raise ValueError(f"alphas must be numbers other than 0, got {tuple(alphas)}")
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    log_q = F.log_softmax(logits, dim=1)  # [N, classes, ...]
    p, q = teacher.to(log_q.dtype), log_q.detach().exp()
    log_ratio = p.log() - log_q.detach()  # -inf where p is 0
    values, slopes = [], []
    for alpha in alphas:
        if alpha == 1:
            values.append(torch.where(p > 0, p * log_ratio, 0.0).sum(1))
            slopes.append(p)
        else:
            power = (alpha * log_ratio).exp().clamp(max=clip)  # (p / q)^a
            values.append((q * (power - 1)).sum(1) / (alpha * (alpha - 1)))
            slopes.append(q * power / alpha)
    values, slopes = torch.stack(values), torch.stack(slopes)  # [alphas, N, ...], [alphas, N, classes, ...]
    largest = values.argmax(0, keepdim=True)  # [1, N, ...]
    value = values.gather(0, largest).mean()
    slope = slopes.gather(0, largest.unsqueeze(2).expand_as(slopes[:1]))[0]
    surrogate = -(slope * log_q).sum(1).mean()  # has the gradient above
    return surrogate + (value - surrogate).detach()
