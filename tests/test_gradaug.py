"""The training step: equal to an independent plain-PyTorch one, drawn from one generator, and resumable."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import gradaug_kernels as gk
from benchmarks.eager import eager_slimmable, eager_step, set_eager_width


def small_resnet(block=torchvision.models.resnet.BasicBlock):
    torch.manual_seed(0)
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return model.double()


def small_bottlenecks():
    return small_resnet(torchvision.models.resnet.Bottleneck)


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def linear_step(**options):
    """Of a model that is not called."""
    model = gk.convert(nn.Linear(2, 2))
    return gk.GradAug(model, sgd(model), **options)


def batches(n, size=16):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        images = torch.randn(6, 3, size, size, generator=generator, dtype=torch.double)
        yield images, torch.randint(10, (6,), generator=generator)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("network", "lr", "accumulate", "recompute"),
    [
        (small_resnet, 0.05, True, False),
        (small_resnet, 0.05, False, False),
        # Ten steps of the larger rate amplify float64's rounding beyond 1e-9 in this deeper network, chains or not.
        (small_bottlenecks, 0.005, True, False),
        (small_bottlenecks, 0.005, True, True),
        (small_bottlenecks, 0.005, False, True),
    ],
)
def test_ten_steps_equal_plain_pytorch(network, lr, accumulate, recompute):
    """The network-level test: losses and weights of ten published steps, float64, relative error under 1e-9."""
    model = network()
    oracle = eager_slimmable(model)
    oracle_optimizer = sgd(oracle, lr)
    gk.convert(model, recompute=recompute)
    step = gk.GradAug(model, sgd(model, lr), min_width=0.8, resolutions=(16, 14, 12), accumulate=accumulate)
    seen = set()
    for images, targets in batches(10):
        losses = step(images, targets)
        expected = eager_step(
            oracle, oracle_optimizer, images, targets, [(draw.width, draw.resolution) for draw in losses.draws]
        )
        seen |= {draw.resolution for draw in losses.draws}
        for actual, reference in zip((losses.full, *losses.subnets), expected, strict=True):
            assert abs(actual - reference) <= 1e-9 * abs(reference)
    assert seen == {16, 14, 12}
    state = model.state_dict()
    for name, value in oracle.state_dict().items():
        assert relative_error(state[name].double(), value.double()) < 1e-9, name


def test_draws_are_the_published_distribution():
    step = linear_step(num_subnets=3, min_width=0.9, resolutions=(224, 192, 160, 128))
    draws = [step.draw() for _ in range(400)]
    for widths in ([draw.width for draw in drawn] for drawn in draws):
        assert widths == sorted(widths, reverse=True)
        assert widths[-1] == 0.9
        assert all(0.9 < width < 1 for width in widths[:-1])
    free = torch.tensor([draw.width for drawn in draws for draw in drawn[:-1]])
    assert abs(free.mean() - 0.95) < 0.003  # 4 standard deviations of the mean of 800 uniform draws
    counts = {r: sum(draw.resolution == r for drawn in draws for draw in drawn) for r in step.resolutions}
    assert all(240 <= count <= 360 for count in counts.values()), counts  # 300 expected, 4 standard deviations


def test_draws_depend_on_the_seed_alone_and_resume():
    def make(seed):
        return linear_step(resolutions=(8, 6), seed=seed)

    first, second, other = make(3), make(3), make(4)
    torch.manual_seed(1)
    drawn = [first.draw() for _ in range(4)]
    torch.manual_seed(2)
    assert [second.draw() for _ in range(4)] == drawn
    assert [other.draw() for _ in range(4)] != drawn
    state = first.state_dict()
    expected = [first.draw() for _ in range(3)]
    other.load_state_dict(state)
    assert [other.draw() for _ in range(3)] == expected


def add_noise(images):
    return images + torch.randn_like(images)


def flip(images):
    return images.flip(-1)


def test_a_step_can_be_replayed():
    model = gk.convert(small_resnet())
    twin = copy.deepcopy(model)
    options = dict(resolutions=(16, 12), transforms=(add_noise, flip))
    images, targets = next(batches(1))
    torch.manual_seed(5)
    losses = gk.GradAug(model, sgd(model), seed=1, **options)(images, targets)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    replayed = gk.GradAug(twin, sgd(twin), seed=2, **options)(images, targets, draws=losses.draws)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert replayed.draws == losses.draws
    assert torch.equal(torch.stack(replayed.subnets), torch.stack(losses.subnets))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_transforms_reach_the_subnets_only():
    seen = []

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = gk.SlimLinear(3, 4)

        def forward(self, x):
            seen.append(x)
            return self.layer(x.mean((2, 3)))

    model = Recorder()
    images = torch.randn(2, 3, 8, 8)
    step = gk.GradAug(model, sgd(model), num_subnets=2, transforms=(flip,), resolutions=(8,))
    losses = step(images, torch.tensor([0, 1]))
    assert [draw.transform for draw in losses.draws] == [0, 0]
    assert torch.equal(seen[0], images)
    assert torch.equal(seen[1], images.flip(-1))
    assert torch.equal(seen[2], images.flip(-1))


def test_mean_reduction_scales_the_gradient():
    model = gk.convert(small_resnet())
    twin = copy.deepcopy(model)
    images, targets = next(batches(1))
    options = dict(num_subnets=3, resolutions=(16, 12))
    summed = gk.GradAug(model, torch.optim.SGD(model.parameters(), 0.1 / 4), **options)(images, targets)
    averaged = gk.GradAug(twin, torch.optim.SGD(twin.parameters(), 0.1), reduction="mean", **options)(images, targets)
    assert torch.equal(summed.full, averaged.full)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "subnet_loss"),
    [
        ({"temperature": 2.5}, lambda t, z, y: 2.5**2 * F.cross_entropy(z / 2.5, t(2.5))),
        ({"subnet_loss": "cross_entropy"}, lambda t, z, y: F.nll_loss(z.log_softmax(1), y)),
        ({"subnet_weight": (0.5, 2.0)}, lambda t, z, y: F.cross_entropy(z, t(1))),
        ({"subnet_weight": 0.25, "reduction": "mean"}, lambda t, z, y: F.cross_entropy(z, t(1))),
        (
            {"subnet_loss": lambda p, z: gk.alpha_divergence(p, z, alphas=(2.0,), clip=1e9)},
            lambda t, z, y: (t(1) ** 2 / z.softmax(1)).sum(1).mean() / 2,
        ),
    ],
    ids=["temperature", "hard labels", "weights", "mean", "alpha"],
)
def test_the_gradient_is_the_sum_of_the_losses(options, subnet_loss):
    """Against one backward pass through the weighted sum of all losses, in plain PyTorch."""
    model = small_resnet()
    oracle = eager_slimmable(model)
    gk.convert(model)
    images, targets = next(batches(1))
    step = gk.GradAug(model, torch.optim.SGD(model.parameters(), 1.0), num_subnets=2, min_width=0.7, **options)
    before = [p.detach().clone() for p in model.parameters()]
    draws = step(images, targets).draws
    z = oracle(images)

    def teacher(temperature):
        return F.softmax(z.detach() / temperature, 1)

    scale = 1 / 3 if options.get("reduction") == "mean" else 1.0
    weights = options.get("subnet_weight", 1.0)
    weights = weights if isinstance(weights, tuple) else (weights, weights)
    loss = F.cross_entropy(z, targets)
    for draw, weight in zip(draws, weights, strict=True):
        set_eager_width(oracle, draw.width)
        loss = loss + weight * subnet_loss(teacher, oracle(images), targets)
    (scale * loss).backward()
    for p, old, q in zip(model.parameters(), before, oracle.parameters(), strict=True):
        assert (old - p - q.grad).norm() <= 1e-8 * q.grad.norm() + 1e-12


def test_distinct_transforms():
    transforms = [lambda x: x, lambda x: -x, lambda x: 2 * x, lambda x: x + 1]
    step = linear_step(num_subnets=3, transforms=transforms, distinct_transforms=True)
    draws = [[draw.transform for draw in step.draw()] for _ in range(50)]
    assert all(len(set(drawn)) == 3 for drawn in draws)
    assert all({drawn[i] for drawn in draws} == {0, 1, 2, 3} for i in range(3))


def test_no_subnets_is_plain_training():
    """For a model without adjustable layers too."""
    model = small_resnet()
    twin = copy.deepcopy(model)
    optimizer = sgd(twin)
    schedulers = []
    step = None
    for images, targets in batches(2):
        if step is None:
            inner = sgd(model)
            schedulers.append(torch.optim.lr_scheduler.StepLR(inner, 1, 0.5))
            step = gk.GradAug(model, inner, num_subnets=0, scheduler=schedulers[0])
            schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
        losses = step(images, targets)
        optimizer.zero_grad()
        loss = F.cross_entropy(twin(images), targets)
        loss.backward()
        optimizer.step()
        schedulers[1].step()
        assert losses.subnets == ()
        assert torch.equal(losses.full, loss.detach())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_soft_targets_and_autocast():
    model = gk.convert(small_resnet().float())
    step = gk.GradAug(model, sgd(model), autocast_dtype=torch.bfloat16)
    images, targets = next(batches(1))
    losses = step(images.float(), F.one_hot(targets, 10).float())
    assert losses.logits.dtype == torch.bfloat16
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in (losses.full, *losses.subnets))


def test_kl_divergence_has_the_gradient_of_soft_cross_entropy():
    logits = torch.randn(5, 7, dtype=torch.double, requires_grad=True)
    teacher = torch.softmax(torch.randn(5, 7, dtype=torch.double), 1)
    (kl,) = torch.autograd.grad(gk.kl_divergence(teacher, logits), logits)
    (ce,) = torch.autograd.grad(F.cross_entropy(logits, teacher), logits)
    torch.testing.assert_close(kl, ce)
    assert gk.kl_divergence(torch.softmax(logits, 1), logits).abs() < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_subnets": -1}, "num_subnets must be at least 0, got -1"),
        ({"min_width": 0.0}, r"width must be in \(0, 1\], got 0"),
        ({"resolutions": ()}, r"resolutions must be positive numbers of pixels, got \(\)"),
        ({"reduction": "average"}, "reduction must be 'sum' or 'mean', got 'average'"),
        ({"subnet_loss": "l2"}, "subnet_loss must be callable or 'cross_entropy', got 'l2'"),
        ({"temperature": 0}, "temperature must be positive, .* got 0"),
        ({"temperature": 2, "subnet_loss": "cross_entropy"}, "and 1 for subnet_loss 'cross_entropy', got 2"),
        ({"subnet_weight": (1, 2)}, r"subnet_weight must be one or 3 numbers of at least 0, got \(1, 2\)"),
        ({"distinct_transforms": True, "transforms": (flip,)}, "transforms must be at least 3 to be distinct, got 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        linear_step(**options)


def test_bad_images_and_models():
    with pytest.raises(ValueError, match="layers of adjustable width, got Linear without any"):
        gk.GradAug(plain := nn.Linear(2, 2), sgd(plain))
    model = gk.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 6, 2)))
    step = gk.GradAug(model, sgd(model), resolutions=(2, 3))
    with pytest.raises(TypeError, match=r"images must be floating point \(normalised\), got torch.uint8"):
        step(torch.zeros(2, 3, 2, 3, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="images must be square to be resized, got 2 x 3 pixels"):
        step(torch.zeros(2, 3, 2, 3), torch.tensor([0, 1]))
