"""Samplers: what they draw, and that a selected sub-network is the smaller network."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import gradaug_kernels as gk
from gradaug_kernels.gradaug import sampler as sampler_module
from gradaug_kernels.models import CifarResNet, PyramidNet, WideResNet
from gradaug_kernels.slim.channel_classes import channel_classes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def statistics(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name or "num_" in name}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# ---- width


def test_listed_widths_are_drawn_without_replacement():
    sampler = gk.RandomWidth(0.25, (0.25, 0.5, 0.75, 0.9))
    draws = [sampler.draw(3, generator(seed)) for seed in range(60)]
    assert all(len(set(drawn)) == 3 and drawn[-1] == 0.25 and drawn == sorted(drawn, reverse=True) for drawn in draws)
    assert {width for drawn in draws for width in drawn[:2]} == {0.5, 0.75, 0.9}
    assert sampler.draw(4, generator()) == [0.9, 0.75, 0.5, 0.25]


def test_private_statistics_follow_their_width_alone():
    """Slimmable training: each listed width's statistics are those of its own passes."""
    torch.manual_seed(0)
    model = gk.convert(CifarResNet(8, base_width=8), widths=(0.5, 1.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    images = torch.randn(4, 3, 16, 16)
    step = gk.GradAug(model, optimizer, num_subnets=2, sampler=gk.RandomWidth(0.5))
    step(images, torch.arange(4))
    norm = model.bn1
    assert (norm.num_batches_tracked, norm.num_batches_tracked_0_5) == (1, 1)
    x = F.conv2d(images, model.conv1.weight, padding=1)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_mean_0_5[:4], norm.running_mean[:4])
    assert norm.running_mean_0_5[4:].abs().sum() == 0


@pytest.mark.parametrize("converted", [True, False])
def test_full_width_subnets_store_nothing(converted):
    """min_width 1 is transforms alone; so is random depth that keeps every block, also without conversion."""
    torch.manual_seed(0)
    model = CifarResNet(8, base_width=4)
    model = gk.convert(model) if converted else model
    plain = copy.deepcopy(model)
    sampler = gk.RandomWidth(1.0) if converted else gk.RandomDepth(1.0)
    step = gk.GradAug(model, torch.optim.SGD(model.parameters(), 0.1), sampler=sampler, transforms=(lambda x: -x,))
    images = torch.randn(4, 3, 16, 16)
    losses = step(images, torch.arange(4))
    plain(images)
    assert_equal(statistics(model), statistics(plain))
    assert len(losses.subnets) == 3
    model(images)
    assert model.bn1.num_batches_tracked == 2, "afterwards statistics are stored again"


# ---- width per layer


def test_classes_of_channels():
    model = gk.convert(CifarResNet(14))
    stream = ["conv1", "bn1"]
    for stage in (1, 2, 3):
        for block in (0, 1):
            stream += [f"layer{stage}.{block}.conv2", f"layer{stage}.{block}.bn2"]
    classes = [found.layers for found in channel_classes(model)]
    assert classes[0] == stream, "padding and strided slices keep channels: the shortcuts are one class"
    assert sorted(map(len, classes[1:])) == [1, *[2] * 6]
    squeeze = [c for c in channel_classes(gk.convert(torchvision.models.mobilenet_v3_small())) if len(c.layers) > 1]
    assert any(name.endswith("fc2") for name in squeeze[0].layers), "a gate shares the channels that it multiplies"


def test_readers_and_units_of_classes():
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(72, 2))
    classes = channel_classes(gk.convert(nn.Sequential(*layers)))
    assert classes == [(["0", "1", "2"], {"2": 1, "4": 9}, 4), (["4"], {}, 1)]
    stream = channel_classes(gk.convert(CifarResNet(8)))[0]
    assert set(stream.readers) == {"layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "fc"}


def test_a_width_per_layer_is_the_network_of_sliced_weights():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 20, 3), nn.BatchNorm2d(20), nn.ReLU())
    model = gk.convert(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 4)).double())
    sampler = gk.RandomLayerWidth(0.3)
    sampler.bind(model, 2)
    assert len(sampler.classes) == 3
    x = torch.randn(2, 3, 9, 9, dtype=torch.double)
    for widths, a, b in (((0.3, 1.0, 0.5), 3, 20), ((1.0, 0.35, 1.0), 10, 7)):
        sampler.select(widths)
        y = F.conv2d(x, model[0].weight[:a], model[0].bias[:a])
        y = F.batch_norm(y, None, None, model[1].weight[:a], model[1].bias[:a], True).relu()
        y = F.conv2d(y, model[3].weight[:b, :a], model[3].bias[:b])
        y = F.batch_norm(y, None, None, model[4].weight[:b], model[4].bias[:b], True).relu()
        torch.testing.assert_close(model(x), F.linear(y.mean((2, 3)), model[8].weight[:, :b], model[8].bias))
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    "build",
    [
        lambda: CifarResNet(8, base_width=8),
        lambda: WideResNet(10, 1),
        lambda: PyramidNet(11, 24),
        lambda: torchvision.models.resnext50_32x4d(num_classes=10),
        lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
    ],
    ids=["cifar_resnet", "wide_resnet", "pyramidnet", "resnext50", "mobilenet_v3"],
)
def test_any_widths_per_layer_run(build):
    torch.manual_seed(0)
    model = gk.convert(build())
    sampler = gk.RandomLayerWidth(0.5)
    step = gk.GradAug(model, torch.optim.SGD(model.parameters(), 0.01), num_subnets=3, sampler=sampler)
    before = len(statistics(model))
    losses = step(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert all(loss.isfinite() for loss in losses.subnets)
    assert losses.draws[-1].subnet == (0.5,) * len(sampler.classes)
    assert all(len(set(draw.subnet)) == len(sampler.classes) for draw in losses.draws[:-1])
    assert len(statistics(model)) == before
    assert all(module._slim_width == 1 for module in model.modules() if hasattr(module, "_slim_width"))


# ---- random channels

NETWORKS = {
    "cifar_resnet": lambda: CifarResNet(14, base_width=8, num_classes=4),
    "wide_resnet": lambda: WideResNet(10, 1, num_classes=4),
    "pyramidnet": lambda: PyramidNet(20, 24, num_classes=4),
    "resnext50": lambda: torchvision.models.resnext50_32x4d(num_classes=4),
    "mobilenet_v3": lambda: torchvision.models.mobilenet_v3_small(num_classes=4, dropout=0.0),
    "flattened": lambda: nn.Sequential(
        *(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9, affine=False), nn.ReLU(), nn.AdaptiveAvgPool2d(5), nn.Flatten()),
        *(nn.Linear(225, 16), nn.ReLU(), nn.Linear(16, 4)),
    ),
}


@pytest.mark.parametrize("accumulate", [True, False], ids=["accumulate", "autograd"])
@pytest.mark.parametrize("inner", [gk.RandomWidth, gk.RandomLayerWidth])
@pytest.mark.parametrize("network", NETWORKS)
def test_random_channels_are_the_full_network_without_the_others(network, inner, accumulate):
    """A step at learning rate 1 against the full network, with the channels that were left out set to zero."""
    torch.manual_seed(0)
    model = gk.convert(NETWORKS[network]().double())
    masked = copy.deepcopy(model)
    sampler = gk.RandomChannels(inner(0.6))
    step = gk.GradAug(
        model,
        torch.optim.SGD(model.parameters(), 1.0),
        num_subnets=2,
        sampler=sampler,
        accumulate=accumulate,
        subnet_loss="cross_entropy",
    )
    images, targets = (
        torch.randn(3, 3, 64, 64, dtype=torch.double),
        torch.tensor([0, 1, 2]),
    )  # fewer pixels: 1 / std large
    losses = step(images, targets)

    layers = dict(masked.named_modules())
    criterion, total = nn.CrossEntropyLoss(), 0
    for draw, loss in zip((None, *losses.draws), (losses.full, *losses.subnets), strict=True):
        handles = []
        if draw is not None:
            sampler.select(draw.subnet)
            for name, kept in sampler._choose(generator(draw.subnet.seed))[0].items():
                zeroed = _zero_all_but(kept)
                handles.append(layers[name].register_forward_hook(lambda m, a, y, zeroed=zeroed: zeroed(y)))
            sampler.select(None)
            assert handles or draw is not losses.draws[-1]
        expected = criterion(masked(images), targets)
        torch.testing.assert_close(loss, expected.detach())
        total = total + expected
        for handle in handles:
            handle.remove()
    total.backward()
    for (name, trained), before in zip(model.named_parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(
            trained.detach(), (before - before.grad).detach(), msg=lambda text, name=name: f"{name}: {text}"
        )


def _zero_all_but(kept):
    def zeroed(y):
        mask = torch.zeros(y.shape[1], dtype=y.dtype)
        mask[kept] = 1
        return y * (mask[:, None, None] if y.dim() == 4 else mask)

    return zeroed


def test_random_channels_differ_between_draws_and_repeat_with_their_seed():
    model = gk.convert(CifarResNet(8, base_width=8))
    sampler = gk.RandomChannels(gk.RandomWidth(0.5))
    sampler.bind(model, 2)
    before = statistics(model)
    draws = sampler.draw(8, generator())
    assert [draw.subnet for draw in draws] == sorted((draw.subnet for draw in draws), reverse=True)
    kept = []
    for draw in (*draws, *draws):
        sampler.select(draw._replace(subnet=0.5))
        kept.append(tuple(model.layer3[0].conv2._kept[0].tolist()))
        model(torch.randn(2, 3, 16, 16))
    assert kept[:8] == kept[8:]
    assert len(set(kept)) == 8
    assert {channel for channels in kept for channel in channels} == set(range(32))
    assert_equal(statistics(model), before)
    sampler.select(None)
    model(torch.randn(2, 3, 16, 16))
    assert model.bn1.num_batches_tracked == 1
    assert model.conv1._kept is None


def test_smaller_numbers_of_channels_are_nested():
    """What padding with zeros makes of the kept channels of the smaller layer is the first channels of the larger."""
    for seed in range(20):
        chosen = sampler_module._choose_nested({16: 10, 32: 24, 36: 28}, 2, generator(seed))
        assert {channels: len(kept) for channels, kept in chosen.items()} == {16: 10, 32: 24, 36: 28}
        for smaller, larger in ((16, 32), (32, 36)):
            assert torch.equal(chosen[larger][: len(chosen[smaller])], chosen[smaller])
            assert max(chosen[smaller]) < smaller
            assert chosen[larger].unique().numel() == len(chosen[larger])
        assert torch.equal(chosen[36].view(-1, 2)[:, 0] + 1, chosen[36].view(-1, 2)[:, 1])


def test_random_channels_in_autocast():
    torch.manual_seed(0)
    model = gk.convert(torchvision.models.resnet18(num_classes=4))
    step = gk.GradAug(
        model,
        torch.optim.SGD(model.parameters(), 0.01),
        sampler=gk.RandomChannels(gk.RandomWidth(0.5)),
        autocast_dtype=torch.bfloat16,
    )
    losses = [step(torch.randn(4, 3, 32, 32), torch.arange(4)) for _ in range(2)]
    assert all(loss.isfinite() for step_losses in losses for loss in step_losses.subnets)


# ---- depth


def test_survival_is_linear_in_depth():
    model = CifarResNet(26)
    sampler = gk.RandomDepth(0.4)
    sampler.bind(model, 1)
    assert sampler.survival == pytest.approx([1 - 0.6 * block / 12 for block in range(1, 13)])
    drawn = sampler.draw(3000, generator())
    assert [sum(row) for row in drawn] == sorted((sum(row) for row in drawn), reverse=True)
    for rate, survival in zip(torch.tensor(drawn).double().mean(0).tolist(), sampler.survival, strict=True):
        assert abs(rate - survival) < 4 * (survival * (1 - survival) / 3000) ** 0.5 + 1e-9


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["cifar_resnet", "wide_resnet", "pyramidnet"])
def test_a_depth_is_the_network_without_the_blocks(name, fused):
    """The unscaled network without the branches, against one whose skipped branches end in zeros."""
    torch.manual_seed(0)
    model = {
        "cifar_resnet": lambda: CifarResNet(14, base_width=4),
        "wide_resnet": lambda: WideResNet(16, 1),
        "pyramidnet": lambda: PyramidNet(20, 12),
    }[name]().double()
    last = {"cifar_resnet": "bn2", "wide_resnet": "conv2", "pyramidnet": "bn4"}[name]
    oracle = copy.deepcopy(model)
    model = gk.convert(model) if fused else model
    sampler = gk.RandomDepth()
    sampler.bind(model, 2)
    kept = (True, False, False, True, True, False)
    blocks = [block for stage in (oracle.layer1, oracle.layer2, oracle.layer3) for block in stage]
    for block, keep in zip(blocks, kept, strict=True):
        if not keep:
            for parameter in getattr(block, last).parameters():
                nn.init.zeros_(parameter)
    x = torch.randn(3, 3, 13, 13, dtype=torch.double)
    sampler.select(kept)
    torch.testing.assert_close(model(x), oracle(x))
    sampler.select(None)
    assert not any(getattr(module, "skipped", False) for module in model.modules())


def test_random_depth_step():
    """Any n; batch norm has seen the full network only; evaluation is the full network, unscaled."""
    torch.manual_seed(0)
    model = gk.convert(CifarResNet(14, base_width=4))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    images, targets = torch.randn(4, 3, 16, 16), torch.arange(4)
    step = gk.GradAug(model, optimizer, num_subnets=5, sampler=gk.RandomDepth(0.3), resolutions=(16, 12))
    losses = step(images, targets)
    assert len(losses.subnets) == 5
    assert all(isinstance(kept, bool) for draw in losses.draws for kept in draw.subnet)
    with pytest.raises(TypeError, match="must be one of RandomWidth to have a width"):
        _ = losses.draws[0].width
    plain(images)
    assert_equal(statistics(model), statistics(plain))
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))
    replayed = gk.GradAug(model.train(), optimizer, num_subnets=5, sampler=gk.RandomDepth(0.3), resolutions=(16, 12))
    assert torch.equal(torch.stack(replayed(images, targets, losses.draws).subnets), torch.stack(losses.subnets))


def test_an_error_in_a_subnet_leaves_the_full_network():
    model = gk.convert(CifarResNet(8, base_width=4))

    def fail(images):
        raise RuntimeError("no images")

    step = gk.GradAug(model, torch.optim.SGD(model.parameters(), 0.1), sampler=gk.RandomDepth(0.5), transforms=(fail,))
    with pytest.raises(RuntimeError, match="no images"):
        step(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    assert not any(block.skipped for block in step.sampler.blocks)
    assert model.bn1.track_running_stats


# ---- bad input


@pytest.mark.parametrize(
    ("sampler", "model", "message"),
    [
        (lambda: gk.RandomWidth(0.5, (0.4,)), None, "widths must be at least min_width 0.5, got 0.4"),
        (lambda: gk.RandomWidth(0.5, (0.7,)), gk.convert(nn.Linear(4, 2)), "num_subnets must be at most 2, .* got 3"),
        (lambda: gk.RandomWidth(0.1), gk.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))), "leave at least 1"),
        (lambda: gk.RandomWidth(0.1), nn.Linear(4, 2), "layers of adjustable width, got Linear without any"),
        (
            lambda: gk.RandomChannels(gk.RandomWidth(0.5)),
            gk.convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1, groups=8), nn.Conv2d(16, 2, 1))),
            "as many output as input channels, got 8 input and 16 output channels",
        ),
        (lambda: gk.RandomDepth(0.0), None, r"min_survival must be in \(0, 1\], got 0"),
        (lambda: gk.RandomDepth(0.5), nn.Linear(4, 2), "random depth needs a model .* got Linear without any"),
    ],
)
def test_bad_settings(sampler, model, message):
    with pytest.raises(ValueError, match=message):
        sampler().bind(model, 3)


def test_random_channels_need_a_sampler_of_widths():
    with pytest.raises(TypeError, match="must be a RandomWidth or a RandomLayerWidth, got RandomDepth"):
        gk.RandomChannels(gk.RandomDepth())


def test_padded_channels_are_not_those_of_a_layer():
    class Padding(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(12, 2, 1)

        def forward(self, x):
            return self.b(F.pad(self.a(x), (0, 0, 0, 0, 0, 4)))

    with pytest.raises(ValueError, match="the input of 'b' must be channels of a layer, got 12 padded ones"):
        gk.RandomChannels(gk.RandomWidth(0.5)).bind(gk.convert(Padding()), 2)


def test_widths_per_layer_need_a_graph():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(self.a(x)) if x.sum() > 0 else self.b(self.a(-x))

    with pytest.raises(ValueError, match=r"need a model that torch.fx can trace, got Branching"):
        gk.RandomLayerWidth().bind(gk.convert(Branching(), keep="b"), 2)
