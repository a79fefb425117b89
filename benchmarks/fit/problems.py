"""A call of an operator that is timed: a kernel without autograd around it, on random values."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import DTYPES
from benchmarks.gate import Gate, check
from gradaug_kernels.cli.paths import parse_convolution

from .constants import Call

_MODULES = {"slim_max_pool2d": "slim_norm_max_pool2d"}  # those not named after their operator
_EPS = 1e-5
_WINDOW = ((3, 3), (2, 2), (1, 1))


class Problem(NamedTuple):
    """An operator and its arguments."""

    op: str
    stage: str
    arguments: tuple

    def run(self) -> object:
        return self._ours(*self.arguments)

    def gate(self) -> Gate:
        """Its result and the reference's of the same dtype, by their distance from one in float64."""
        module = import_module(f"gradaug_kernels.ops.{_MODULES.get(self.op, self.op)}")
        reference = getattr(module, f"{self._name}_reference")
        exact = tuple(each.double() if _is_real(each) else each for each in self.arguments)
        results = (
            self._result(self._ours, self.arguments),
            self._result(reference, self.arguments),
            self._result(reference, exact),
        )
        slack = {"result": torch.finfo(self.arguments[0].dtype).eps / 8}  # of tests/support/accuracy.py
        return check(*({"result": result} for result in results), slack)

    @property
    def _name(self) -> str:
        return self.op if self.stage == "forward" else f"{self.op}_{self.stage}"

    @property
    def _ours(self) -> Callable:
        return getattr(torch.ops.gradaug, self._name)

    def _result(self, call: Callable, arguments: tuple) -> Tensor:
        if self.stage == "weight_grad_":  # in place
            dweight = torch.zeros_like(arguments[2])
            call(*arguments[:2], dweight, *arguments[3:])
            return dweight
        result = call(*arguments)
        return result if isinstance(result, Tensor) else result[0]


def _is_real(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def prepare(call: Call) -> Problem:
    """Raises: ValueError for a text that is no problem."""
    kind, _, sizes = call.problem.partition(" ")
    if kind not in _PREPARE or not sizes:
        raise ValueError(f'a problem must be one of {", ".join(_PREPARE)} and its sizes, got "{call.problem}"')
    generator = torch.Generator().manual_seed(1)

    def draw(shape: Sequence[int], dtype: torch.dtype = DTYPES[call.dtype]) -> Tensor:
        tensor = torch.randn(*shape, generator=generator).to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 and kind != "planes" else tensor

    return _PREPARE[kind](kind, sizes, call.stage, draw)


def _convolution(kind, sizes, stage, draw) -> Problem:
    conv = parse_convolution(sizes)
    weight, x = draw((*conv.full, *conv.kernel), torch.float32), draw(conv.shape)
    if stage == "forward":
        return Problem("slim_conv2d", stage, (x, weight, None, conv.out, *conv.options))
    axes = zip(conv.shape[2:], conv.kernel, *conv.options[:3], strict=True)
    dy = draw((conv.shape[0], conv.out, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)))
    if stage == "input_grad":
        return Problem("slim_conv2d", stage, (dy, weight, conv.shape, *conv.options))
    return Problem("slim_conv2d", "weight_grad_", (dy, x, torch.zeros_like(weight), *conv.options))


def _linear(kind, sizes, stage, draw) -> Problem:
    """linear16: with a weight of the images' dtype, as a low-precision model has it."""
    rows, features, out = map(int, sizes.split(","))
    x, dy = draw((rows, features)), draw((rows, out))
    weight = draw((out, features), x.dtype if kind == "linear16" else torch.float32)
    if stage == "forward":
        return Problem("slim_linear", stage, (x, weight, None, out))
    if stage == "input_grad":
        return Problem("slim_linear", stage, (dy, weight, features))
    return Problem("slim_linear", "weight_grad_", (dy, x, torch.zeros_like(weight)))


def _norm(kind, sizes, stage, draw) -> Problem:
    shape = tuple(map(int, sizes.split(",")))
    x, weight, bias = draw(shape), draw(shape[1:2], torch.float32), draw(shape[1:2], torch.float32)
    forward = Problem("slim_batch_norm", "forward", (x, weight, bias, None, None, None, True, _EPS))
    if stage == "forward":
        return forward
    y, mean, var = forward.run()
    return Problem("slim_batch_norm", stage, (draw(shape), x, y, weight, bias, mean, var, True, False, _EPS))


def _pool(kind, sizes, stage, draw) -> Problem:
    x = draw(tuple(map(int, sizes.split(","))))
    forward = Problem("slim_max_pool2d", "forward", (x, *_WINDOW))
    if stage == "forward":
        return forward
    y, offset = forward.run()
    return Problem("slim_max_pool2d", stage, (draw(y.shape), None, offset, x.shape, *_WINDOW))


_PREPARE = {
    "conv": _convolution,
    "linear": _linear,
    "linear16": _linear,
    "norm": _norm,
    "planes": _norm,
    "pool": _pool,
}
