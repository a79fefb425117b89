"""slim_norm_max_pool2d and the pooling beneath it, beside PyTorch's batch norm and max pooling."""

import pytest
import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format

import gradaug_kernels as gk
from gradaug_kernels.ops.slim_norm_max_pool2d import slim_max_pool2d_backward_reference, slim_max_pool2d_reference

OPS = torch.ops.gradaug
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NHWC, NCHW = torch.channels_last, torch.contiguous_format
CASES = {  # shape, kernel, stride, padding
    "stem of a ResNet": ((2, 64, 14, 14), (3, 3), (2, 2), (1, 1)),
    "odd sizes": ((3, 70, 7, 6), (2, 3), (2, 1), (0, 1)),
    "windows side by side": ((1, 130, 8, 8), (2, 2), (2, 2), (0, 0)),
    "each pixel in 25 windows": ((2, 3, 5, 5), (5, 5), (1, 1), (2, 2)),
    "pixels in no window": ((2, 3, 9, 10), (2, 2), (3, 3), (0, 0)),
    "one channel": ((2, 1, 6, 6), (3, 3), (2, 2), (1, 1)),
    "one window": ((2, 5, 4, 4), (4, 4), (4, 4), (0, 0)),
}
with_cases = pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), CASES.values(), ids=CASES.keys())


def image(shape, dtype=torch.float64, memory_format=NHWC, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=memory_format)


# ---- pooling


@pytest.mark.parametrize("memory_format", [NHWC, NCHW])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@with_cases
def test_pooling_equals_torchs(shape, kernel, stride, padding, dtype, memory_format):
    """ReLU makes many equal values, of which the first is taken as PyTorch does. Gradients are summed in float32."""
    window = (kernel, stride, padding)
    x = image(shape, dtype, memory_format).relu().requires_grad_()
    expected = F.max_pool2d(x, *window)
    y, offset = OPS.slim_max_pool2d(x.detach(), *window)
    assert torch.equal(y, expected)
    assert torch.equal(offset, slim_max_pool2d_reference(x.detach(), *window)[1])
    assert y.is_contiguous(memory_format=memory_format)
    dy = image(y.shape, dtype, memory_format, seed=1)
    exact = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(F.max_pool2d(exact, *window), exact, dy.double())[0].to(dtype)
    dx = OPS.slim_max_pool2d_backward(dy, None, offset, shape, *window)
    torch.testing.assert_close(dx, expected)
    assert dx.is_contiguous(memory_format=suggest_memory_format(offset))
    masked = OPS.slim_max_pool2d_backward(dy, y, offset, shape, *window)
    torch.testing.assert_close(masked, expected * (x > 0))
    reference = slim_max_pool2d_backward_reference(dy, y, offset, shape, *window)
    torch.testing.assert_close(masked, reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_order_of_special_values(dtype):
    """NaN is the largest whatever its sign; zeros are equal whatever theirs. 70 channels: two vectors and a rest.

    Channel c has the first 1 + c % 10 values: the later ones would be the maximum of nearly every window.
    """
    values = torch.tensor([-1.0, -torch.inf, -1e-7, -0.0, 0.0, 1e-7, 1.0, torch.inf, torch.nan, -torch.nan])
    choice = torch.randint(2520, (2, 70, 9, 9), generator=torch.Generator().manual_seed(0))
    choice = choice % (1 + torch.arange(70) % len(values))[:, None, None]
    x = values[choice].to(dtype).contiguous(memory_format=NHWC)
    window = (3, 3), (2, 2), (1, 1)
    y, offset = OPS.slim_max_pool2d(x, *window)
    torch.testing.assert_close(y, F.max_pool2d(x, *window), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(offset, slim_max_pool2d_reference(x, *window)[1])
    dy = image(y.shape, dtype, seed=1)
    dx = OPS.slim_max_pool2d_backward(dy, y, offset, x.shape, *window)
    torch.testing.assert_close(dx, slim_max_pool2d_backward_reference(dy, y, offset, x.shape, *window))


# ---- norm and pooling


def torch_norm_pool(x, gamma, beta, mean, var, relu, window):
    c = x.shape[1]
    gamma, beta = (None if p is None else p[:c] for p in (gamma, beta))
    y = F.batch_norm(x, mean, var, gamma, beta, training=mean is None)
    return F.max_pool2d(y.relu() if relu else y, *window)


@pytest.mark.parametrize("statistics", ["of the batch", "known to be the batch's", "given"])
@pytest.mark.parametrize("relu", [True, False])
@with_cases
def test_equals_batch_norm_and_pooling(shape, kernel, stride, padding, relu, statistics):
    window = (kernel, stride, padding)
    x = image(shape).requires_grad_()
    gamma, beta = (image((shape[1] + 3,), memory_format=NCHW, seed=s).requires_grad_() for s in (1, 2))
    found = torch.var_mean(x.detach(), (0, 2, 3), correction=0)[::-1]
    given = (found[0] + 0.1, found[1] + 0.1) if statistics == "given" else (None, None)
    expected = torch_norm_pool(x, gamma, beta, *given, relu, window)
    mean, var = found if statistics == "known to be the batch's" else given
    norm = {"gamma": gamma, "beta": beta, "mean": mean, "var": var, "batch_stats": statistics != "given"}
    y, used_mean, used_var = gk.slim_norm_max_pool2d(x, *window, **norm, relu=relu)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close((used_mean, used_var), given if statistics == "given" else tuple(found))
    dy = image(y.shape, seed=3)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, gamma, beta), dy), torch.autograd.grad(expected, (x, gamma, beta), dy)
    )


def test_float_parameters_of_a_bfloat16_image_and_none():
    x = image((2, 6, 8, 8), torch.bfloat16)
    y, _, _ = gk.slim_norm_max_pool2d(x, 2, gamma=torch.full((6,), 2.0), beta=torch.zeros(6))
    plain, mean, _ = gk.slim_norm_max_pool2d(x, 2)
    assert (y.dtype, mean.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, 2 * plain)


@with_cases
def test_gradcheck_and_opcheck(shape, kernel, stride, padding):
    shape = (2, 3, *shape[2:])
    x = image(shape).requires_grad_()
    gamma, beta = (image((5,), memory_format=NCHW, seed=s).requires_grad_() for s in (1, 2))

    def run(x, gamma, beta):
        return gk.slim_norm_max_pool2d(x, kernel, stride, padding, gamma=gamma, beta=beta, relu=True)[0]

    assert torch.autograd.gradcheck(run, (x, gamma, beta))
    norm, window = (None, None, gamma, beta, False, True, 1e-5), (kernel, stride, padding)
    torch.library.opcheck(OPS.slim_norm_max_pool2d.default, (x, *norm, *window))
    x = x.detach()
    y, offset = OPS.slim_max_pool2d(x, *window)
    torch.library.opcheck(OPS.slim_max_pool2d.default, (x, *window))
    torch.library.opcheck(OPS.slim_max_pool2d_backward.default, (y, y, offset, list(shape), *window))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"kernel must be two integers of at least 1, got \(0, 0\)", {"kernel": 0}),
        (r"kernel must have at most 255 pixels, got \(16, 16\)", {"kernel": 16}),
        (r"padding must be at most half of the kernel, \(3, 3\), got \(2, 2\)", {"padding": 2}),
        (r"the padded image must be at least as large as the kernel, got \(1, 4, 5, 5\)", {"kernel": (6, 2)}),
        (r"gamma must have at least 4 elements, got shape \(3,\)", {"gamma": torch.zeros(3)}),
    ],
)
def test_errors(message, change):
    with pytest.raises(ValueError, match=message):
        gk.slim_norm_max_pool2d(torch.zeros(1, 4, 5, 5), **{"kernel": 3, **change})
