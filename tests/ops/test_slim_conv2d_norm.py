"""slim_conv2d_norm, whose backward computes again what forward does not keep, beside the operators in turn."""

import pytest
import torch
from ops.test_slim_norm_conv2d import leaves_of, norm_conv, output_gradient, with_cases
from support.cases import ConvCase, conv_cases, named
from support.torch_norm_conv import EPS, options_for
from torch import Tensor

import gradaug_kernels as gk

CASES = named(*conv_cases())
TRACED = (
    "1x1",
    "1x1 with a stride of 3 rows",
    "3x3 of 129 channels",
    "3x3 on one pixel",
    "3x3 on a channel slice",
    "3x3 of an empty batch",
    "4 groups on NCHW",
    "depthwise with dilation",
    "channel multiplier 2",
    "depthwise with stride 2 and dilation 2",
    "depthwise on a channel slice, stride 2",
    "3 groups of 16 channels, dilation 2",
)
OPS = torch.ops.gradaug


def tail(case: ConvCase, options, tensors, out, normalise, **more):
    """The first results of slim_conv2d_norm: y and the statistics of the convolution's result."""
    x, gamma, beta, mean, var, weight, bias = tensors
    norm = {"gamma": gamma, "beta": beta, "mean": mean, "var": var, "relu": options.relu, "eps": EPS}
    arguments = (x, weight, bias, case.out_channels, *case.geometry)
    names = ("out_gamma", "out_beta", "out_mean", "out_var", "residual", "out_relu")
    return gk.slim_conv2d_norm(
        *arguments,
        normalise=normalise,
        **(norm if normalise else {}),
        **dict(zip(names, out, strict=True)),
        out_eps=EPS,
        **more,
    )


def tail_in_steps(case: ConvCase, options, tensors, out, normalise):
    x, *_, weight, bias = tensors
    if normalise:
        c = norm_conv(case, options, tensors).y
    else:
        c = gk.slim_conv2d(x, weight, bias, case.out_channels, *case.geometry)
    return gk.slim_batch_norm(c, *out, EPS)


def tail_tensors(case: ConvCase, y: Tensor, dtype: torch.dtype):
    """out_gamma, out_beta, out_mean, out_var, residual, out_relu; variants spread over the cases."""
    number = sum(map(ord, case.name))
    generator = torch.Generator().manual_seed(3)
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    gamma, beta, mean, var = torch.randn(4, case.out_channels + 2, generator=generator).to(stats_dtype)
    residual = torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator)) if number % 2 else None
    # Two values become -1 and 1 whatever they are: what their norm's gradient leaves of anything is rounding alone.
    given = y.numel() // y.shape[1] <= 2 or number % 5 == 0
    statistics = (mean[: case.out_channels], var[: case.out_channels].square() + 0.5) if given else (None, None)
    return (1 + gamma / 2, beta, *statistics, residual, number % 3 > 0)


def inputs_of(leaves, out, normalise):
    """What a gradient is asked of, but the weight."""
    inputs = [t for i, t in enumerate(leaves) if t is not None and i in ((0, 1, 2, 6) if normalise else (0, 6))]
    return inputs + [t for t in (out[0], out[1], out[4]) if t is not None]


def gradients_in_float64(case, options, leaves, out, normalise, dy):
    doubles = [
        [t.detach().double().requires_grad_() if isinstance(t, Tensor) else t for t in of] for of in (leaves, out)
    ]
    y = tail_in_steps(case, options, *doubles, normalise)[0]
    return torch.autograd.grad(y, [*inputs_of(*doubles, normalise), doubles[0][5]], dy.double())


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@with_cases(CASES.values())
def test_recomputing_equals_the_operators_one_after_the_other(case, dtype, normalise, buffer):
    """Results to the bit. What backward makes again it normalises with statistics that were rounded to float32."""
    options = options_for(case)
    leaves = leaves_of(options.tensors(case, dtype))
    with torch.no_grad():
        c = gk.slim_conv2d(leaves[0], leaves[5], None, case.out_channels, *case.geometry)
    out = tail_tensors(case, c, dtype)
    out = [t.requires_grad_() if i in (0, 1, 4) and t is not None else t for i, t in enumerate(out)]
    inputs = inputs_of(leaves, out, normalise)
    expected = tail_in_steps(case, options, leaves, out, normalise)
    dy = output_gradient(expected[0])
    expected_gradients = torch.autograd.grad(expected[0], [*inputs, leaves[5]], dy)
    exact_gradients = gradients_in_float64(case, options, leaves, out, normalise, dy)
    weight_grad = torch.zeros_like(leaves[5]).detach() if buffer else None
    found = tail(case, options, leaves, out, normalise, weight_grad=weight_grad)
    for actual, other in zip(found[:3], expected, strict=True):
        assert torch.equal(actual, other)
    *found_gradients, dweight = torch.autograd.grad(found[0], [*inputs, leaves[5]], dy, allow_unused=True)
    assert (dweight is None) == buffer
    found_gradients.append(weight_grad if buffer else dweight)
    for actual, other, exact in zip(found_gradients, expected_gradients, exact_gradients, strict=True):
        rtol, atol = (1.3e-6, 1e-5) if dtype == torch.float32 else (1.6e-2, 1e-5)  # PyTorch's own
        # Errors of at most twice those of the operators in turn (accuracy.py) are at most three times theirs apart.
        rounding = float((other - exact).abs().max()) if exact.numel() else 0.0
        torch.testing.assert_close(actual, other, rtol=rtol, atol=atol + 3 * rounding)


def test_recomputing_saves_the_inputs_and_the_result():
    case = CASES["1x1"]
    options = options_for(case)
    leaves = leaves_of(options.tensors(case, torch.float32))
    out = (None, None, None, None, None, True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = tail(case, options, leaves, out, True)[0]
    large = {t.data_ptr() for t in saved if t.dim() == 4}
    assert large == {leaves[0].data_ptr(), leaves[5].data_ptr(), y.data_ptr()}


@with_cases([CASES[name] for name in TRACED])
def test_recomputing_gradcheck_and_opcheck(case):
    options = options_for(case)
    x, gamma, beta, mean, var, weight, bias = leaves = leaves_of(options.tensors(case, torch.float64))
    with torch.no_grad():
        c = norm_conv(case, options, leaves).y
    out_gamma, out_beta, out_mean, out_var, residual, out_relu = tail_tensors(case, c, torch.float64)

    def function(x, weight, out_gamma, residual):
        tensors = (x, gamma, beta, mean, var, weight, bias)
        return tail(case, options, tensors, (out_gamma, out_beta, out_mean, out_var, residual, out_relu), True)[0]

    values = (x, weight, out_gamma.requires_grad_(), None if residual is None else residual.requires_grad_())
    assert torch.autograd.gradcheck(function, values, fast_mode=True)

    geometry = [*(list(pair) for pair in case.geometry[:3]), case.groups]
    norm = (mean, var, gamma, beta, False, options.relu, EPS)
    out = (out_mean, out_var, out_gamma, out_beta, residual, out_relu, EPS)
    arguments = (x, True, *norm, weight, bias, case.out_channels, *geometry, *out)
    torch.library.opcheck(OPS.slim_conv2d_norm.default, arguments)


def test_recomputing_inside_autocast():
    case = CASES["1x1"]
    options = options_for(case)
    leaves = leaves_of(options.tensors(case, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        c = norm_conv(case, options, leaves).y
        out = (*tail_tensors(case, c, torch.bfloat16)[:4], torch.ones_like(c), True)
        expected = gk.slim_batch_norm(c, *out, EPS)[0]
        y = tail(case, options, leaves, out, True)[0]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


def test_recomputing_errors():
    x, weight = torch.zeros(1, 4, 5, 5), torch.zeros(8, 6, 1, 1)
    with pytest.raises(ValueError, match="mean, var, gamma and beta must be None where x is not normalised"):
        gk.slim_conv2d_norm(x, weight, gamma=torch.ones(4))
    with pytest.raises(ValueError, match="out_gamma must have at least 8 elements, got shape \\(4,\\)"):
        gk.slim_conv2d_norm(x, weight, out_gamma=torch.ones(4))
    with pytest.raises(ValueError, match=r"residual must have the shape and dtype of x, \(1, 8, 5, 5\)"):
        gk.slim_conv2d_norm(x, weight, residual=torch.zeros(1, 8, 5, 4))
