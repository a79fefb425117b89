"""slim_conv2d and its gradients: the kernels that serve the CPU, beside PyTorch's own convolution of the slice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_as_accurate
from support.cases import NCHW, NHWC, SOME_CONVS, ConvCase, conv_cases, named
from torch import Tensor
from torch._prims_common import suggest_memory_format

import gradaug_kernels as gk

CASES = named(*conv_cases())
# Larger than one block of any kernel, with the counts that sub-networks have: multiples of nothing.
LARGE = named(
    ConvCase("large 1x1", 2, (17, 19), (301, 187), (1, 1), padding=(0, 0)),
    ConvCase("large 1x1, few input channels", 3, (21, 22), (37, 109), (1, 1), padding=(0, 0)),
    ConvCase("large 1x1, five channels to 61", 2, (21, 22), (5, 61), (1, 1), padding=(0, 0), x_layout="wide"),
    ConvCase("large 1x1, stride 2", 2, (15, 16), (187, 301), (1, 1), (2, 2), (0, 0)),
    ConvCase("large 3x3", 3, (15, 14), (187, 131)),
    ConvCase("large 3x3, stride 2", 2, (29, 28), (67, 131), stride=(2, 2)),
    ConvCase("large 3x3, small image", 3, (7, 7), (301, 187)),
    ConvCase("few pixels 1x1", 2, (5, 6), (96, 127), (1, 1), padding=(0, 0), bias=True),
    ConvCase("few pixels 1x1, odd channels", 3, (4, 3), (131, 61), (1, 1), padding=(0, 0), x_layout="wide"),
    ConvCase("few pixels 1x1, stride 2", 2, (7, 8), (187, 251), (1, 1), (2, 2), (0, 0)),
    ConvCase("few pixels 1x1, padding", 2, (3, 4), (97, 127), (1, 1), padding=(1, 2)),
    ConvCase("few pixels 3x3, stride 2", 2, (8, 7), (125, 127), stride=(2, 2), bias=True),
    ConvCase("few pixels 3x2, dilation 2", 2, (4, 5), (66, 126), (3, 2), padding=(2, 1), dilation=(2, 2)),
    ConvCase("one column of few pixels", 2, (9, 1), (64, 64), (1, 1), padding=(0, 0)),
    ConvCase("one pixel", 5, (1, 1), (96, 187), (1, 1), padding=(0, 0), bias=True),
    ConvCase("large stem", 2, (64, 63), (3, 61), (7, 7), (2, 2), (3, 3), wider=(0, 3)),
    ConvCase("large stem to 16 channels", 2, (64, 63), (3, 16), stride=(2, 2), wider=(0, 3)),
    ConvCase("large stem of one column", 2, (700, 1), (3, 5), wider=(0, 3)),
    ConvCase("many 3x3 tiles", 3, (19, 22), (37, 53), bias=True),
    ConvCase("many 3x3 tiles without padding", 2, (24, 21), (45, 33), padding=(0, 0), weight_format=NCHW),
    ConvCase("many 3x3 tiles of 100 channels", 2, (30, 25), (100, 99)),
    ConvCase("many 3x3 tiles of 58 channels", 2, (30, 25), (58, 59), bias=True),
    ConvCase("several blocks of 3x3 tiles", 2, (58, 55), (70, 66)),
    ConvCase("many 3x3 tiles, padding 2", 2, (20, 19), (33, 48), padding=(2, 2), x_layout="wide"),
    ConvCase("large groups", 2, (15, 14), (128, 128), groups=16, wider=(4, 16)),
    ConvCase("large groups of 4", 2, (29, 70), (68, 68), groups=17, wider=(0, 4)),
    ConvCase("large depthwise", 2, (29, 31), (187, 187), groups=187, wider=(0, 5)),
    ConvCase("large depthwise on wide rows", 1, (40, 150), (37, 37), stride=(2, 1), groups=37, wider=(0, 5)),
    ConvCase("large depthwise 5x5", 2, (30, 29), (93, 93), (5, 5), (2, 2), (2, 2), groups=93, wider=(0, 5)),
)
SOME_LARGE = (
    "large 1x1",
    "large 1x1, five channels to 61",
    "large 3x3",
    "large 3x3, small image",
    "few pixels 1x1, odd channels",
    "few pixels 1x1, padding",
    "few pixels 3x2, dilation 2",
    "one pixel",
    "large stem to 16 channels",
    "many 3x3 tiles",
    "many 3x3 tiles of 100 channels",
    "several blocks of 3x3 tiles",
    "large groups",
    "large depthwise",
    "large depthwise 5x5",
)
TRACED = (
    "1x1",
    "1x1 with padding",
    "3x3",
    "3x3 with dilation 2",
    "3x3 from one channel to one",
    "3x3 on swapped rows and columns",
    "3x3 of an empty batch",
    "1x1 in 3 groups",
    "depthwise 5x5, stride 2",
    "depthwise on a channel slice",
    "depthwise of 67 channels on wide rows",
    "depthwise 3x5 with asymmetric geometry",
    "depthwise on a channel slice, stride 2",
    "5x5 in 6 groups of 4 channels",
)


def with_cases(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def with_dtypes(*dtypes):
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype)[6:])


all_dtypes = with_dtypes(torch.float32, torch.bfloat16, torch.float16)
# PyTorch's own float16 convolutions take seconds on the large cases; the blocking does not depend on the dtype.
fast_dtypes = with_dtypes(torch.float32, torch.bfloat16)


# ---- the oracle slices the weight and leaves the rest to PyTorch; three functions with one signature each for ours


def torch_forward(case: ConvCase, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias[: case.out_channels]
    return F.conv2d(x, case.slice(weight), bias, *case.geometry)


def torch_gradients(case: ConvCase, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dx [N, C, H, W] and dw [out, in / groups, KH, KW], in the dtype of x."""
    x, w = x.detach().requires_grad_(), case.slice(weight).detach().requires_grad_()
    return torch.autograd.grad(F.conv2d(x, w, None, *case.geometry), (x, w), dy)


def forward(case: ConvCase, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return gk.slim_conv2d(x, weight, bias, case.out_channels, *case.geometry)


def input_grad(case: ConvCase, x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    return torch.ops.gradaug.slim_conv2d_input_grad(dy, weight, x.shape, *case.geometry)


def weight_grad(case: ConvCase, x: Tensor, dy: Tensor, dweight: Tensor) -> Tensor:
    torch.ops.gradaug.slim_conv2d_weight_grad_(dy, x, dweight, *case.geometry)
    return dweight


def output_gradient(case: ConvCase, x: Tensor, weight: Tensor) -> Tensor:
    """dy [N, out, OH, OW], in the layout that the forward gives."""
    y = forward(case, x, weight, None)
    values = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return torch.empty_like(y).copy_(values)


def memory_format(*tensors: Tensor) -> torch.memory_format:
    return NHWC if any(suggest_memory_format(tensor) == NHWC for tensor in tensors) else NCHW


def doubles(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


# ---- correctness


def check_forward(case: ConvCase, dtype: torch.dtype) -> None:
    x, weight, bias = case.tensors(dtype)
    y = forward(case, x, weight, bias)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format(x, weight))
    assert_as_accurate(y, torch_forward(case, x, weight, bias), torch_forward(case, *doubles(x, weight, bias)))


def check_gradients(case: ConvCase, dtype: torch.dtype) -> None:
    x, weight, _ = case.tensors(dtype)
    dy = output_gradient(case, x, weight)
    exact_dx, exact_dw = torch_gradients(case, *doubles(x, weight, dy))
    torch_dx, torch_dw = torch_gradients(case, x, weight, dy)

    dx = input_grad(case, x, weight, dy)
    assert dx.dtype == dtype
    assert dx.is_contiguous(memory_format=memory_format(dy, weight))
    assert_as_accurate(dx, torch_dx, exact_dx, gradient=True)

    for buffer_dtype in {dtype, torch.float32}:
        dweight = torch.full_like(weight, torch.nan, dtype=buffer_dtype)
        case.slice(dweight).zero_()
        weight_grad(case, x, dy, dweight)
        assert_as_accurate(case.slice(dweight), torch_dw, exact_dw, gradient=True)
        assert dweight.isnan().sum() == dweight.numel() - exact_dw.numel(), "memory outside the slice was written"


@all_dtypes
@with_cases(CASES.values())
def test_forward_is_as_accurate_as_torch(case, dtype):
    check_forward(case, dtype)


@all_dtypes
@with_cases(CASES.values())
def test_gradients_are_as_accurate_as_torch(case, dtype):
    check_gradients(case, dtype)


@fast_dtypes
@with_cases(LARGE.values())
def test_several_blocks(case, dtype):
    check_forward(case, dtype)
    check_gradients(case, dtype)


@with_dtypes(torch.bfloat16, torch.float16)
@with_cases([*CASES.values(), *(LARGE[name] for name in SOME_LARGE)])
def test_float32_parameters_are_rounded_as_they_are_read(case, dtype):
    x, weight, bias = case.tensors(torch.float32)
    x = x.to(dtype)
    rounded = (weight.to(dtype), None if bias is None else bias.to(dtype))
    y = forward(case, x, weight, bias)
    assert y.dtype == dtype
    assert_as_accurate(y, torch_forward(case, x, *rounded), torch_forward(case, *doubles(x, weight, bias)))
    dy = output_gradient(case, x, rounded[0])
    dx = input_grad(case, x, weight, dy)
    assert dx.dtype == dtype
    exact_dx, _ = torch_gradients(case, *doubles(x, weight, dy))
    assert_as_accurate(dx, torch_gradients(case, x, rounded[0], dy)[0], exact_dx, gradient=True)


@with_cases(CASES.values())
def test_float64(case):
    x, weight, bias = case.tensors(torch.float64)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(forward(case, x, weight, bias), torch_forward(case, x, weight, bias), **close)
    dy = output_gradient(case, x, weight)
    dx, dw = torch_gradients(case, x, weight, dy)
    torch.testing.assert_close(input_grad(case, x, weight, dy), dx, **close)
    torch.testing.assert_close(case.slice(weight_grad(case, x, dy, torch.zeros_like(weight))), dw, **close)


@fast_dtypes
@with_cases([*(CASES[name] for name in SOME_CONVS), *LARGE.values()])
def test_weight_gradient_is_added_to_the_buffer(case, dtype):
    x, weight, _ = case.tensors(dtype)
    dy = output_gradient(case, x, weight)
    buffer = torch.zeros_like(weight, dtype=torch.float32)
    once = weight_grad(case, x, dy, buffer).clone()
    twice = weight_grad(case, x, dy, buffer)
    torch.testing.assert_close(twice, 2 * once)


@fast_dtypes
@with_cases([*(CASES[name] for name in SOME_CONVS), *LARGE.values()])
def test_repeats_are_equal(case, dtype):
    x, weight, bias = case.tensors(dtype)
    dy = output_gradient(case, x, weight)

    def run():
        dweight = weight_grad(case, x, dy, torch.zeros_like(weight))
        return forward(case, x, weight, bias), input_grad(case, x, weight, dy), dweight

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@all_dtypes
@with_cases([CASES[name] for name in SOME_CONVS])
def test_expanded_output_gradient(case, dtype):
    """y.sum().backward() hands over a dy whose strides are all zero."""
    x, weight, _ = case.tensors(dtype)
    dy = torch.ones((), dtype=dtype).expand(forward(case, x, weight, None).shape)
    exact_dx, exact_dw = torch_gradients(case, *doubles(x, weight, dy))
    torch_dx, torch_dw = torch_gradients(case, x, weight, dy)
    assert_as_accurate(input_grad(case, x, weight, dy), torch_dx, exact_dx)
    dweight = weight_grad(case, x, dy, torch.zeros_like(weight))
    assert_as_accurate(case.slice(dweight), torch_dw, exact_dw)


# ---- autograd


@with_cases(CASES.values())
def test_gradcheck(case):
    x, weight, bias = (None if t is None else t.nan_to_num().requires_grad_() for t in case.tensors(torch.float64))
    small = max(x.numel(), weight.numel()) < 60
    assert torch.autograd.gradcheck(lambda *args: forward(case, *args), (x, weight, bias), fast_mode=not small)


def test_gradients_of_the_function():
    case = CASES["1x1 on one pixel"]
    x, weight, bias = (None if t is None else t.nan_to_num().requires_grad_() for t in case.tensors(torch.float32))
    y = forward(case, x, weight, bias)
    dy = torch.randn_like(y)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert torch.equal(dx, input_grad(case, x, weight.detach(), dy))
    assert torch.equal(dweight, weight_grad(case, x.detach(), dy, torch.zeros_like(weight)))


@with_cases([CASES[name] for name in TRACED])
def test_opcheck(case):
    x, weight, bias = (None if t is None else t.nan_to_num() for t in case.tensors(torch.float32))
    dy = output_gradient(case, x, weight)
    geometry = [*(list(pair) for pair in case.geometry[:3]), case.groups]
    ops = torch.ops.gradaug
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(ops.slim_conv2d.default, (*leaves, case.out_channels, *geometry))
    torch.library.opcheck(ops.slim_conv2d_input_grad.default, (dy, weight, list(x.shape), *geometry))
    torch.library.opcheck(ops.slim_conv2d_weight_grad_.default, (dy, x, torch.zeros_like(weight), *geometry))


@pytest.mark.parametrize("buffer_dtype", [torch.float32, torch.bfloat16])
def test_inside_autocast(buffer_dtype):
    """The forward is cast like F.conv2d; the gradient kernels compute in the dtype that they are given."""
    case = CASES["1x1"]
    x, weight, _ = case.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = forward(case, x, weight, None)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, forward(case, x.bfloat16(), weight, None))
    dy = torch.randn(y.shape)
    with torch.autocast("cpu", torch.bfloat16):
        dx = input_grad(case, x, weight, dy)
        dweight = weight_grad(case, x, dy, torch.zeros_like(weight, dtype=buffer_dtype))
    assert torch.equal(dx, input_grad(case, x, weight, dy))
    assert torch.equal(dweight, weight_grad(case, x, dy, torch.zeros_like(weight, dtype=buffer_dtype)))


# ---- which kernels run


def torch_convolutions(dtype: torch.dtype) -> set[str]:
    """PyTorch's own convolutions that a dense NHWC case calls, forward and backward."""
    case = CASES["1x1"]
    x, weight, _ = case.tensors(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.profiler.profile() as profile:
        y = forward(case, x, weight, None)
        y.backward(torch.randn(y.shape).contiguous(memory_format=torch.channels_last))
    return {event.name for event in profile.events() if event.name.startswith("aten::") and "conv" in event.name}


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs AVX2 or AVX-512")
def test_dense_convolutions_run_on_our_kernels():
    assert torch_convolutions(torch.float32) == set()
    assert torch_convolutions(torch.float64) != set(), "what the profiler shows where PyTorch's run"


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    """The kernels that a lesser CPU would run, on this one: the accuracy tests in a process of their own."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    found = torch.backends.cpu.get_cpu_capability()
    if found not in order or order.index(capability.upper()) >= order.index(found):
        pytest.skip(f"torch uses {found} here, which is not above {capability}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    chosen = "(as_accurate and (float32 or bfloat16) and not large) or our_kernels"
    done = subprocess.run([*command, "-k", chosen], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


# ---- errors: expected, then received


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"x must be \[N, C, H, W\], got 3 dimensions", {"x": torch.zeros(4, 5, 5)}),
        (TypeError, "x must be a floating-point tensor, got torch.int32", {"x": torch.zeros(1, 4, 5, 5).int()}),
        (ValueError, r"weight must be \[O, I / groups, KH, KW\], got 2 dim", {"weight": torch.zeros(8, 6)}),
        (
            TypeError,
            "weight must have the dtype of x, torch.float32, got torch.float64",
            {"weight": torch.zeros(8, 6, 3, 3).double()},
        ),
        (
            TypeError,
            "weight must have the dtype of x, torch.bfloat16, or be torch.float32, got torch.float16",
            {"x": torch.zeros(1, 4, 5, 5).bfloat16(), "weight": torch.zeros(8, 6, 3, 3).half()},
        ),
        (
            TypeError,
            "bias must have the dtype of x, torch.float32, got torch.bfloat16",
            {"bias": torch.zeros(8).bfloat16()},
        ),
        (ValueError, r"out_channels must be in \[1, 8\], got 9", {"out_channels": 9}),
        (ValueError, r"out_channels must be in \[1, 8\], got 0", {"out_channels": 0}),
        (ValueError, "groups must divide 4 input and 8 output channels, got 3", {"groups": 3}),
        (
            ValueError,
            r"x must have between 1 and 6 channels \(6 for each of 1 groups\), got 7",
            {"x": torch.zeros(1, 7, 5, 5)},
        ),
        (ValueError, r"bias must have at least 8 elements, got shape \(7,\)", {"bias": torch.zeros(7)}),
        (ValueError, r"stride must be two integers of at least 1, got \(0, 1\)", {"stride": (0, 1)}),
        (ValueError, r"padding must be two integers of at least 0, got \(-1, -1\)", {"padding": -1}),
        (ValueError, r"dilation must be two integers of at least 1, got \(1,\)", {"dilation": (1,)}),
        (ValueError, "as large as the dilated kernel, 7, got 5 along height", {"dilation": 3}),
    ],
)
def test_errors(error, message, change):
    arguments = {"x": torch.zeros(1, 4, 5, 5), "weight": torch.zeros(8, 6, 3, 3), **change}
    with pytest.raises(error, match=message):
        gk.slim_conv2d(**arguments)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("channels", "kernel", "stride"), [(20, 1, 1), (20, 1, 2), (20, 3, 2), (3, 3, 2), (3, 7, 2)])
def test_weight_gradient_of_odd_batches(batch, channels, kernel, stride):
    """Pairs of images: the last may have no partner, and a flattened image no second half."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, 9, 11, generator=generator).bfloat16().to(memory_format=torch.channels_last)
    weight = torch.zeros(18, channels + 1, kernel, kernel)
    geometry = [[stride, stride], [kernel // 2, kernel // 2], [1, 1]]
    y = torch.nn.functional.conv2d(x, weight[:17, :channels].bfloat16(), None, *geometry)
    dy = torch.randn(y.shape, generator=generator).bfloat16().to(memory_format=torch.channels_last)
    torch.ops.gradaug.slim_conv2d_weight_grad_(dy, x, weight, *geometry, 1)
    exact = torch.nn.grad.conv2d_weight(x.double(), (17, channels, kernel, kernel), dy.double(), *geometry)
    # A lost pixel shows far above one rounding to bfloat16, which PyTorch's own kernels add where ours do not serve.
    bound = 0.01 * exact.abs().max().item()
    torch.testing.assert_close(weight[:17, :channels].double(), exact, rtol=0, atol=bound)
    assert not weight[17:].any()
    assert not weight[:, channels:].any()


def geometries() -> list[tuple[tuple[int, ...], ...]]:
    """kernel, stride, padding, dilation of one axis: paddings in every residue class of stride and dilation."""
    return [
        (kernel, stride, padding, dilation)
        for kernel in (1, 2, 3)
        for stride in (1, 2, 3)
        for padding in range(5)
        for dilation in ((1, 2, 3) if kernel > 1 else (1,))
    ]


@pytest.mark.parametrize(("channels", "groups"), [(5, 1), (3, 1), (6, 6), (8, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_every_residue_of_padding(channels, groups, dtype):
    """Padding need not be a multiple of stride or dilation: which input meets which tap depends on the residues.

    Small integers, whose sums every dtype holds exactly, so that one lost or misplaced product shows.
    """
    generator = torch.Generator().manual_seed(0)
    axes = geometries()
    for i, (kernel, stride, padding, dilation) in enumerate(axes):
        # The other axis has the same list in another order.
        other = axes[(8 * i + 3) % len(axes)]
        pairs = [list(pair) for pair in zip((kernel, stride, padding, dilation), other, strict=True)]
        kernels, *geometry = pairs
        size = [
            max(s, d * (k - 1) + 1 - 2 * p) for s, k, p, d in zip((5, 6), *(pairs[j] for j in (0, 2, 3)), strict=True)
        ]
        x = torch.randint(-2, 3, (2, channels, *size), generator=generator).double()
        w = torch.randint(-1, 2, (channels, channels // groups, *kernels), generator=generator).double()
        exact_y = F.conv2d(x, w, None, *geometry, groups)
        dy = torch.randint(-1, 2, exact_y.shape, generator=generator).double()
        exact = (
            exact_y,
            torch.nn.grad.conv2d_input(x.shape, w, dy, *geometry, groups),
            torch.nn.grad.conv2d_weight(x, w.shape, dy, *geometry, groups),
        )
        x, w, dy = (t.to(dtype).contiguous(memory_format=NHWC) for t in (x, w, dy))
        ops = torch.ops.gradaug
        dw = torch.zeros(w.shape)
        ops.slim_conv2d_weight_grad_(dy, x, dw, *geometry, groups)
        ours = (
            ops.slim_conv2d(x, w, None, channels, *geometry, groups),
            ops.slim_conv2d_input_grad(dy, w, list(x.shape), *geometry, groups),
            dw,
        )
        for name, got, expected in zip(("y", "dx", "dw"), ours, exact, strict=True):
            assert torch.equal(got.double(), expected), f"{name} of {pairs}, {size}"


@pytest.mark.skipif(sys.platform != "linux", reason="maps pages as Linux does")
def test_weight_gradients_read_nothing_beyond_their_images():
    program = Path(__file__).parents[1] / "support" / "guarded_memory.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, program], check=True, env=environment, timeout=300)
