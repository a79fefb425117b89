"""The divergences against their formulas, written out class by class."""

import math

import pytest
import torch

import gradaug_kernels as gk


def probabilities(rows, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(rows, classes, generator=generator, dtype=torch.double), 1)


def logits(rows, classes, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, classes, generator=generator, dtype=torch.double)).requires_grad_()


@pytest.mark.parametrize("alpha", [-2.0, -1.0, 0.5, 1.0, 2.0])
def test_one_alpha_without_clipping(alpha):
    teacher, z = probabilities(5, 7, 1), logits(5, 7)
    value = gk.alpha_divergence(teacher, z, alphas=(alpha,), clip=math.inf)
    q = torch.softmax(z, 1)
    if alpha == 1:
        expected = (teacher * (teacher / q).log()).sum(1).mean()
    else:
        expected = (q * ((teacher / q) ** alpha - 1)).sum(1).mean() / (alpha * (alpha - 1))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (value, expected)))


def test_each_image_takes_the_larger_and_ratios_are_clipped():
    teacher, z = probabilities(40, 6, 1), logits(40, 6)
    value = gk.alpha_divergence(teacher, z, alphas=(-1.0, 1.0), clip=4.0)
    (grad,) = torch.autograd.grad(value, z)
    expected, winners, clipped = 0.0, [], 0
    expected_grad = torch.zeros_like(grad)
    for i, (p, q) in enumerate(zip(teacher.tolist(), torch.softmax(z, 1).tolist(), strict=True)):
        kl = sum(pk * math.log(pk / qk) for pk, qk in zip(p, q, strict=True))
        powers = [min(qk / pk, 4.0) for pk, qk in zip(p, q, strict=True)]  # (p / q)^-1
        reverse = sum(qk * (power - 1) for qk, power in zip(q, powers, strict=True)) / 2
        winners.append(kl > reverse)
        expected += max(kl, reverse) / 40
        slope = p if kl > reverse else [-qk * power for qk, power in zip(q, powers, strict=True)]
        for k in range(6):  # d log q_j / d z_k = [j = k] - q_k
            expected_grad[i, k] = -(slope[k] - q[k] * sum(slope)) / 40
        clipped += max(powers) == 4.0 and kl < reverse
    assert 0 < sum(winners) < 40
    assert clipped > 0
    assert value.item() == pytest.approx(expected)
    torch.testing.assert_close(grad, expected_grad)


def test_a_teacher_without_doubt():
    teacher = torch.tensor([[0.0, 1.0, 0.0]])
    z = torch.tensor([[3.0, -2.0, 0.5]], requires_grad=True)
    gk.alpha_divergence(teacher, z).backward()
    assert z.grad.isfinite().all()
    assert z.grad[0, 1] < 0 < z.grad[0, 0]


def test_bad_arguments():
    teacher, z = probabilities(2, 3, 0), logits(2, 3)
    with pytest.raises(ValueError, match=r"alphas must be numbers other than 0, got \(0, 1\)"):
        gk.alpha_divergence(teacher, z, alphas=(0, 1))
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        gk.alpha_divergence(teacher, z, clip=0)


@pytest.mark.parametrize("divergence", [gk.kl_divergence, gk.alpha_divergence])
@pytest.mark.parametrize("places", [(6,), (3, 2)])
def test_places_of_an_image_are_averaged_as_images_are(divergence, places):
    """As F.cross_entropy averages them."""
    rows_t, rows_z = probabilities(4 * 6, 7, 1), logits(4 * 6, 7)

    def dense(rows):
        return rows.reshape(4, *places, 7).movedim(-1, 1)  # [N, classes, ...]

    values = divergence(rows_t, rows_z), divergence(dense(rows_t), dense(rows_z))
    torch.testing.assert_close(*values, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(*(torch.autograd.grad(value, rows_z)[0] for value in values), rtol=1e-12, atol=1e-15)
