"""fuse: which chains are found, that they compute the same, and that modules stay what they were."""

import copy
import io

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import gradaug_kernels as gk
from gradaug_kernels.models import build_model

INNER = "batch_norm + relu + convolution"


def chain_counts(model):
    chains = list(gk.fused_chains(model).values())
    return {chain: chains.count(chain) for chain in set(chains)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", {INNER: 8, "batch_norm + relu + max_pool": 1, "batch_norm + add + relu": 8, "batch_norm": 3}),
        ("resnet50", {INNER: 32, "batch_norm + relu + max_pool": 1, "batch_norm + add + relu": 16, "batch_norm": 4}),
        ("mobilenet_v2", {"batch_norm": 52}),  # ReLU6, and adds outside of the module that has the batch norm
    ],
)
def test_chains_of_torchvision_models(name, expected):
    assert chain_counts(gk.convert(torchvision.models.get_model(name))) == expected


def test_recomputed_chains():
    model = gk.convert(torchvision.models.resnet50(), recompute=True)
    ends = {"recomputed convolution + batch_norm + add + relu": 16, "recomputed convolution + batch_norm": 4}
    assert chain_counts(model) == {INNER: 32, "batch_norm + relu + max_pool": 1, **ends}
    assert chain_counts(copy.deepcopy(model)) == chain_counts(model)


NETWORKS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "resnet50": lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=10),
    "wide_resnet": lambda: build_model("wide_resnet", 10, depth=16, widen_factor=1),
    "pyramidnet": lambda: build_model("pyramidnet", 10, depth=11, alpha=12),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_fused_equals_unfused(network, recompute):
    """Losses, gradients and statistics of a listed and of unlisted widths, in training and in evaluation."""
    torch.manual_seed(0)
    model = NETWORKS[network]().double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.2)
    fused = gk.convert(copy.deepcopy(model), widths=(0.8, 1.0), recompute=recompute)
    plain = gk.convert(copy.deepcopy(model), widths=(0.8, 1.0), fuse_chains=False)
    assert set(chain_counts(plain)) == {"batch_norm"}
    x = torch.randn(2, 3, 32, 32, dtype=torch.double)
    for width in (1.0, 0.8, 0.73):
        for m in (fused, plain):
            m.zero_grad()
            with gk.use_width(m, width):
                m(x).square().sum().backward()
        for (name, p), q in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
            torch.testing.assert_close(q[1].grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)
    for (name, value), other in zip(plain.state_dict().items(), fused.state_dict().items(), strict=True):
        torch.testing.assert_close(other[1], value, rtol=1e-9, atol=1e-12, msg=name)
    for m in (fused.eval(), plain.eval()):
        m.zero_grad()
        with gk.use_width(m, 0.8):
            m(x).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        torch.testing.assert_close(q[1].grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)
    with gk.use_width(fused, 0.73), pytest.raises(RuntimeError, match=r"the statistics of width 0\.73, got those"):
        fused(x)


def test_hooks_of_layers_in_a_chain_fire():
    torch.manual_seed(0)
    model = gk.convert(torchvision.models.resnet18(num_classes=10)).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.double)
    expected = model(x)
    seen = []
    for name in ("conv1", "bn1", "conv2", "bn2"):
        layer = model.layer1[0].get_submodule(name)
        layer.register_forward_hook(lambda module, args, output, name=name: seen.append((name, output)))
    torch.testing.assert_close(model(x), expected)
    assert [name for name, _ in seen] == ["conv1", "bn1", "conv2", "bn2"]
    assert seen[1][1].min() == 0, "the hook of a norm sees its output, activated"


def test_errors_of_layers_in_a_chain():
    model = gk.fuse(nn.Sequential(gk.FastSlimConv2d(3, 8, 1), gk.SlimBatchNorm2d(6), gk.FastSlimConv2d(6, 4, 1)))
    assert gk.fused_chains(model) == {"1": "batch_norm + convolution"}
    with pytest.raises(ValueError, match="input must have 6 channels at width 1, got 8"):
        model(torch.randn(2, 3, 4, 4))
    model = gk.fuse(nn.Sequential(gk.SlimBatchNorm2d(6), gk.FastSlimConv2d(6, 4, 1)))
    with pytest.raises(ValueError, match="training needs more than 1 value per channel"):
        model(torch.randn(1, 6, 1, 1))


def test_modules_keep_their_class_and_survive_copies_and_pickles():
    model = gk.convert(torchvision.models.resnet18(num_classes=10)).eval()
    assert isinstance(model, torchvision.models.ResNet)
    assert isinstance(model.layer1[0], torchvision.models.resnet.BasicBlock)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(1, 3, 32, 32)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert chain_counts(other) == chain_counts(model)
        assert torch.equal(other(x), model(x))
        other.layer1[0].bn1.weight.data.zero_()
        assert not torch.equal(other(x), model(x)), "a copy runs its own layers"


def test_a_slice_of_a_fused_sequential():
    model = gk.fuse(nn.Sequential(gk.FastSlimConv2d(3, 4, 1), gk.SlimBatchNorm2d(4), nn.ReLU()))
    assert gk.fused_chains(model) == {"1": "batch_norm + relu"}
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model[:2](x), model[1](model[0](x)))
    assert torch.equal(model(x), model[:2](x).relu())


class Chain(nn.Module):
    """Two convolutions with a batch norm between them, joined by what a test passes."""

    def __init__(self, join, **options):
        super().__init__()
        self.conv1, self.norm = gk.FastSlimConv2d(4, 4, 1), gk.SlimBatchNorm2d(4)
        self.conv2 = gk.FastSlimConv2d(4, 4, 3, padding=1, **options)
        self.keep, self.drop = nn.Dropout(0.0), nn.Dropout(0.5)
        self.pool, self.pool_up = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True)
        self.join = join

    def forward(self, x):
        return self.join(self, x)


JOINS = {
    "norm and convolution": (lambda m, x: m.conv2(m.norm(x)), {}, "batch_norm + convolution"),
    "relu": (lambda m, x: m.conv2(F.relu(m.norm(m.conv1(x)))), {}, INNER),
    "dropout of nothing": (lambda m, x: m.conv2(m.keep(F.relu(m.norm(x)))), {}, INNER),
    "dropout": (lambda m, x: m.conv2(m.drop(F.relu(m.norm(x)))), {}, "batch_norm + relu"),
    "reflected padding": (lambda m, x: m.conv2(m.norm(x)), {"padding_mode": "reflect"}, "batch_norm"),
    "another use of the norm": (lambda m, x: (lambda y: m.conv2(y) + y)(m.norm(x)), {}, "batch_norm"),
    "another use of the convolution": (lambda m, x: (lambda c: m.norm(c) * c)(m.conv1(x)), {}, "batch_norm"),
    "add before the convolution": (lambda m, x: m.conv2(m.norm(x) + x), {}, "batch_norm + add"),
    "norm and convolution of one input": (lambda m, x: m.conv2(m.norm(x)) + m.conv1(x), {}, "batch_norm + convolution"),
    "pooling": (lambda m, x: m.pool(F.relu(m.norm(m.conv1(x)))), {}, "batch_norm + relu + max_pool"),
    "pooling without relu": (lambda m, x: m.pool(m.norm(x)), {}, "batch_norm + max_pool"),
    "pooling that rounds up": (lambda m, x: m.pool_up(F.relu(m.norm(x))), {}, "batch_norm + relu"),
    "pooling of a convolution": (lambda m, x: m.norm(m.pool(m.conv1(x))), {}, "batch_norm"),
    "pooling after an add": (lambda m, x: m.pool(m.norm(x) + x), {}, "batch_norm + add"),
    "input written in place later": (lambda m, x: m.conv2(m.norm(x)) + x.mul_(1), {}, "batch_norm + convolution"),
    "input written in place between": (lambda m, x: in_place_between(m, x + 0), {}, "batch_norm"),
}


def in_place_between(m, x):
    y = m.norm(x)
    x.mul_(2)
    return m.conv2(y) + x


@pytest.mark.parametrize(("join", "options", "chain"), JOINS.values(), ids=JOINS.keys())
def test_what_joins_a_chain(join, options, chain):
    torch.manual_seed(0)
    plain = Chain(join, **options)
    fused = gk.fuse(copy.deepcopy(plain))
    assert gk.fused_chains(fused) == {"norm": chain}
    x = torch.randn(3, 4, 5, 5)
    for mode in (True, False):
        torch.manual_seed(1)
        expected = plain.train(mode)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(fused.train(mode)(x), expected)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value)


class Block(nn.Module):
    """One batch norm, followed by what a test passes."""

    def __init__(self, tail):
        super().__init__()
        self.norm, self.relu, self.tail = gk.SlimBatchNorm2d(4), nn.ReLU(inplace=True), tail

    def forward(self, x):
        return self.tail(self, self.norm(x), x)


TAILS = {
    "relu module": (lambda m, y, x: m.relu(y), "batch_norm + relu"),
    "relu function": (lambda m, y, x: F.relu(y, inplace=True), "batch_norm + relu"),
    "relu method": (lambda m, y, x: y.relu_(), "batch_norm + relu"),
    "add": (lambda m, y, x: x + y, "batch_norm + add"),
    "add, relu": (lambda m, y, x: torch.relu(torch.add(y, x)), "batch_norm + add + relu"),
    "add a number": (lambda m, y, x: y + 1.0, "batch_norm"),
    "twice itself": (lambda m, y, x: (y + y).relu(), "batch_norm"),
    "scaled add": (lambda m, y, x: torch.add(y, x, alpha=2), "batch_norm"),
    "broadcast add": (lambda m, y, x: (y + x.mean((2, 3), keepdim=True)).relu(), "batch_norm + add + relu"),
    "used twice": (lambda m, y, x: y.relu() * y, "batch_norm"),
    "training only": (lambda m, y, x: y.relu() if m.training else y, "batch_norm"),
    "data-dependent": (lambda m, y, x: y.relu() if y.sum() > 0 else y, "batch_norm"),
}


@pytest.mark.parametrize(("tail", "chain"), TAILS.values(), ids=TAILS.keys())
def test_what_follows_a_batch_norm(tail, chain):
    plain = Block(tail)
    fused = gk.fuse(Block(tail))
    assert gk.fused_chains(fused) == {"norm": chain}
    x = torch.randn(3, 4, 5, 5)
    for mode in (True, False):
        torch.testing.assert_close(fused.train(mode)(x), plain.train(mode)(x))
