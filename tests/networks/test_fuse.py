"""fuse: which chains are found, that they compute the same, and that modules stay what they were."""

import contextlib
import copy
import cProfile
import functools
import gc
import io
import pickle
import random
import threading
import time
import weakref

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
import torch.utils.checkpoint
import torchvision
import torchvision.models.feature_extraction
from torch import nn
from torch.nn import functional as F

import gradaug_kernels as gk
from gradaug_kernels.models import build_model
from gradaug_kernels.slim.fuse import Fused
from gradaug_kernels.slim.tracing import FaithfulTracer

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
        layer.register_forward_hook(lambda module, args, output, name=name: seen.append((name, output.min().item())))
    torch.testing.assert_close(model(x), expected)
    assert [name for name, _ in seen] == ["conv1", "bn1", "conv2", "bn2"]
    assert seen[1][1] < 0, "the hook of a norm sees its output, as in torch.nn"


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


# ---- code that does something else in another run


class Code(nn.Module):
    """A stem that fuses, if what follows, which a test passes, is the same in every run."""

    factor = 1.0

    def __init__(self, tail, body=None):
        super().__init__()
        self.conv, self.norm, self.out = gk.FastSlimConv2d(3, 4, 1), gk.SlimBatchNorm2d(4), gk.FastSlimConv2d(4, 2, 1)
        self.acts, self.flag = nn.ModuleList([nn.Identity()]), False
        self.scale, self._scale, self.options, self.sizes = 1.0, 1.0, {"scale": 1.0}, [1]
        self.feature, self.features, self.calls = None, [], 0
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("shift", torch.ones(()))
        self.tail = tail
        if body is not None:
            self.body = body

    def body(self, model, x):
        return F.relu(model.norm(model.conv(x)))

    def forward(self, x, doubled=False):
        y = self.out(self.body(self, x))
        if doubled:
            y = y * 2
        return self.tail(self, y)

    def helped(self, y):
        return y * self.scale

    @property
    def scaled(self):
        return self.scale * 2


class Settings:
    scale = 1.0


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


SCALE = 1.0
OPTIONS = {"scale": 1.0}
GENERATOR = np.random.default_rng(0)


def relu_without_gradient(m, x):
    with torch.no_grad():
        return F.relu(m.norm(m.conv(x)))


def relu_with_gradient_disabled(m, x):
    with torch.set_grad_enabled(False):
        return F.relu(m.norm(m.conv(x)))


@torch.no_grad()
def relu_decorated(m, x):
    return F.relu(m.norm(m.conv(x)))


def relu_in_full_precision(m, x):
    with torch.autocast("cpu", enabled=False):
        return F.relu(m.norm(m.conv(x.float())))


def relu_checkpointed(m, x):
    return torch.utils.checkpoint.checkpoint(lambda x: F.relu(m.norm(m.conv(x))), x, use_reentrant=False)


def store(m, y):
    m.feature = y
    return y


def append(m, y):
    m.features.append(y)
    return y


def count(m, y):
    m.calls += 1
    return y * m.calls


def count_in_class(m, y):
    Settings.calls = getattr(Settings, "calls", 0) + 1
    return y


def count_in_buffer(m, y):
    m.count.add_(1)
    return y * m.count


def fall_back(m, y):
    try:
        return y * 2 if y.mean() > 0 else y * 3
    except Exception:
        return y


def run_through(m, y):
    for act in m.acts:
        y = act(y)
    return y


def set_scale(m, patch):
    m.scale = 3.0


def twice(scale):
    return lambda m, y: y * scale["scale"]


# What follows the stem, what happens after fusing, and whether the stem is fused before that.
CODES = {
    "dropout": (lambda m, y: F.dropout(y, p=0.5, training=m.training), None, False),
    "dropout by position": (lambda m, y: F.dropout(y, 0.5, m.training), None, False),
    "dropout of channels": (lambda m, y: F.dropout2d(y, training=m.training), None, False),
    "a keyword": (lambda m, y: F.leaky_relu(y - 1, negative_slope=0.5 if m.training else 0.1), None, False),
    "a factor": (lambda m, y: torch.add(y, y.detach(), alpha=2 if m.training else 3), None, False),
    "gradients": (lambda m, y: y * 2 if torch.is_grad_enabled() else y, None, False),
    "inference mode": (lambda m, y: y * 2 if torch.is_inference_mode_enabled() else y, None, False),
    "autocast": (lambda m, y: y * 2 if torch.is_autocast_enabled("cpu") else y, None, False),
    "random": (lambda m, y: y * 3 if m.training and random.random() < 0.5 else y, None, False),
    "random of torch": (lambda m, y: y * 3 if torch.rand(1).item() < 0.5 else y, None, False),
    "random of torch, as a tensor": (lambda m, y: y * torch.rand(2, 1, 1), None, False),
    "random of NumPy": (lambda m, y: y * 3 if np.random.rand() < 0.5 else y, None, False),
    "random of a generator": (lambda m, y: y * 3 if GENERATOR.random() < 2 else y, None, False),
    "the time": (lambda m, y: y * 3 if time.monotonic() > 0 else y, None, False),
    "the mode of a layer": (lambda m, y: y * 3 if m.norm.training else y, None, True),
    "the mode of a layer, changed": (
        lambda m, y: y * 3 if m.norm.training else y,
        lambda m, patch: m.norm.eval(),
        True,
    ),
    "an attribute": (lambda m, y: y * m.scale, set_scale, True),
    "a private attribute": (lambda m, y: y * m._scale, lambda m, patch: setattr(m, "_scale", 3.0), True),
    "an attribute by its name": (lambda m, y: y * getattr(m, "scale"), set_scale, True),  # noqa: B009
    "all attributes": (lambda m, y: y * vars(m)["scale"], set_scale, False),
    "an attribute that is not there": (
        lambda m, y: y * (m.late if hasattr(m, "late") else 1),
        lambda m, patch: setattr(m, "late", 3.0),
        True,
    ),
    "an attribute of a layer": (lambda m, y: y * m.norm.eps, lambda m, patch: setattr(m.norm, "eps", 0.5), True),
    "a method": (lambda m, y: m.helped(y), set_scale, True),
    "a method, replaced": (
        lambda m, y: m.helped(y),
        lambda m, patch: patch.setattr(Code, "helped", lambda m, y: y * 3),
        True,
    ),
    "a method, hidden": (lambda m, y: m.helped(y), lambda m, patch: setattr(m, "helped", lambda y: y * 3), True),
    "a property": (lambda m, y: y * m.scaled, set_scale, True),
    "a dictionary": (lambda m, y: y * m.options["scale"], lambda m, patch: m.options.update(scale=3.0), False),
    "a list": (lambda m, y: y * m.sizes[0], lambda m, patch: m.sizes.insert(0, 3), False),
    "a list's length": (lambda m, y: y * len(m.sizes), lambda m, patch: m.sizes.append(3), False),
    "a list of modules": (run_through, lambda m, patch: m.acts.append(nn.Tanh()), True),
    "the number of modules": (lambda m, y: y * len(m.acts), lambda m, patch: m.acts.append(nn.Tanh()), True),
    "a class attribute": (lambda m, y: y * m.factor, lambda m, patch: patch.setattr(Code, "factor", 3.0), True),
    "a class attribute, hidden": (lambda m, y: y * m.factor, lambda m, patch: setattr(m, "factor", 3.0), True),
    "an attribute of the class": (
        lambda m, y: y * type(m).factor,
        lambda m, patch: patch.setattr(Code, "factor", 3.0),
        False,
    ),
    "an attribute of another class": (
        lambda m, y: y * Settings.scale,
        lambda m, patch: patch.setattr(Settings, "scale", 3.0),
        True,
    ),
    "a global variable": (lambda m, y: y * SCALE, lambda m, patch: patch.setitem(globals(), "SCALE", 3.0), True),
    "a global dictionary": (
        lambda m, y: y * OPTIONS["scale"],
        lambda m, patch: patch.setitem(OPTIONS, "scale", 3.0),
        False,
    ),
    "a dictionary of the function around": (
        twice(OPTIONS),
        lambda m, patch: patch.setitem(OPTIONS, "scale", 3.0),
        False,
    ),
    "a bound function": (functools.partial(lambda m, y, scale: y * scale, scale=3), None, False),
    "an argument": (lambda m, y: y * 2 if m.flag is True else y, lambda m, patch: setattr(m, "flag", True), False),
    "the class of an attribute": (lambda m, y: y * 2 if isinstance(m.acts[0], nn.Identity) else y, None, True),
    "the class of a value": (lambda m, y: y * 2 if isinstance(y, torch.Tensor) else y, None, False),
    "the type of a value": (lambda m, y: y * 2 if type(y) is torch.Tensor else y, None, False),
    "the data type of a value": (lambda m, y: y * 2 if y.dtype is torch.float32 else y, None, False),
    "what a value has": (lambda m, y: y * 2 if hasattr(y, "late") else y, None, False),
    "the gradient function": (lambda m, y: y * 2 if y.grad_fn is None else y, None, False),
    "an exception": (fall_back, None, False),
    "a stored value": (store, None, False),
    "an appended value": (append, None, False),
    "a counter": (count, None, False),
    "a counter in a class": (count_in_class, None, False),
    "a counter in a buffer": (count_in_buffer, None, True),
    "a buffer": (lambda m, y: y * (m.shift + m.count), lambda m, patch: m.shift.fill_(3), True),
    "a reversed gradient": (lambda m, y: Reversed.apply(y), None, False),
    "nothing": (lambda m, y: y, None, True),
}
BODIES = {
    "no_grad": relu_without_gradient,
    "set_grad_enabled": relu_with_gradient_disabled,
    "no_grad around a function": relu_decorated,
    "autocast": relu_in_full_precision,
    "checkpoint": relu_checkpointed,
}


@pytest.mark.parametrize("name", CODES)
def test_code_that_does_something_else_in_another_run(name, monkeypatch):
    tail, change, is_fused = CODES[name]
    compare_runs(Code(tail), is_fused, change and functools.partial(change, patch=monkeypatch))


@pytest.mark.parametrize("name", BODIES)
def test_contexts_around_fused_layers(name):
    compare_runs(Code(lambda m, y: y, BODIES[name]), is_fused=False)


def compare_runs(plain, is_fused, change=None):
    """Outputs, gradients, buffers and what is stored, of a module and of its fused copy."""
    torch.manual_seed(0)
    fused = gk.fuse(copy.deepcopy(plain))
    assert (gk.fused_chains(fused) == {"norm": INNER}) == is_fused
    assert (fused.features, fused.feature, fused.calls, fused.count.item()) == ([], None, 0, 0), "tracing wrote it"
    contexts = [contextlib.nullcontext, torch.no_grad, torch.inference_mode]
    contexts.append(lambda: torch.autocast("cpu", torch.bfloat16))
    for step in (lambda model: None, change or (lambda model: None)):
        for model in (plain, fused):
            step(model)
        for mode in (True, False):
            for context in contexts:
                compare_run(plain.train(mode), fused.train(mode), context)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value)
    written = [(model.calls, len(model.features), type(model.feature)) for model in (plain, fused)]
    assert written[0] == written[1]


def compare_run(plain, fused, context):
    results = []
    for model in (plain, fused):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        for argument in ((), (False,), (True,)):
            with context():
                y = model(torch.randn(2, 3, 4, 4, requires_grad=True), *argument)
            if y.requires_grad:
                y.square().sum().backward()
            results.append((y, {name: p.grad for name, p in model.named_parameters()}))
    for (y, expected), (z, grads) in zip(results[:3], results[3:], strict=True):
        tolerance = {"rtol": 0.02, "atol": 0.02} if y.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(z, y, **tolerance)
        for name, grad in expected.items():
            assert (grads[name] is None) == (grad is None), name
            if grad is not None:
                torch.testing.assert_close(grads[name], grad, **tolerance)


def test_arguments_by_default_and_by_name():
    """`flag is True` of a value that stands for an argument is False."""

    class Doubling(Code):
        def forward(self, x, doubled=False, residual=None):
            y = self.norm(self.conv(x)).relu()
            y = self.out(y)
            if residual is not None:
                y = y + residual
            return y * 2 if doubled else y

    torch.manual_seed(0)
    plain = Doubling(None).eval()
    fused, x = gk.fuse(copy.deepcopy(plain)), torch.randn(2, 3, 4, 4)
    assert gk.fused_chains(fused) == {"norm": INNER}
    for arguments in ({}, {"doubled": True}, {"residual": torch.ones(2, 2, 4, 4)}, {"doubled": torch.tensor(True)}):
        torch.testing.assert_close(fused(x, **arguments), plain(x, **arguments))
        torch.testing.assert_close(fused(x=x, **arguments), plain(x=x, **arguments))
    torch.testing.assert_close(fused(x, True), plain(x, True))


def test_a_fused_module_is_freed_at_once():
    model = gk.fuse(Code(lambda m, y: m.helped(y) * m._scale * m.factor * SCALE))
    assert gk.fused_chains(model) == {"norm": INNER}
    reference = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_a_sequential_that_grows():
    plain, converted = block(), gk.convert(block())
    for model in (plain, converted):
        model.append(nn.Tanh())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(converted(x), plain(x))


def test_profilers_go_on():
    profiler = cProfile.Profile()
    profiler.enable()
    model = gk.convert(block())
    assert is_training(model)
    profiler.disable()
    assert any(entry.code is is_training.__code__ for entry in profiler.getstats())
    assert gk.fused_chains(model) == FUSED
    assert "__getattribute__" not in vars(nn.Module)


def is_training(model):
    return model.training


# ---- what is done to a model after its conversion


def block():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.0), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*body, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1))


FUSED = {"1": INNER, "5": INNER}


def replace(index, layer):
    return lambda model: model.__setitem__(index, layer())


def set_attribute(index, name, value):
    return lambda model: setattr(model[index], name, value)


@torch.no_grad()
def prune(layer):
    nn.utils.prune.custom_from_mask(layer, "weight", torch.eye(8)[..., None, None].expand_as(layer.weight))


CHANGES = {
    "a fused ReLU": replace(2, nn.SiLU),
    "a fused ReLU by nothing": replace(2, nn.Identity),
    "a norm by nothing": replace(1, nn.Identity),
    "a norm by another": replace(1, lambda: nn.GroupNorm(2, 8)),
    "a convolution": replace(4, lambda: nn.Conv2d(8, 8, 5, padding=2)),
    "the dictionary of modules": lambda model: model._modules.__setitem__("2", nn.SiLU()),
    "a norm by a synchronised one": nn.SyncBatchNorm.convert_sync_batchnorm,
    "the forward of one layer": set_attribute(2, "forward", F.silu),
    "the class of one layer": set_attribute(2, "__class__", nn.SELU),
    "dropout": set_attribute(3, "p", 1.0),
    "padding": set_attribute(4, "padding", (2, 2)),
    "padding by its name": set_attribute(4, "padding", "valid"),
    "padding mode": set_attribute(4, "padding_mode", "circular"),
    "stride": set_attribute(4, "stride", (2, 1)),
    "dilation": set_attribute(4, "dilation", (2, 2)),
    "epsilon": set_attribute(1, "eps", 0.1),
    "momentum": set_attribute(1, "momentum", None),
    "statistics no longer tracked": set_attribute(1, "track_running_stats", False),
    "a frozen norm": lambda model: model[1].eval(),
    "pruning": lambda model: prune(model[4]),
    "a parametrisation": lambda model: nn.utils.parametrizations.weight_norm(model[4]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_after_conversion_are_those_of_the_original(name):
    """At width 1 a converted model does what the original one does after the same change, copies of it too."""
    plain, converted = block(), gk.convert(block())
    assert gk.fused_chains(converted) == FUSED
    for model in (plain, converted):
        torch.manual_seed(2)  # of new parameters
        CHANGES[name](model)
    x = torch.randn(2, 3, 6, 6)
    synchronised = any(isinstance(m, nn.SyncBatchNorm) for m in plain.modules())
    for model in (converted, copy.deepcopy(converted)):
        reference = copy.deepcopy(plain)
        for mode in (False,) if synchronised else (True, False):  # in training it needs a GPU
            if not mode:
                model.eval(), reference.eval()
            torch.manual_seed(3)
            expected = reference(x)
            torch.manual_seed(3)
            torch.testing.assert_close(model(x), expected)
        for buffer, value in reference.named_buffers():
            torch.testing.assert_close(model.get_buffer(buffer), value, msg=buffer)


def test_a_compiled_model_notices_a_replaced_layer():
    plain, model = block().eval(), gk.convert(block().eval())
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(compiled(x), plain(x))
    plain[2], model[2] = nn.SiLU(), nn.SiLU()
    torch.testing.assert_close(compiled(x), plain(x))
    torch._dynamo.reset()


def test_an_attribute_that_tracing_read_may_change():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.scale, self.activation = gk.SlimBatchNorm2d(4), 2.0, F.relu

        def forward(self, x):
            return self.scale * self.activation(self.norm(x))

    plain, fused = Scaled(), gk.fuse(Scaled())
    assert gk.fused_chains(fused) == {"norm": "batch_norm + relu"}
    x = torch.randn(3, 4, 5, 5)
    for name, value in (("scale", 3.0), ("activation", F.silu)):
        for model in (plain, fused):
            setattr(model, name, value)
        torch.testing.assert_close(fused(x), plain(x))
        assert gk.fused_chains(fused) == {"norm": "batch_norm"}


REPLACED = {
    "head": (replace(7, lambda: nn.Conv2d(8, 5, 1)), "'7' .*as the FastSlimConv2d that convert made, got Conv2d"),
    "synchronised norms": (nn.SyncBatchNorm.convert_sync_batchnorm, "'1' .*SlimBatchNorm2d .*got SyncBatchNorm"),
}


@pytest.mark.parametrize(("change", "message"), REPLACED.values(), ids=REPLACED.keys())
def test_a_layer_of_no_width_is_refused_below_width_1(change, message):
    model = gk.convert(block())
    change(model)
    model.eval()(torch.randn(2, 3, 6, 6))
    with pytest.raises(ValueError, match=message), gk.use_width(copy.deepcopy(model), 0.5):
        pass
    for sampler in (gk.RandomWidth(0.5), gk.RandomLayerWidth(0.5)):
        with pytest.raises(ValueError, match=message):
            gk.GradAug(model, torch.optim.SGD(model.parameters(), 0.1), sampler=sampler)


def test_layers_that_need_no_width_may_replace_others():
    model = gk.convert(block())
    model[7], model[4] = nn.Identity(), gk.FastSlimConv2d(8, 8, 3, padding=1)
    with gk.use_width(model, 0.5):
        assert model(torch.randn(2, 3, 6, 6)).shape == (2, 4, 6, 6)


# ---- hooks


def record_calls(model, calls):
    """A hook of each kind on every layer; returns what removes them."""

    def forward(module, args, kwargs, output):
        calls.append(("forward", output.abs().sum().item()))

    def before_forward(module, args, kwargs):
        calls.append(("before forward", len(args)))

    def backward(module, grad_input, grad_output):
        calls.append(("backward", grad_output[0].abs().sum().item()))

    def before_loading(module, state, prefix, *_):
        calls.append((f"before loading {prefix}", len(list(module.parameters()))))

    handles = []
    for layer in model.children():
        handles += [
            layer.register_forward_hook(forward, with_kwargs=True, always_call=True),
            layer.register_forward_pre_hook(before_forward, with_kwargs=True),
            layer.register_full_backward_hook(backward),
            layer.register_full_backward_pre_hook(lambda module, grad: calls.append(("before backward", 0))),
            layer.register_state_dict_pre_hook(
                lambda module, prefix, keep: calls.append((f"before saving {prefix}", 0))
            ),
            layer.register_state_dict_post_hook(lambda module, state, prefix, _: calls.append((f"saved {prefix}", 0))),
            layer.register_load_state_dict_pre_hook(before_loading),
            layer.register_load_state_dict_post_hook(lambda module, keys: calls.append(("loaded", 0))),
        ]
    return handles


def exercise(model):
    model(torch.ones(2, 3, 6, 6) * torch.arange(6.0)).square().sum().backward()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("when", ["before conversion", "after conversion"])
def test_hooks_fire_as_in_the_original_model(when):
    expected, calls, model = [], [], block()
    record_calls(model, expected)
    exercise(model)
    model = block() if when == "before conversion" else gk.convert(block())
    handles = record_calls(model, calls)
    if when == "before conversion":
        model = gk.convert(model)
    exercise(model)
    assert len(expected) == 8 * 8
    assert [name for name, _ in calls] == [name for name, _ in expected]
    values, wanted = (torch.tensor([float(value) for _, value in found]) for found in (calls, expected))
    torch.testing.assert_close(values, wanted, rtol=1e-3, atol=1e-3)
    calls.clear()
    for handle in handles:
        handle.remove()
    exercise(model)
    assert not calls
    assert gk.fused_chains(model) == FUSED, "fused again without hooks"


def test_hooks_of_all_modules_fire():
    model, called = gk.convert(block()), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        model(torch.randn(2, 3, 6, 6))
    finally:
        handle.remove()
    assert called == [*model, model]


# ---- tracing, copies, threads


def test_symbolic_trace_of_a_converted_model():
    """Layers of adjustable width are calls of the graph, as layers of torch.nn are; it runs at every width."""
    plain = torchvision.models.resnet18(num_classes=10)
    model = gk.convert(copy.deepcopy(plain))
    traced = torch.fx.symbolic_trace(model)
    assert [node.name for node in traced.graph.nodes] == [n.name for n in torch.fx.symbolic_trace(plain).graph.nodes]
    x = torch.randn(2, 3, 32, 32)
    for width in (1.0, 0.5):
        with gk.use_width(model, width), gk.use_width(traced, width):
            torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)


def test_feature_extractors_of_a_converted_model():
    extract = torchvision.models.feature_extraction.create_feature_extractor
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=10)
    nodes = ["relu", "layer1.0.bn1", "layer1.0.relu", "layer2", "flatten"]
    converted = gk.convert(copy.deepcopy(plain))
    x = torch.randn(2, 3, 32, 32)
    expected = extract(plain, nodes).eval()(x)
    for name, actual in extract(converted, nodes).eval()(x).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-4, atol=1e-4, msg=name)


class Twice(nn.Module):
    """The same layers called twice in one chain."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = gk.FastSlimConv2d(4, 4, 3, padding=1), gk.SlimBatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        for _ in range(2):
            x = self.relu(self.norm(self.conv(x)))
        return self.norm(x)


def test_layers_that_are_called_twice_in_a_chain():
    torch.manual_seed(0)
    plain = Twice().double()
    fused = gk.fuse(copy.deepcopy(plain))
    assert gk.fused_chains(fused) != {"norm": "batch_norm"}
    x = torch.randn(2, 4, 5, 5, dtype=torch.double)
    for width, model in ((w, m) for w in (1.0, 0.5) for m in (plain, fused)):
        with gk.use_width(model, width):
            model(x[:, : round(4 * width)]).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, msg=name)


def append_call(module, *_):
    module.calls.append(1)


def test_copies_of_a_module_that_its_hooks_refer_to():
    model = gk.convert(block())
    model.register_load_state_dict_pre_hook(append_call)
    model.calls = []
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.load_state_dict(model.state_dict())
        assert (copied.calls, model.calls) == ([1], [])
        assert gk.fused_chains(copied) == FUSED
        copied[2] = nn.SiLU()
        assert gk.fused_chains(copied) == {"1": "batch_norm", "5": "batch_norm"}
        assert gk.fused_chains(model) == FUSED


def test_copies_can_be_stacked():
    model = gk.convert(block())
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    parameters, _ = torch.func.stack_module_state(models)
    assert parameters["0.weight"].shape == (3, 8, 3, 3, 3)


def test_threads_run_one_model_while_others_are_converted():
    torch.manual_seed(0)
    model = gk.convert(block()).eval()
    x = torch.randn(2, 3, 6, 6)
    expected, wrong = model(x), []

    def run():
        for _ in range(30):
            try:
                if not torch.equal(model(x), expected):
                    wrong.append("another result")
            except Exception as error:  # of a thread, which pytest would not see
                wrong.append(error)

    def copies():
        try:
            for _ in range(8):
                gk.convert(block())
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=target) for target in (run, run, copies, copies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("threshold", [3, 10, 30])
def test_garbage_is_not_the_code_of_a_module(threshold, monkeypatch):
    """What a collection runs (finalizers, callbacks of weak references) neither raises nor keeps a module unfused."""

    class Cycle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            torch.rand(1)

    note_child = FaithfulTracer.note_child

    def note_and_litter(*args):
        Cycle(), Cycle()
        return note_child(*args)

    monkeypatch.setattr(FaithfulTracer, "note_child", note_and_litter)
    before = gc.get_threshold()
    try:
        gc.set_threshold(threshold)
        model = gk.convert(torchvision.models.resnet18(num_classes=10))
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled()
    blocks = [module for module in model.modules() if isinstance(module, torchvision.models.resnet.BasicBlock)]
    assert len(blocks) == 8
    assert all(isinstance(block, Fused) for block in (model, *blocks))


@pytest.mark.parametrize("write", ["mul_", "relu_", "imul", "module"])
def test_what_is_written_between_a_norm_and_its_sum(write):
    """The norm reads its input before that is written to."""

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            y = self.conv(x)
            out = self.norm(y)
            if write == "mul_":
                y.mul_(2)
            elif write == "relu_":
                y = F.relu_(y)
            elif write == "imul":
                y *= 3
            else:
                y = self.relu(y)
            return self.head(F.relu(out + y).mean((2, 3)))

    torch.manual_seed(0)
    model = Written().double().eval()
    nn.init.uniform_(model.norm.running_mean)
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    expected = model(x)
    torch.testing.assert_close(gk.convert(copy.deepcopy(model))(x), expected)
