"""Who computes a convolution on the CPU: the lists of csrc/cpu/conv/paths.cpp, what they say, what paths compute."""

import os
import random
import subprocess
import sys

import pytest
import torch
from support import property_oracle
from support.cases import NCHW, ConvCase, conv_cases
from support.property_oracle import Approx

import gradaug_kernels as gk
from gradaug_kernels import _library
from gradaug_kernels.ops.conv_paths import DIRECTIONS, chosen, conv_paths, forced_path, linear_paths, recorded_paths

pytestmark = pytest.mark.skipif(not _library.build_config().get("cpu"), reason="built with GRADAUG_BUILD_EXT=0")

OPS = torch.ops.gradaug
CAPABILITY = torch.backends.cpu.get_cpu_capability()
needs_kernels = pytest.mark.skipif(CAPABILITY not in ("AVX2", "AVX512"), reason="needs AVX2 or AVX-512")

WIDE_POINTWISE = ConvCase("1x1 of 128 channels", 2, (5, 6), (128, 96), (1, 1), padding=(0, 0))
POINTWISE = ConvCase("1x1", 2, (5, 6), (96, 127), (1, 1), padding=(0, 0))
STRIDED = ConvCase("1x1 with stride 2", 8, (16, 16), (24, 20), (1, 1), (2, 2), (0, 0))
STEM = ConvCase("7x7 stem", 2, (33, 31), (3, 20), (7, 7), (2, 2), (3, 3), wider=(0, 4))
LARGE = ConvCase("3x3 of 8 images", 8, (16, 16), (64, 64))
DENSE = ConvCase("3x3", 2, (16, 16), (64, 64))
NARROW = ConvCase("3x3 of 33 channels", 2, (20, 20), (33, 48))
DEPTHWISE = ConvCase("depthwise 3x3", 2, (9, 8), (37, 37), groups=37, wider=(0, 4))
STRIDED_DEPTHWISE = ConvCase("depthwise 3x3 with stride 2", 2, (9, 8), (37, 37), stride=(2, 2), groups=37, wider=(0, 4))
PLANES = ConvCase("3x3 on NCHW", 2, (9, 8), (24, 20), x_layout="nchw", weight_format=NCHW)
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64

# direction, path -> problems that it is chosen for with AVX2 and with AVX-512, by two threads
CHOSEN = {
    ("forward", "depthwise"): [(DEPTHWISE, F32), (DEPTHWISE, BF16), (STRIDED_DEPTHWISE, BF16)],
    ("forward", "winograd_4x4"): [(DENSE, F32)],
    ("forward", "winograd_2x2"): [(NARROW, F32)],
    ("forward", "small_image_gemm"): [(POINTWISE, F32), (POINTWISE, BF16)],
    ("forward", "implicit_gemm"): [(STEM, F32), (STEM, BF16)],
    ("forward", "torch"): [(DENSE, F64), (PLANES, F32), (STRIDED_DEPTHWISE, F32)],
    ("input_grad", "depthwise"): [(DEPTHWISE, F32), (STRIDED_DEPTHWISE, BF16)],
    ("input_grad", "zeros"): [(STRIDED, F32), (STRIDED, BF16)],
    ("input_grad", "winograd_4x4"): [(DENSE, F32)],
    ("input_grad", "winograd_2x2"): [(ConvCase("3x3 to 48 channels", 2, (20, 20), (33, 48)), F32)],
    ("input_grad", "small_image_gemm"): [(WIDE_POINTWISE, F32)],
    ("input_grad", "implicit_gemm"): [(STRIDED, F32), (STEM, BF16)],
    ("input_grad", "torch"): [(DENSE, F64), (PLANES, F32), (STRIDED_DEPTHWISE, F32)],
    ("weight_grad", "depthwise"): [(DEPTHWISE, F32), (DEPTHWISE, BF16)],
    ("weight_grad", "first_layer"): [(STEM, F32), (STEM, BF16)],
    ("weight_grad", "winograd_4x4"): [(LARGE, BF16)],
    ("weight_grad", "winograd_2x2"): [(DENSE, F32)],
    ("weight_grad", "gemm"): [(POINTWISE, F32), (STRIDED, BF16)],
    ("weight_grad", "torch"): [(DENSE, F64), (PLANES, F32), (STRIDED_DEPTHWISE, F32)],
}
PATHS = {
    "forward": ["depthwise", "zeros", "winograd_4x4", "winograd_2x2", "small_image_gemm", "implicit_gemm", "torch"],
    "input_grad": ["depthwise", "zeros", "winograd_4x4", "winograd_2x2", "small_image_gemm", "implicit_gemm", "torch"],
    "weight_grad": ["depthwise", "first_layer", "winograd_4x4", "winograd_2x2", "gemm", "torch"],
}


def verdicts_on(direction, case, dtype):
    x, weight, _ = case.tensors(dtype)
    return conv_paths(direction, x, weight, case.out_channels, *case.geometry)


def result(direction, case, x, weight, dy):
    if direction == "forward":
        return gk.slim_conv2d(x, weight, None, case.out_channels, *case.geometry)
    if direction == "input_grad":
        return OPS.slim_conv2d_input_grad(dy, weight, x.shape, *case.geometry)
    dweight = torch.zeros_like(weight)
    OPS.slim_conv2d_weight_grad_(dy, x, dweight, *case.geometry)
    return case.slice(dweight)


def exact_result(direction, case, x, weight, dy):
    x, w, dy, unit = Approx.of(x), Approx.of(case.slice(weight)), Approx.of(dy), property_oracle.unit(x.dtype)
    if direction == "forward":
        return property_oracle.conv2d(x, w, None, case.geometry, unit)
    if direction == "input_grad":
        return property_oracle.conv2d_input_grad(dy, w, x.value.shape, case.geometry, unit)
    return property_oracle.conv2d_weight_grad(dy, x, w.value.shape, case.geometry, unit)


def tensors_of(case, dtype):
    x, weight, _ = case.tensors(dtype)
    y = gk.slim_conv2d(x, weight, None, case.out_channels, *case.geometry)
    values = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return x, weight, torch.empty_like(y).copy_(values)


# ---- the lists


def test_the_table_has_every_path():
    listed = {(d, path) for d, paths in PATHS.items() for path in paths} - {("forward", "zeros")}
    assert listed == CHOSEN.keys()
    for direction, paths in PATHS.items():
        assert [verdict.path for verdict in verdicts_on(direction, DENSE, F32)] == paths


@needs_kernels
@pytest.mark.parametrize(("direction", "path"), CHOSEN)
def test_every_path_is_chosen_for_something(direction, path):
    for case, dtype in CHOSEN[direction, path]:
        assert path in chosen(verdicts_on(direction, case, dtype)).values(), (case, dtype)


@pytest.mark.skipif(CAPABILITY != "DEFAULT", reason="needs a processor without AVX2, or ATEN_CPU_CAPABILITY=default")
def test_without_kernels_pytorch_computes_everything():
    for (direction, _), problems in CHOSEN.items():
        for case, dtype in problems:
            assert set(chosen(verdicts_on(direction, case, dtype)).values()) == {"torch"}


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    order = ["DEFAULT", "AVX2", "AVX512"]
    if CAPABILITY not in order or order.index(capability.upper()) >= order.index(CAPABILITY):
        pytest.skip(f"torch uses {CAPABILITY} here, which is not above {capability}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def test_a_path_that_is_not_taken_has_a_reason():
    for direction in DIRECTIONS:
        for case in conv_cases():
            if case.batch == 0:
                continue
            for dtype in (F32, BF16, F64):
                verdicts = verdicts_on(direction, case, dtype)
                paths = chosen(verdicts)
                assert paths, case
                for verdict in verdicts:
                    assert not (verdict.cannot and verdict.loses)
                    if verdict.path == "torch":
                        assert not verdict.reason
                    for reason in filter(None, (verdict.cannot, verdict.loses)):
                        assert len(reason.split()) >= 4
                        assert not reason.endswith(".")


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_the_path_that_runs_is_the_one_that_is_printed(dtype):
    for case in conv_cases():
        if case.batch == 0:
            continue
        tensors = tensors_of(case, dtype)
        for direction in DIRECTIONS:
            with recorded_paths() as taken:
                result(direction, case, *tensors)
            assert taken == list(chosen(verdicts_on(direction, case, dtype)).values()), (case, direction)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_of_a_linear_layer_too(dtype):
    for rows, features, out in ((4, 65, 49), (64, 96, 127), (17, 16, 16)):
        x, weight = torch.randn(rows, features, dtype=dtype), torch.randn(out + 5, features + 3, dtype=dtype)
        dy, buffer = torch.randn(rows, out, dtype=dtype), torch.zeros_like(weight)
        calls = (
            lambda x=x, weight=weight, out=out: OPS.slim_linear(x, weight, None, out),
            lambda dy=dy, weight=weight, features=features: OPS.slim_linear_input_grad(dy, weight, features),
            lambda dy=dy, x=x, buffer=buffer: OPS.slim_linear_weight_grad_(dy, x, buffer),
        )
        for direction, call in zip(DIRECTIONS, calls, strict=True):
            with recorded_paths() as taken:
                call()
            assert taken == list(chosen(linear_paths(direction, x, weight, out)).values())


# ---- forced paths


def drawn_case(draw: random.Random) -> ConvCase:
    """A small convolution, often of a kind that some path is made for."""
    kind = draw.choice(["1x1", "3x3", "3x3", "any", "depthwise", "groups", "stem"])
    channels = [draw.choice([1, 3, 4, 8, 16, 17, 31, 32, 33, 47, 58, 64]) for _ in range(2)]
    size = [draw.randint(1, 12) for _ in range(2)]
    kernel, stride, padding, dilation, groups = (3, 3), (1, 1), (1, 1), (1, 1), 1
    if kind == "1x1":
        kernel, padding, stride = (1, 1), (0, 0), draw.choice([(1, 1), (2, 2), (1, 3)])
    elif kind == "3x3":
        padding = draw.choice([(0, 0), (1, 1), (2, 1)])
    elif kind == "any":
        kernel, stride, padding, dilation = (tuple(draw.randint(a, b) for _ in "hw") for a, b in OPTIONS)
    elif kind == "stem":
        channels[0], kernel, stride, padding = draw.randint(1, 4), (5, 5), draw.choice([(1, 1), (2, 2)]), (2, 2)
    else:
        group = 1 if kind == "depthwise" else draw.choice([2, 4, 8])
        groups, stride = draw.randint(2, 20), draw.choice([(1, 1), (2, 2)])
        channels = [group * groups] * 2
    least = [dilation[a] * (kernel[a] - 1) + 1 - 2 * padding[a] for a in (0, 1)]
    size = tuple(max(pair) for pair in zip(size, least, strict=True))
    layout = draw.choice(["nhwc", "nhwc", "wide", "nchw"])
    return ConvCase("drawn", draw.randint(1, 3), size, tuple(channels), kernel, stride, padding, dilation, groups,
                    x_layout=layout)  # fmt: skip


OPTIONS = ((1, 5), (1, 3), (0, 3), (1, 2))  # of kernel, stride, padding and dilation


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_path_that_can_is_right(dtype):
    draw = random.Random(1)
    tried = set()
    for _ in range(160):
        case = drawn_case(draw)
        x, weight, dy = tensors_of(case, dtype)
        for direction in DIRECTIONS:
            verdicts = verdicts_on(direction, case, dtype)
            cannot = {verdict.path for verdict in verdicts if verdict.cannot and "meet no tap" not in verdict.cannot}
            exact = exact_result(direction, case, x, weight, dy).stored(dtype)
            for path in [path for path in PATHS[direction] if path not in cannot | {"zeros"}]:
                with forced_path(path) as taken:
                    ours = result(direction, case, x, weight, dy)
                assert set(taken) - {"zeros"} <= {path}, (case, direction, path)
                assert ((ours.double() - exact.value).abs() <= exact.error).all(), (case, direction, path)
                tried.add((direction, path))
    if CAPABILITY in ("AVX2", "AVX512"):
        large = {("weight_grad", "winograd_4x4")} if dtype == F32 else set()  # which float32 does not allow
        assert tried >= CHOSEN.keys() - {("input_grad", "zeros")} - large


@needs_kernels
def test_a_forced_path_that_cannot_is_refused_in_one_sentence():
    x, weight, _ = POINTWISE.tensors(F32)
    message = "path winograd_4x4 must be able to compute the convolution, but the kernel is not 3x3 with stride 1"
    with pytest.raises(ValueError, match=message), forced_path("winograd_4x4"):
        result("forward", POINTWISE, x, weight, None)
    with (
        pytest.raises(ValueError, match=r"path must be one of depthwise, zeros, .*, torch, got fast"),
        forced_path("fast"),
    ):
        result("forward", POINTWISE, x, weight, None)
    with recorded_paths() as taken:
        result("forward", POINTWISE, x, weight, None)
    assert taken == ["small_image_gemm"], "forced only inside the block"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "backward"}, "direction must be forward, input_grad or weight_grad, got backward"),
        ({"x": torch.empty(96, 5, 6)}, r"x must be \[N, C, H, W\], got 3 dimensions"),
        ({"weight": torch.empty(127, 96)}, r"weight must be \[O, I / groups, KH, KW\], got 2 dimensions"),
        ({"out_channels": 128}, r"out_channels must be in \[1, 127\], got 128"),
        ({"stride": (0, 1)}, "stride must be two integers of at least 1"),
        ({"groups": 0}, "groups must divide 96 input and 127 output channels, got 0"),
    ],
)
def test_questions_that_do_not_fit(arguments, message):
    question = {"direction": "forward", "x": torch.empty(2, 96, 5, 6), "weight": torch.empty(127, 96, 1, 1)}
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    with pytest.raises(ValueError, match=message):
        conv_paths(**{**question, "out_channels": 127, **geometry, **arguments})


def test_integers_have_no_paths():
    x = torch.zeros(2, 96, 5, 6, dtype=torch.int64)
    with pytest.raises(TypeError, match="x must be float32, float64, bfloat16 or float16"):
        conv_paths("forward", x, torch.empty(127, 96, 1, 1), 127, (1, 1), (0, 0), (1, 1), 1)
    with pytest.raises(ValueError, match=r"out_features must be in \[1, 20\], got 21"):
        linear_paths("forward", torch.empty(4, 8), torch.empty(20, 8), 21)
