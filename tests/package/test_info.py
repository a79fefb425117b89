"""`gradaug info --conv` and `--model`: who computes a convolution, or each layer of a network."""

import json

import pytest
import torch

from gradaug_kernels import _library
from gradaug_kernels.cli.main import main
from gradaug_kernels.cli.paths import parse_convolution
from gradaug_kernels.ops.conv_paths import DIRECTIONS, chosen, conv_paths

needs_library = pytest.mark.skipif(not _library.build_config().get("cpu"), reason="built with GRADAUG_BUILD_EXT=0")
needs_kernels = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs AVX2 or AVX-512"
)


def rows_of(capsys, *arguments):
    assert main(["info", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["paths"]


def test_the_text_of_a_convolution():
    conv = parse_convolution("8,64,56,40,128,3x5,2,1x2,1,4", "96,256")
    assert conv.shape == (8, 64, 56, 40)
    assert (conv.out, conv.full) == (128, (256, 24))
    assert (conv.kernel, conv.stride, conv.padding, conv.dilation, conv.groups) == ((3, 5), (2, 2), (1, 2), (1, 1), 4)
    assert parse_convolution("8,64,56,56,128,1").padding == (0, 0)
    assert parse_convolution("8,64,56,56,128,1").full == (128, 64)


@needs_library
@pytest.mark.parametrize("text", ["2,64,14,14,96,3,1,1", "2,64,15,14,96,3,2,1", "2,64,14,14,64,3,1,1,1,64"])
def test_a_convolution_has_a_path_and_a_reason_for_each_before_it(text, capsys):
    conv = parse_convolution(text)
    x = torch.empty(conv.shape).contiguous(memory_format=torch.channels_last)
    weight = torch.empty(*conv.full, *conv.kernel).contiguous(memory_format=torch.channels_last)
    rows = rows_of(capsys, "--conv", text, "--device", "cpu")
    assert list(dict.fromkeys(row["direction"] for row in rows)) == list(DIRECTIONS)
    for direction in DIRECTIONS:
        verdicts = conv_paths(direction, x, weight, conv.out, conv.stride, conv.padding, conv.dilation, conv.groups)
        of_direction = [row for row in rows if row["direction"] == direction]
        assert {row["path"] for row in of_direction} == set(chosen(verdicts).values())
        names = list(dict.fromkeys(verdict.path for verdict in verdicts))
        for row in of_direction:
            assert [*row["rejected"], row["path"]] == names[: len(row["rejected"]) + 1]
            assert all(row["rejected"].values())


@needs_library
@needs_kernels
def test_a_convolution_as_text(capsys):
    assert main(["info", "--conv", "8,24,16,16,20,1,2", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"paths, with {torch.backends.cpu.get_cpu_capability()} on the CPU"
    assert "  cpu input gradient, rows 1 of 2, columns 0 of 2: zeros" in lines
    assert "    not depthwise: the convolution is not in groups" in lines
    assert main(["info", "--conv", "8,24,16,16,20,1,2", "--device", "cpu", "--dtype", "float64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("    not ")][1:] == [
        "  cpu forward: torch",
        "  cpu input gradient: torch",
        "  cpu weight gradient: torch",
    ]
    assert "    not implicit_gemm: the images are float64" in lines


def test_the_rule_of_a_gpu_without_one(capsys):
    rows = rows_of(capsys, "--conv", "32,64,56,56,64,3,1,1", "--device", "cuda", "--dtype", "bfloat16")
    assert [(row["device"], row["direction"]) for row in rows] == [("cuda", direction) for direction in DIRECTIONS]
    assert all(row["path"] not in row["rejected"] for row in rows)


@needs_library
@needs_kernels
def test_every_layer_of_a_model(capsys):
    rows = rows_of(capsys, "--model", "cifar_resnet", "--images", "4,3,32,32")
    assert rows[0] == {
        "layer": "conv1",
        "forward": ["implicit_gemm", "implicit_gemm"],
        "input_grad": rows[0]["input_grad"],
        "weight_grad": ["first_layer", "first_layer"],
    }
    assert all(len(row[direction]) == 2 for row in rows for direction in DIRECTIONS)
    of_float64 = rows_of(capsys, "--model", "cifar_resnet", "--images", "4,3,32,32", "--dtype", "float64")
    assert [row["layer"] for row in of_float64] == [row["layer"] for row in rows]
    assert all(row[direction] == ["torch", "torch"] for row in of_float64 for direction in DIRECTIONS)
    assert main(["info", "--model", "cifar_resnet", "--images", "4,3,32,32"]) == 0
    table = capsys.readouterr().out
    assert "paths on the CPU, at each width where they differ" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--conv", "8,64,56,56,128"], "--conv must be N,C,H,W,O,KERNEL[,STRIDE"),
        (["--conv", "8,64,56,56,128,3.5"], "--conv must have integers of at least 0 between commas"),
        (["--conv", "8,64,56,56,128,3x3x3"], "--conv must have one integer or two, such as 3x5"),
        (["--conv", "8,64,56,56,128,3,1,1,1,0"], "groups must be at least 1, got 0"),
        (["--conv", "8,64,2,2,128,5"], "must be at least"),
        (["--conv", "8,64,56,56,128,3", "--full", "64"], "--full must be C,O, got 64"),
        (["--conv", "8,64,56,56,128,3", "--full", "32,128"], "x must have between 1 and 32 channels"),
        (["--conv", "8,64,56,56,128,3", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16"),
        (["--conv", "8,64,56,56,128,3", "--device", "tpu"], "--device must be cpu or cuda, got tpu"),
        (["--conv", "8,64,56,56,128,3", "--model", "cifar_resnet"], "--conv must come without --model, got both"),
        (["--device", "cpu"], "--device must come with --conv, got it alone"),
        (["--images", "8,3,32,32"], "--images must come with --model, got it alone"),
        (["--model", "cifar_resnet", "--images", "8,3,32"], "--images must be N,C,H,W, got 8,3,32"),
        (["--model", "cifar_resnet", "--images", "0,3,32,32"], "--images must have integers of at least 1"),
    ],
)
def test_what_is_refused(arguments, message, capsys):
    assert main(["info", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
