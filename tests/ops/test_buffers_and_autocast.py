"""What operators refuse as a buffer for a weight's gradient, and what autocast leaves alone."""

import pytest
import torch
import torch.nn.functional as F

import gradaug_kernels as gk


def conv(x, weight, weight_grad=None):
    return gk.slim_conv2d(x, weight, None, 6, padding=1, weight_grad=weight_grad)


def linear(x, weight, weight_grad=None):
    return gk.slim_linear(x, weight, None, 6, weight_grad=weight_grad)


def norm_conv(x, weight, weight_grad=None):
    return gk.slim_norm_conv2d(x, weight, padding=1, batch_stats=True, weight_grad=weight_grad).y


def conv_norm(x, weight, weight_grad=None):
    return gk.slim_conv2d_norm(x, weight, padding=1, weight_grad=weight_grad)[0]


OPERATORS = {
    "conv": (conv, (2, 6, 7, 7), (8, 6, 3, 3)),
    "linear": (linear, (5, 6), (8, 6)),
    "norm_conv": (norm_conv, (2, 6, 7, 7), (8, 6, 3, 3)),
    "conv_norm": (conv_norm, (2, 6, 7, 7), (8, 6, 3, 3)),
}
of_all = pytest.mark.parametrize(("function", "x_size", "weight_size"), OPERATORS.values(), ids=OPERATORS)


def imaginary(size):
    """Memory that PyTorch negates when it is read."""
    return torch.zeros(size, dtype=torch.complex64).conj().imag


@of_all
def test_a_buffer_is_memory_of_its_own(function, x_size, weight_size):
    x, weight = torch.randn(x_size), torch.randn(weight_size, requires_grad=True)
    with pytest.raises(ValueError, match="weight_grad must not share memory with weight, got one buffer for both"):
        function(x, weight, weight.detach())
    with pytest.raises(ValueError, match="weight_grad must be memory of its own, got the imaginary part of a conj"):
        function(x, weight, imaginary(weight_size))
    beside = torch.zeros(2, *weight_size)
    weight = beside[0].requires_grad_()
    function(x, weight, beside.detach()[1]).sum().backward()  # one allocation, but not one memory


@of_all
def test_a_buffer_of_a_weight_that_takes_no_gradient(function, x_size, weight_size):
    x, weight, buffer = torch.randn(x_size, requires_grad=True), torch.randn(weight_size), torch.zeros(weight_size)
    function(x, weight, buffer).sum().backward()
    assert x.grad is not None
    assert buffer.eq(0).all()


def test_direct_calls_with_lazily_negated_tensors():
    dy, x = torch.randn(2, 6, 7, 7), torch.randn(2, 6, 7, 7, dtype=torch.complex64).conj().imag
    geometry = [1, 1], [1, 1], [1, 1], 1
    with pytest.raises(ValueError, match="dweight must be memory of its own, got the imaginary part of a conjugate"):
        torch.ops.gradaug.slim_conv2d_weight_grad_(dy, dy, imaginary((8, 6, 3, 3)), *geometry)
    buffer = torch.zeros(8, 6, 3, 3)
    torch.ops.gradaug.slim_conv2d_weight_grad_(dy, x, buffer, *geometry)
    torch.testing.assert_close(buffer[:6], torch.nn.grad.conv2d_weight(x.clone(), (6, 6, 3, 3), dy, 1, 1))
    assert buffer[6:].eq(0).all()


@of_all
def test_autocast_leaves_float64_alone(function, x_size, weight_size):
    x, weight = torch.randn(x_size, dtype=torch.float64), torch.randn(weight_size, dtype=torch.float64)
    expected = function(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(x, weight), expected)
        assert F.linear(torch.ones(1, 2).double(), torch.ones(1, 2).double()).dtype == torch.float64  # as PyTorch does
        assert function(x.float(), weight.float()).dtype == torch.bfloat16
        for mixed in ((x, weight.float()), (x.float(), weight)):
            with pytest.raises(TypeError, match="weight must have the dtype of x"):
                function(*mixed)


def test_arguments_of_other_types_are_one_sentence():
    x, weight = torch.randn(2, 6, 7, 7), torch.randn(8, 6, 3, 3)
    for weight_grad in (None, torch.zeros(8, 6, 3, 3)):
        with pytest.raises(
            TypeError, match=r"slim_conv2d must be given .*int out_channels.*, got .*, float, "
        ) as caught:
            gk.slim_conv2d(x, weight.requires_grad_(), None, 6.0, weight_grad=weight_grad)
        assert "\n" not in str(caught.value)
