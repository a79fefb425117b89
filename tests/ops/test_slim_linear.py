"""slim_linear and its gradients: the kernels that serve the CPU, beside PyTorch's own linear layer of the slice."""

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_as_accurate
from support.cases import LinearCase, linear_cases, named
from torch import Tensor

import gradaug_kernels as gk

CASES = named(*linear_cases())
LARGE = named(
    LinearCase("large", (131,), 517, 303),
    LinearCase("classifier", (32,), 1283, 1000, wider=(5, 0)),
    LinearCase("large, transposed weight", (67,), 301, 203, weight_layout="columns"),
)


def with_cases(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


all_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)


def torch_forward(case: LinearCase, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, case.slice(weight), None if bias is None else bias[: case.out_features])


def torch_gradients(case: LinearCase, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dx [..., F] and dw [out, F], in the dtype of x."""
    x, w = x.detach().requires_grad_(), case.slice(weight).detach().requires_grad_()
    return torch.autograd.grad(F.linear(x, w), (x, w), dy)


def forward(case: LinearCase, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return gk.slim_linear(x, weight, bias, case.out_features)


def input_grad(x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    return torch.ops.gradaug.slim_linear_input_grad(dy, weight, x.shape[-1])


def weight_grad(x: Tensor, dy: Tensor, dweight: Tensor) -> Tensor:
    torch.ops.gradaug.slim_linear_weight_grad_(dy, x, dweight)
    return dweight


def output_gradient(case: LinearCase, x: Tensor) -> Tensor:
    values = torch.randn(*x.shape[:-1], case.out_features, generator=torch.Generator().manual_seed(1))
    return values.to(x.dtype)


def doubles(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


@all_dtypes
@with_cases([*CASES.values(), *LARGE.values()])
def test_forward_is_as_accurate_as_torch(case, dtype):
    x, weight, bias = case.tensors(dtype)
    y = forward(case, x, weight, bias)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_as_accurate(y, torch_forward(case, x, weight, bias), torch_forward(case, *doubles(x, weight, bias)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@with_cases([*CASES.values(), *LARGE.values()])
def test_float32_parameters_are_rounded_as_they_are_read(case, dtype):
    x, weight, bias = case.tensors(torch.float32)
    x, rounded = x.to(dtype), (weight.to(dtype), None if bias is None else bias.to(dtype))
    y = forward(case, x, weight, bias)
    assert y.dtype == dtype
    assert_as_accurate(y, torch_forward(case, x, *rounded), torch_forward(case, *doubles(x, weight, bias)))
    dy = output_gradient(case, x)
    dx = input_grad(x, weight, dy)
    assert dx.dtype == dtype
    exact_dx, _ = torch_gradients(case, *doubles(x, weight, dy))
    assert_as_accurate(dx, torch_gradients(case, x, rounded[0], dy)[0], exact_dx, gradient=True)


@all_dtypes
@with_cases([*CASES.values(), *LARGE.values()])
def test_gradients_are_as_accurate_as_torch(case, dtype):
    x, weight, _ = case.tensors(dtype)
    dy = output_gradient(case, x)
    exact_dx, exact_dw = torch_gradients(case, *doubles(x, weight, dy))
    torch_dx, torch_dw = torch_gradients(case, x, weight, dy)

    dx = input_grad(x, weight, dy)
    assert dx.dtype == dtype
    assert dx.is_contiguous()
    assert_as_accurate(dx, torch_dx, exact_dx, gradient=True)

    for buffer_dtype in {dtype, torch.float32}:
        dweight = torch.full_like(weight, torch.nan, dtype=buffer_dtype)
        case.slice(dweight).zero_()
        weight_grad(x, dy, dweight)
        assert_as_accurate(case.slice(dweight), torch_dw, exact_dw, gradient=True)
        assert dweight.isnan().sum() == dweight.numel() - exact_dw.numel(), "memory outside the slice was written"
        once = weight_grad(x, dy, torch.zeros_like(weight, dtype=buffer_dtype))
        assert torch.equal(weight_grad(x, dy, torch.zeros_like(once)), once)


@all_dtypes
@with_cases(CASES.values())
def test_expanded_output_gradient(case, dtype):
    """y.sum().backward() hands over a dy whose strides are all zero."""
    x, weight, _ = case.tensors(dtype)
    dy = torch.ones((), dtype=dtype).expand(*x.shape[:-1], case.out_features)
    exact_dx, exact_dw = torch_gradients(case, *doubles(x, weight, dy))
    torch_dx, torch_dw = torch_gradients(case, x, weight, dy)
    assert_as_accurate(input_grad(x, weight, dy), torch_dx, exact_dx, gradient=True)
    dweight = weight_grad(x, dy, torch.zeros_like(weight))
    assert_as_accurate(case.slice(dweight), torch_dw, exact_dw, gradient=True)


@with_cases(CASES.values())
def test_gradcheck(case):
    x, weight, bias = (None if t is None else t.nan_to_num().requires_grad_() for t in case.tensors(torch.float64))
    small = max(x.numel(), weight.numel()) < 60
    assert torch.autograd.gradcheck(lambda *args: forward(case, *args), (x, weight, bias), fast_mode=not small)


def test_weight_gradient_is_added_to_the_buffer():
    case = LARGE["large"]
    x, weight, _ = case.tensors(torch.bfloat16)
    dy = output_gradient(case, x)
    buffer = torch.zeros_like(weight, dtype=torch.float32)
    once = weight_grad(x, dy, buffer).clone()
    torch.testing.assert_close(weight_grad(x, dy, buffer), 2 * once)


@with_cases(
    [
        CASES[name]
        for name in (
            "a slice",
            "7 to 129",
            "more batch dimensions",
            "rows of a wider tensor",
            "a transposed weight",
        )
    ]
)
def test_opcheck(case):
    x, weight, bias = (None if t is None else t.nan_to_num() for t in case.tensors(torch.float32))
    dy = output_gradient(case, x)
    ops = torch.ops.gradaug
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(ops.slim_linear.default, (*leaves, case.out_features))
    torch.library.opcheck(ops.slim_linear_input_grad.default, (dy, weight, case.features))
    torch.library.opcheck(ops.slim_linear_weight_grad_.default, (dy, x, torch.zeros_like(weight)))


def test_inside_autocast():
    """The forward is cast like F.linear; the gradient kernels compute in the dtype that they are given."""
    case = CASES["a slice"]
    x, weight, _ = case.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = forward(case, x, weight, None)
    assert torch.equal(y, forward(case, x.bfloat16(), weight.bfloat16(), None))
    dy = torch.randn(y.shape)
    with torch.autocast("cpu", torch.bfloat16):
        dx = input_grad(x, weight, dy)
        dweight = weight_grad(x, dy, torch.zeros_like(weight))
    assert torch.equal(dx, input_grad(x, weight, dy))
    assert torch.equal(dweight, weight_grad(x, dy, torch.zeros_like(weight)))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"x must be \[..., F\] and weight \[O, I\], got 2 and 3 dim", {"weight": torch.zeros(8, 6, 1)}),
        (TypeError, "x must be a floating-point tensor, got torch.int64", {"x": torch.zeros(2, 4).long()}),
        (
            TypeError,
            "weight must have the dtype of x, torch.float32, got torch.float64",
            {"weight": torch.zeros(8, 6).double()},
        ),
        (ValueError, "x must have between 1 and 6 features, got 7", {"x": torch.zeros(2, 7)}),
        (ValueError, r"out_features must be in \[1, 8\], got 9", {"out_features": 9}),
        (ValueError, r"bias must have at least 8 elements, got shape \(7,\)", {"bias": torch.zeros(7)}),
    ],
)
def test_errors(error, message, change):
    with pytest.raises(error, match=message):
        gk.slim_linear(**{"x": torch.zeros(2, 4), "weight": torch.zeros(8, 6), **change})
