"""The Triton kernels of sliced convolution, in Triton's interpreter, on the operator's own cases.

The interpreter must be chosen before triton is imported, so the kernels run in worker processes, two cases at a time.
It multiplies bfloat16 wrongly, so the half type here is float16; test_gpu_code.py compiles bfloat16.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from support.accuracy import assert_as_accurate
from support.cases import conv_cases
from support.report import report

CASES = {case.name: case for case in conv_cases()}
# The interpreter takes seconds for each group, and what a group does the float32 cases show.
HALF = [name for name, case in CASES.items() if case.groups in (1, case.channels[1])]
RUNS = [*((name, torch.float32) for name in CASES), *((name, torch.float16) for name in HALF)]

pytest.importorskip("triton", reason="triton is not installed")


def run_case(name: str, dtype: torch.dtype, buffer_dtype: torch.dtype | None) -> dict[str, tuple[float, float]]:
    """Check one case in this process; output -> largest error of the kernel and of PyTorch in the same dtype.

    The weight gradient is added to zeros, or to other values in a buffer of `buffer_dtype`.
    """
    from gradaug_kernels._gpu.paths import DIRECTIONS, paths_built
    from gradaug_kernels.ops._conv import memory_format

    case = CASES[name]
    x, weight, bias = case.tensors(dtype)
    depthwise = case.groups == case.channels[0] == case.channels[1] and case.groups > 1
    kernels = paths_built()["depthwise" if depthwise else "triton"]
    forward, input_grad, weight_grad = (kernels[direction] for direction in DIRECTIONS)
    errors = {}

    def check(output, ours, torchs, exact, gradient):
        assert_as_accurate(ours, torchs, exact, gradient)
        largest = [float((r.double() - exact).abs().max()) if exact.numel() else 0.0 for r in (ours, torchs)]
        errors[output] = tuple(largest)

    def reference(kind):
        w = case.slice(weight).to(kind)
        b = None if bias is None else bias[: case.out_channels].to(kind)
        return torch.nn.functional.conv2d(x.to(kind), w, b, *case.geometry)

    exact, torchs = reference(torch.float64), reference(dtype)
    y = forward(x, weight, bias, case.out_channels, *case.geometry)
    check("y", y, torchs, exact, gradient=False)
    assert y.is_contiguous(memory_format=memory_format(x, weight))

    dy = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    dy = dy.contiguous(memory_format=torch.channels_last)

    def gradients(kind):
        if dy.numel() == 0:
            return x.to(kind), torch.zeros_like(case.slice(weight), dtype=kind)
        return torch.ops.aten.convolution_backward(
            *(dy.to(kind), x.to(kind), case.slice(weight).to(kind), None),
            *(*case.geometry[:3], False, [0, 0], case.groups, [True, True, False]),
        )[:2]

    (dx_exact, dw_exact), (dx_torch, dw_torch) = gradients(torch.float64), gradients(dtype)
    check("dx", input_grad(dy, weight, x.shape, *case.geometry), dx_torch, dx_exact, gradient=True)

    dweight = torch.full_like(weight, torch.nan, dtype=buffer_dtype or dtype)
    old = torch.zeros_like(dw_exact) if buffer_dtype is None else torch.randn_like(dw_exact).to(buffer_dtype)
    case.slice(dweight).copy_(old)
    weight_grad(dy, x, dweight, *case.geometry)
    exact, torchs = old.double() + dw_exact, old + dw_torch.to(dweight.dtype)
    check("dw", case.slice(dweight), torchs.to(dweight.dtype), exact, gradient=buffer_dtype is None)
    case.slice(dweight).fill_(torch.nan)
    assert dweight.isnan().all(), "the gradient must be written in its slice only"
    return errors


def poison_memory():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="module")
def results(request):
    """(case, dtype, dtype of the gradient buffer) -> future of its errors, for the tests that were selected."""
    selected = [item.callspec.params for item in request.session.items if item.path == request.path]
    wanted = [(p["name"], p["dtype"], p.get("buffer_dtype")) for p in selected]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(2, os.cpu_count()), mp_context=context, initializer=poison_memory) as pool:
            futures = {key: pool.submit(run_case, *key) for key in wanted}
            yield futures
            pool.shutdown(cancel_futures=True)
    errors = [future.result() for future in futures.values() if not (future.cancelled() or future.exception())]
    worst = {
        output: max((e[output][0] / e[output][1] for e in errors if e[output][1] > 0), default=0.0)
        for output in ("y", "dx", "dw")
    }
    report(
        request.config,
        f"Triton interpreter: {len(errors)} runs; largest error against float64, as a multiple of PyTorch's own: "
        + ", ".join(f"{output} {ratio:.2f}" for output, ratio in worst.items()),
    )


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=lambda v: v if isinstance(v, str) else dtype_name(v))
def test_as_accurate_as_torch(results, name, dtype):
    results[name, dtype, None].result()


@pytest.mark.parametrize("buffer_dtype", [torch.float16, torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("name", ["3x3 with stride 2", "depthwise 3x3"])
@pytest.mark.parametrize("dtype", [torch.float16], ids=dtype_name)
def test_adds_to_a_buffer_of_any_dtype(results, name, dtype, buffer_dtype):
    results[name, dtype, buffer_dtype].result()
