"""slim_batch_norm and its gradients: the kernels that serve the CPU, beside PyTorch's batch norm, add and ReLU."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from support.accuracy import assert_as_accurate
from support.cases import BatchNormCase, batch_norm_cases, named
from support.torch_batch_norm import EPS, assert_statistics, torch_batch_norm
from torch import Tensor

import gradaug_kernels as gk
from gradaug_kernels.ops.slim_batch_norm import slim_batch_norm_record_

CASES = named(*batch_norm_cases())
LARGE = named(  # more than one thread, many blocks of sums
    BatchNormCase("large", (4, 61, 40, 41), residual=True, relu=True),
    BatchNormCase("large with few channels", (3, 6, 64, 75), relu=True),
    BatchNormCase("large on NCHW", (4, 23, 40, 41), residual=True, relu=True, x_layout="nchw"),
    BatchNormCase("large planes of NCHW", (1, 2, 190, 191), relu=True, x_layout="nchw"),
    BatchNormCase("large mean of many values", (4, 40, 40, 41), center=300.0, spread=0.1),
)
OPERATOR = importlib.import_module("gradaug_kernels.ops.slim_batch_norm")


def with_cases(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


all_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)


def doubles(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.double() for name, t in tensors.items()}


def leaves(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The differentiable ones among x, weight, bias, residual."""
    names = ("x", "weight", "bias", "residual")
    return {n: tensors[n].detach().requires_grad_() for n in names if tensors[n] is not None}


def ours(case: BatchNormCase, tensors: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, C, H, W], mean [C], var [C]."""
    arguments = {name: tensors[name] for name in ("x", "weight", "bias", "mean", "var", "residual")}
    return gk.slim_batch_norm(**arguments, relu=case.relu, eps=EPS)


def gradients(function, case: BatchNormCase, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    inputs = leaves(tensors)
    y = function(case, {**tensors, **inputs})
    y = y if isinstance(y, Tensor) else y[0]
    grads = torch.autograd.grad(y, list(inputs.values()), tensors["dy"], allow_unused=True)
    return {n: torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(inputs, grads, strict=True)}


def backward_arguments(case: BatchNormCase, tensors: dict[str, Tensor | None], needs_dz: bool = True) -> tuple:
    """Arguments of gradaug::slim_batch_norm_backward."""
    y, mean, var = ours(case, tensors)
    dy, x, weight, bias = (tensors[name] for name in ("dy", "x", "weight", "bias"))
    return dy, x, y if case.relu else None, weight, bias, mean, var, not case.given, needs_dz, EPS


@all_dtypes
@with_cases([*CASES.values(), *LARGE.values()])
def test_forward_is_as_accurate_as_torch(case, dtype):
    tensors = case.tensors(dtype)
    y, mean, var = ours(case, tensors)
    x = tensors["x"]
    assert (y.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)
    assert y.is_contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
    if case.given:
        assert torch.equal(mean, tensors["mean"])
        assert torch.equal(var, tensors["var"])
        assert mean.data_ptr() != tensors["mean"].data_ptr()
    if x.numel() == 0:
        assert y.shape == x.shape
        assert case.given or torch.equal(torch.stack((mean, var)), torch.zeros(2, case.channels))
        return
    assert_as_accurate(y, torch_batch_norm(case, tensors), torch_batch_norm(case, doubles(tensors)))
    if not case.given:
        assert_statistics(x, mean, var)


@all_dtypes
@with_cases([*CASES.values(), *LARGE.values()])
def test_gradients_are_as_accurate_as_torch(case, dtype):
    tensors = case.tensors(dtype)
    if tensors["x"].numel() == 0:
        assert all(g.count_nonzero() == 0 for g in gradients(ours, case, tensors).values())
        return
    got = gradients(ours, case, tensors)
    torch_grads, exact = gradients(torch_batch_norm, case, tensors), gradients(torch_batch_norm, case, doubles(tensors))
    for name, grad in got.items():
        assert (grad.shape, grad.dtype) == (tensors[name].shape, tensors[name].dtype)
        if name in ("weight", "bias"):  # sums over a channel, which may cancel
            assert grad[case.channels :].count_nonzero() == 0
            options = {"terms": float(tensors["dy"].double().square().sum((0, 2, 3)).sqrt().max())}
        else:
            options = {"sharing": grad.numel() // case.channels}
        if name == "x" and not case.given and grad.numel() // case.channels <= 4:
            # Of dz, little is left after what few values have in common: the unit is that of dz.
            std = (tensors["x"].double().var((0, 2, 3), correction=0) + 1e-5).sqrt()[:, None, None]
            options["terms"] = float((tensors["dy"].double() / std).square().mean().sqrt())
        assert_as_accurate(grad, torch_grads[name], exact[name], gradient=True, **options)


@with_cases([*CASES.values(), *LARGE.values()])
def test_float64_equals_torch(case):
    """float64 is computed in float64 throughout: y and all gradients, to its rounding."""
    tensors = case.tensors(torch.float64)
    y, mean, var = ours(case, tensors)
    assert (mean.dtype, var.dtype) == (torch.float64, torch.float64)
    loose = {"rtol": 1e-9, "atol": 1e-9 * max(1, abs(case.center) / case.spread)}
    torch.testing.assert_close(y, torch_batch_norm(case, tensors), **loose)
    expected = gradients(torch_batch_norm, case, tensors)
    for name, grad in gradients(ours, case, tensors).items():
        torch.testing.assert_close(grad / case.spread, expected[name] / case.spread, **loose)


@pytest.mark.parametrize("needs_dz", [False, True])
@with_cases([c for c in CASES.values() if 0 not in c.shape])
def test_backward_equals_the_reference(case, needs_dz):
    """dx, dz, dweight, dbias of the operator, with dz asked for or not, to the rounding of float64."""
    tensors = case.tensors(torch.float64)
    arguments = backward_arguments(case, tensors, needs_dz)
    got = torch.ops.gradaug.slim_batch_norm_backward(*arguments)
    exact = OPERATOR.slim_batch_norm_backward_reference(*arguments)
    for ours_, reference in zip(got, exact, strict=True):
        torch.testing.assert_close(ours_, reference, rtol=1e-9, atol=1e-9)


@with_cases([c for c in CASES.values() if c.channels * c.shape[2] * c.shape[3] < 700 or c.given])
def test_gradcheck(case):
    tensors = case.tensors(torch.float64)
    tensors = {n: None if t is None else t.nan_to_num() for n, t in tensors.items()}
    inputs = leaves(tensors)

    def function(*values):
        return ours(case, {**tensors, **dict(zip(inputs, values, strict=True))})[0]

    if case.spread < 1e-3:  # a step of gradcheck's size is larger than the data
        pytest.skip("finite differences need data that are larger than their step")
    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)


@all_dtypes
def test_expanded_output_gradient(dtype):
    """y.sum().backward() hands over a dy whose strides are all zero."""
    for name in ("64 channels", "243 channels", "129 channels of 1 pixel", "7 channels"):
        case = CASES[name]
        tensors = case.tensors(dtype)
        dense = gradients(ours, case, {**tensors, "dy": torch.ones(case.shape, dtype=dtype)})
        expanded = gradients(ours, case, {**tensors, "dy": torch.ones((), dtype=dtype).expand(case.shape)})
        assert all(torch.equal(dense[name], expanded[name]) for name in dense)


@with_cases([LARGE["large"], LARGE["large on NCHW"]])
def test_repeated_runs_are_equal(case):
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            tensors = case.tensors(torch.bfloat16)
            first, again = ((*ours(case, tensors), *gradients(ours, case, tensors).values()) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        finally:
            torch.set_num_threads(2)


@all_dtypes
@with_cases([*LARGE.values(), BatchNormCase("more channels than rows", (1, 700, 7, 7), residual=True, relu=True)])
def test_threads_do_not_change_the_results(case, dtype):
    """Sums are cut by the sizes alone."""
    tensors, results = case.tensors(dtype), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append((*ours(case, tensors), *gradients(ours, case, tensors).values()))
        finally:
            torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@with_cases(LARGE.values())
def test_one_thread(case):
    """As accurate on one thread, forward and backward."""
    torch.set_num_threads(1)
    try:
        test_forward_is_as_accurate_as_torch(case, torch.float32)
        test_gradients_are_as_accurate_as_torch(case, torch.float32)
    finally:
        torch.set_num_threads(2)


def test_outlier_in_front():
    """The first value of a channel, about which its first sum is taken, may lie anywhere."""
    for layout in ("nhwc", "nchw"):
        case = BatchNormCase("outlier", (2, 40, 30, 31), x_layout=layout)
        tensors = case.tensors(torch.float32)
        tensors["x"][0, :, 0, 0] = 100.0
        _, mean, var = ours(case, tensors)
        assert_statistics(tensors["x"], mean, var)


@all_dtypes
def test_nan_reaches_the_output(dtype):
    """A diverged activation must show in the loss: the ReLU passes NaN, as PyTorch's does."""
    case = CASES["64 channels"]
    tensors = case.tensors(dtype)
    tensors["x"][0, 3, 0, 0] = torch.nan
    y, mean, var = ours(case, tensors)
    assert y[:, 3].isnan().all()
    assert mean[3].isnan()
    assert var[3].isnan()
    assert y.isnan().sum() == y[:, 3].numel()


def test_statistics_are_not_differentiable():
    case = CASES["64 channels"]
    tensors = case.tensors(torch.float32)
    y, mean, var = ours(case, {**tensors, **leaves(tensors)})
    assert (y.requires_grad, mean.requires_grad, var.requires_grad) == (True, False, False)


@with_cases(
    [
        CASES[name]
        for name in (
            "64 channels",
            "7 channels",
            "one channel of one pixel",
            "an empty batch",
            "NCHW of one channel",
            "a channel slice",
            "NHWC among NCHW",
            "given statistics on NCHW",
            "without weight",
            "large mean",
        )
    ]
)
def test_opcheck(case):
    tensors = {n: None if t is None else t.nan_to_num() for n, t in case.tensors(torch.float32).items()}
    torch.library.opcheck(
        torch.ops.gradaug.slim_batch_norm_backward.default, backward_arguments(case, tensors, needs_dz=case.relu)
    )
    tensors |= leaves(tensors)
    names = ("x", "weight", "bias", "mean", "var", "residual")
    torch.library.opcheck(torch.ops.gradaug.slim_batch_norm.default, (*(tensors[n] for n in names), case.relu, EPS))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"x must be \[N, C, H, W\], got 3 dimensions", {"x": torch.zeros(2, 4, 3)}),
        (TypeError, "x must be a floating-point tensor, got torch.int64", {"x": torch.zeros(2, 4, 3, 3).long()}),
        (ValueError, r"weight must have at least 4 elements, got shape \(3,\)", {"weight": torch.zeros(3)}),
        (
            TypeError,
            "bias must be torch.float32 or the dtype of x, got torch.float64",
            {"bias": torch.zeros(4).double()},
        ),
        (ValueError, "mean and var must be given together, got only mean", {"mean": torch.zeros(4)}),
        (
            ValueError,
            r"var must have 4 elements, got shape \(5,\)",
            {"mean": torch.zeros(4), "var": torch.zeros(5)},
        ),
        (
            TypeError,
            "mean must be torch.float32, got torch.bfloat16",
            {"mean": torch.zeros(4).bfloat16(), "var": torch.zeros(4)},
        ),
        (
            ValueError,
            r"residual must have the shape and dtype of x, \(2, 4, 3, 3\) torch.float32, got \(2, 4, 3, 1\)",
            {"residual": torch.zeros(2, 4, 3, 1)},
        ),
        (ValueError, "eps must be at least 0, got -1", {"eps": -1.0}),
    ],
)
def test_errors(error, message, change):
    arguments = {"x": torch.zeros(2, 4, 3, 3), **change}
    with pytest.raises(error, match=message):
        gk.slim_batch_norm(**arguments)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("dy must have the shape and dtype of x", {"dy": torch.zeros(2, 4, 3, 2)}),
        ("y must have the shape and dtype of x", {"y": torch.zeros(2, 4, 3, 3).bfloat16()}),
        ("weight must have at least 4 elements", {"weight": torch.zeros(3)}),
        ("mean must have 4 elements", {"mean": torch.zeros(3)}),
        ("var must be", {"var": torch.zeros(4).double()}),
    ],
)
def test_kernel_refuses_what_it_cannot_read(message, change):
    """The operators can be called past the Python checks; the kernel still reads no memory that is not there."""
    x, stats = torch.zeros(2, 4, 3, 3), torch.ones(4)
    arguments = {"dy": x, "x": x, "y": x, "weight": None, "bias": None, "mean": stats, "var": stats, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.gradaug.slim_batch_norm_backward(**arguments, batch_stats=True, needs_dz=False, eps=EPS)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    """The kernels that a lesser CPU would run, on this one: the accuracy tests in a process of their own."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    found = torch.backends.cpu.get_cpu_capability()
    if found not in order or order.index(capability.upper()) >= order.index(found):
        pytest.skip(f"torch uses {found} here, which is not above {capability}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([*command, "-k", "as_accurate and bfloat16"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


# ---- running statistics


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_running_statistics_are_nn_batch_norms(dtype, momentum):
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(5, momentum=momentum, dtype=dtype)
    running = [buffer.clone() for buffer in norm.buffers()]
    for _ in range(3):
        x = torch.randn(2, 5, 3, 3, dtype=dtype) + 1
        norm(x)
        _, mean, var = gk.slim_batch_norm(x)
        slim_batch_norm_record_(*running, mean, var, 18, momentum)
    for found, expected in zip(running, norm.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_first_running_statistics_move():
    running = [torch.zeros(6), torch.ones(6), torch.tensor(0)]
    slim_batch_norm_record_(*running, torch.ones(4), torch.ones(4), 2, 0.25)
    torch.testing.assert_close(running[0], torch.tensor([0.25] * 4 + [0.0] * 2))
    torch.testing.assert_close(running[1], torch.tensor([1.25] * 4 + [1.0] * 2), msg="the variance is unbiased: 2")
    arguments = (*running, torch.ones(4), torch.ones(4), 2, 0.25)
    torch.library.opcheck(torch.ops.gradaug.slim_batch_norm_record_.default, arguments)
