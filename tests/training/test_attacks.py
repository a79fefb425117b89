"""FGSM and PGD: bit-identical to foolbox's where it is installed, and within their ball."""

import pytest
import torch
from torch import nn

from gradaug_kernels.evaluate.attacks import OnPixels, fgsm, pgd
from gradaug_kernels.models import CifarResNet

EPSILONS = (1 / 255, 4 / 255, 0.1)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return CifarResNet(8, base_width=4).eval()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 16, 16, generator=generator), torch.arange(6)


@pytest.fixture(scope="module")
def foolbox():
    return pytest.importorskip("foolbox", reason="foolbox is not installed")


def run_foolbox(foolbox, attack, network, pixels, targets, epsilon):
    preprocessing = {"mean": list(MEAN), "std": list(STD), "axis": -3}
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu", preprocessing=preprocessing)
    return attack.run(model, pixels, foolbox.criteria.Misclassification(targets), epsilon=epsilon)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_fgsm_is_bit_identical_to_foolbox(foolbox, network, batch, epsilon):
    attack = foolbox.attacks.LinfFastGradientAttack()
    expected = run_foolbox(foolbox, attack, network, *batch, epsilon)
    assert torch.equal(fgsm(OnPixels(network, MEAN, STD), *batch, epsilon), expected)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_pgd_is_bit_identical_to_foolbox(foolbox, network, batch, epsilon):
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(rel_stepsize=0.25, steps=7, random_start=False)
    expected = run_foolbox(foolbox, attack, network, *batch, epsilon)
    assert torch.equal(pgd(OnPixels(network, MEAN, STD), *batch, epsilon, epsilon * 0.25, 7), expected)


def test_fgsm_of_a_linear_network():
    """Cross entropy of two classes falls along w_target - w_other: the attack goes the other way."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    model[1].weight.data = torch.tensor([[1.0, -1.0, 2.0, 0.5], [0.0, 1.0, 2.5, -0.5]])
    pixels, targets = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    attacked = fgsm(model, pixels, targets, 0.1)
    torch.testing.assert_close(attacked.flatten(), torch.tensor([0.4, 0.6, 0.6, 0.4]))
    attacked = fgsm(model, torch.full((1, 1, 2, 2), 0.05), targets, 0.1)
    torch.testing.assert_close(attacked.flatten(), torch.tensor([0.0, 0.15, 0.15, 0.0]))


def test_pgd_stays_in_its_ball_and_is_stronger(network, batch):
    network.zero_grad()
    model, (pixels, _) = OnPixels(network, MEAN, STD), batch
    targets = model(pixels).argmax(1)

    def loss(images):
        return nn.functional.cross_entropy(model(images), targets)

    attacked = pgd(model, pixels, targets, 0.05, 0.0125, 10, torch.Generator().manual_seed(0))
    assert (attacked - pixels).abs().max() <= 0.05 + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert loss(attacked) > loss(fgsm(model, pixels, targets, 0.05)) > loss(pixels)
    again = pgd(model, pixels, targets, 0.05, 0.0125, 10, torch.Generator().manual_seed(0))
    assert torch.equal(attacked, again)
    assert not attacked.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
