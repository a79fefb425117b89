"""Widths: rounding, setting, restoring, and the sentences for bad ones."""

import numpy as np
import pytest
import torch
from torch import nn

import gradaug_kernels as gk


def published_make_divisible(v, divisor=1, min_value=1):
    """The rounding of the published code, written from its description: the oracle."""
    new = max(min_value, int(v + divisor / 2) // divisor * divisor)
    return new + divisor if new < 0.9 * v else new


@pytest.mark.parametrize("channels", [1, 3, 16, 64, 100, 256, 1280, 2048])
def test_default_rounding_is_the_published_one(channels):
    for width in np.linspace(0.5, 1.0, 101):
        assert gk.round_channels(channels, width) == published_make_divisible(channels * width)


@pytest.mark.parametrize(
    ("channels", "width", "divisor", "expected"),
    [
        (64, 0.9, 1, 58),  # 57.6 rounds up
        (5, 0.5, 1, 3),  # half rounds up
        (64, 0.9, 8, 56),  # 57.6 to the nearest multiple
        (64, 0.8, 8, 48),  # 51.2: 48 is the nearest, and not under nine tenths
        (24, 0.5, 8, 16),  # 12 -> 16
        (16, 0.2, 8, 8),  # never below one multiple
        (20, 1.0, 8, 20),  # width 1 is always the whole layer
        (3, 0.9, 8, 3),  # fewer channels than the divisor
    ],
)
def test_rounding_to_multiples(channels, width, divisor, expected):
    assert gk.round_channels(channels, width, divisor) == expected


def test_losing_over_a_tenth_adds_a_multiple():
    assert int(11.2 + 4) // 8 * 8 == 8 < 0.9 * 11.2
    assert gk.round_channels(16, 0.7, 8) == 16


@pytest.mark.parametrize("width", [0.0, -0.5, 1.01, float("nan")])
def test_width_outside_its_range(width):
    with pytest.raises(ValueError, match=r"width must be in \(0, 1\], got"):
        gk.set_width(gk.FastSlimConv2d(4, 4, 1), width)
    with pytest.raises(ValueError, match=r"width must be in \(0, 1\], got"):
        gk.round_channels(4, width)


NEARLY = {0.8: [0.7999999999999999, float(np.float32(0.8)), 0.8 + 4e-7], 1.0: [0.9999999999, 1.0000000001, 1.0 - 4e-7]}


@pytest.mark.parametrize(("width", "nearly"), [(w, n) for w in NEARLY for n in NEARLY[w]])
def test_widths_are_those_of_six_decimals(width, nearly):
    assert gk.round_channels(10_000, nearly, 1) == 10_000 * width
    norm = gk.SlimBatchNorm2d(10, widths=(nearly,))
    assert norm.widths == tuple(sorted({width, 1.0}))
    norm.add_width(width)
    assert norm.widths == tuple(sorted({width, 1.0}))
    x = torch.randn(4, round(10 * width), 3, 3)
    gk.calibrate(nn.Sequential(norm), [nearly], [x])
    suffix = "" if width == 1.0 else "_0_8"
    assert norm.state_dict()[f"running_mean{suffix}"].abs().sum() > 0
    with gk.use_width(norm.eval(), width):
        expected = norm(x)
    with gk.use_width(norm, nearly):
        assert torch.equal(norm(x), expected)
    norm.reset_width_stats(nearly)
    assert norm.state_dict()[f"running_mean{suffix}"].abs().sum() == 0


def test_a_grid_of_widths_is_the_widths_meant():
    norm = gk.SlimBatchNorm2d(10, widths=tuple(np.arange(0.5, 1.01, 0.1)))
    assert norm.widths == (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def test_statistics_saved_under_an_unrounded_name_load_as_those_of_the_width():
    norm, other = gk.SlimBatchNorm2d(10, widths=(0.8,)), gk.SlimBatchNorm2d(10)
    with gk.use_width(norm, 0.8):
        norm(torch.randn(4, 8, 3, 3))
    state = {name.replace("_0_8", "_0_7999999999999999"): value for name, value in norm.state_dict().items()}
    other.load_state_dict(state)
    assert other.widths == (0.8, 1.0)
    assert list(other.state_dict()) == list(norm.state_dict())
    assert torch.equal(other.running_var_0_8, norm.running_var_0_8)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_0_7999999999999999"):
        other.load_state_dict(state | norm.state_dict())


def test_statistics_of_a_width_that_has_none():
    with pytest.raises(ValueError, match=r"width must be one of 0\.5, 1, got 0\.7"):
        gk.SlimBatchNorm2d(10, widths=(0.5,)).reset_width_stats(0.7)


def test_width_that_leaves_no_channel():
    conv = gk.FastSlimConv2d(3, 8, 1)
    message = r"width must leave at least 1 of 8 channels \(be at least 0.0625\), got 0.05"
    with pytest.raises(ValueError, match=message):
        gk.set_width(conv, 0.05)
    with pytest.raises(ValueError, match=message), gk.use_width(nn.Sequential(gk.SlimBatchNorm2d(8), conv), 0.05):
        pass
    assert conv(torch.randn(1, 3, 4, 4)).shape[1] == 8, "the width is the one before"


def test_a_model_without_adjustable_layers():
    with pytest.raises(ValueError, match="layers of adjustable width, got Linear without any"):
        gk.set_width(nn.Linear(2, 2), 0.5)


def test_use_width_restores_after_an_error():
    model = nn.Sequential(gk.FastSlimConv2d(3, 8, 1), gk.SlimBatchNorm2d(8))
    gk.set_width(model, 0.75)
    with gk.use_width(model, 0.5):
        assert model(torch.randn(2, 3, 2, 2)).shape[1] == 4
    assert model(torch.randn(2, 3, 2, 2)).shape[1] == 6
    with gk.use_width(model, 0.5), pytest.raises(ValueError, match="got 9"):
        model(torch.randn(2, 9, 2, 2))
    with pytest.raises(ValueError, match="got 9"), gk.use_width(model, 0.5):
        model(torch.randn(2, 9, 2, 2))
    assert model(torch.randn(2, 3, 2, 2)).shape[1] == 6


def test_a_refused_width_leaves_every_layer_as_it_was():
    model = nn.Sequential(gk.FastSlimConv2d(3, 64, 1), gk.SlimBatchNorm2d(64), gk.FastSlimConv2d(64, 16, 1))
    gk.set_width(model, 0.75)
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    for refused in (lambda: gk.set_width(model, 0.02), lambda: gk.use_width(model, 0.02).__enter__()):
        with pytest.raises(ValueError, match="at least 1 of 16 channels"):
            refused()
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("channels", "divisor", "message"),
    [
        (16, 1.5, "divisor must be a whole number, got 1.5"),
        (16.5, 1, "channels must be a whole number, got 16.5"),
        (16, 0, "divisor must be at least 1, got 0"),
        (0, 1, "channels must be at least 1, got 0"),
        (-3, 1, "channels must be at least 1, got -3"),
    ],
)
def test_numbers_of_channels_that_are_none(channels, divisor, message):
    with pytest.raises(ValueError, match=message):
        gk.round_channels(channels, 0.5, divisor)
    assert type(gk.round_channels(np.int64(16), 0.5, np.int32(4))) is int
