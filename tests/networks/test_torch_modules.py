"""torch.nn's own tests of its modules (their arguments, inputs, references and errors), run with our layers.

LazyConv2d and LazyLinear have no counterpart: the channels of a layer of adjustable width are known when it is made.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import gradaug_kernels as gk

LAYERS = {nn.Conv2d: gk.FastSlimConv2d, nn.Linear: gk.SlimLinear, nn.BatchNorm2d: gk.SlimBatchNorm2d}
INFOS = {info.module_cls: info for info in module_db if info.module_cls in LAYERS}
# What torch.nn's lists leave out of nn.Conv2d: the arguments beside channels and kernel size.
CONVOLUTIONS = [
    dict(zip(("padding", "padding_mode"), both, strict=True))
    for both in itertools.product((1, (2, 0), "same", "valid"), ("zeros", "reflect", "replicate", "circular"))
] + [{"stride": 2, "dilation": (1, 2), "padding": 2}, {"groups": 4}, {"bias": False}]


def module_inputs(info, dtype, training):
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    cases = [(given.constructor_input, given.forward_input, given.reference_fn) for given in inputs]
    if info.module_cls is nn.Conv2d:
        constructor, forward, _ = cases[0]
        channels = (4, 8, 3)
        cases += [(type(constructor)(*channels, **options), forward, None) for options in CONVOLUTIONS]
    return cases


def pair(info, constructor, dtype):
    """torch.nn's module and our layer, of the same parameters."""
    classes = info.module_cls, LAYERS[info.module_cls]
    made = [cls(*constructor.args, **constructor.kwargs, dtype=dtype) for cls in classes]
    made[1].load_state_dict(made[0].state_dict())
    return made


def run(module, forward):
    """Output, and gradients of the inputs and parameters of a call."""
    args, kwargs = copy.deepcopy((forward.args, forward.kwargs))
    inputs = [*args, *kwargs.values()]
    y = module(*args, **kwargs)
    return y, torch.autograd.grad(y.square().sum(), [*inputs, *module.parameters()])


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1.3e-5 if actual.dtype == torch.float else 1e-10, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls", INFOS)
def test_our_layers_are_torch_modules(cls, dtype, training):
    torch.manual_seed(0)
    info = INFOS[cls]
    assert dtype in info.dtypes
    for constructor, forward, reference in module_inputs(info, dtype, training):
        module, layer = (m.train(training) for m in pair(info, constructor, dtype))
        (y, gradients), (expected, wanted) = run(layer, forward), run(module, forward)
        assert y.shape == expected.shape, constructor
        for a, b in zip((y, *gradients), (expected, *wanted), strict=True):
            assert_close(a, b)
        for (name, a), b in zip(layer.state_dict().items(), module.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
        if reference is not None:
            assert_close(y, reference(layer, *forward.args, **forward.kwargs))
        named = type(forward)(input=(*forward.args, *forward.kwargs.values())[0])
        assert_close(run(layer.eval(), named)[0], run(module.eval(), named)[0])


@pytest.mark.parametrize("cls", INFOS)
def test_our_layers_on_the_meta_device(cls):
    info = INFOS[cls]
    for constructor, forward, _ in module_inputs(info, torch.float32, True):
        module = info.module_cls(*constructor.args, **constructor.kwargs)
        layer = LAYERS[cls](*constructor.args, **constructor.kwargs, device="meta")
        assert {p.device.type for p in (*layer.parameters(), *layer.buffers())} <= {"meta"}
        x = (*forward.args, *forward.kwargs.values())[0].detach()
        y, expected = layer(x.to("meta")), module(x)
        assert (y.is_meta, y.shape, y.dtype) == (True, expected.shape, expected.dtype)


@pytest.mark.parametrize("cls", [cls for cls in INFOS if INFOS[cls].module_error_inputs_func is not None])
def test_our_layers_refuse_what_torch_modules_refuse(cls):
    info = INFOS[cls]
    for case in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float, requires_grad=False, training=True
    ):
        assert case.error_on is ModuleErrorEnum.FORWARD_ERROR
        constructor, forward = case.module_error_input.constructor_input, case.module_error_input.forward_input
        layer = LAYERS[cls](*constructor.args, **constructor.kwargs)
        with pytest.raises(case.error_type, match=case.error_regex):
            layer(*forward.args, **forward.kwargs)
