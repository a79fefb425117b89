"""Which channels every value of a network has, found by running it on tensors without data.

A convolution or linear layer makes channels; every operator after it either passes them on in their place (batch norm,
ReLU, pooling, addition, padding, flattening, ...) or does something that is not the same for the first channels alone
(a softmax or a mean over them, a shuffle, a concatenation, a parameter of fixed size, ...). `Follower` is a dispatch
mode that knows the first kind, by the operator's name, and notes everything else as the second kind. It knows nothing
of modules but of those that are sliced, so that a network's own code needs no case of its own here.

A second run, of the sliced network at a smaller width, is compared with the first operator by operator: the same
operators, operands and constants, every channel dimension as narrow as it should be and every other one as it was.
"""

import functools
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_OWN_FILES = tuple(os.path.join(os.path.dirname(file), "") for file in (os.path.dirname(__file__), torch.__file__))
_MOST_NUMBERS = 1 << 14  # of a tensor with data that is looked at
_MOST_OPERATORS = 50_000  # of a run; a loop that waits for a value that never comes ends here


class Channels(NamedTuple):
    """What a dimension with channels has.

    source: the layer that made them; layers that share channels have one class, of which it is a member.
    inner: values side by side per channel, above 1 in a flattened image.
    padded: zeros may follow the channels of the source, up to the number of channels of another layer.
    """

    source: str
    inner: int = 1
    padded: bool = False


UNIFORM = "uniform"  # a dimension along which nothing tells one index from another: zeros, an expanded 1
Dimension = Channels | str | None  # None: a dimension that has the same size at every width
Dimensions = tuple[Dimension, ...]


class Value(NamedTuple):
    """What is known of a tensor."""

    dimensions: Dimensions
    sources: frozenset[str]  # whose channels went into it, with no layer in between, and cannot be told apart any more
    origin: tuple | str | None  # the operator that made it and which of its results, a parameter's name, or its data
    is_noise: bool = False  # made of random numbers alone


class Use(NamedTuple):
    """A use of channels that differs between a network and its sub-networks."""

    what: str
    where: str


class Stopped(Exception):
    """The run cannot go on: it needs a value, and there are only shapes."""


class Differs(Exception):
    """The narrow run does something else than the one at full width."""


# ---- classes of channels


class Classes:
    """Sources that share their channels, joined by union-find."""

    def __init__(self):
        self._parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        parent = self._parent
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = parent[above]
            name = above
        return name

    def join(self, a: str, b: str) -> None:
        self._parent[self.find(b)] = self.find(a)


# ---- the place in the user's code


def place(names: dict[int, str], frame=None) -> str:
    """The innermost module and the line of the user's code that run now, or in the frame given."""
    frame = sys._getframe(1) if frame is None else frame
    module = line = None
    while frame is not None and (module is None or line is None):
        file = frame.f_code.co_filename
        if line is None and not file.startswith(_OWN_FILES) and not file.startswith("<"):
            line = f"{os.path.basename(file)}:{frame.f_lineno}"
        owner = frame.f_locals.get("self")
        if module is None and id(owner) in names and isinstance(owner, nn.Module):
            module = f"{describe(names[id(owner)])} ({type(owner).__name__})"
        frame = frame.f_back
    return ", ".join(part for part in (module, line) if part is not None) or "the model"


def describe(name: str) -> str:
    return f"'{name}'" if name else "the model itself"


def place_of_error(error: BaseException, names: dict[int, str]) -> str:
    """The innermost module and the last line of the user's code that an exception passed."""
    trace, frames = error.__traceback__, []
    while trace is not None:
        frames.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    module = line = None
    for frame, number in reversed(frames):
        file = frame.f_code.co_filename
        if line is None and not file.startswith(_OWN_FILES) and not file.startswith("<"):
            line = f"{os.path.basename(file)}:{number}"
        owner = frame.f_locals.get("self")
        if module is None and id(owner) in names and isinstance(owner, nn.Module):
            module = f"{describe(names[id(owner)])} ({type(owner).__name__})"
    return ", ".join(part for part in (module, line) if part is not None) or "the model"


# ---- what operators do to channels


class _Mixes(Exception):
    """Raised by a rule: the operator does not treat each channel alike and in its place."""


def _positions(dims, rank: int) -> tuple[int, ...]:
    if dims is None or dims == []:
        return tuple(range(rank))
    dims = (dims,) if isinstance(dims, int) else dims
    return tuple(d % rank if rank else 0 for d in dims)


def _refuse_over(dimensions: Dimensions, positions, what: str) -> None:
    if any(isinstance(dimensions[p], Channels) for p in positions):
        raise _Mixes(what)


def _argument(func, args, kwargs, name, default=None):
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[i] if i < len(args) else kwargs.get(name, argument.default_value)
    return default


class _Call(NamedTuple):
    follower: "Follower"
    func: Any
    args: tuple
    kwargs: dict
    operands: list[tuple[Tensor, Value]]
    sizes: list[torch.Size]  # of the operands before the call, which may be in place
    out: Any

    def get(self, name: str, default=None):
        return _argument(self.func, self.args, self.kwargs, name, default)

    @property
    def name(self) -> str:
        return self.func._overloadpacket.__name__

    @property
    def first(self) -> Dimensions:
        return self.operands[0][1].dimensions

    @property
    def labelled(self) -> list[Channels]:
        """Those that went into it."""
        return [d for _, value in self.operands for d in value.dimensions if isinstance(d, Channels)]

    @property
    def outs(self) -> list[Tensor]:
        return [leaf for leaf in _leaves((self.out,), {}) if isinstance(leaf, Tensor)]


_KEEP_ZERO = ("relu", "relu_", "add", "add_", "sub", "sub_", "_to_copy", "copy_")


def _pointwise(call: _Call) -> Dimensions:
    """Broadcast: channels meet the same channels, a 1, or values that are alike for all of them."""
    shape = call.out.shape if isinstance(call.out, Tensor) else call.out[0].shape
    rank = len(shape)
    merged: list[Dimension] = []
    name = call.func._overloadpacket.__name__
    for position in range(rank):
        found: Dimension = None
        constant = None  # an operand of fixed size there
        uniform = False
        for (tensor, value), size in zip(call.operands, call.sizes, strict=True):
            at = position - (rank - len(size))
            if at < 0 or (size[at] == 1 and shape[position] != 1):
                continue
            dimension = value.dimensions[at]
            if isinstance(dimension, Channels):
                found = dimension if found is None else call.follower.meet(found, dimension, name)
            elif dimension == UNIFORM:
                uniform = True
            else:
                constant = tensor
        if isinstance(found, Channels):
            if constant is not None:
                raise _Mixes(call.follower.describe_constant(constant, name))
            if found.padded and name not in _KEEP_ZERO:
                raise _Mixes(f"channels padded with zeros go through {name}")
            merged.append(found)
        else:
            merged.append(UNIFORM if uniform and constant is None else None)
    return tuple(merged)


def _creates(call: _Call) -> Dimensions:
    return (UNIFORM,) * call.out.dim()


def _reduces(call: _Call) -> Dimensions:
    dimensions = call.first
    positions = _positions(call.get("dim"), len(dimensions))
    _refuse_over(dimensions, positions, f"computes a {call.func._overloadpacket.__name__} over")
    if call.get("keepdim", False):
        return tuple(None if p in positions else d for p, d in enumerate(dimensions))
    return tuple(d for p, d in enumerate(dimensions) if p not in positions)


def _along(call: _Call) -> Dimensions:
    dimensions = call.first
    dims = call.get("dims", "none")
    dims = call.get("dim") if dims == "none" else dims
    name = call.func._overloadpacket.__name__.strip("_")
    _refuse_over(dimensions, _positions(dims, len(dimensions)), f"computes a {name} over")
    return tuple(None if p in _positions(dims, len(dimensions)) else d for p, d in enumerate(dimensions))


def _spatial(count: int) -> Callable[[_Call], Dimensions]:
    def rule(call: _Call) -> Dimensions:
        dimensions = call.first
        _refuse_over(dimensions, range(len(dimensions) - count, len(dimensions)), "pools or resizes over")
        for _, value in call.operands[1:]:
            _refuse_over(value.dimensions, range(len(value.dimensions)), "samples at places given by")
        return (*dimensions[:-count], *(None,) * count)

    return rule


def _pad(call: _Call) -> Dimensions:
    dimensions, pad = list(call.first), list(call.get("pad"))
    for i in range(len(pad) // 2):
        position, before, after = len(dimensions) - 1 - i, pad[2 * i], pad[2 * i + 1]
        if before == after == 0:
            continue
        if isinstance(found := dimensions[position], Channels):
            if before != 0 or after < 0 or call.get("value", 0) != 0 or found.inner != 1:
                raise _Mixes("pads, other than with zeros at the end,")
            dimensions[position] = found._replace(padded=True)
        else:
            dimensions[position] = None
    return tuple(dimensions)


def _slice(call: _Call) -> Dimensions:
    dimensions = list(call.first)
    position = (call.get("dim") or 0) % len(dimensions)
    if call.out.shape[position] == call.sizes[0][position]:
        if (call.get("step") or 1) != 1:
            dimensions[position] = None
        return tuple(dimensions)
    _refuse_over(dimensions, (position,), "takes a part of")
    dimensions[position] = UNIFORM if dimensions[position] == UNIFORM else None
    return tuple(dimensions)


def _select(call: _Call) -> Dimensions:
    dimensions = call.first
    position = call.get("dim") % len(dimensions)
    _refuse_over(dimensions, (position,), "takes one of")
    return dimensions[:position] + dimensions[position + 1 :]


def _split(call: _Call) -> Dimensions:
    dimensions = call.first
    position = (call.get("dim") or 0) % len(dimensions)
    _refuse_over(dimensions, (position,), "concatenates or splits")
    return tuple(None if p == position else d for p, d in enumerate(dimensions))


def _unbind(call: _Call) -> Dimensions:
    dimensions = call.first
    position = (call.get("dim") or 0) % len(dimensions)
    _refuse_over(dimensions, (position,), "concatenates or splits")
    return dimensions[:position] + dimensions[position + 1 :]


def _concatenate(call: _Call) -> Dimensions:
    stacked = call.func._overloadpacket.__name__ == "stack"
    position = (call.get("dim") or 0) % call.out.dim()
    rows = []
    for _, value in call.operands:
        dimensions = value.dimensions
        if not stacked:
            _refuse_over(dimensions, (position,), "concatenates or splits")
            dimensions = dimensions[:position] + dimensions[position + 1 :]
        rows.append(dimensions)
    merged: list[Dimension] = []
    for column in zip(*rows, strict=True):
        channels = [d for d in column if isinstance(d, Channels)]
        if channels and any(d is None for d in column):
            raise _Mixes("concatenates values of fixed size with")
        found = channels[0] if channels else None
        for other in channels[1:]:
            found = call.follower.meet(found, other, "cat")
        merged.append(found)
    merged.insert(position, None)
    return tuple(merged)


def _permute(call: _Call) -> Dimensions:
    dimensions = call.first
    return tuple(dimensions[d % len(dimensions)] for d in call.get("dims"))


def _transpose(call: _Call) -> Dimensions:
    dimensions = list(call.first)
    if len(dimensions) < 2:
        return tuple(dimensions)
    a, b = (0, 1) if call.func._overloadpacket.__name__ == "t" else (call.get("dim0"), call.get("dim1"))
    a, b = a % len(dimensions), b % len(dimensions)
    dimensions[a], dimensions[b] = dimensions[b], dimensions[a]
    return tuple(dimensions)


def _unsqueeze(call: _Call) -> Dimensions:
    dimensions = call.first
    position = call.get("dim") % (len(dimensions) + 1)
    return (*dimensions[:position], None, *dimensions[position:])


def _squeeze(call: _Call) -> Dimensions:
    dimensions = call.first
    positions = _positions(call.get("dim"), len(dimensions))
    return tuple(d for p, d in enumerate(dimensions) if not (p in positions and call.sizes[0][p] == 1))


def _expand(call: _Call) -> Dimensions:
    size, dimensions, shape = call.sizes[0], call.first, call.out.shape
    added = len(shape) - len(size)
    kept = (
        UNIFORM if old == 1 and new != 1 else d for d, old, new in zip(dimensions, size, shape[added:], strict=True)
    )
    return ((UNIFORM,) * added) + tuple(kept)


def _index(call: _Call) -> Dimensions:
    dimensions, indices = call.first, list(call.get("indices"))
    picked = [p for p, index in enumerate(indices) if index is not None]
    sources = [d for _, value in call.operands[1:] for d in value.dimensions]
    if any(isinstance(d, Channels) for d in sources) or any(indices[p].dtype == torch.bool for p in picked):
        raise _Mixes("picks by index")
    _refuse_over(dimensions, picked, "picks by index")
    added = (None,) * (call.out.dim() - len(dimensions) + len(picked))
    kept = [d for p, d in enumerate(dimensions) if p not in picked]
    at = picked[0] if picked[-1] - picked[0] == len(picked) - 1 else 0
    return (*kept[:at], *added, *kept[at:])


def _repeat(call: _Call) -> Dimensions:
    size, dimensions, repeats = call.sizes[0], call.first, call.get("repeats")
    added = len(repeats) - len(size)
    result: list[Dimension] = [UNIFORM] * added
    for d, old, times in zip(dimensions, size, repeats[added:], strict=True):
        if isinstance(d, Channels) and times != 1:
            raise _Mixes("repeats")
        result.append(d if times == 1 else UNIFORM if old == 1 or d == UNIFORM else None)
    return tuple(result)


def _view(call: _Call) -> Dimensions:
    """Dimensions that are split or flattened: channels stay channels where they are the outermost of theirs."""
    old, new, dimensions = call.sizes[0], call.out.shape, call.first
    if call.out.numel() == 0:
        raise _Mixes("views, without any element,")
    result: list[Dimension] = []
    for ins, outs in _groups(old, new):
        channels = [d for d in ins if isinstance(dimensions[d], Channels)]
        real_in, real_out = [d for d in ins if old[d] != 1], [d for d in outs if new[d] != 1]
        if not channels:
            alike = bool(real_in) and all(dimensions[d] == UNIFORM for d in real_in)
            result += [UNIFORM if alike and new[d] != 1 else None for d in outs]
            continue
        if len(channels) > 1 or real_in[0] != channels[0]:
            raise _Mixes("rearranges, by a view or a reshape,")
        found = dimensions[channels[0]]
        count = old[channels[0]] // found.inner
        if new[real_out[0]] % count:
            raise _Mixes("rearranges, by a view or a reshape,")
        inner = new[real_out[0]] // count
        if found.padded and inner != 1:
            raise _Mixes("flattens, padded with zeros,")
        result += [found._replace(inner=inner) if d == real_out[0] else None for d in outs]
    return tuple(result)


def _groups(old: torch.Size, new: torch.Size) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions of equal size in both shapes."""
    i = j = 0
    while i < len(old) or j < len(new):
        ins, outs, a, b = [], [], 1, 1
        if i < len(old):
            ins.append(i)
            a *= old[i]
            i += 1
        if j < len(new):
            outs.append(j)
            b *= new[j]
            j += 1
        while a != b:
            if a < b:
                ins.append(i)
                a *= old[i]
                i += 1
            else:
                outs.append(j)
                b *= new[j]
                j += 1
        # Ones that stand beside a run belong to it.
        while i < len(old) and old[i] == 1 and (j >= len(new) or new[j] != 1):
            ins.append(i)
            i += 1
        while j < len(new) and new[j] == 1 and (i >= len(old) or old[i] != 1):
            outs.append(j)
            j += 1
        yield ins, outs


def _rules() -> dict[str, Callable[[_Call], Dimensions]]:
    table: dict[str, Callable[[_Call], Dimensions]] = {}

    def add(rule, names: str) -> None:
        table.update(dict.fromkeys(names.split(), rule))

    add(_pointwise, "_to_copy copy_ native_dropout bernoulli bernoulli_ fill_")
    add(_pointwise, "zero_ uniform_ normal_ _prelu_kernel masked_fill masked_fill_ where log_sigmoid_forward rrelu_")
    add(_pointwise, "hardswish hardswish_ hardsigmoid hardsigmoid_ mish mish_ silu silu_ gelu gelu_ elu elu_ celu selu")
    add(_pointwise, "leaky_relu leaky_relu_ softplus threshold threshold_ softshrink hardshrink celu_ selu_ relu6")
    add(_pointwise, "hardtanh hardtanh_ rrelu_with_noise rrelu_with_noise_")
    add(_creates, "empty zeros ones full rand randn new_empty new_zeros new_ones new_full zeros_like ones_like")
    add(_creates, "full_like empty_like rand_like randn_like empty_strided new_empty_strided scalar_tensor")
    add(_reduces, "mean sum amax amin var std any all logsumexp prod argmax argmin max min linalg_vector_norm norm")
    add(_reduces, "var_mean std_mean median aminmax count_nonzero")
    add(_along, "_softmax _log_softmax cumsum cumprod flip roll sort logcumsumexp")
    add(_spatial(1), "upsample_nearest1d upsample_linear1d reflection_pad1d replication_pad1d avg_pool1d")
    add(_spatial(2), "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d")
    add(_spatial(2), "adaptive_avg_pool2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa")
    add(_spatial(2), "_upsample_bicubic2d_aa _upsample_nearest_exact2d reflection_pad2d replication_pad2d")
    add(_spatial(2), "grid_sampler_2d fractional_max_pool2d")
    add(_spatial(3), "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d")
    add(_pad, "constant_pad_nd")
    add(_slice, "slice")
    add(_select, "select")
    add(_split, "split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk")
    add(_unbind, "unbind")
    add(_concatenate, "cat stack")
    add(_permute, "permute")
    add(_transpose, "transpose t")
    add(_unsqueeze, "unsqueeze")
    add(_squeeze, "squeeze")
    add(_expand, "expand")
    add(_index, "index _unsafe_index")
    add(_repeat, "repeat")
    add(_view, "view _unsafe_view _reshape_alias _reshape_copy")
    return table


_RULES = _rules()
# Operators whose integers are sizes: those are compared by the shapes that come of them.
_SIZED = set(
    [
        "view",
        "_unsafe_view",
        "_reshape_alias",
        "_reshape_copy",
        "expand",
        "empty",
        "zeros",
        "ones",
        "full",
        "rand",
        "randn",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "empty_strided",
        "new_empty_strided",
        "constant_pad_nd",
        "slice",
        "arange",
        "linspace",
    ]
)
_WHATEVER_THE_SIZE = {
    *(_pointwise, _creates, _slice, _select, _permute, _transpose, _unsqueeze, _squeeze, _expand, _repeat, _view),
}
_FILLED = {"full", "new_full", "full_like"}
_SCALES = {"mul", "mul_", "div", "div_"}
_RANDOM = {"bernoulli", "bernoulli_", "rand", "randn", "rand_like", "randn_like", "uniform_", "normal_"}
_COPIES = {"clone", "contiguous", "alias", "detach", "detach_", "lift_fresh"}
_VIEWS = dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "_reshape_copy"), "view")
_MIXING = {
    "convolution": "reads, in a convolution that is no nn.Conv2d layer,",
    "mm": "multiplies, as a matrix,",
    "addmm": "multiplies, as a matrix,",
    "bmm": "multiplies, as a matrix,",
    "baddbmm": "multiplies, as a matrix,",
    "linear": "multiplies, as a matrix,",
    "einsum": "multiplies, as a matrix,",
    "scaled_dot_product_attention": "attends with",
    "native_group_norm": "normalises groups of",
    "native_layer_norm": "normalises over",
    "_native_batch_norm_legit": "normalises with statistics or parameters of fixed size",
    "native_batch_norm": "normalises with statistics or parameters of fixed size",
    "_native_batch_norm_legit_no_training": "normalises with statistics or parameters of fixed size",
    "index_select": "picks by index",
    "gather": "picks by index",
    "pixel_shuffle": "rearranges, by a pixel shuffle,",
    "pixel_unshuffle": "rearranges, by a pixel shuffle,",
    "channel_shuffle": "rearranges, by a shuffle,",
    "im2col": "unfolds",
    "col2im": "folds",
}


def without_data(leaf: Any) -> Any:
    """A tensor of the same shape on the meta device; anything else as it is."""
    if isinstance(leaf, Tensor) and leaf.device.type != "meta":
        return torch.empty_like(leaf, device="meta")
    return leaf


def _uniform_sizes(operands: list[tuple[Tensor, Value]]) -> Iterator[int]:
    """The sizes that tell how often the same value was summed up, and the like."""
    for operand, value in operands:
        for size, dimension in zip(operand.shape, value.dimensions, strict=True):
            if dimension == UNIFORM:
                yield size


def _data(tensor: Tensor) -> tuple:
    """What tells a tensor with data from another one."""
    if tensor.numel() > _MOST_NUMBERS:
        return "data", id(tensor)
    return "data", str(tensor.dtype), tuple(tensor.shape), str(tensor.detach().cpu().tolist())


def _leaves(args: tuple, kwargs: dict) -> list:
    """The arguments of an operator, those in lists one by one."""
    leaves = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple):
            leaves += value
        else:
            leaves.append(value)
    return leaves


@functools.cache
def _takes_device(func) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


@functools.cache
def _rule(func) -> Callable[[_Call], Dimensions] | None:
    if func.namespace != "aten":
        return None
    rule = _RULES.get(func._overloadpacket.__name__)
    if rule is None and torch.Tag.pointwise in func.tags:
        return _pointwise
    return rule


# ---- the run


class Follower(TorchDispatchMode):
    """Follows channels through one run of a network.

    Args:
        names: id of each module -> its name, for messages.
        parameters: id of each parameter and buffer -> its name.
        expected: the record of the run at full width, for a narrow one.
        width_of: a source's number of channels in a narrow run.
        answer: what a value is taken for that the code asks for as a bool; None for an error instead.
    """

    def __init__(self, names, parameters, classes=None, expected=None, width_of=None, kept=None, answer=None):
        super().__init__()
        self.names, self.parameters = names, parameters
        self.classes = classes or Classes()
        self.record: list[tuple] = []
        self.expected, self.width_of, self.kept = expected, width_of, kept
        self.answer = answer
        self.uses: dict[str, Use] = {}  # source -> its first use of the kind
        self.touched: dict[str, str] = {}  # parameter or buffer that the network's own code reads -> where
        self._values: dict[int, Value] = {}
        self._foreign: set[int] = set()  # storages that hold values that labels no longer tell
        self._alive: list[Tensor] = []  # so that no id is used twice
        self._saved: dict[tuple, Value] = {}  # by memory and shape, what a backward pass may find saved
        self._inside = False

    # -- values

    def value(self, tensor: Tensor) -> Value:
        found = self._values.get(id(tensor))
        if found is None and self._saved:
            found = self._saved.get((tensor.untyped_storage()._cdata, tensor.shape))
        if found is None:
            has_data = tensor.device.type != "meta"
            origin = _data(tensor) if has_data else self.parameters.get(id(tensor))
            found = Value((None,) * tensor.dim(), frozenset(), origin)
        elif UNIFORM in found.dimensions and tensor.untyped_storage()._cdata in self._foreign:
            found = found._replace(dimensions=tuple(None if d == UNIFORM else d for d in found.dimensions))
        return found

    def meet(self, a: Channels, b: Channels, name: str) -> Channels:
        """The channels of the result where two dimensions with channels meet."""
        if a.inner != b.inner:
            raise _Mixes("combines flattened images of different sizes of")
        self.classes.join(a.source, b.source)
        return b if a.padded else a

    def describe_constant(self, tensor: Tensor, name: str) -> str:
        origin = self.value(tensor).origin
        owner = f"'{origin}'" if isinstance(origin, str) else f"a tensor of fixed size {tuple(tensor.shape)}"
        return f"combines {owner} (by {name.strip('_')}) with"

    def mix(self, sources, what: str) -> None:
        """Note a use that is not the same in a sub-network."""
        if all(source in self.uses for source in sources):
            return
        where = place(self.names)
        for source in sorted(sources):
            self.uses.setdefault(source, Use(what, where))

    # -- operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._inside:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():  # what this code asks of tensors is not the network's question
            return self._follow(func, args, kwargs or {})

    def _follow(self, func, args: tuple, kwargs: dict):
        rule = _rule(func)
        name = func._overloadpacket.__name__
        if rule is None and name not in _MIXING and name not in _COPIES:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "allclose"):
            return self._answer(args[0] if isinstance(args[0], Tensor) else None, name)
        leaves = _leaves(args, kwargs)
        call = self._on_meta(func, args, kwargs, leaves)
        outs = call.outs
        if rule is not _creates and not name.startswith("detach"):
            self._ask_for_gradients([tensor for tensor, _ in call.operands], outs)
        if name in _COPIES:  # whether there is one depends on the memory format
            for tensor in outs:
                self._alive.append(tensor)
                self._values[id(tensor)] = call.operands[0][1]
            return call.out
        noise = not call.labelled and (name in _RANDOM or any(value.is_noise for _, value in call.operands))
        constants = self._constants(call, leaves, noise)
        entry = (_VIEWS.get(name, func), tuple(value.origin for _, value in call.operands), constants)
        if self.expected is not None:
            self._compare(entry, outs, noise)
            self._note_writes(call, outs, self.value(outs[0]).dimensions if outs else None)
        else:
            self._label(call, outs, entry, noise)
        return call.out

    def _on_meta(self, func, args: tuple, kwargs: dict, leaves: list) -> _Call:
        """Call it on the meta device."""
        operands = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        values = [self.value(operand) for operand in operands]
        for value in values:
            if isinstance(value.origin, str) and value.origin not in self.touched:
                self.touched[value.origin] = place(self.names)
        if any(operand.device.type != "meta" for operand in operands):
            args, kwargs = tree_map(without_data, (args, kwargs))
            operands = [leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, Tensor)]
        if kwargs:
            kwargs = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory")}
        if _takes_device(func):
            kwargs["device"] = torch.device("meta")
        sizes = [operand.shape for operand in operands]
        alone = len(operands) == 1 and _rule(func) is _pointwise and func._overloadpacket.__name__.endswith("_")
        out = operands[0] if alone else func(*args, **kwargs)  # in place, and the same shape, without the call
        return _Call(self, func, args, kwargs, list(zip(operands, values, strict=True)), sizes, out)

    def _constants(self, call: _Call, leaves: list, noise: bool) -> tuple:
        """What of an operator but its operands must be the same in a narrow run."""
        if noise and call.name in _SCALES:
            return ()  # DropBlock divides by the mean of what it has drawn, over all channels
        constants = () if call.name in _SIZED else tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        if call.name in _FILLED:
            constants = (call.get("fill_value"),)
        if not noise and _rule(call.func) not in _WHATEVER_THE_SIZE:
            constants += tuple(_uniform_sizes(call.operands))
        return constants

    def _label(self, call: _Call, outs: list[Tensor], entry: tuple, noise: bool) -> None:
        """Note what the results have, in the run at full width."""
        sources = frozenset().union(*(value.sources for _, value in call.operands))
        labelled = {d.source for d in call.labelled}
        dimensions, mixes = self._apply_rule(call)
        if mixes is not None:
            self.mix(labelled, mixes)
            sources |= labelled
        self._note_writes(call, outs, dimensions)
        known = []
        for tensor in outs:
            fits = dimensions is not None and len(dimensions) == tensor.dim()
            known.append(dimensions if fits else (None,) * tensor.dim())
            if not fits and dimensions is not None:
                self.mix(labelled, f"applies {call.name.strip('_')} to")
                sources |= labelled
        for i, (tensor, found) in enumerate(zip(outs, known, strict=True)):
            self._alive.append(tensor)
            self._values[id(tensor)] = Value(found, sources, (len(self.record), i), noise)
        self._append(entry, outs, known)

    def _apply_rule(self, call: _Call) -> tuple[Dimensions | None, str | None]:
        """The dimensions of the results, or what the operator does that is not the same for each channel."""
        rule = _rule(call.func)
        if rule is None or (not call.operands and rule is not _creates):
            return None, _MIXING.get(call.name, f"applies {call.name.strip('_')} to")
        try:
            return rule(call), None
        except _Mixes as error:
            return None, str(error)

    def _append(self, entry, outs, known) -> None:
        if len(self.record) >= _MOST_OPERATORS:
            raise Stopped(f"runs over {_MOST_OPERATORS} operators")
        self.record.append((*entry, tuple(zip((tuple(out.shape) for out in outs), known, strict=True))))

    def _note_writes(self, call: _Call, outs: list[Tensor], dimensions: Dimensions | None) -> None:
        for operand, value in call.operands:
            if any(operand is written for written in outs):
                self._write(operand, value, dimensions)

    def _write(self, tensor: Tensor, before: Value, dimensions: Dimensions | None) -> None:
        """An operator in place changes what other views of the same memory hold."""
        after = dimensions or (None,) * tensor.dim()
        if after != before.dimensions or (UNIFORM in after and tensor.numel() * tensor.element_size() < _bytes(tensor)):
            self._foreign.add(tensor.untyped_storage()._cdata)
            views = [
                other
                for other in self._alive
                if other is not tensor and other.untyped_storage()._cdata == tensor.untyped_storage()._cdata
            ]
            if views and any(isinstance(d, Channels) for d in (*after, *before.dimensions)):
                mixed = {d.source for d in (*after, *before.dimensions) if isinstance(d, Channels)}
                self.mix(mixed, "writes in place, into a part of another tensor,")

    def _answer(self, tensor: Tensor | None, name: str):
        if self.answer is None or tensor is None or (name == "_local_scalar_dense" and tensor.dtype != torch.bool):
            raise Stopped("needs the value of a tensor (as `if x.sum() > 0` or x.item() do)")
        return self.answer

    # -- gradients

    def _ask_for_gradients(self, operands: Iterable[Tensor], outs: Iterable[Tensor]) -> None:
        """What autograd, which has no part in this run, would answer to `tensor.requires_grad`."""
        if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
            for out in outs:
                if out.is_floating_point() or out.is_complex():
                    out.requires_grad_()

    def follow_backward(self) -> None:
        """Run the network's own backward code: of its autograd functions, and hooks of tensors."""
        made = list(self._alive)
        with torch._C.DisableTorchFunction():
            self._saved = {(tensor.untyped_storage()._cdata, tensor.shape): self.value(tensor) for tensor in made}
        nodes: dict[Any, dict[int, Tensor]] = {}
        for tensor in made:
            for hook in (tensor._backward_hooks or {}).values():
                hook(self._gradient(tensor))
            node = tensor.grad_fn
            if isinstance(node, BackwardCFunction) and not node._forward_cls.__module__.startswith("torch."):
                nodes.setdefault(node, {})[tensor.output_nr] = tensor
        for node, outputs in nodes.items():
            count = 1 + max(outputs)
            node.apply(*(self._gradient(outputs[i]) if i in outputs else None for i in range(count)))

    def _gradient(self, tensor: Tensor) -> Tensor:
        """A gradient of `tensor`, which has its channels."""
        self._inside = True
        try:
            gradient = torch.empty_like(tensor, requires_grad=False)
        finally:
            self._inside = False
        with torch._C.DisableTorchFunction():
            value = self.value(tensor)
        self._alive.append(gradient)
        self._values[id(gradient)] = value._replace(origin=("gradient", value.origin))
        return gradient

    # -- a narrow run beside the one at full width

    def _compare(self, entry, outs, is_noise: bool) -> None:
        step = len(self.record)
        if step >= len(self.expected):
            raise Differs("computes more than at width 1")
        func, origins, constants, results = self.expected[step]
        if func == entry[0] and origins != entry[1]:
            raise Differs(f"computes with other values than at width 1 ({func})")
        if func != entry[0] or len(results) != len(outs):
            raise Differs(f"computes something else than at width 1 ({entry[0]} in place of {func})")
        if not _equal(constants, entry[2]):
            raise Differs(f"computes with a number that depends on the number of channels ({func})")
        known = []
        for i, (tensor, (shape, dimensions)) in enumerate(zip(outs, results, strict=True)):
            self.check_sizes(tensor.shape, shape, dimensions)
            self._alive.append(tensor)
            self._values[id(tensor)] = Value(dimensions, frozenset(), (step, i), is_noise)
            known.append(dimensions)
        self._append(entry, outs, known)

    def check_sizes(self, narrow: torch.Size, full: tuple[int, ...], dimensions: Dimensions) -> None:
        """That every dimension with channels is as narrow as its source, and every other one as it was."""
        for size, before, dimension in zip(narrow, full, dimensions, strict=True):
            if isinstance(dimension, Channels) and self.classes.find(dimension.source) not in self.kept:
                if dimension.padded:
                    continue
                expected = self.width_of(dimension.source) * dimension.inner
                if size != expected:
                    raise Differs(f"has {size} channels of '{dimension.source}' where {expected} are expected")
            elif dimension != UNIFORM and size != before:
                raise Differs(f"has a dimension of {size} that no layer explains and that is {before} at width 1")

    # -- layers

    def layer(self, module: nn.Module, x: Tensor, make: Callable, dimensions: Callable) -> Tensor:
        """A call of a sliced layer: `make` makes its output, `dimensions` tells what that has of what x has."""
        with torch._C.DisableTorchFunction():
            return self._layer(self.names[id(module)], module, without_data(x), make, dimensions)

    def _layer(self, name: str, module: nn.Module, x: Tensor, make: Callable, dimensions: Callable) -> Tensor:
        value = self.value(x)
        self._inside = True
        try:
            with torch.no_grad():
                out = make(x)
        finally:
            self._inside = False
        self._ask_for_gradients([x, *module.parameters(recurse=False)], [out])
        entry = (f"layer {name}", (value.origin,), ())
        if self.expected is not None:
            self._compare(entry, [out], False)
            return out
        known = dimensions(value.dimensions)
        self._alive.append(out)
        self._values[id(out)] = Value(known, frozenset(), (len(self.record), 0))
        self._append(entry, [out], [known])
        return out


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _equal(a: tuple, b: tuple) -> bool:
    """Whether two operators got the same constants; one that is not a number is the same as itself."""
    return a == b or str(a) == str(b)


# ---- running without a trace


class UntouchedGenerators:
    """Python's and NumPy's random numbers start alike in every run, and go on afterwards as if nothing had been drawn.

    PyTorch's are not drawn on the meta device.
    """

    def __enter__(self) -> "UntouchedGenerators":
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        return self

    def restart(self) -> None:
        random.seed(0)
        if self._numpy is not None:
            sys.modules["numpy"].random.seed(0)

    def __exit__(self, *_):
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
