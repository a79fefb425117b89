"""Calls with one argument that does not fit: each must raise, in one sentence, and never return or end the process."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from support.property_cases import (
    BatchNormCase,
    Case,
    ConvCase,
    LinearCase,
    PoolCase,
    Printed,
    batch_norm_cases,
    conv_cases,
    linear_cases,
    pool_cases,
)
from support.property_checks import *  # noqa: F403 - what the repr of a call names
from support.property_checks import REFUSALS, assert_one_sentence, call_of

OPS = torch.ops.gradaug


@dataclass(frozen=True, repr=False)
class InvalidCall(Printed):
    """A valid case and the name of what makes it invalid, in CHANGES."""

    case: Case
    change: str


def other_float(dtype: torch.dtype) -> torch.dtype:
    """That no operator takes beside `dtype`."""
    return torch.bfloat16 if dtype == torch.float16 else torch.float16


def replacing(name: str, change: Callable) -> Callable:
    """Of a tensor among the arguments; None where there is none."""

    def function(arguments):
        tensor = arguments.get(name)
        return None if tensor is None else arguments | {name: change(tensor)}

    return function


def setting(name: str, value) -> Callable:
    return lambda arguments: arguments | {name: value} if name in arguments else None


CHANGES: dict[str, Callable[[dict], dict | None]] = {
    "x of 5 dimensions": lambda a: None if "out_features" in a else a | {"x": a["x"].unsqueeze(0)},
    "x of no dimensions": replacing("x", lambda x: x.new_zeros(())),
    "x of integers": replacing("x", lambda x: x.nan_to_num().long()),
    "x on another device": lambda a: a | {"x": a["x"].to("meta")} if "weight_grad" in a else None,
    "weight of one dimension": replacing("weight", lambda w: w.flatten() if w.dim() > 1 else w[:, None]),
    "weight of another type": lambda a: (
        a | {"weight": a["weight"].to(other_float(a["x"].dtype))} if a.get("weight") is not None else None
    ),
    "weight of integers": replacing("weight", lambda w: w.nan_to_num().int()),
    "weight with too few inputs": lambda a: (
        a | {"weight": a["weight"][:, : a["x"].shape[1 if a["weight"].dim() == 4 else -1] // a.get("groups", 1) - 1]}
        if a.get("weight") is not None and a["weight"].dim() > 1
        else None
    ),
    "bias too short": lambda a: a | {"bias": a["bias"][:0]} if a.get("bias") is not None else None,
    "bias of two dimensions": replacing("bias", lambda b: b[None].expand(300, -1)),
    "bias of integers": replacing("bias", lambda b: b.nan_to_num().int()),
    **{
        f"{name} = {value}": setting(name, value)
        for name, numbers in {
            "out_channels": (0, -1, 1000, 2**40),
            "out_features": (0, -1, 1000, 2**40),
            "groups": (0, -1, 1000, 2**40),
            "stride": (0, -1, (1,), (1, 1, 1), (1, 0)),
            "padding": (-1, (0, -3), (1,), 2**31, 2**62, (2**40, 0)),
            "dilation": (0, -1, (1, 1, 1), (1, 0)),
            "kernel": (0, -1, 16, (1, 256), (3,), 2**33),
            "eps": (-1.0,),
        }.items()
        for value in numbers
    },
    "a dilation of 2**40": lambda a: a | {"dilation": 2**40} if _kernel(a) > 1 else None,
    "a dilation of 2**62": lambda a: a | {"dilation": 2**62} if _kernel(a) > 1 else None,
    "padding beyond half of the kernel": lambda a: a | {"padding": 100} if "kernel" in a else None,
    "a buffer of another shape": lambda a: (
        a | {"weight_grad": a["weight"].new_zeros(3)} if "weight_grad" in a else None
    ),
    "a buffer that was computed": lambda a: (
        a | {"weight_grad": 2 * torch.zeros_like(a["weight"]).requires_grad_()} if "weight_grad" in a else None
    ),
    "mean without var": lambda a: a | {"var": None} if a.get("mean") is not None else None,
    "mean too long": replacing("mean", lambda m: torch.cat([m, m])),
    "var of another type": replacing("var", lambda v: v.half()),
    "var too short": replacing("var", lambda v: v[:-1]),
    "gamma too short": replacing("gamma", lambda g: g[:0]),
    "beta of two dimensions": replacing("beta", lambda b: b[None].expand(300, -1)),
    "out_gamma of integers": replacing("out_gamma", lambda g: g.nan_to_num().int()),
    "out_mean too long": replacing("out_mean", lambda m: torch.cat([m, m])),
    "residual too small": replacing("residual", lambda r: r[:, :-1]),
    "residual of another type": replacing("residual", lambda r: r.to(other_float(r.dtype))),
}


def _kernel(arguments) -> int:
    weight = arguments.get("weight")
    return max(weight.shape[2:]) if "dilation" in arguments and weight is not None else 0


def _gradient_calls(case: Case, y: torch.Tensor, t: dict) -> dict[str, tuple]:
    """Of the operators behind the autograd formulas: name -> operator and arguments."""
    x, weight = t["x"], t["weight"]
    buffer = torch.zeros_like(weight, dtype=torch.float32)
    if isinstance(case, LinearCase):
        rows = y.reshape(-1, y.shape[-1])
        return {
            "input gradient with too many outputs": (
                OPS.slim_linear_input_grad,
                (y.new_zeros(*y.shape[:-1], weight.shape[0] + 1), weight, x.shape[-1]),
            ),
            "input gradient of too many features": (
                OPS.slim_linear_input_grad,
                (y, weight, weight.shape[1] + 1),
            ),
            "weight gradient of too many rows": (
                OPS.slim_linear_weight_grad_,
                (torch.cat([rows, rows, y.new_zeros(1, y.shape[-1])]), x, buffer),
            ),
            "weight gradient in a small buffer": (OPS.slim_linear_weight_grad_, (y, x, buffer[: y.shape[-1] - 1])),
            "weight gradient in few columns": (OPS.slim_linear_weight_grad_, (y, x, buffer[:, : x.shape[-1] - 1])),
        }
    geometry = case.geometry
    more = [(0, 0, 0, 0, 0, 1), (0, 0, 0, 1), (0, 1)]  # outputs of one more channel, row, column
    more = [torch.nn.functional.pad(y, pad) for pad in more]
    groups = case.groups
    many = y.new_zeros(y.shape[0], groups * (weight.shape[0] // groups + 1), *y.shape[2:])
    inputs = groups * (weight.shape[1] + 1)
    return {
        "input gradient with too many outputs": (OPS.slim_conv2d_input_grad, (many, weight, x.shape, *geometry)),
        "input gradient of too many inputs": (
            OPS.slim_conv2d_input_grad,
            (y, weight, (x.shape[0], inputs, *x.shape[2:]), *geometry),
        ),
        "input gradient of more images": (
            OPS.slim_conv2d_input_grad,
            (y, weight, (x.shape[0] + 1, *x.shape[1:]), *geometry),
        ),
        "input gradient of taller outputs": (OPS.slim_conv2d_input_grad, (more[1], weight, x.shape, *geometry)),
        "input gradient of wider outputs": (OPS.slim_conv2d_input_grad, (more[2], weight, x.shape, *geometry)),
        "input gradient with a stride of 0": (
            OPS.slim_conv2d_input_grad,
            (y, weight, x.shape, (0, 0), *geometry[1:]),
        ),
        "weight gradient of more images": (
            OPS.slim_conv2d_weight_grad_,
            (torch.cat([y, y, y[:1] if len(y) else y.new_zeros(1, *y.shape[1:])]), x, buffer, *geometry),
        ),
        "weight gradient of taller outputs": (OPS.slim_conv2d_weight_grad_, (more[1], x, buffer, *geometry)),
        "weight gradient of wider outputs": (OPS.slim_conv2d_weight_grad_, (more[2], x, buffer, *geometry)),
        "weight gradient of too many outputs": (OPS.slim_conv2d_weight_grad_, (many, x, buffer, *geometry)),
        "weight gradient in a small buffer": (
            OPS.slim_conv2d_weight_grad_,
            (y, x, buffer[: y.shape[1] - 1], *geometry),
        ),
        "weight gradient in few inputs": (
            OPS.slim_conv2d_weight_grad_,
            (y, x, buffer[:, : x.shape[1] // groups - 1], *geometry),
        ),
        "weight gradient in three dimensions": (OPS.slim_conv2d_weight_grad_, (y, x, buffer[:, :, 0], *geometry)),
        "weight gradient of no groups": (OPS.slim_conv2d_weight_grad_, (y, x, buffer, *geometry[:3], 0)),
    }


GRADIENTS = (
    *(f"input gradient {of}" for of in ("with too many outputs", "of too many inputs", "of too many features")),
    *(f"input gradient of {of}" for of in ("more images", "taller outputs", "wider outputs")),
    "input gradient with a stride of 0",
    *(f"weight gradient of {of}" for of in ("more images", "taller outputs", "wider outputs", "too many outputs")),
    *(f"weight gradient in {of}" for of in ("a small buffer", "few inputs", "few columns", "three dimensions")),
    *("weight gradient of too many rows", "weight gradient of no groups"),
)


# The first words of the changes that can apply to a case.
NAMES = {
    ConvCase: "x weight bias out_channels groups stride padding dilation eps a mean var gamma beta out_gamma out_mean "
    "residual",
    LinearCase: "x weight bias out_features a",
    BatchNormCase: "x weight bias eps mean var residual",
    PoolCase: "x kernel stride padding eps mean var gamma beta",
}
NAMES = {kind: names.split() for kind, names in NAMES.items()}


def _gradient_names(case: Case) -> tuple[str, ...]:
    linear = ("features", "rows", "columns")
    if isinstance(case, LinearCase):
        return tuple(g for g in GRADIENTS if g.endswith((*linear, "too many outputs", "small buffer")))
    return tuple(g for g in GRADIENTS if not g.endswith(linear))


@st.composite
def invalid_calls(draw):
    operators = ("slim_conv2d", "slim_conv2d", "slim_conv2d_statistics", "slim_norm_conv2d", "slim_conv2d_norm")
    strategies = [conv_cases(operators, budget=10**4)] * 2 + [linear_cases(), batch_norm_cases(), pool_cases(10**4)]
    case = draw(draw(st.sampled_from(strategies)))
    changes = [change for change in CHANGES if change.split()[0] in NAMES[type(case)]]
    if isinstance(case, (ConvCase, LinearCase)):
        changes += [change for change in GRADIENTS if change in _gradient_names(case)]
    return InvalidCall(case, draw(st.sampled_from(changes)))


def check_refused(invalid: InvalidCall) -> str:
    """Raises AssertionError where the call returns; returns "refused", or "fits" where the change does not apply."""
    call = call_of(invalid.case)
    if 0 in call.tensors["x"].shape:
        return "fits"
    tensors = {n: None if t is None else t.nan_to_num() for n, t in call.tensors.items()}
    function, arguments = call.function(**tensors)
    if invalid.change in GRADIENTS:
        y = call.named(function(**arguments))["y"]
        function, arguments = _gradient_calls(invalid.case, y, tensors).get(invalid.change, (None, ()))
        calls = [] if function is None else [lambda: function(*arguments)]
    else:
        arguments = CHANGES[invalid.change](arguments)
        calls = [] if arguments is None else [lambda: function(**arguments)]
    if not calls:
        return "fits"
    try:
        calls[0]()
    except (*REFUSALS, IndexError) as error:
        assert_one_sentence(error)
        return "refused"
    raise AssertionError(f"{invalid.change} must be refused")
