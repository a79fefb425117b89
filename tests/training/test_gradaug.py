"""The training step: equal to an independent plain-PyTorch one, drawn from one generator, and resumable."""

import copy
import threading
import time

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import gradaug_kernels as gk
from benchmarks.eager import eager_slimmable, eager_step, set_eager_width
from gradaug_kernels.models import CifarResNet


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


@pytest.mark.parametrize("of", ["the full network", "a sub-network"])
@pytest.mark.parametrize("sampler", [gk.RandomWidth, lambda a: gk.RandomChannels(gk.RandomWidth(a))])
def test_a_copy_made_inside_a_step_is_a_model_outside_of_one(of, sampler):
    copies = []

    def criterion(z, y):
        copies.append(copy.deepcopy(model))
        return F.cross_entropy(z, y)

    def subnet_loss(t, z):
        copies.append(copy.deepcopy(model))
        return gk.kl_divergence(t, z)

    model = gk.convert(small_bottlenecks())
    model.layer1[0].bn1.eval()
    images, targets = next(batches(1))
    options = {"criterion": criterion} if of == "the full network" else {"subnet_loss": subnet_loss}
    gk.GradAug(model, sgd(model), num_subnets=1, sampler=sampler(0.5), **options)(images, targets)
    made = gk.set_width(copies[0], 1.0) or copies[0]
    assert all(layer._accumulating is None for layer in made.modules() if hasattr(layer, "_accumulating"))
    assert made.bn1.track_running_stats
    counted = made.bn1.num_batches_tracked.item()
    made(images)
    assert made.bn1.num_batches_tracked == counted + 1
    with gk.use_width(made.eval(), 0.77), pytest.raises(RuntimeError, match=r"needs the statistics of width 0\.77"):
        made(images)
    with gk.use_width(model.eval(), 0.77), pytest.raises(RuntimeError, match=r"needs the statistics of width 0\.77"):
        model(images)


def test_steps_in_two_threads_draw_their_own_noise():
    def train(model, barrier=None):
        step = gk.GradAug(model, sgd(model), num_subnets=2, transforms=(noise,))
        for images, targets in batches(3):
            if barrier is not None:
                barrier.wait()
            step(images, targets)

    def noise(images):
        first = torch.randn_like(images)
        time.sleep(0.01)  # another thread would draw in between
        return images + first + torch.randn_like(images)

    models = [gk.convert(small_resnet()) for _ in range(2)]
    expected = copy.deepcopy(models[0])
    train(expected)
    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=train, args=(model, barrier)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
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
        ({"num_subnets": 1.5}, r"num_subnets must be an integer, got 1\.5"),
        ({"num_subnets": "2"}, "num_subnets must be an integer, got '2'"),
        ({"resolutions": 12}, "resolutions must be positive numbers of pixels, got 12"),
        ({"resolutions": (8.5,)}, r"resolutions must be positive numbers of pixels, got \(8\.5,\)"),
        ({"seed": 1.5}, r"seed must be an integer, got 1\.5"),
        ({"criterion": None}, "criterion must be callable, got None"),
        ({"transforms": 5}, "transforms must be a sequence of callables, got 5"),
        ({"transforms": flip}, "transforms must be a sequence of callables, got <function flip"),
        ({"transforms": (flip, 5)}, r"transforms must be a sequence of callables, got \(<function flip.*, 5\)"),
        ({"scheduler": 5}, "scheduler must step without a metric, got int"),
        ({"sampler": 0.5}, r"sampler must have bind, draw and select, got 0\.5"),
        ({"autocast_dtype": "bf16"}, r"autocast_dtype must be None, torch\.bfloat16 or torch\.float16, got 'bf16'"),
        ({"autocast_dtype": torch.float64}, r"autocast_dtype must be None, .* or torch\.float16, got torch\.float64"),
        ({"temperature": float("inf")}, "temperature must be positive, finite, .* got inf"),
        ({"temperature": "2"}, "temperature must be positive, finite, .* got '2'"),
        ({"subnet_weight": float("nan")}, "subnet_weight must be one or 3 finite numbers of at least 0, got nan"),
        ({"subnet_weight": (1, 1, float("inf"))}, r"one or 3 finite numbers of at least 0, got \(1, 1, inf\)"),
        ({"subnet_weight": "1"}, "one or 3 finite numbers of at least 0, got '1'"),
        ({"temperature": 0}, "temperature must be positive, .* got 0"),
        ({"temperature": 2, "subnet_loss": "cross_entropy"}, "and 1 for subnet_loss 'cross_entropy', got 2"),
        ({"subnet_weight": (1, 2)}, r"subnet_weight must be one or 3 finite numbers of at least 0, got \(1, 2\)"),
        ({"distinct_transforms": True, "transforms": (flip,)}, "transforms must be at least 3 to be distinct, got 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        linear_step(**options)


def test_bad_images_and_models():
    with pytest.raises(ValueError, match="layers of adjustable width, got Linear without any"):
        gk.GradAug(plain := nn.Linear(2, 2), sgd(plain))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got None"):
        gk.GradAug(None, sgd(plain))
    with pytest.raises(TypeError, match="optimizer must step without a closure, got int"):
        gk.GradAug(plain, 5)
    layers = (nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 6, 2))
    model = gk.convert(nn.Sequential(*layers), example=(2, 3, 2, 3))
    step = gk.GradAug(model, sgd(model), resolutions=(2, 3))
    with pytest.raises(TypeError, match=r"images must be floating point \(normalised\), got torch.uint8"):
        step(torch.zeros(2, 3, 2, 3, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="images must be square to be resized, got 2 x 3 pixels"):
        step(torch.zeros(2, 3, 2, 3), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="images must be a tensor, got list"):
        step([0.0], torch.tensor([0, 1]))
    with torch.inference_mode():
        images, targets = torch.zeros(2, 3, 2, 2), torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"images must be made outside of torch\.inference_mode, got an inference"):
        step(images, targets)
    with pytest.raises(TypeError, match=r"targets must be made outside of torch\.inference_mode, got an inference"):
        step(images.clone(), targets)


# ---- what is refused when the step is called


def refused_step(error, message, call=None, **options):
    """A step that is refused leaves model and optimizer as they were. Returns it."""
    model = gk.convert(small_resnet())
    optimizer = sgd(model)
    before = copy.deepcopy(model.state_dict())
    step = gk.GradAug(model, optimizer, **{"num_subnets": 2, "min_width": 0.5, **options})
    with pytest.raises(error, match=message):
        (call or (lambda step, batch: step(*batch)))(step, next(batches(1)))
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key
    assert not optimizer.state
    return step


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients(context):
    def call(step, batch):
        with context():
            step(*batch)

    refused_step(RuntimeError, r"a step must be taken with gradients enabled, got torch\.no_grad or", call)


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        ([0.7, 0.5], r"draws must be SubnetDraws of an earlier step, got \[0\.7, 0\.5\]"),
        ([gk.SubnetDraw(0.5, None, None, 0)], "draws must be 2, one for each sub-network, got 1"),
        (2 * [gk.SubnetDraw(0.5, None, 1, 0)], "draws must name one of 1 transforms, got number 1"),
    ],
)
def test_draws_of_another_step(draws, message):
    call = lambda step, batch: step(*batch, draws=draws)  # noqa: E731
    refused_step((TypeError, ValueError), message, call, transforms=(flip,))


@pytest.mark.parametrize("of", ["criterion", "subnet_loss"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda z: z.square().mean(1), r"{} must return a scalar, got shape \(6,\); reduce it over the batch"),
        (lambda z: float(z.detach().sum()), "{} must return a scalar tensor, got float"),
        (lambda z: z.detach().sum(), "{} must return a scalar with a gradient, got one without"),
    ],
    ids=["not reduced", "number", "detached"],
)
def test_losses_without_a_backward_pass(of, spoil, message):
    loss = (lambda z, y: spoil(z)) if of == "criterion" else (lambda t, z: spoil(z))
    refused_step((TypeError, ValueError), message.format(of), **{of: loss})


class InPlace(nn.Module):
    """Normalises its images, in place or not, from the second call on."""

    def __init__(self, late):
        super().__init__()
        self.net, self.calls = small_resnet(), -late

    def forward(self, x):
        self.calls += 1
        return self.net(x.sub_(0.5) if self.calls > 0 else x - 0.5)


@pytest.mark.parametrize("late", [0, 1])
def test_a_model_that_changes_its_images(late):
    model = gk.convert(InPlace(100))
    model.calls = -late
    step = gk.GradAug(model, sgd(model), num_subnets=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="model must leave its images as they are, got them changed in place"):
        step(*next(batches(1)))
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key


def test_transforms_and_losses_that_change_what_later_passes_read():
    refused_step(ValueError, "transforms must leave the batch's images as they are, got", transforms=(torch.relu_,))

    def spoil_teacher(t, z):
        return gk.kl_divergence(t.clamp_(min=0.2), z)

    refused_step(ValueError, "subnet_loss must leave the teacher's probabilities as", subnet_loss=spoil_teacher)

    def smooth(z, y):
        return F.cross_entropy(z, y.mul_(0.9))

    def call(step, batch):
        step(batch[0], F.one_hot(batch[1], 10).double())

    refused_step(ValueError, "criterion must leave its targets as", call, criterion=smooth, subnet_loss="cross_entropy")


def test_a_criterion_with_a_margin_in_place():
    """The teacher's logits, and those returned, are the model's."""

    def margin(z, y):
        z[torch.arange(len(y)), y] -= 2.0
        return F.cross_entropy(z, y)

    model = gk.convert(small_resnet())
    twin = copy.deepcopy(model)
    images, targets = next(batches(1))
    losses = gk.GradAug(model, sgd(model), criterion=margin)(images, targets)
    expected = gk.GradAug(twin, sgd(twin), criterion=lambda z, y: margin(z.clone(), y))(images, targets)
    assert torch.equal(losses.logits, expected.logits)
    assert torch.equal(torch.stack(losses.subnets), torch.stack(expected.subnets))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


# ---- what is trained


def test_a_layer_that_was_replaced_and_given_to_the_optimizer():
    model = gk.convert(small_resnet())
    optimizer = sgd(model)
    step = gk.GradAug(model, optimizer, num_subnets=1)
    batch = next(batches(1))
    step(*batch)
    model.fc.weight = nn.Parameter(model.fc.weight.detach().clone())
    before = model.fc.weight.detach().clone()
    optimizer.add_param_group({"params": [model.fc.weight]})
    step(*batch)
    assert not torch.equal(model.fc.weight, before)


def test_parameters_that_were_replaced_are_noticed():
    model = gk.convert(small_resnet())
    optimizer = sgd(model)
    step = gk.GradAug(model, optimizer, num_subnets=1)
    batch = next(batches(1))
    step(*batch)
    model.fc.weight = nn.Parameter(model.fc.weight.detach().clone())
    with pytest.raises(ValueError, match="optimizer must hold the model's parameters, got 1 that the model has no"):
        step(*batch)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(ValueError, match=r"that the model has no longer; make it after .* load_state_dict\(assign"):
        step(*batch)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.state.clear()
    before = model.fc.weight.detach().clone()
    step(*batch)
    assert not torch.equal(model.fc.weight, before)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"optimizer must hold parameters that require gradients, got \d+ frozen ones"):
        step(*batch)


@pytest.mark.parametrize("options", [{"num_subnets": 0}, {"sampler": "depth"}], ids=["no subnets", "depth"])
def test_a_width_set_before_is_not_trained(options):
    states = []
    for width in (1.0, 0.5):
        torch.manual_seed(0)
        model = gk.convert(CifarResNet(8, base_width=4)).double()
        sampler = gk.RandomDepth(0.5) if "sampler" in options else None
        step = gk.GradAug(model, sgd(model), **{**options, "sampler": sampler})
        gk.set_width(model, width)
        step(*next(batches(1)))
        states.append(model.state_dict())
        assert all(module._slim_width == 1 for module in model.modules() if hasattr(module, "_slim_width"))
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


# ---- what has part in a step


class Branches(nn.Module):
    """A layer in some steps only, one never, and a frozen one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.sometimes = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.never = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 10)
        self.calls_all = True

    def forward(self, x):
        h = self.frozen(self.stem(x))
        if self.calls_all:
            h = h + self.sometimes(h)
        return self.head(h.mean((2, 3)))


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_both_ways_to_gather_gradients_train_the_same_network(autocast_dtype):
    """Weight decay and momentum move the weights that had part in a step, and no others."""
    models = [gk.convert(Branches()) for _ in range(2)]
    options = dict(num_subnets=2, min_width=0.6, autocast_dtype=autocast_dtype)
    steps = []
    for model, accumulate in zip(models, (True, False), strict=True):
        model.to(torch.double if autocast_dtype is None else torch.float)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
        steps.append(gk.GradAug(model, optimizer, accumulate=accumulate, **options))
    before = copy.deepcopy(models[0])
    close = dict(rtol=1e-10, atol=1e-13) if autocast_dtype is None else dict(rtol=0.05, atol=2e-3)
    had_gradients = []
    for number, (images, targets) in enumerate(batches(10)):
        for step in steps:
            step.model.calls_all = number % 3 == 0
            step(images.to(step.model.head.weight.dtype), targets)
        (names, others) = ([n for n, p in m.named_parameters() if p.grad is not None] for m in models)
        assert names == others
        had_gradients.append("sometimes.0.weight" in names)
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, **close, msg=name)
    assert had_gradients == [number % 3 == 0 for number in range(10)]
    for name, p in models[0].named_parameters():
        assert torch.equal(p, before.get_parameter(name)) == name.startswith(("never", "frozen")), name


def test_random_depth_with_and_without_accumulation():
    states = []
    for accumulate in (True, False):
        torch.manual_seed(0)
        model = gk.convert(CifarResNet(14, base_width=4)).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
        step = gk.GradAug(model, optimizer, num_subnets=2, sampler=gk.RandomDepth(0.3), accumulate=accumulate)
        for images, targets in batches(10):
            step(images, targets)
        states.append(model.state_dict())
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-9, atol=1e-12, msg=name)


# ---- what a model may be and do


def dense_model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1)]
    return gk.convert(nn.Sequential(*layers)).double()


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"subnet_loss": gk.alpha_divergence}])
def test_dense_logits(options):
    """The loss of the sub-networks is that of all pixels as so many images."""
    model = dense_model()
    images = torch.randn(2, 3, 6, 4, dtype=torch.double)
    targets = torch.randint(5, (2, 6, 4))
    twin = copy.deepcopy(model)
    flat = dense_model()
    flat.register_forward_hook(lambda module, inputs, z: z.movedim(1, -1).flatten(0, 2))  # [N H W, classes]
    flat.load_state_dict(twin.state_dict())
    losses = []
    for network, y in ((model, targets), (flat, targets.flatten())):
        step = gk.GradAug(network, torch.optim.SGD(network.parameters(), 0.1), num_subnets=2, **options)
        losses.append(step(images, y))
    torch.testing.assert_close(losses[0].subnets, losses[1].subnets, rtol=1e-12, atol=1e-15)
    assert losses[0].logits.shape == (2, 5, 6, 4)
    for p, q in zip(model.parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    ("wrap", "name"), [(lambda z: {"logits": z}, "dict"), (lambda z: (z, z), "tuple"), (lambda z: [z], "list")]
)
def test_a_model_must_return_a_tensor(wrap, name):
    model = gk.convert(small_resnet())
    before = copy.deepcopy(model.state_dict())
    step = gk.GradAug(model, sgd(model), num_subnets=1)
    handle = model.register_forward_hook(lambda module, inputs, output: wrap(output))
    with pytest.raises(TypeError, match=rf"model must return logits \[N, classes, ...\] as a tensor, got {name}"):
        step(*next(batches(1)))
    handle.remove()
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key


def test_optimizers_and_schedulers_that_do_not_fit():
    model = gk.convert(nn.Linear(2, 2))
    optimizer, other = sgd(model), sgd(nn.Linear(2, 2))
    schedulers = torch.optim.lr_scheduler
    with pytest.raises(TypeError, match="scheduler must step without a metric, got ReduceLROnPlateau"):
        gk.GradAug(model, optimizer, scheduler=schedulers.ReduceLROnPlateau(optimizer))
    with pytest.raises(ValueError, match="scheduler must be one of the optimizer given, got one of another SGD"):
        gk.GradAug(model, optimizer, scheduler=schedulers.StepLR(other, 1))
    with pytest.raises(TypeError, match="optimizer must step without a closure, got LBFGS"):
        gk.GradAug(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="optimizer must hold parameters of the model, got 2 others"):
        gk.GradAug(model, other)
    with pytest.raises(TypeError, match=r"model must be in DistributedDataParallel to .* got a DataParallel"):
        gk.GradAug(nn.DataParallel(model), optimizer)
    parts = [schedulers.LinearLR(optimizer), schedulers.CosineAnnealingLR(optimizer, 4)]
    for scheduler in (schedulers.SequentialLR(optimizer, parts, [2]), schedulers.ChainedScheduler(parts)):
        gk.GradAug(model, optimizer, scheduler=scheduler)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_fire_in_every_pass(register):
    model = gk.convert(small_resnet())
    twin = copy.deepcopy(model)
    called = []
    for p in model.parameters():
        getattr(p, register)(lambda _: called.append(1))
    images, targets = next(batches(1))
    for network in (model, twin):
        gk.GradAug(network, sgd(network), num_subnets=2)(images, targets)
    assert len(called) == 3 * len(list(model.parameters()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_criterion_may_ask_for_gradients(recompute):
    """Of its logits with respect to the images, say: those of the weights are not added twice."""
    images, targets = next(batches(1))
    images.requires_grad_()
    asked = []

    def criterion(z, y):
        loss = F.cross_entropy(z, y)
        asked.append(torch.autograd.grad(loss, images, retain_graph=True)[0])
        return loss

    model = gk.convert(small_bottlenecks(), recompute=recompute)
    twin = copy.deepcopy(model)
    gk.GradAug(model, sgd(model), num_subnets=1, criterion=criterion)(images, targets)
    gk.GradAug(twin, sgd(twin), num_subnets=1)(images, targets)
    assert asked[0].shape == images.shape
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_inside_a_step(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, net, reentrant):
            super().__init__()
            self.net, self.reentrant = net, reentrant

        def forward(self, x):
            h = self.net[:2](x)
            if self.reentrant is None:
                return self.net[3:](self.net[2](h))
            return self.net[3:](torch.utils.checkpoint.checkpoint(self.net[2], h, use_reentrant=self.reentrant))

    results = []
    for choice in (None, reentrant):
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
        model = Checkpointed(gk.convert(nn.Sequential(*layers)).double(), choice)
        step = gk.GradAug(model, sgd(model), num_subnets=2)
        for images, targets in batches(2):
            step(images, targets)
        results.append(list(model.parameters()))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-14)


# ---- frozen batch norm


@pytest.mark.parametrize("frozen_norm", ["batch", "full"])
@pytest.mark.parametrize(
    "sampler", [gk.RandomWidth, gk.RandomLayerWidth, lambda a: gk.RandomChannels(gk.RandomWidth(a))]
)
def test_frozen_norms(frozen_norm, sampler):
    """Of the full network the frozen statistics, of sub-networks what was chosen; never updated."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    model = gk.convert(nn.Sequential(*layers)).double().requires_grad_(False)
    model[4].weight.requires_grad_()
    model[1].eval()
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    kept = copy.deepcopy(model.state_dict())
    images, targets = next(batches(1))
    step = gk.GradAug(
        model, torch.optim.SGD(model.parameters(), 0.0), num_subnets=1, sampler=sampler(0.5), frozen_norm=frozen_norm
    )
    losses = step(images, targets)
    for key, value in kept.items():
        assert torch.equal(model.state_dict()[key], value), key
    step.sampler.select(losses.draws[0].subnet)
    chosen = torch.arange(4) if model[1]._kept is None else model[1]._kept
    step.sampler.select(None)
    h = F.conv2d(images, model[0].weight, model[0].bias)
    norm = model[1]

    def logits(h, mean, var, channels):
        h = (h[:, channels] - mean[:, None, None]) / (var + norm.eps).sqrt()[:, None, None]
        return F.linear(h.mean((2, 3)), model[4].weight[:, channels], model[4].bias)

    z = logits(h, norm.running_mean, norm.running_var, slice(None))
    torch.testing.assert_close(losses.logits, z, rtol=1e-10, atol=1e-12)
    if frozen_norm == "batch":
        statistics = h.mean((0, 2, 3))[chosen], h.var((0, 2, 3), correction=0)[chosen]
    else:
        statistics = norm.running_mean[chosen], norm.running_var[chosen]
    expected = gk.kl_divergence(z.softmax(1), logits(h, *statistics, chosen))
    torch.testing.assert_close(losses.subnets[0], expected, rtol=1e-9, atol=1e-12)
    with gk.use_width(model, 0.5), pytest.raises(RuntimeError, match=r"in training norm.train\(\) takes the batch's"):
        model(images)


def test_a_frozen_norm_with_statistics_of_its_own_takes_those():
    model = gk.convert(small_resnet(), widths=(0.5, 1.0))
    images, targets = next(batches(1))
    gk.calibrate(model, [0.5], [images])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    losses = gk.GradAug(model, torch.optim.SGD(model.parameters(), 0.0), num_subnets=1, min_width=0.5)(images, targets)
    model.eval()
    with torch.no_grad():
        teacher = model(images).softmax(1)
        with gk.use_width(model, 0.5):
            torch.testing.assert_close(losses.subnets[0], gk.kl_divergence(teacher, model(images)))


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (torch.optim.SparseAdam, TypeError, "must take dense gradients, got SparseAdam"),
        (lambda p: torch.optim.SGD(p, 0.1, differentiable=True), ValueError, r"got SGD\(differentiable=True\)"),
    ],
    ids=["sparse", "differentiable"],
)
def test_an_optimizer_that_cannot_step_is_refused_at_once(build, error, sentence):
    model = gk.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)))
    with pytest.raises(error, match=sentence):
        gk.GradAug(model, build(list(model.parameters())), num_subnets=1, min_width=0.5)
