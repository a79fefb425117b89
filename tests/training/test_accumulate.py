"""AccumulateIntoGrad: the same gradients as autograd's, in place; hooks, casts and fallbacks."""

import contextlib
import copy
import sys

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
        model.zero_grad()
        x.grad = None
        accumulation.begin_step()
        buffers = [layer.weight.grad.data_ptr() for layer in accumulation.layers]
        for actual, reference in zip(passes(model, x, accumulation), expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x.grad, dx, rtol=1e-12, atol=1e-12)
        accumulation.end_step()
        assert buffers == [layer.weight.grad.data_ptr() for layer in accumulation.layers]


def bottlenecks(recompute):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.Flatten()]
    return gk.convert(nn.Sequential(*layers, nn.Linear(6 * 36, 5)), recompute=recompute).double()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("wanted", ["input", "weight", "both"])
def test_torch_autograd_grad_has_its_gradients_and_leaves_grad_alone(x, recompute, wanted):
    """As a criterion may call it inside a step; recompute reaches the formulas in Python."""
    model = bottlenecks(recompute)
    of = {"input": [x], "weight": [model[3].weight], "both": [x, model[0].weight]}[wanted]
    expected = torch.autograd.grad(model(x).square().sum(), of)
    accumulation = gk.AccumulateIntoGrad(model)
    accumulation.begin_step()
    with accumulation:
        y = model(x).square().sum()
        found = torch.autograd.grad(y, of, retain_graph=True)
        for layer in accumulation.layers:
            assert layer.weight.grad.count_nonzero() == 0
        y.backward(inputs=[model[0].weight])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert model[0].weight.grad.count_nonzero() > 0
    assert model[3].weight.grad.count_nonzero() == 0
    assert model[0]._accumulating is None, "outside of the with-block autograd has its way"


def in_one_step(model, x, change, dtype=None, forward=None):
    """The gradients of two passes with and without accumulation; `change` is made in the middle of the step."""
    gradients = []
    for accumulate in (True, False):
        m = copy.deepcopy(model)
        accumulation = gk.AccumulateIntoGrad(m)
        if accumulate:
            accumulation.begin_step()
        for number in range(2):
            with accumulation if accumulate else contextlib.nullcontext():
                y = (forward or nn.Module.__call__)(m, x)
                if number == 0:
                    change(m)
                y.square().sum().backward()
        if accumulate:
            accumulation.end_step()
        gradients.append([None if p.grad is None else p.grad.to_dense() for p in m.parameters()])
    return gradients


def forget(model):
    model[3].weight.grad = None


def replace(model):
    model[3].weight.grad = torch.ones_like(model[3].weight)


def replace_by_other_strides(model):
    weight = model[0].weight
    weight.grad = torch.ones(weight.shape, dtype=weight.dtype)
    assert weight.grad.stride() != weight.stride()


def replace_by_sparse(model):
    model[5].weight.grad = torch.ones_like(model[5].weight).to_sparse()


def freeze(model):
    model[3].weight.requires_grad_(False)


def assign(model):
    with torch.no_grad():
        model[3].weight = nn.Parameter(2 * model[3].weight)


def hook(model):
    model[3].weight.register_hook(lambda grad: 3 * grad)


def parametrise(model):
    nn.utils.parametrizations.weight_norm(model[5])


@pytest.mark.parametrize(
    "change",
    [forget, replace, replace_by_other_strides, replace_by_sparse, freeze, assign, hook, parametrise],
)
def test_a_weight_or_gradient_that_changes_within_the_step(model, x, change):
    model.zero_grad(set_to_none=False)
    for actual, expected in zip(*in_one_step(model, x, change), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_functional_call_uses_the_given_parameters(model, x):
    given = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}

    def forward(module, images):
        return torch.func.functional_call(module, given, (images,))

    in_one_step(model, x, lambda m: None, forward=forward)
    twice = [p.grad for p in given.values()]
    for p in given.values():
        p.grad = None
    forward(model, x).square().sum().backward()
    for actual, p in zip(twice, given.values(), strict=True):
        torch.testing.assert_close(actual, 4 * p.grad, rtol=1e-12, atol=1e-12)


def test_a_weight_shared_by_two_layers(x):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Flatten(), nn.Linear(384, 5)]
    model = gk.convert(nn.Sequential(*layers)).double()
    model[3].weight = model[1].weight
    twin = copy.deepcopy(model)
    accumulation = gk.AccumulateIntoGrad(model)
    for _ in range(2):
        model.zero_grad()
        twin.zero_grad()
        accumulation.begin_step()
        for actual, expected in zip(passes(model, x, accumulation), passes(twin, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        accumulation.end_step()


def test_a_replica_leaves_the_masters_gradient_to_autograd(model, x):
    """torch.nn.DataParallel's replicas have copies of the weights and of all other attributes."""
    layer = model[0]
    accumulation = gk.AccumulateIntoGrad(model)
    accumulation.begin_step()
    with accumulation:
        replica = layer._replicate_for_data_parallel()
        replica.weight, replica.bias = 1 * layer.weight, 1 * layer.bias
        copied, _ = replica._arguments(x)
        replica(x).square().sum().backward()
    assert copied[0] is replica.weight
    expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_a_model_whose_weights_move_between_steps(model, x):
    accumulation = gk.AccumulateIntoGrad(model)
    for dtype in (torch.double, torch.float, torch.double):
        model.to(dtype).zero_grad()
        accumulation.begin_step()
        gradients = passes(model, x.detach().to(dtype), accumulation)
        accumulation.end_step()
        model.zero_grad()
        for actual, expected in zip(gradients, passes(model, x.detach().to(dtype)), strict=True):
            assert actual.dtype == dtype
            torch.testing.assert_close(actual, expected)
    model.to("meta").zero_grad()
    accumulation.begin_step()
    assert all(layer.weight.grad.is_meta for layer in accumulation.layers)


def test_a_copy_of_a_weight_that_changed_since_is_not_computed_with(x):
    model = gk.convert(network())
    accumulation = gk.AccumulateIntoGrad(model, torch.bfloat16)
    accumulation.begin_step()
    with torch.no_grad():
        model[3].weight.mul_(2)
    with accumulation, torch.autocast("cpu", torch.bfloat16):
        y = model(x.detach().float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(y, model(x.detach().float()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("buffers", ["made", "kept"])
def test_layers_without_a_part_in_the_step_have_no_gradient(model, x, buffers):
    model.spare = gk.SlimLinear(4, 4).double()
    accumulation = gk.AccumulateIntoGrad(model)
    if buffers == "kept":
        accumulation.begin_step()
        with accumulation:
            (nn.Sequential.forward(model[:6], x).sum() + model.spare(x.new_ones(2, 4)).sum()).backward()
        accumulation.end_step()
        assert model.spare.weight.grad.count_nonzero() == 16
    for _ in range(2):
        model.zero_grad()
        accumulation.begin_step()
        with accumulation:
            model.spare(x.new_ones(2, 4))  # called, but without a part in the loss
            model[:6](x).square().sum().backward()
        accumulation.end_step()
        assert model.spare.weight.grad is None
        assert model[0].weight.grad.count_nonzero() > 0
    accumulation.begin_step()
    with accumulation:
        model.spare(x.new_ones(2, 4)).sum().backward()
    accumulation.end_step()
    assert torch.equal(model.spare.weight.grad, 2 * torch.ones_like(model.spare.weight))


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


@pytest.mark.skipif("gradaug_kernels._autograd" not in sys.modules, reason="only native code can tell")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_weight_whose_node_has_a_prehook_is_left_to_autograd(x, recompute):
    model = bottlenecks(recompute)
    expected = passes(copy.deepcopy(model), x)
    nodes = [torch.autograd.graph.get_gradient_edge(layer.weight).node for layer in (model[0], model[3], model[6])]
    for node in nodes:
        node.register_prehook(lambda grads: tuple(3 * grad for grad in grads))
    accumulation = gk.AccumulateIntoGrad(model)
    accumulation.begin_step()
    gradients = passes(model, x, accumulation)
    for (name, _), actual, reference in zip(model.named_parameters(), gradients, expected, strict=True):
        tripled = 3 if name in ("0.weight", "3.weight", "6.weight") else 1
        torch.testing.assert_close(actual, tripled * reference, rtol=1e-12, atol=1e-12, msg=name)


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
