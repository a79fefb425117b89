"""A step is taken as a whole or not at all: bad pixels, bad targets, bad gradients, exceptions."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradaug_kernels as gk
from gradaug_kernels.gradaug.finite import any_non_finite

NAN, INF = float("nan"), float("inf")


def network(widths=(0.5, 1.0)):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU()]
    return gk.convert(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)), widths=widths)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "fused adam": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
}


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)


def state(model, optimizer):
    found = {name: value.clone() for name, value in model.state_dict().items()}
    for i, kept in enumerate(optimizer.state.values()):
        found |= {f"{i}.{name}": value.clone() for name, value in kept.items() if value is not None}
    return found


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def bad_pixel(images, targets):
    images = images.clone()
    images[1, 0, 2, 3] = NAN
    return images, targets


def bad_target(images, targets):
    probabilities = F.one_hot(targets, 4).float()
    probabilities[0, 1] = INF
    return images, probabilities


def huge_images(images, targets):
    return 1e30 * images, targets  # squares overflow in the statistics


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("spoil", [bad_pixel, bad_target, huge_images])
@pytest.mark.parametrize("before", [0, 2])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(optimizer, spoil, before):
    model = network()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step = gk.GradAug(model, optimizer, num_subnets=2, min_width=0.5, scheduler=scheduler)
    for i in range(before):
        assert not step(*batch(i)).skipped
    kept = state(model, optimizer)
    losses = step(*spoil(*batch()))
    assert_equal(state(model, optimizer), kept)
    assert losses.skipped.dtype == torch.bool
    assert losses.skipped
    assert step.skipped == 1
    assert scheduler.last_epoch == before + 1, "schedules count iterations"
    if before == 0:
        with gk.use_width(model.eval(), 0.5), pytest.raises(RuntimeError, match=r"needs the statistics of width 0\.5"):
            model(batch()[0])
        model.train()
    assert not step(*batch()).skipped
    assert step.skipped == 1
    assert all(value.isfinite().all() for value in state(model, optimizer).values())


def test_the_skipped_step_leaves_no_trace_in_later_ones():
    states = []
    for spoiled in (False, True):
        model = network()
        optimizer = OPTIMIZERS["fused adam"](model.parameters())
        step = gk.GradAug(model, optimizer, num_subnets=1, min_width=0.5)
        draws = [step.draw() for _ in range(3)]
        step(*batch(1), draws[0])
        if spoiled:
            step(*bad_pixel(*batch(2)), draws[1])
        step(*batch(3), draws[2])
        states.append(state(model, optimizer))
    assert_equal(*states)


@pytest.mark.parametrize("accumulate", [True, False])
def test_a_nan_in_a_subnets_pass_alone(accumulate):
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    transforms = (lambda images: images * images.new_full((1,), NAN),)
    step = gk.GradAug(model, optimizer, num_subnets=2, transforms=transforms, min_width=0.5, accumulate=accumulate)
    kept = state(model, optimizer)
    losses = step(*batch())
    assert losses.full.isfinite()
    assert losses.skipped
    assert_equal(state(model, optimizer), kept)


class FiniteAhead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * NAN


def test_a_gradient_that_is_not_finite_beside_finite_losses():
    def criterion(z, y):
        return F.cross_entropy(FiniteAhead.apply(z), y)

    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    kept = state(model, optimizer)
    losses = gk.GradAug(model, optimizer, num_subnets=1, criterion=criterion)(*batch())
    assert all(loss.isfinite() for loss in (losses.full, *losses.subnets))
    assert losses.skipped
    assert_equal(state(model, optimizer), kept)
    step = gk.GradAug(model, optimizer, num_subnets=1, criterion=criterion, on_nonfinite="raise")
    with pytest.raises(
        FloatingPointError, match=r"gradient must be finite, got one of '0.weight' that is not; the step"
    ):
        step(*batch())


def test_a_bfloat16_overflow():
    model = network()
    with torch.no_grad():
        model[8].weight.fill_(3e38)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    kept = state(model, optimizer)
    assert gk.GradAug(model, optimizer, num_subnets=1, autocast_dtype=torch.bfloat16)(*batch()).skipped
    assert_equal(state(model, optimizer), kept)


@pytest.mark.parametrize(("where", "name"), [("full", "the full network"), ("subnet", "sub-network 1")])
def test_raising_names_the_loss(where, name):
    model = network()
    optimizer = OPTIMIZERS["fused sgd"](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    transforms = (lambda images: images * NAN,) if where == "subnet" else ()
    options = {"num_subnets": 2, "transforms": transforms, "scheduler": scheduler, "on_nonfinite": "raise"}
    step = gk.GradAug(model, optimizer, **options)
    kept = state(model, optimizer)
    with pytest.raises(
        FloatingPointError, match=f"loss must be finite, got nan as the loss of {name}; the step was not"
    ):
        step(*(bad_pixel(*batch()) if where == "full" else batch()))
    assert_equal(state(model, optimizer), kept)
    assert scheduler.last_epoch == 0
    with pytest.raises(ValueError, match="on_nonfinite must be 'skip' or 'raise', got 'warn'"):
        gk.GradAug(model, optimizer, on_nonfinite="warn")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["criterion", "subnet_loss", "transform"])
def test_an_exception_in_the_middle_of_a_step(error, at):
    def fail(*_):
        raise error("in the middle")

    model = network()
    model[4].eval()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    options = {"transforms": (fail,)} if at == "transform" else {at: fail}
    step = gk.GradAug(model, optimizer, num_subnets=2, min_width=0.5, sampler=gk.RandomLayerWidth(0.5), **options)
    kept = state(model, optimizer)
    with pytest.raises(error, match="in the middle"):
        step(*batch())
    assert_equal(state(model, optimizer), kept)
    assert all(p.grad is None for p in model.parameters())
    assert all(layer._accumulating is None for layer in step.accumulation.layers)
    assert model(batch()[0]).shape == (4, 4), "the full network"
    assert model[4]._substitute is None
    assert not gk.GradAug(model, optimizer, num_subnets=1)(*batch()).skipped


def test_what_is_finite():
    assert not any_non_finite([torch.full((9,), 3e38), torch.zeros(0)], torch.device("cpu")), "only the sum overflows"
    assert not any_non_finite([torch.full((9,), 6e4, dtype=torch.float16)], torch.device("cpu"))
    for value in (NAN, INF, -INF):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            spoiled = torch.ones(3, 5, dtype=dtype)
            spoiled[2, 1] = value
            for tensor in (spoiled, spoiled.to_sparse(), spoiled.T):
                assert any_non_finite([torch.ones(2), tensor], torch.device("cpu"))
    balanced = torch.tensor([INF, -INF])
    assert any_non_finite([balanced], torch.device("cpu"))


def test_an_optimizer_that_makes_its_state_later_is_not_asked_to_skip():
    """Fused SGD would make momentum buffers, not fill them, and count them as filled in the next step."""
    model = network()
    optimizer = OPTIMIZERS["fused sgd"](model.parameters())
    twin = copy.deepcopy(model)
    expected = OPTIMIZERS["sgd"](twin.parameters())
    first, second = (gk.GradAug(m, o, num_subnets=1, seed=2) for m, o in ((model, optimizer), (twin, expected)))
    draws = first.draw()
    first(*bad_pixel(*batch()), draws)
    for seed in range(3):
        first(*batch(seed), draws)
        second(*batch(seed), draws)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
