"""The dispatch story: who serves an operator, and what a library that does not fit says."""

import itertools
import re
import sys
import types
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
import torch

from gradaug_kernels import _library


def test_cpp_serves_every_operator_on_the_cpu():
    if not _library.build_config().get("cpu"):
        pytest.skip("built with GRADAUG_BUILD_EXT=0")
    served = {name: devices["cpu"] for name, devices in _library.backends().items()}
    composite = {"slim_channel_statistics", "slim_conv2d_statistics", "slim_norm_conv2d", "slim_norm_conv2d_backward_"}
    assert {name for name, backend in served.items() if backend == "composite"} <= composite
    assert {backend for name, backend in served.items() if name not in composite} == {"cpp"}, served
    assert {"slim_conv2d", "slim_linear", "slim_batch_norm"} <= served.keys()


def test_the_cuda_library_is_built_where_nvcc_is_and_can_be():
    config = _library.build_config()
    assert config.get("cuda") or config["why_no_cuda"], "a reason is given"


def test_a_library_built_for_another_torch_says_what_to_run(monkeypatch, tmp_path):
    config = {"cpu": True, "cuda": False, "torch": "1.0.0", "folder": str(tmp_path)}
    for name in ("_autograd", "_cpu"):
        (tmp_path / f"{name}{EXTENSION_SUFFIXES[0]}").touch()
    monkeypatch.setattr(_library, "build_config", lambda: config)
    with pytest.raises(ImportError, match=r"was built against torch 1\.0\.0, but torch .* is imported; run `pip"):
        _library.load_native()


def test_a_library_that_cannot_be_loaded_says_what_to_run(monkeypatch, tmp_path):
    for name in ("_autograd", "_cpu"):
        (tmp_path / f"{name}{EXTENSION_SUFFIXES[0]}").write_bytes(b"interrupted")
    config = {"cpu": True, "cuda": False, "torch": torch.__version__, "folder": str(tmp_path)}
    monkeypatch.setattr(_library, "build_config", lambda: config)
    monkeypatch.setattr(_library, "_clone_sources", lambda: None)
    with pytest.raises(ImportError, match=r"_autograd was built for torch .* cannot be loaded .*; run `pip install"):
        _library.load_native()


def test_an_operator_has_one_owner_per_device():
    op = torch.ops.gradaug.slim_conv2d.default
    owner = _library.backends()["slim_conv2d"]["cuda"]
    if owner == "reference":
        pytest.skip("nobody serves slim_conv2d on CUDA here")
    message = re.escape(f"slim_conv2d on cuda must have one kernel, got 'other' after '{owner}'")
    with pytest.raises(RuntimeError, match=message):
        _library.use_kernel(op, lambda *args: None, "cuda", "other")


def _image(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


PARAMETERS = {"slim_conv2d": (0, 1, 2), "slim_linear": (0, 1, 2), "slim_batch_norm": (0, 1, 2, 5)}
PARAMETERS["slim_norm_conv2d"] = (0, 3, 4, 8, 9)  # places of the arguments that can take a gradient
WEIGHTS = {"slim_conv2d": 1, "slim_linear": 1, "slim_norm_conv2d": 8}


def _formula_cases():
    """operator and its arguments."""
    torch.manual_seed(0)
    x, weight, bias = _image(3, 5, 7, 6), torch.randn(9, 6, 3, 3), torch.randn(9)
    geometry = ([2, 1], [1, 1], [1, 1], 1)
    rows, matrix = torch.randn(2, 3, 5), torch.randn(9, 6)
    gamma, beta, mean, var = torch.rand(8), torch.randn(8), torch.randn(5), torch.rand(5) + 0.5
    yield "slim_conv2d", (x, weight, bias, 7, *geometry)
    yield "slim_conv2d", (x, weight, None, 9, *geometry)
    yield "slim_linear", (rows, matrix, bias, 7)
    yield "slim_linear", (rows, matrix, None, 9)
    yield "slim_linear", (rows[0], matrix, bias, 9)
    for residual in (None, _image(3, 5, 7, 6)):
        yield "slim_batch_norm", (x, gamma, beta, None, None, residual, True, 1e-5)
        yield "slim_batch_norm", (x, gamma, None, None, None, residual, False, 1e-5)
        yield "slim_batch_norm", (x, None, beta, mean, var, residual, True, 1e-5)
        yield "slim_batch_norm", (x, None, None, mean, var, residual, False, 1e-5)
    convolution = (weight, bias, 7, *geometry, False)
    yield "slim_norm_conv2d", (x, None, None, gamma, beta, True, True, 1e-5, *convolution)
    yield "slim_norm_conv2d", (x, mean, var, gamma, beta, True, False, 1e-5, *convolution)
    yield "slim_norm_conv2d", (x, mean, var, None, beta, False, True, 1e-5, weight, None, 7, *geometry, True)
    yield "slim_norm_conv2d", (x, None, None, gamma, None, True, True, 1e-5, *convolution)


def _formulas(name, attribute):
    """The formulas in Python and in C++, the latter of which a built library must have."""
    calls = getattr(sys.modules[f"gradaug_kernels.ops.{name}"], attribute)
    if not _library.build_config().get("cpu"):
        pytest.skip("built with GRADAUG_BUILD_EXT=0")
    assert calls.in_cpp is not None
    return calls.in_python, calls.in_cpp


def _subsets(name, args):
    places = [i for i in PARAMETERS[name] if args[i] is not None]
    return [takes for n in range(1, len(places) + 1) for takes in itertools.combinations(places, n)]


def _results_and_gradients(call, args, takes, wanted=None, buffer=None):
    """Results, gradients {place: gradient or None} of the wanted among those that take one, and the buffer."""
    args = [a.detach().clone().requires_grad_(i in takes) if torch.is_tensor(a) else a for i, a in enumerate(args)]
    buffer = None if buffer is None else buffer.clone()
    results = call(*args) if buffer is None else call(*args, buffer)
    results = list(results) if isinstance(results, tuple) else [results]
    dy = torch.linspace(-1, 1, results[0].numel()).reshape(results[0].shape)
    wanted = takes if wanted is None else wanted
    gradients = torch.autograd.grad(results[0], [args[i] for i in wanted], dy, allow_unused=True)
    return results, dict(zip(wanted, gradients, strict=True)), buffer


def _assert_same(expected, found):
    for a, b in zip(expected[0], found[0], strict=True):
        assert torch.equal(a, b)
        assert (a.stride(), a.requires_grad) == (b.stride(), b.requires_grad)
    for i, gradient in expected[1].items():
        other = found[1][i]
        assert (gradient is None) == (other is None)
        assert gradient is None or (torch.equal(gradient, other) and gradient.stride() == other.stride())
    assert expected[2] is None or torch.equal(expected[2], found[2])


@pytest.mark.parametrize(("name", "args"), list(_formula_cases()))
def test_autograd_formulas_in_cpp_are_those_in_python(name, args):
    in_python, in_cpp = _formulas(name, "_apply")
    for takes in _subsets(name, args):
        expected, found = (_results_and_gradients(call, args, takes) for call in (in_python, in_cpp))
        _assert_same(expected, found)
        assert all(gradient is not None for gradient in found[1].values())


@pytest.mark.parametrize(("name", "args"), [case for case in _formula_cases() if case[0] in WEIGHTS])
def test_autograd_formulas_add_to_a_buffer_alike(name, args):
    """A buffer takes what autograd would, where the weight needs a gradient and that is asked for; else nothing."""
    weight = WEIGHTS[name]
    start = torch.randn(args[weight].shape)
    for takes in _subsets(name, args):
        for wanted in (takes, takes[:1], takes[-1:]):
            of_autograd = _results_and_gradients(_formulas(name, "_apply")[1], args, takes, wanted)
            expected, found = (
                _results_and_gradients(call, args, takes, wanted, start)
                for call in _formulas(name, "_apply_into_buffer")
            )
            _assert_same(expected, found)
            gradient = of_autograd[1].pop(weight, None)
            assert found[1].pop(weight, None) is None
            if gradient is None:
                assert torch.equal(found[2], start)
            else:
                torch.testing.assert_close(found[2], start + gradient, rtol=1e-5, atol=1e-5)
            _assert_same((*of_autograd[:2], None), found)


def test_a_library_without_a_formula_says_what_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradaug_kernels._autograd", types.ModuleType("gradaug_kernels._autograd"))
    op = torch.ops.gradaug.slim_conv2d.default
    with pytest.raises(ImportError, match=r"_autograd must have the formula of slim_conv2d, got .*; run `pip install"):
        _library.differentiable(op, None, None, None, cpp=True)
