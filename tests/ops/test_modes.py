"""PyTorch's modes, tensor subclasses, tracers and exporters see the operators, and compute the same."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gradaug_kernels as gk


def network(recompute, training):
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    grouped = [nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    last = [nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = gk.convert(nn.Sequential(*stem, *grouped, *last, nn.Linear(12, 5)), recompute=recompute)
    gk.calibrate(model, [0.5], [(images(), None)], 1)
    return model.train(training)


def images(n=2):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[False, True], ids=["plain", "recompute"])
def recompute(request):
    return request.param


@pytest.fixture(params=[(False, 1.0), (False, 0.5), (True, 1.0), (True, 0.5)], ids=str)
def model(request, recompute):
    training, width = request.param
    net = network(recompute, training)
    with gk.use_width(net, width):
        yield net


def ours(targets):
    return [str(target) for target in targets if "gradaug" in str(target)]


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_both_directions(recompute):
    with Dispatched() as mode:
        network(recompute, False)(images()).sum().backward()
    last = "slim_conv2d_norm" if recompute else "slim_norm_conv2d"
    expected = {"slim_conv2d", "slim_norm_conv2d", last, "slim_linear"}
    expected |= {"slim_conv2d_weight_grad", "slim_norm_conv2d_backward", f"{last}_backward", "slim_linear_input_grad"}
    assert {f"gradaug.{name}.default" for name in expected} <= set(ours(mode.operators))


def test_a_function_mode_sees_and_may_replace_operators(recompute):
    model = network(recompute, False)
    with Called() as mode:
        model(images())
    assert {"gradaug.slim_conv2d.default", "gradaug.slim_linear.default"} <= set(ours(mode.functions))

    class Zero(Called):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            y = super().__torch_function__(func, types, args, kwargs)
            return torch.zeros_like(y) if func is torch.ops.gradaug.slim_linear.default else y

    with Zero():
        assert model(images()).abs().max() == 0


def test_a_default_device_takes_nothing_from_the_way_of_eager_layers(monkeypatch):
    module = gk.FastSlimConv2d(3, 4, 1)
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", None)  # what the dispatcher's way calls
    with torch.device("cpu"):
        module(images())


def test_a_subclass_decides():
    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            functions.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    functions = []
    y = gk.slim_conv2d(images().as_subclass(Logged), torch.ones(4, 3, 1, 1))
    assert type(y) is Logged
    assert ours(functions) == ["gradaug.slim_conv2d.default"]


def test_fake_tensors(model):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(images())
        y = model(x.requires_grad_())
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert (y.shape, dx.shape, type(y), type(dx)) == ((2, 5), x.shape, type(x), type(x))


@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
def test_make_fx(model, tracing_mode):
    def gradient(x):
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    def result(x):
        return model(x)

    x = images().requires_grad_()
    for function in (result, gradient):
        graph = make_fx(function, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
        assert len(ours(node.target for node in graph.graph.nodes)) >= 4
        torch.testing.assert_close(graph(x), function(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(model, strict):
    batch = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (images(),), dynamic_shapes=(batch,), strict=strict)
    assert "gradaug.slim_conv2d.default" in ours(node.target for node in exported.graph.nodes)
    twin, x = copy.deepcopy(model), images(5)
    torch.testing.assert_close(exported.module()(x), twin(x))
    for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)  # the exported module shares the model's


def test_compile_of_a_transform():
    model = network(False, False)

    def gradient(x):
        return torch.func.grad(lambda x: model(x).square().sum())(x)

    torch._dynamo.reset()
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), gradient(images()))


def test_compile_with_a_buffer():
    layer, grads = gk.FastSlimConv2d(3, 4, 3), []
    torch._dynamo.reset()
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        accumulation = gk.AccumulateIntoGrad(layer)
        layer.zero_grad()
        accumulation.begin_step()
        with accumulation:
            call(images()).square().sum().backward()
        grads.append(layer.weight.grad)
    torch.testing.assert_close(*grads)
