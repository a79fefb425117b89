"""AccumulateIntoGrad: the same gradients as autograd's, in place; hooks, casts and fallbacks."""

import copy

import pytest
import torch
from torch import nn

import gradaug_kernels as gk


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=True), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6 * 36, 5))


@pytest.fixture
def model():
    return gk.convert(network()).double()


def passes(model, x, context=None):
    """Three widths, as one training step runs them; the gradients."""
    for width in (1.0, 0.7, 0.5):
        with gk.use_width(model, width):
            if context is None:
                model(x).square().sum().backward()
            else:
                with context:
                    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, dtype=torch.double, requires_grad=True)


def test_gradients_equal_autograds(model, x):
    expected = passes(copy.deepcopy(model), x)
    dx = x.grad.clone()
    x.grad = None
    accumulation = gk.AccumulateIntoGrad(model)
    for _ in range(2):  # the second step adds into the buffers of the first
        model.zero_grad(set_to_none=False)
        x.grad = None
        accumulation.begin_step()
        buffers = [layer.weight.grad.data_ptr() for layer in accumulation.layers]
        for actual, reference in zip(passes(model, x, accumulation), expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x.grad, dx, rtol=1e-12, atol=1e-12)
        assert buffers == [layer.weight.grad.data_ptr() for layer in accumulation.layers]


def test_autograd_gets_no_gradient_for_the_weight(model, x):
    accumulation = gk.AccumulateIntoGrad(model)
    accumulation.begin_step()
    with accumulation:
        y = model(x).sum()
    (dweight,) = torch.autograd.grad(y, [model[0].weight], allow_unused=True)
    assert dweight is None
    assert model[0]._accumulating is None, "outside of the with-block autograd has its way"


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_weight_with_a_hook_is_left_to_autograd(model, x, hook):
    expected = passes(copy.deepcopy(model), x)
    called = []
    getattr(model[0].weight, hook)(lambda grad: called.append(1))
    accumulation = gk.AccumulateIntoGrad(model)
    accumulation.begin_step()
    gradients = passes(model, x, accumulation)
    assert len(called) == 3
    for actual, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)


def test_frozen_weights_get_no_gradient(model, x):
    model[0].weight.requires_grad_(False)
    accumulation = gk.AccumulateIntoGrad(model)
    accumulation.begin_step()
    with accumulation:
        model(x).sum().backward()
    assert model[0].weight.grad is None
    assert model[3].weight.grad is not None


def test_low_precision_copies_follow_the_weights_and_gradients_stay_float32(model, x):
    model.float()
    accumulation = gk.AccumulateIntoGrad(model, torch.bfloat16)
    images = x.detach().float()
    for _ in range(2):
        accumulation.begin_step()
        copies = dict(accumulation._copies)
        for layer, weight in copies.items():
            assert torch.equal(weight, layer.weight.bfloat16())
        with accumulation, torch.autocast("cpu", torch.bfloat16):
            model(images).float().square().sum().backward()
        assert all(layer.weight.grad.dtype == torch.float32 for layer in copies)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1
    twin = copy.deepcopy(model)
    model.zero_grad(set_to_none=False)
    twin.zero_grad()
    accumulation.begin_step()
    with torch.autocast("cpu", torch.bfloat16):
        with accumulation:
            model(images).float().square().sum().backward()
        twin(images).float().square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 0.02 * q.grad.norm(), "bfloat16 rounds at 2^-8"


def test_a_recomputing_model_makes_no_copies_on_the_cpu(x):
    images = x.detach().float()
    gradients = []
    for recompute in (False, True):
        model = gk.convert(network(), recompute=recompute)
        accumulation = gk.AccumulateIntoGrad(model, torch.bfloat16)
        accumulation.begin_step()
        assert len(accumulation._copies) == (0 if recompute else 3)
        with accumulation, torch.autocast("cpu", torch.bfloat16):
            model(images).float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for copied, read in zip(*gradients, strict=True):
        assert (copied - read).norm() <= 0.02 * copied.norm(), "bfloat16 rounds at 2^-8"


def test_second_derivatives_raise(model, x):
    accumulation = gk.AccumulateIntoGrad(model)
    accumulation.begin_step()
    with accumulation:
        y = model(x).square().sum()
    with pytest.raises(RuntimeError, match=r"has no second derivative \(create_graph=True\); leave gradients to auto"):
        torch.autograd.grad(y, x, create_graph=True)


def test_a_buffer_that_does_not_fit():
    x, weight = torch.randn(1, 2, 3, 3), torch.randn(4, 2, 1, 1, requires_grad=True)
    with pytest.raises(ValueError, match=r"weight_grad must be a buffer of shape \(4, 2, 1, 1\)"):
        gk.slim_conv2d(x, weight, weight_grad=torch.zeros(4, 1, 1, 1))
    with pytest.raises(ValueError, match=r"weight_grad must be a buffer of shape \(4, 2\)"):
        gk.slim_linear(x[:, :, 0, 0], weight[:, :, 0, 0], weight_grad=torch.zeros(2, 4))
