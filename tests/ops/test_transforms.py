"""torch.func, forward mode and second derivatives of every operator, beside PyTorch's own of the slices."""

import contextlib
import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import gradaug_kernels as gk

EPS = 1e-5


def _norm(x, gamma, beta, mean=None, var=None, residual=None, relu=False):
    c = x.shape[1]
    y = F.batch_norm(x, mean, var, gamma[:c], beta[:c], training=mean is None, eps=EPS)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def _moments(x):
    return x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), correction=0)


def _cases():
    """name -> (ours, PyTorch's, tensors), each from tensors to y."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.double)

    x, residual, weight, bias = randn(2, 3, 4, 3), randn(2, 4, 4, 3), randn(5, 4, 3, 3), randn(5)
    gamma, beta, mean, var = randn(5), randn(5), randn(3), randn(3).square() + 0.5
    norm = {"eps": EPS, "relu": True}

    def conv(x, weight, bias):
        return F.conv2d(x, weight[:4, :3], bias[:4], padding=1)

    return {
        "slim_conv2d": (lambda x, w, b: gk.slim_conv2d(x, w, b, 4, padding=1), conv, (x, weight, bias)),
        "slim_conv2d of groups": (
            lambda x, w: gk.slim_conv2d(x, w, None, 4, stride=2, dilation=(2, 1), groups=2),
            lambda x, w: F.conv2d(x, w[:4, :2], None, 2, dilation=(2, 1), groups=2),
            (randn(2, 4, 4, 3), randn(6, 3, 2, 3)),
        ),
        "slim_linear": (
            lambda x, w, b: gk.slim_linear(x, w, b, 4),
            lambda x, w, b: F.linear(x, w[:4, :3], b[:4]),
            (randn(2, 3), randn(5, 4), bias),
        ),
        "slim_batch_norm": (
            lambda x, g, b, r: gk.slim_batch_norm(x, g, b, residual=r, relu=True)[0],
            lambda x, g, b, r: _norm(x, g, b, residual=r, relu=True),
            (x, gamma, beta, randn(2, 3, 4, 3)),
        ),
        "slim_batch_norm, given statistics": (
            lambda x, g, b: gk.slim_batch_norm(x, g, b, mean, var)[0],
            lambda x, g, b: _norm(x, g, b, mean, var),
            (x, gamma, beta),
        ),
        "slim_batch_norm, known statistics of the batch": (
            lambda x, g, b: gk.slim_batch_norm(x, g, b, *_moments(x), relu=True, batch_stats=True)[0],
            lambda x, g, b: _norm(x, g, b, relu=True),
            (x, gamma, beta),
        ),
        "slim_conv2d_statistics": (
            lambda x, w, b: gk.slim_conv2d_statistics(x, w, b, 4, padding=1)[0],
            conv,
            (x, weight, bias),
        ),
        "slim_norm_conv2d": (
            lambda x, g, s, w, b: gk.slim_norm_conv2d(x, w, b, 4, padding=1, gamma=g, beta=s, **norm)[0],
            lambda x, g, s, w, b: conv(_norm(x, g, s, relu=True), w, b),
            (x, gamma, beta, weight, bias),
        ),
        "slim_norm_conv2d, known statistics of the batch": (
            lambda x, g, s, w: gk.slim_norm_conv2d(
                x, w, None, 4, padding=1, gamma=g, beta=s, mean=_moments(x)[0], var=_moments(x)[1], batch_stats=True
            )[0],
            lambda x, g, s, w: F.conv2d(_norm(x, g, s), w[:4, :3], padding=1),
            (x, gamma, beta, weight),
        ),
        "slim_conv2d_norm": (
            lambda x, w, b, g, s, r: gk.slim_conv2d_norm(
                x, w, b, 4, padding=1, out_gamma=g, out_beta=s, residual=r, out_relu=True
            )[0],
            lambda x, w, b, g, s, r: _norm(conv(x, w, b), g, s, residual=r, relu=True),
            (x, weight, bias, gamma, beta, residual),
        ),
        "slim_conv2d_norm of a norm": (
            lambda x, w, g, s, og, ob: gk.slim_conv2d_norm(
                x, w, None, 4, padding=1, normalise=True, gamma=g, beta=s, out_gamma=og, out_beta=ob, relu=True
            )[0],
            lambda x, w, g, s, og, ob: _norm(F.conv2d(_norm(x, g, s, relu=True), w[:4, :3], padding=1), og, ob),
            (x, weight, gamma, beta, randn(6), randn(6)),
        ),
        "slim_norm_max_pool2d": (
            lambda x, g, s: gk.slim_norm_max_pool2d(x, 3, 2, 1, gamma=g, beta=s, relu=True)[0],
            lambda x, g, s: F.max_pool2d(_norm(x, g, s, relu=True), 3, 2, 1),
            (x, gamma, beta),
        ),
    }


CASES = _cases()


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def _assert_equal(ours, plain):
    ours, plain = tree_leaves(ours), tree_leaves(plain)
    assert len(ours) == len(plain) > 0
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def _loss(function):
    return lambda *tensors: function(*tensors).square().sum()


def _tangents(tensors):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors)


def _all(tensors):
    return tuple(range(len(tensors)))


def _vjp(function, tensors):
    y, pullback = torch.func.vjp(function, *tensors)
    return y, pullback(torch.ones_like(y))


def _dual(function, tensors):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, v) for t, v in zip(tensors, _tangents(tensors), strict=True)]
        return tuple(forward_ad.unpack_dual(function(*duals)))


def _dual_gradient(function, tensors):
    """Of a graph recorded before: the tangent of the gradient for a dual grad_output."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.ones_like(y), torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y))
        return [tuple(forward_ad.unpack_dual(g)) for g in torch.autograd.grad(y, leaves, dy)]


def _batched_gradients(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    return torch.autograd.grad(y, leaves, _tangents([y.new_empty(3, *y.shape)])[0], is_grads_batched=True)


def _second(function, tensors):
    """Gradients of a gradient penalty."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    gradients = torch.autograd.grad(_loss(function)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)


def _stacked(tensors):
    return tuple(torch.stack((t, 2 * t, t.flip(0))) for t in tensors)


TRANSFORMS = {
    "grad": lambda f, t: torch.func.grad(_loss(f), _all(t))(*t),
    "vjp": _vjp,
    "jvp": lambda f, t: torch.func.jvp(f, t, _tangents(t)),
    "jacrev": lambda f, t: torch.func.jacrev(f, _all(t))(*t),
    "jacfwd": lambda f, t: torch.func.jacfwd(f, _all(t))(*t),
    "vmap": lambda f, t: torch.func.vmap(f)(*_stacked(t)),
    "vmap over x": lambda f, t: torch.func.vmap(f, (0, *(None,) * (len(t) - 1)))(_stacked(t)[0], *t[1:]),
    "per-sample gradients": lambda f, t: torch.func.vmap(torch.func.grad(_loss(f), _all(t)))(*_stacked(t)),
    "gradient of vmap": lambda f, t: torch.func.grad(_loss(torch.func.vmap(f)), _all(t))(*_stacked(t)),
    "hessian": lambda f, t: torch.func.hessian(_loss(f), len(t) - 1)(*t),
    "reverse over reverse": lambda f, t: torch.func.grad(
        lambda *t: sum(g.square().sum() for g in torch.func.grad(_loss(f), _all(t))(*t)), _all(t)
    )(*t),
    "forward mode": _dual,
    "forward mode of the backward pass": _dual_gradient,
    "batched gradients": _batched_gradients,
    "second derivatives": _second,
    "autograd.functional.jvp": lambda f, t: torch.autograd.functional.jvp(f, t, _tangents(t)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_operators_in_transforms(case, transform):
    ours, plain, tensors = case
    of = TRANSFORMS[transform]
    _assert_equal(of(ours, tensors), of(plain, tensors))


OF_A_GRAPH = ("forward mode of the backward pass", "batched gradients", "second derivatives", "autograd.functional.jvp")


@pytest.mark.parametrize("transform", OF_A_GRAPH)
def test_operators_with_pythons_formulas(case, transform, monkeypatch):
    """Where a graph was recorded by Python's formula, as without native code, instead of C++'s."""
    for name in ("slim_conv2d", "slim_linear", "slim_batch_norm", "slim_norm_conv2d"):
        module = sys.modules[f"gradaug_kernels.ops.{name}"]
        monkeypatch.setattr(module, "_apply", module._apply.in_python)
    test_operators_in_transforms(case, transform)


# ---- models


class Net(nn.Module):
    """A stem and a bottleneck block."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.pool = nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, 1)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        y = F.relu(self.bn2(self.conv2(x)))
        y = F.relu(self.bn3(self.conv3(y)) + x)
        return self.fc(y.mean((2, 3)))


@pytest.fixture(params=["plain", "recompute"])
def models(request):
    """A converted network in evaluation and the original, whose statistics are not those of a new network."""
    torch.manual_seed(0)
    net = Net().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return gk.convert(copy.deepcopy(net), recompute=request.param == "recompute").eval(), net.eval()


def _images():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 3, 11, 9, generator=generator, dtype=torch.double)


def _functional(model, training):
    """Parameters to the loss of a batch, with new running statistics in each call."""

    def loss(parameters, images):
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        return torch.func.functional_call(model, (parameters, buffers), (images,)).square().sum()

    return loss, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("training", [False, True])
def test_a_model_in_transforms(models, training):
    found = []
    for model in models:
        model.train(training)
        loss, parameters = _functional(model, training)
        images = _images()
        tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
        gradients = torch.func.grad(loss)(parameters, images)
        derivative = torch.func.jvp(lambda p, f=loss: f(p, _images()), (parameters,), (tangents,))
        curvature = torch.func.jvp(
            lambda x, f=loss, p=parameters: torch.func.grad(f, 1)(p, x), (images,), (torch.ones_like(images),)
        )
        found.append((gradients, derivative, curvature))
    _assert_equal(*found)


def test_per_sample_gradients_of_a_model(models):
    found = []
    for model in models:
        loss, parameters = _functional(model, False)
        per_sample = torch.func.vmap(torch.func.grad(lambda p, x, f=loss: f(p, x[None])), (None, 0))
        found.append(per_sample(parameters, _images()))
    _assert_equal(*found)


def test_linearize_of_a_model(models):
    found = []
    for model in models:
        y, jvp = torch.func.linearize(model, _images())
        found.append((y, jvp(torch.ones_like(_images()))))
    _assert_equal(*found)


def test_a_sub_network_is_differentiated_forward(models):
    model, _ = models
    x, tangent = _images(), torch.linspace(-1, 1, 594, dtype=torch.double).view(2, 3, 11, 9)
    gk.calibrate(model, [0.5], [(x, None)], 1)
    with gk.use_width(model.eval(), 0.5), torch.no_grad():
        y, dy = torch.func.jvp(model, (x,), (tangent,))
        numerical = (model(x + 1e-6 * tangent) - model(x - 1e-6 * tangent)) / 2e-6
        torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(dy, numerical, rtol=1e-4, atol=1e-6)


def test_training_updates_running_statistics_inside_a_transform(models):
    twin, statistics = copy.deepcopy(models[0]).train(), []
    twin(_images())
    models[0].train()
    torch.func.grad(lambda x: models[0](x).sum())(_images())
    for model in (models[0], twin):
        statistics.append(dict(model.named_buffers()))
    _assert_equal(*statistics)


def test_running_statistics_inside_vmap(models):
    model, original = (m.train() for m in models)
    with pytest.raises(RuntimeError, match=r"running statistics must be batched inside vmap to be updated, got"):
        torch.func.vmap(model)(torch.stack((_images(), _images())))
    found = []
    for m in (model, original):
        torch.func.replace_all_batch_norm_modules_(m)
        found.append(torch.func.vmap(m)(torch.stack((_images(), 2 * _images()))))
    _assert_equal(*found)


def test_an_ensemble_updates_the_statistics_of_each_network(models):
    found = []
    for model in models:
        twins = [copy.deepcopy(model).train() for _ in range(2)]
        with torch.no_grad():
            twins[1].conv1.weight.mul_(-1)
        parameters, buffers = torch.func.stack_module_state(twins)
        call = lambda p, b, x, m=twins[0]: torch.func.functional_call(m, (p, b), (x,))  # noqa: E731
        found.append((torch.func.vmap(call, (0, 0, None))(parameters, buffers, _images()), buffers))
    _assert_equal(*found)


# ---- inside AccumulateIntoGrad


def _accumulated(model, penalty, accumulate, dtype=None):
    """The gradients of a loss that takes a derivative of the model by its input."""
    model.zero_grad()
    accumulation = gk.AccumulateIntoGrad(model, dtype)
    if accumulate:
        accumulation.begin_step()
    with accumulation if accumulate else contextlib.nullcontext():
        penalty(model).backward()
    return [p.grad for p in model.parameters()]


PENALTIES = {
    "jvp": lambda m: torch.func.jvp(m, (_images(),), (torch.ones_like(_images()),))[1].square().sum(),
    "grad": lambda m: torch.func.grad(lambda x: m(x).square().sum())(_images()).square().sum(),
    "both": lambda m: m(_images()).sum() + torch.func.grad(lambda x: m(x).square().sum())(_images()).square().sum(),
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_accumulation_leaves_transforms_to_autograd(models, penalty):
    found = [_accumulated(models[0], PENALTIES[penalty], accumulate) for accumulate in (True, False)]
    _assert_equal(*found)


def test_accumulation_from_copies_leaves_transforms_to_autograd():
    model, found = gk.convert(Net()).eval(), []
    for accumulate in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            penalty = lambda m: torch.func.jvp(m, (_images().float(),), (_images().float(),))[1].float().sum()  # noqa: E731
            gradients = _accumulated(model, penalty, accumulate, torch.bfloat16)
        found.append([None if gradient is None else gradient.clone() for gradient in gradients])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None), "the last bias has no part in a derivative"
        assert b is None or (a - b).norm() <= 0.02 * b.norm(), "bfloat16 rounds at 2^-8"


def test_a_buffer_refuses_transforms():
    x, weight = torch.randn(2, 3), torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"weight_grad must be None or a parameter inside function transforms"):
        torch.func.jvp(lambda x: gk.slim_linear(x, weight, weight_grad=torch.zeros(4, 3)), (x,), (x,))


def test_accumulation_refuses_second_derivatives(models):
    accumulation = gk.AccumulateIntoGrad(models[0])
    accumulation.begin_step()
    x = _images().requires_grad_()
    with accumulation:
        loss = models[0](x).square().sum()
        with pytest.raises(RuntimeError, match=r"has no second derivative \(create_graph=True\)"):
            torch.autograd.grad(loss, x, create_graph=True)


def test_a_gradient_of_the_input_alone_leaves_the_buffers(models):
    accumulation = gk.AccumulateIntoGrad(models[0])
    accumulation.begin_step()
    x = _images().requires_grad_()
    with accumulation:
        torch.autograd.grad(models[0](x).square().sum(), x)
    assert all(layer.weight.grad.abs().max() == 0 for layer in accumulation.layers)
