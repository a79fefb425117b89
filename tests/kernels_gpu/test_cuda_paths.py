"""The rule that gives each convolution of CUDA tensors its path, and the two paths that also run on the CPU."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from support.accuracy import assert_as_accurate
from support.cases import conv_cases, linear_cases
from support.report import report

from gradaug_kernels._gpu import gemm, operators
from gradaug_kernels._gpu import paths as gpu_paths
from gradaug_kernels._gpu.paths import (
    DIRECTIONS,
    PATHS,
    UNMEASURED,
    Card,
    Geometry,
    bucket,
    candidates,
    explain,
    path_for,
    paths_built,
)
from gradaug_kernels.cli import tune
from gradaug_kernels.ops import slim_conv2d as _  # noqa: F401
from gradaug_kernels.ops._conv import memory_format

PAIR = (1, 1)
SLICE_3X3 = Geometry("forward", torch.bfloat16, 8, 60, 14, 14, 60, 64, 64, 3, 3, PAIR, PAIR, PAIR, 1)
needs_triton = pytest.mark.skipif(not gpu_paths.has_triton(), reason="triton is not installed")


# ---- the rule


@needs_triton
@pytest.mark.parametrize("network", tune.NETWORKS)
def test_every_convolution_of_the_networks_has_a_path(request, network):
    model, size = tune.build_network(network)
    lines = []
    for width in (1.0, 0.93, 0.8):
        geometries = tune.convolutions(model, size, 64, width, torch.bfloat16)
        assert len(geometries) >= 10
        for direction in DIRECTIONS:
            paths = {g: path_for(g._replace(direction=direction), "auto") for g in geometries}
            assert set(paths.values()) <= set(paths_built())
            for g, path in paths.items():
                if g.kh == g.kw == g.groups == 1 and g.stride == PAIR:
                    assert path == "gemm"
                elif g.depthwise:
                    assert path == "depthwise"
                elif g.groups == 1 and not g.whole and min(g.c, g.o) >= 16:
                    assert path == "triton"
                else:
                    assert path == "cudnn"
            counts = ", ".join(f"{path} {n}" for path, n in sorted(Counter(paths.values()).items()))
            lines.append(f"{network} at width {width}, {direction}: {len(geometries)} convolutions: {counts}")
    report(request.config, *lines)


@needs_triton
@pytest.mark.parametrize(
    ("changes", "choice", "expected"),
    [
        ({}, "auto", "triton"),
        ({}, "triton", "triton"),
        ({}, "cudnn", "cudnn"),
        ({"o": 64, "c": 64}, "auto", "cudnn"),  # the whole weight
        ({"o": 64, "c": 64}, "triton", "triton"),
        ({"c": 3}, "auto", "cudnn"),
        ({"groups": 4, "full_c": 16}, "auto", "cudnn"),
        ({"groups": 4, "full_c": 16}, "triton", "triton"),
        ({"groups": 60, "full_c": 1}, "auto", "depthwise"),
        ({"groups": 60, "full_c": 1}, "triton", "depthwise"),
        ({"groups": 60, "full_c": 1, "o": 120, "full_o": 128}, "triton", "triton"),  # a channel multiplier
        ({"kh": 1, "kw": 1, "padding": (0, 0)}, "auto", "gemm"),
        ({"kh": 1, "kw": 1, "padding": (0, 0)}, "triton", "gemm"),
        ({"kh": 1, "kw": 1, "padding": (0, 0)}, "cudnn", "cudnn"),
        ({"kh": 1, "kw": 1, "padding": (0, 0), "stride": (2, 2)}, "auto", "triton"),
        ({"kh": 1, "kw": 1, "padding": (0, 1)}, "auto", "triton"),
        ({"dtype": torch.float64}, "triton", "cudnn"),
        ({"n": 2**24}, "triton", "cudnn"),  # more output pixels than 32 bits count
        ({"h": 2**15, "w": 2**12, "n": 1}, "triton", "cudnn"),  # an image with more elements
        ({"groups": 60, "full_c": 1, "stride": (64, 64), "h": 99, "w": 99}, "triton", "cudnn"),  # more residues
    ],
)
def test_path(changes, choice, expected):
    assert path_for(SLICE_3X3._replace(**changes), choice) == expected


@needs_triton
def test_precision_of_float32_decides(monkeypatch):
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    pointwise = {"kh": 1, "kw": 1, "padding": (0, 0), "dtype": torch.float32}
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        conv.fp32_precision, matmul.fp32_precision = "tf32", "tf32"
        assert path_for(SLICE_3X3._replace(dtype=torch.float32), "auto") == "triton"
        assert path_for(SLICE_3X3._replace(**pointwise), "auto") == "gemm"
        matmul.fp32_precision = "ieee"  # cuBLAS would not obey the setting for convolutions
        assert path_for(SLICE_3X3._replace(**pointwise), "auto") == "triton"
        conv.fp32_precision = "ieee"
        assert path_for(SLICE_3X3._replace(**pointwise), "auto") == "gemm"
        assert path_for(SLICE_3X3._replace(dtype=torch.float32), "auto") == "cudnn"
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


# ---- the reasons


POINTWISE = SLICE_3X3._replace(kh=1, kw=1, padding=(0, 0))
DEPTHWISE = SLICE_3X3._replace(groups=60, full_c=1)
OLD_CARD = Card(capability=(7, 5))


@needs_triton
@pytest.mark.parametrize(
    ("geometry", "choice", "card", "expected"),
    [
        (POINTWISE, "auto", UNMEASURED, {"gemm": None}),
        (SLICE_3X3, "auto", UNMEASURED, {"gemm": "not 1x1", "depthwise": "not depthwise", "triton": None}),
        (DEPTHWISE, "auto", UNMEASURED, {"gemm": "not 1x1", "depthwise": None}),
        (SLICE_3X3._replace(c=64, o=64), "auto", UNMEASURED, {"triton": "whole weight", "cudnn": None}),
        (SLICE_3X3._replace(groups=4, full_c=16), "auto", UNMEASURED, {"triton": "groups leave", "cudnn": None}),
        (SLICE_3X3._replace(c=3), "auto", UNMEASURED, {"triton": "fewer than 16 channels", "cudnn": None}),
        (SLICE_3X3._replace(dtype=torch.float64), "auto", UNMEASURED, {"triton": "no float64"}),
        (SLICE_3X3._replace(n=2**24), "auto", UNMEASURED, {"triton": "32 bits", "cudnn": None}),
        (SLICE_3X3, "auto", OLD_CARD, {"triton": "older than compute capability 8.0", "cudnn": None}),
        (DEPTHWISE, "triton", OLD_CARD, {"depthwise": "older than", "triton": "it is depthwise", "cudnn": None}),
        (SLICE_3X3, "cudnn", UNMEASURED, {"triton": "GRADAUG_CUDA=cudnn does not allow it", "cudnn": None}),
        (SLICE_3X3, "auto", Card(measured={bucket(SLICE_3X3): "cudnn"}), {"triton": "measured cudnn", "cudnn": None}),
    ],
)
def test_reasons(geometry, choice, card, expected):
    found = explain(geometry, choice, card)
    assert [name for name, reason in found] == list(PATHS)[: len(found)], "the list's own order"
    assert found[-1] == (path_for(geometry, choice, card), None)
    reasons = dict(found)
    assert all(reasons[name] for name in list(reasons)[:-1]), "every path that is not taken has a reason"
    for name, part in expected.items():
        assert reasons[name] is None if part is None else part in reasons[name]


def test_a_path_that_is_not_built_says_so(monkeypatch):
    monkeypatch.setattr(gpu_paths, "has_triton", lambda: False)
    monkeypatch.setattr(gpu_paths, "paths_built", lambda: {"gemm": {}, "cudnn": {}})
    reasons = dict(explain(SLICE_3X3, "auto"))
    assert reasons["triton"] == "the package triton is not installed"
    assert reasons["cpp"] == "the CUDA extension was not built"
    assert reasons["cudnn"] is None


# ---- tables


@needs_triton
def test_a_table_decides_for_its_buckets_only():
    card = Card(measured={bucket(SLICE_3X3): "cudnn", bucket(SLICE_3X3._replace(h=28, w=28)): "depthwise"})
    assert path_for(SLICE_3X3, "auto", card) == "cudnn"
    assert path_for(SLICE_3X3._replace(c=44), "auto", card) == "cudnn"  # the same bucket
    assert path_for(SLICE_3X3, "triton", card) == "triton"
    assert path_for(SLICE_3X3._replace(h=28, w=28), "auto", card) == "triton"  # it cannot take the path of the table
    for change in ({"c": 59}, {"n": 16}, {"c": 130, "full_c": 256}, {"direction": "input_grad"}, {"stride": (2, 2)}):
        assert path_for(SLICE_3X3._replace(**change), "auto", card) == "triton"


def test_tune_writes_the_table_that_auto_reads(tmp_path, monkeypatch):
    geometries = [SLICE_3X3, SLICE_3X3._replace(c=58), SLICE_3X3._replace(direction="weight_grad")]
    measured = []

    def measure(geometry, device):
        measured.append(geometry)
        fast = "cudnn" if geometry.direction == "forward" else candidates(geometry)[0]
        return {path: 1.0 if path == fast else 2.0 for path in candidates(geometry)}

    device, lines = torch.device("cuda", 0), []
    table = tune.tune(geometries, device, measure, lines.append)
    assert measured == [geometries[0], geometries[2]]  # the second is of the first's bucket
    assert len(lines) == 2
    assert table[bucket(SLICE_3X3)] == "cudnn"

    (tmp_path / "some-card.json").write_text(json.dumps({"paths": table}))
    monkeypatch.setattr(gpu_paths, "TUNING", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name, measured in (("Some Card", table), ("another card", {})):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert gpu_paths.card_of.__wrapped__(device) == Card((9, 0), measured)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_says_that_it_needs_a_gpu():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        tune.main([])


# ---- who is registered


def start(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_one_variable_chooses():
    show = (
        "import json, gradaug_kernels; from gradaug_kernels._library import backends; "
        "print(json.dumps({op: served['cuda'] for op, served in backends().items()}))"
    )
    without_triton = "import sys; sys.modules['triton'] = None; "
    runs = {
        choice: start(show, GRADAUG_CUDA=choice) for choice in ("triton", "cudnn", "reference", "fastest") if choice
    }
    runs["without triton"] = start(without_triton + show)
    runs["triton without triton"] = start(without_triton + show, GRADAUG_CUDA="triton")
    said = {name: process.communicate()[0].splitlines()[-1] for name, process in runs.items()}

    served = {name: json.loads(said[name]) for name in ("cudnn", "reference", "without triton")}
    convolutions = ("slim_conv2d", "slim_conv2d_input_grad", "slim_conv2d_weight_grad_")
    linears = ("slim_linear", "slim_linear_input_grad", "slim_linear_weight_grad_")
    assert all(served["cudnn"][op] == "cudnn" for op in convolutions)
    assert all(served["cudnn"][op] == "gemm" for op in linears)
    assert set(served["reference"].values()) == {"reference"}
    for op in ("slim_norm_conv2d", "slim_norm_conv2d_backward_", "slim_conv2d_statistics", "slim_channel_statistics"):
        assert op not in served["cudnn"] | served["reference"] | served["without triton"], "the composite serves"
    paths = served["without triton"]["slim_conv2d"].split("+")
    assert {"gemm", "cudnn"} <= set(paths)
    assert not {"triton", "depthwise"} & set(paths)
    if gpu_paths.has_triton():
        assert json.loads(said["triton"])["slim_conv2d"] == "triton"
    assert said["triton without triton"].startswith("ImportError: GRADAUG_CUDA=triton needs the package triton")
    assert said["fastest"].endswith("must be one of auto, triton, cpp, cudnn, reference, got 'fastest'")


@pytest.mark.parametrize("name", ["1x1", "2 groups", "3x3 of the full width"])
def test_registered_kernels_pass_their_arguments_on(monkeypatch, name):
    """What the CUDA key calls, called on CPU tensors, whose paths here (gemm, cudnn) run there too."""
    monkeypatch.setattr(operators, "card_of", lambda device: UNMEASURED)
    case = next(case for case in conv_cases() if case.name == name)
    x, weight, bias = case.tensors(torch.float64)
    ops = torch.ops.gradaug
    y = ops.slim_conv2d(x, weight, bias, case.out_channels, *case.geometry)
    forward, input_grad, weight_grad = operators.CONVOLUTIONS.values()
    torch.testing.assert_close(forward(x, weight, bias, case.out_channels, *case.geometry), y)
    dx = ops.slim_conv2d_input_grad(y, weight, x.shape, *case.geometry)
    torch.testing.assert_close(input_grad(y, weight, x.shape, *case.geometry), dx)
    expected, got = torch.zeros_like(weight), torch.zeros_like(weight)
    ops.slim_conv2d_weight_grad_(y, x, expected, *case.geometry)
    weight_grad(y, x, got, *case.geometry)
    torch.testing.assert_close(got, expected)


NORMED_CONVOLUTIONS = ("slim_channel_statistics", "slim_conv2d_statistics", "slim_norm_conv2d")


@needs_triton
@pytest.mark.parametrize("name", ["1x1", "2 groups", "3x3 of the full width"])
def test_norms_are_composed_on_paths_without_them(monkeypatch, name):
    """What the CUDA key calls, on CPU tensors in float64, whose paths are gemm and cudnn."""
    monkeypatch.setattr(operators, "card_of", lambda device: UNMEASURED)
    case = next(case for case in conv_cases() if case.name == name)
    x, weight, bias = case.tensors(torch.float64)
    gamma, beta = torch.randn(2, x.shape[1] + 3, dtype=torch.float64)
    kernels = {op._schema.name.removeprefix("gradaug::"): k for op, k in operators.NORMED_CONVOLUTIONS.items()}
    ops, conv = torch.ops.gradaug, (weight, bias, case.out_channels, *case.geometry)
    norm = (None, None, gamma, beta, False, True, 1e-5)
    for op, arguments in zip(NORMED_CONVOLUTIONS, ((x,), (x, *conv), (x, *norm, *conv, True)), strict=True):
        for actual, expected in zip(kernels[op](*arguments), getattr(ops, op)(*arguments), strict=True):
            torch.testing.assert_close(actual, expected)
    y, mean, var = ops.slim_norm_conv2d(x, *norm, *conv, False)[:3]
    expected_dw, got_dw = torch.zeros_like(weight), torch.zeros_like(weight)
    norm = (mean, var, gamma, beta, True, True, 1e-5)
    expected = ops.slim_norm_conv2d_backward_(y, x, *norm, weight, expected_dw, *case.geometry, True, True)
    got = kernels["slim_norm_conv2d_backward_"](y, x, *norm, weight, got_dw, *case.geometry, True, True)
    for actual, other in zip((*got, got_dw), (*expected, expected_dw), strict=True):
        torch.testing.assert_close(actual, other)


@needs_triton
def test_statistics_on_an_older_card_are_not_triton_s(monkeypatch):
    monkeypatch.setattr(operators, "card_of", lambda device: OLD_CARD)
    x = torch.randn(2, 5, 3, 4)
    found = operators.NORMED_CONVOLUTIONS[torch.ops.gradaug.slim_channel_statistics.default](x)
    for actual, expected in zip(found, torch.ops.gradaug.slim_channel_statistics(x), strict=True):
        torch.testing.assert_close(actual, expected)


@needs_triton
@pytest.mark.parametrize(
    ("input_grad", "weight_grad", "made"),
    [("triton", "triton", 0), ("triton", "cudnn", 1), ("cudnn", "triton", 1), ("cudnn", "cudnn", 1)],
)
def test_norms_are_fused_where_triton_serves(monkeypatch, input_grad, weight_grad, made):
    """Each direction of SLICE_3X3 takes the kernel of its path; the norm's output is made only for the others."""
    kernels = operators.norm_kernels()
    called = []

    def record(module, name, result=None):
        monkeypatch.setattr(module, name, lambda *a, **k: called.append(name) or (result and result(*a, **k)))

    class Ops:
        def slim_batch_norm(self, x, *arguments):
            called.append("slim_batch_norm")
            return (x,)

        def slim_conv2d_weight_grad_(self, *arguments):
            called.append("slim_conv2d_weight_grad_")

        def slim_conv2d_input_grad(self, dy, weight, size, *arguments):
            called.append("slim_conv2d_input_grad")
            return dy.new_empty(size)

        def slim_batch_norm_backward(self, da, x, mask, *arguments):
            called.append("masked" if mask is not None else "not masked")
            return da, None, None, None

    monkeypatch.setattr(kernels, "_OPS", Ops())
    record(kernels, "norm_of", lambda *a: kernels.Norm(torch.empty(3, 60), True))
    record(kernels, "weight_grad")
    record(kernels, "input_grad", lambda dy, weight, size, *a, **k: dy.new_empty(size))
    table = {"input_grad": input_grad, "weight_grad": weight_grad}
    monkeypatch.setattr(operators, "path_on", lambda geometry, device: table[geometry.direction])
    monkeypatch.setattr(operators, "slim_norm_conv2d_backward__reference", lambda *a: called.append("slim_batch_norm"))
    half = {"dtype": torch.bfloat16}
    x, weight, dy = (torch.empty(*shape, **half) for shape in ((8, 60, 14, 14), (64, 64, 3, 3), (8, 60, 14, 14)))
    norm = (torch.empty(60), torch.empty(60), None, None, True, True, 1e-5)
    operators.NORMED_CONVOLUTIONS[torch.ops.gradaug.slim_norm_conv2d_backward_.default](
        dy, x, *norm, weight, torch.empty_like(weight), [1, 1], [1, 1], [1, 1], 1, True, True
    )
    assert called.count("slim_batch_norm") == made
    assert ("weight_grad" in called) == (weight_grad == "triton")
    assert ("input_grad" in called) == (input_grad == "triton")
    if made == 0 or input_grad == "triton":
        assert "not masked" in called, "the kernel of the input gradient zeroed it where the ReLU did"


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "precision", "fused"), [("bfloat16", "ieee", True), ("float32", "tf32", True), ("float32", "ieee", False)]
)
def test_exact_float32_is_not_fused(monkeypatch, dtype, precision, fused):
    monkeypatch.setattr(operators, "path_on", lambda geometry, device: "triton")
    geometry = SLICE_3X3._replace(dtype=getattr(torch, dtype))
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        conv.fp32_precision = precision
        assert operators.fuses_norms(geometry, torch.device("cuda")) == fused
    finally:
        conv.fp32_precision = before


# ---- the paths through ATen


def is_gemm(case):
    return case.kernel == case.stride == PAIR and case.padding == (0, 0) and case.groups == 1


ON_CPU = [("cudnn", case) for case in conv_cases()] + [("gemm", case) for case in conv_cases() if is_gemm(case)]


@pytest.mark.parametrize(("path", "case"), ON_CPU, ids=lambda v: v if isinstance(v, str) else v.name)
def test_convolution_through_aten(path, case):
    x, weight, bias = case.tensors(torch.float32)
    kernels = [paths_built()[path][direction] for direction in DIRECTIONS]
    w = case.slice(weight)
    b = None if bias is None else bias[: case.out_channels]
    exact = torch.nn.functional.conv2d(x.double(), w.double(), None if b is None else b.double(), *case.geometry)
    y = kernels[0](x, weight, bias, case.out_channels, *case.geometry)
    torchs = torch.nn.functional.conv2d(x, w, b, *case.geometry)
    assert_as_accurate(y, torchs, exact)
    assert y.is_contiguous(memory_format=memory_format(x, weight))

    dy = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    dx = kernels[1](dy, weight, x.shape, *case.geometry)
    assert dx.shape == x.shape
    dweight = torch.full_like(weight, torch.nan)
    case.slice(dweight).zero_()
    kernels[2](dy, x, dweight, *case.geometry)
    if dy.numel() > 0:
        (dx_torch, dw_torch), (dx_exact, dw_exact) = (
            torch.ops.aten.convolution_backward(
                *(dy.to(dtype), x.to(dtype), w.to(dtype), None, *case.geometry[:3], False, [0, 0], case.groups),
                [True, True, False],
            )[:2]
            for dtype in (torch.float32, torch.float64)
        )
        assert_as_accurate(dx, dx_torch, dx_exact)
        assert_as_accurate(case.slice(dweight), dw_torch, dw_exact)
    case.slice(dweight).fill_(torch.nan)
    assert dweight.isnan().all(), "the gradient must be written in its slice only"


@pytest.mark.parametrize("case", linear_cases(), ids=lambda case: case.name)
def test_linear_through_aten(case):
    x, weight, bias = case.tensors(torch.float32)
    w = case.slice(weight)
    b = None if bias is None else bias[: case.out_features]
    y = gemm.slim_linear_gemm(x, weight, bias, case.out_features)
    exact = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    assert_as_accurate(y, torch.nn.functional.linear(x, w, b), exact)
    dy = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    dx = gemm.slim_linear_input_grad_gemm(dy, weight, case.features)
    assert_as_accurate(dx, dy @ w, dy.double() @ w.double())
    dweight = torch.full_like(weight, torch.nan)
    case.slice(dweight).zero_()
    gemm.slim_linear_weight_grad__gemm(dy, x, dweight)
    rows, columns = dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1])
    assert_as_accurate(case.slice(dweight), rows @ columns, rows.double() @ columns.double())


def test_gemm_reads_rows_in_place():
    wide = torch.randn(2, 5, 6, 16).permute(0, 3, 1, 2)  # [2, 16, 5, 6], NHWC
    for x in (wide, wide[:, :9], wide[:1, 3:]):
        rows = gemm.rows_of(x)
        assert rows.data_ptr() == x.data_ptr()
        assert rows.stride() == (16, 1)
        torch.testing.assert_close(rows, x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), rtol=0, atol=0)


@pytest.mark.parametrize("target_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_product_is_added_in_the_wider_dtype(monkeypatch, target_dtype):
    def mm(a, b, out_dtype):  # which torch has for CUDA only
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    a, b = torch.randn(7, 33).bfloat16(), torch.randn(33, 5).bfloat16()
    buffer = torch.randn(9, 8).to(target_dtype)
    expected = buffer.double()
    expected[:7, :5] += a.double() @ b.double()
    gemm.add_product_(buffer[:7, :5], a, b)
    eps = torch.finfo(torch.float32 if target_dtype == torch.float32 else torch.bfloat16).eps
    assert (buffer.double() - expected).abs().max() <= 8 * eps * expected.abs().max()
