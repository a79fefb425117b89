"""Operators called without the Python functions refuse what does not fit: never a crash, never an answer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.direct_calls import NO_RANGE, SIZES, arguments_of, bad_values, operators, valid_arguments

import gradaug_kernels as gk


def run(*options: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    program = Path(__file__).parents[1] / "support" / "direct_calls.py"
    done = subprocess.run([sys.executable, program, *options], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended with {done.returncode} {lines[-1:]}: {done.stderr[-2000:]}"
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert not wrong, "\n".join(wrong[:20])
    assert lines[-1] == "done"


def test_arguments_out_of_range_are_refused():
    run()


def test_references_refuse_them_too():
    run("--reference")


def test_every_argument_of_every_operator_is_tried():
    assert set(operators()) == set(SIZES), "a new operator needs its row in direct_calls.py"
    for name in operators():
        arguments = valid_arguments(name, torch.float32, torch.channels_last, 1)
        for argument in arguments_of(name):
            ranged = str(argument.type) != "bool" and argument.name not in NO_RANGE
            assert any(True for _ in bad_values(name, argument, arguments, 1)) == ranged, (name, argument.name)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_images_without_rows_or_columns(size):
    """As F.conv2d and F.max_pool2d do, refused in one sentence: here by the function, the operator and its fake."""
    x, weight = torch.zeros(2, 4, *size), torch.zeros(4, 4, 3, 3)
    pooling, window = r"x must have channels, rows and columns, got shape", ([2, 2], [2, 2], [1, 1])
    with pytest.raises(ValueError, match=pooling):
        gk.slim_norm_max_pool2d(x, 2, padding=1)
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=pooling):
            torch.ops.gradaug.slim_max_pool2d(x.to(device), *window)
        message = "the size of the image must be two integers of at least 1"
        geometry = ([1, 1], [2, 2], [1, 1], 1)
        with pytest.raises(ValueError, match=message):
            torch.ops.gradaug.slim_conv2d(x.to(device), weight.to(device), None, 4, *geometry)
    with pytest.raises(ValueError, match=message):
        gk.slim_conv2d(x, weight, padding=2)


def test_too_many_output_channels():
    message = r"out_channels must be in \[1, 4\], got 4000"
    with pytest.raises(ValueError, match=message):
        torch.ops.gradaug.slim_conv2d(
            torch.zeros(1, 4, 5, 5), torch.zeros(4, 4, 3, 3), None, 4000, [1, 1], [1, 1], [1, 1], 1
        )
