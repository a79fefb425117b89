"""The dispatch story: who serves an operator, and what a library that does not fit says."""

import re
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


def _formula_cases():
    """operator, its arguments, and the names of those that take a gradient."""
    torch.manual_seed(0)
    x, weight, bias = _image(3, 5, 7, 6), torch.randn(9, 6, 3, 3), torch.randn(9)
    geometry = ([2, 1], [1, 1], [1, 1], 1)
    rows, matrix = torch.randn(2, 3, 5), torch.randn(9, 6)
    gamma, beta, mean, var = torch.rand(8), torch.randn(8), torch.randn(5), torch.rand(5) + 0.5
    yield "slim_conv2d", (x, weight, bias, 7, *geometry), (0, 1, 2)
    yield "slim_conv2d", (x, weight, None, 9, *geometry), (1,)
    yield "slim_conv2d", (x, weight, bias, 7, *geometry), (0, 2)
    yield "slim_linear", (rows, matrix, bias, 7), (0, 1, 2)
    yield "slim_linear", (rows, matrix, None, 9), (0,)
    yield "slim_linear", (rows[0], matrix, bias, 9), (1, 2)
    for residual in (None, _image(3, 5, 7, 6)):
        takes = () if residual is None else (5,)
        yield "slim_batch_norm", (x, gamma, beta, None, None, residual, True, 1e-5), (0, 1, 2, *takes)
        yield "slim_batch_norm", (x, gamma, None, None, None, residual, False, 1e-5), (0, *takes)
        yield "slim_batch_norm", (x, None, beta, mean, var, residual, True, 1e-5), (2, *takes)
        yield "slim_batch_norm", (x, None, None, mean, var, residual, False, 1e-5), (0,)
    convolution = (weight, bias, 7, *geometry, False)
    yield "slim_norm_conv2d", (x, None, None, gamma, beta, True, True, 1e-5, *convolution), (0, 3, 4, 8, 9)
    yield "slim_norm_conv2d", (x, mean, var, gamma, beta, True, False, 1e-5, *convolution), (0, 3, 8)
    yield "slim_norm_conv2d", (x, mean, var, None, beta, False, True, 1e-5, weight, None, 7, *geometry, True), (4, 8)
    yield "slim_norm_conv2d", (x, None, None, gamma, None, True, True, 1e-5, *convolution), (8, 9)


def _results_and_gradients(call, args, takes):
    args = [a.detach().clone().requires_grad_(i in takes) if torch.is_tensor(a) else a for i, a in enumerate(args)]
    results = call(*args)
    results = list(results) if isinstance(results, tuple) else [results]
    results[0].backward(torch.linspace(-1, 1, results[0].numel()).reshape(results[0].shape))
    return results, {i: a.grad for i, a in enumerate(args) if torch.is_tensor(a)}


@pytest.mark.parametrize(("name", "args", "takes"), list(_formula_cases()))
def test_autograd_formulas_in_cpp_are_those_in_python(name, args, takes):
    op = getattr(torch.ops.gradaug, name).default
    in_cpp = _library._in_cpp(op)
    if in_cpp is None:
        pytest.skip("built with GRADAUG_BUILD_EXT=0")
    expected, found = _results_and_gradients(op, args, takes), _results_and_gradients(in_cpp, args, takes)
    for a, b in zip(expected[0], found[0], strict=True):
        assert torch.equal(a, b)
        assert (a.stride(), a.requires_grad) == (b.stride(), b.requires_grad)
    for i, grad in expected[1].items():
        assert (grad is None) == (found[1][i] is None) == (i not in takes)
        assert grad is None or (torch.equal(grad, found[1][i]) and grad.stride() == found[1][i].stride())


def _buffer_cases():
    """Those whose weight takes a gradient, and its place among the arguments."""
    places = {"slim_conv2d": 1, "slim_linear": 1, "slim_norm_conv2d": 8}
    return [(*case, places[case[0]]) for case in _formula_cases() if places.get(case[0]) in case[2]]


@pytest.mark.parametrize(("name", "args", "takes", "weight"), _buffer_cases())
def test_autograd_formulas_in_cpp_add_to_a_buffer(name, args, takes, weight):
    in_cpp = _library._in_cpp(getattr(torch.ops.gradaug, name).default)
    if in_cpp is None:
        pytest.skip("built with GRADAUG_BUILD_EXT=0")
    expected = _results_and_gradients(in_cpp, args, takes)
    buffer = torch.zeros_like(args[weight])
    found = _results_and_gradients(lambda *args: in_cpp(*args, buffer), args, takes)
    assert found[1][weight] is None
    found[1][weight] = buffer
    for a, b in zip(expected[0], found[0], strict=True):
        assert torch.equal(a, b)
    for i in takes:
        assert torch.equal(expected[1][i], found[1][i])
