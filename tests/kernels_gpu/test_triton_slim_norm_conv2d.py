"""The Triton kernels of convolution with a batch norm before and after it, in Triton's interpreter.

As test_triton_slim_conv2d.py: on the convolution's own cases, in worker processes, the half type being float16. What
is depthwise takes another path and is left out.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from kernels_gpu.test_triton_slim_conv2d import dtype_name, poison_memory
from support.cases import ConvCase, conv_cases
from support.report import report
from support.torch_norm_conv import EPS, assert_moments, check_results, options_for, torch_results

pytest.importorskip("triton", reason="triton is not installed")

CASES = {case.name: case for case in conv_cases() if case.groups == 1 or case.groups != case.channels[0]}
HALF = [name for name, case in CASES.items() if case.groups == 1]  # what a group does the float32 cases show
RUNS = [*((name, torch.float32) for name in CASES), *((name, torch.float16) for name in HALF)]
LARGE_MEAN = "large mean"  # of the output: mean 1000, standard deviation 1
# Several tiles of pixels and of channels, the last ones not full.
TILES = ConvCase("several tiles", 3, (17, 19), (5, 70), (1, 1), padding=(0, 0))


def run_case(name: str, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Check one case in this process; output -> largest error of the kernels and of PyTorch in the same dtype."""
    from gradaug_kernels._gpu.triton import slim_norm_conv2d as kernels
    from gradaug_kernels.ops._conv import memory_format

    if name == LARGE_MEAN:
        return check_large_mean(kernels, dtype)
    case = CASES[name]
    options = options_for(case)
    x, gamma, beta, mean, var, weight, bias = tensors = options.tensors(case, dtype)
    norm = (mean, var, gamma, beta, True, options.relu, EPS)
    y, mean, var, y_mean, y_var = kernels.slim_norm_conv2d_triton(
        x, *norm, weight, bias, case.out_channels, *case.geometry, True
    )
    assert y.is_contiguous(memory_format=memory_format(x, weight))
    if y.numel() == 0:
        assert not y_mean.any()
        assert not y_var.any()
        return {}
    assert_moments(y, y_mean, y_var)

    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    dy = dy.contiguous(memory_format=torch.channels_last)
    dweight = torch.full_like(weight, torch.nan, dtype=torch.float32)
    case.slice(dweight).zero_()
    norm = (mean, var, gamma, beta, not options.given, options.relu, EPS)
    dx, dgamma, dbeta = kernels.slim_norm_conv2d_backward__triton(
        dy, x, *norm, weight, dweight, *case.geometry, True, True
    )
    ours = {"y": y, "dx": dx, "dw": case.slice(dweight).to(dtype)}
    if options.affine:
        ours |= {"dgamma": dgamma[: x.shape[1]], "dbeta": dbeta[: x.shape[1]]}
    exact = torch_results(case, options, dy.double(), *(None if t is None else t.double() for t in tensors))
    torchs = torch_results(case, options, dy, *tensors)
    check_results(case, options, x, ours, torchs, exact)
    errors = {}
    for name, result in ours.items():
        errors[name] = tuple(float((r.double() - exact[name]).abs().max()) for r in (result, torchs[name]))
    case.slice(dweight).fill_(torch.nan)
    assert dweight.isnan().all(), "the gradient must be written in its slice only"
    return errors


def check_large_mean(kernels, dtype):
    """The statistics of an output whose mean is large beside its spread, by each of the kernels that sum tiles."""
    x, weight, _ = TILES.tensors(dtype)
    bias = torch.full((weight.shape[0],), 1000, dtype=dtype)
    y, *statistics = kernels.slim_conv2d_statistics_triton(x, weight, bias, TILES.out_channels, *TILES.geometry)
    assert 0.5 < y.double().std((0, 2, 3)).mean() < 2
    assert_moments(y, *statistics)
    assert_moments(y, *kernels.slim_channel_statistics_triton(y))
    return {}


@pytest.fixture(scope="module")
def results(request):
    """(case, dtype) -> future of its errors, for the tests that were selected."""
    selected = [item.callspec.params for item in request.session.items if item.path == request.path]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(2, os.cpu_count()), mp_context=context, initializer=poison_memory) as pool:
            futures = {(p["name"], p["dtype"]): pool.submit(run_case, p["name"], p["dtype"]) for p in selected}
            yield futures
            pool.shutdown(cancel_futures=True)
    errors = [future.result() for future in futures.values() if not (future.cancelled() or future.exception())]
    outputs = sorted({output for found in errors for output in found})
    worst = {o: max((e[o][0] / e[o][1] for e in errors if o in e and e[o][1] > 0), default=0.0) for o in outputs}
    report(
        request.config,
        f"Triton interpreter, norm and convolution: {len(errors)} runs; largest error against float64, as a multiple "
        "of PyTorch's own: " + ", ".join(f"{output} {ratio:.2f}" for output, ratio in worst.items()),
    )


@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=lambda v: v if isinstance(v, str) else dtype_name(v))
def test_as_accurate_as_torch(results, name, dtype):
    results[name, dtype].result()


@pytest.mark.parametrize("name", [LARGE_MEAN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
def test_statistics_of_a_large_mean(results, name, dtype):
    results[name, dtype].result()
