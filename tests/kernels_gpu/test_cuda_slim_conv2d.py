"""Every path of a convolution on a GPU: accuracy, repeatability, and what a training step relies on.

Among these: no synchronisation, other streams, CUDA graphs, and GEMMs that copy no operand.
"""

import pytest
import torch
from support.accuracy import assert_as_accurate
from support.cases import conv_cases

from gradaug_kernels._gpu.paths import DIRECTIONS, Geometry, candidates, paths_built
from gradaug_kernels.ops import slim_conv2d

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

PRECISIONS = ("float16", "bfloat16", "tf32", "float32", "float64")


@pytest.fixture
def dtype(request):
    """The dtype of a precision, with torch's settings for float32 made to agree."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if request.param == "tf32" else "ieee"
    yield torch.float32 if request.param == "tf32" else getattr(torch, request.param)
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value


def geometry_of(case, x, weight, direction="forward"):
    (full_o, full_c, kh, kw), options = weight.shape, case.geometry
    return Geometry(direction, x.dtype, *x.shape, case.out_channels, full_c, full_o, kh, kw, *options)


def exact_and_torchs(case, x, weight, bias, dy):
    """(y, dx, dw) of the slice, in float64 and by torch in the dtype of x."""
    found = []
    for kind in (torch.float64, x.dtype):
        w, b = case.slice(weight).to(kind), None if bias is None else bias[: case.out_channels].to(kind)
        y = torch.nn.functional.conv2d(x.to(kind), w, b, *case.geometry)
        arguments = (dy.to(kind), x.to(kind), w, None, *case.geometry[:3], False, [0, 0], case.groups)
        dx, dw, _ = torch.ops.aten.convolution_backward(*arguments, [True, True, False])
        found.append((y, dx, dw))
    return found


@pytest.mark.parametrize("dtype", PRECISIONS, indirect=True)
@pytest.mark.parametrize("case", conv_cases(), ids=lambda case: case.name)
def test_every_path_is_as_accurate_as_torch(case, dtype):
    x, weight, bias = case.tensors(dtype, "cuda")
    shape = torch.nn.functional.conv2d(x, case.slice(weight), None, *case.geometry).shape
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    dy = dy.contiguous(memory_format=torch.channels_last)
    for path in candidates(geometry_of(case, x, weight)):
        forward, input_grad, weight_grad = (paths_built()[path][direction] for direction in DIRECTIONS)

        def slice_gradient(weight_grad=weight_grad, path=path):
            dweight = torch.full_like(weight, torch.nan)
            case.slice(dweight).zero_()
            weight_grad(dy, x, dweight, *case.geometry)
            found = case.slice(dweight).clone()
            case.slice(dweight).fill_(torch.nan)
            assert dweight.isnan().all(), f"{path} must write the gradient in its slice only"
            return found

        y = forward(x, weight, bias, case.out_channels, *case.geometry)
        dx, dw = input_grad(dy, weight, x.shape, *case.geometry), slice_gradient()
        if x.shape[0] == 0:
            assert y.shape == dy.shape
            assert dx.shape == x.shape
            assert not dw.any()
            continue
        exact, torchs = exact_and_torchs(case, x, weight, bias, dy)
        for ours, by_torch, truth in zip((y, dx, dw), torchs, exact, strict=True):
            if dtype == torch.float64:  # torch's own result is the truth
                torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
            else:
                assert_as_accurate(ours, by_torch, truth)
        if path in ("depthwise", "triton", "cpp"):
            assert torch.equal(slice_gradient(), dw), f"two runs of {path} must give equal bits"


def layer():
    """A sliced layer whose path is Triton's by default, and its gradient's buffer."""
    x = torch.randn(8, 60, 14, 14, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16) / 24
    return x, weight.contiguous(memory_format=torch.channels_last).requires_grad_()


def run(x, weight):
    y = slim_conv2d(x, weight, out_channels=60, padding=1)
    return y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))


def test_nothing_synchronises():
    x, weight = layer()
    run(x, weight)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream():
    x, weight = layer()
    expected = run(x, weight)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.data.mul_(2)  # late: a kernel on another stream would read x before
        found = run(x, weight)
    torch.cuda.synchronize()
    torch.testing.assert_close(found[0], expected[0] * 2)


def test_can_be_captured_in_a_graph():
    x, weight = layer()
    expected = run(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(x, weight)
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_its_tensors_are():
    x, weight = (tensor.detach() for tensor in layer())
    expected = slim_conv2d(x, weight, out_channels=60, padding=1)
    with torch.cuda.device(0):
        found = slim_conv2d(x.to("cuda:1"), weight.to("cuda:1"), out_channels=60, padding=1)
    assert torch.equal(found.to(x.device), expected)


def test_gemms_copy_no_operand():
    x = torch.randn(64, 300, 28, 28, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(2048, 2048, 1, 1, device="cuda", dtype=torch.bfloat16)
    forward, input_grad, weight_grad = (paths_built()["gemm"][direction] for direction in DIRECTIONS)
    options = ([1, 1], [0, 0], [1, 1], 1)
    dy = forward(x, weight, None, 1800, *options)
    dweight = torch.zeros_like(weight)
    operands = weight[:1800, :300].numel() * weight.element_size()
    for call, result in (
        (lambda: forward(x, weight, None, 1800, *options), dy.numel()),
        (lambda: input_grad(dy, weight, x.shape, *options), x.numel()),
        (lambda: weight_grad(dy, x, dweight, *options), 0),
    ):
        call()  # cuBLAS takes its workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        extra = torch.cuda.max_memory_allocated() - before - result * x.element_size()
        assert extra < operands / 2, f"a slice takes {operands} bytes; more than its result was allocated: {extra}"
