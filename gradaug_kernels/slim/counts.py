"""Numbers of channels as a network's own code sees them: at all widths at once.

A network may ask how many channels a value has, and do one thing or another: `if x.shape[1] < 8`. The sizes that
`CountedSizes` gives it remember what they are at every width. They compute like numbers, and a comparison that turns
out differently at some width is an error, whatever the width at which the network happens to run.
"""

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .follow import Channels, Differs, Follower

_SHAPE = Tensor.shape.__get__
_SIZE, _NUMBERS = Tensor.size, (Tensor.numel, Tensor.nelement, torch.numel)


class _Run:
    """Which of all widths a run is at, and whether it is over: numbers that outlive it are plain ones."""

    def __init__(self, now: int):
        self.now, self.is_over = now, False


class _OfWidth:
    """A number that is `at[run.now]` at the width of the run, and at[i] at the others."""

    def __new__(cls, at: tuple, run: _Run):
        self = super().__new__(cls, at[run.now])
        self._at, self._run = at, run
        return self

    def _compare(self, compare: Callable, other):
        if self._run.is_over:
            return compare(_plain(self), _plain(other))
        at = _at(other, len(self._at))
        if at is None:
            return NotImplemented
        found = [bool(compare(a, b)) for a, b in zip(self._at, at, strict=True)]
        now = found[self._run.now]
        if not all(answer == now for answer in found):
            other_answer = found.index(not now)
            a, b = (f"{self._at[i]} with {at[i]}" for i in (self._run.now, other_answer))
            raise Differs(f"compares {a}, which turns out differently at another width, {b}")
        return now

    def _apply(self, apply: Callable, *others, reverse: bool = False):
        if self._run.is_over:
            others = [_plain(other) for other in others]
            return apply(*others, _plain(self)) if reverse else apply(_plain(self), *others)
        columns = [_at(other, len(self._at)) for other in others]
        if any(column is None for column in columns):
            return NotImplemented
        rows = zip(*columns, self._at, strict=True) if reverse else zip(self._at, *columns, strict=True)
        return of_width(tuple(apply(*row) for row in rows), self._run)

    def __bool__(self) -> bool:
        return self._compare(operator.ne, 0)

    def __hash__(self) -> int:
        self._compare(operator.eq, _plain(self))  # a key of a dictionary
        return hash(_plain(self))

    def __reduce__(self):  # a copy is a plain number
        return type(_plain(self)), (_plain(self),)


def _plain(number):
    return number._at[number._run.now] if isinstance(number, _OfWidth) else number


def _at(number, count: int) -> tuple | None:
    if isinstance(number, _OfWidth):
        return number._at
    return (number,) * count if isinstance(number, int | float) else None


def _add_operators() -> None:
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift"):
        apply = getattr(operator, name)

        def forward(self, other, apply=apply):
            return self._apply(apply, other)

        def backward(self, other, apply=apply):
            return self._apply(apply, other, reverse=True)

        setattr(_OfWidth, f"__{name.strip('_')}__", forward)
        setattr(_OfWidth, f"__r{name.strip('_')}__", backward)
    for name, apply in {
        **{"neg": operator.neg, "abs": abs, "round": round, "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc}
    }.items():
        setattr(_OfWidth, f"__{name}__", lambda self, *others, apply=apply: self._apply(apply, *others))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        compare = getattr(operator, name)
        setattr(_OfWidth, f"__{name}__", lambda self, other, compare=compare: self._compare(compare, other))


_add_operators()


class _Integer(_OfWidth, int):
    def __divmod__(self, other):
        return self // other, self % other


class _Real(_OfWidth, float):
    pass


def of_width(at: tuple, run: _Run) -> int | float:
    """The number that is at[run.now], and remembers the others where they differ."""
    if all(number == at[run.now] for number in at):
        return at[run.now]
    return (_Integer if isinstance(at[run.now], int) else _Real)(at, run)


class _Size(tuple):
    """Like torch.Size, which turns what it holds into plain integers, and also passes for one."""

    __slots__ = ()

    @property
    def __class__(self):
        return torch.Size

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return _Size(found) if isinstance(index, slice) else found

    def __hash__(self) -> int:
        """Of all widths, so that a cache by shape does not meet the same numbers of another layer."""
        numbers = (n._at if isinstance(n, _OfWidth) and not n._run.is_over else n for n in self)
        return hash(tuple(numbers))

    def __add__(self, other):
        return _Size((*self, *other))

    def __radd__(self, other):
        return _Size((*other, *self))

    def numel(self) -> int:
        product = 1
        for size in self:
            product = product * size
        return product


class CountedSizes(TorchFunctionMode):
    """Lets sizes of tensors remember how many channels there are at every width.

    Args:
        follower: of the run, which knows which sizes are numbers of channels.
        counts: a source's numbers of channels at every width.
        now: which of them is that of the run.
    """

    def __init__(self, follower: Follower, counts: Callable[[str], tuple[int, ...]], now: int):
        super().__init__()
        self._follower, self._counts, self._run = follower, counts, _Run(now)

    def __exit__(self, *exception):
        self._run.is_over = True
        return super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func == _SHAPE or (func is _SIZE and isinstance(out, torch.Size)):
            return self._sizes(args[0], out)
        if func is _SIZE:
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return self._sizes(args[0], args[0].shape)[dim]
        if func in _NUMBERS:
            return self._sizes(args[0], args[0].shape).numel()
        return out

    def _sizes(self, tensor: Tensor, shape: torch.Size) -> _Size:
        dimensions = self._follower.value(tensor).dimensions
        return _Size(map(self._size, shape, dimensions))

    def _size(self, size: int, dimension) -> int:
        if not isinstance(dimension, Channels) or dimension.padded:
            return size
        return of_width(tuple(count * dimension.inner for count in self._counts(dimension.source)), self._run)
