"""What `convert` is to do with a network: decided before any of it is changed, and tried on a copy without data."""

import functools
import math
import threading
import time
import types
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .adapters import adapter, is_slim, refused_model
from .counts import CountedSizes
from .follow import (
    Channels,
    Classes,
    Differs,
    Dimensions,
    Follower,
    Stopped,
    UntouchedGenerators,
    Use,
    describe,
    place_of_error,
    without_data,
)
from .fuse import Fused
from .layers import HOOKS, FastSlimConv2d, SlimBatchNorm2d, SlimLinear

PROVEN_WIDTHS = (0.5, 0.7)  # each leaves every layer a channel, and odd numbers of them
_GRID = 256  # widths at which comparisons of numbers of channels must turn out alike
_LEAST_WIDTH = 0.1  # the least of them, unless one is asked for: below, all layers come down to one channel
_LOCK = threading.Lock()  # the process has one state of Python's random numbers
_SIZES = (224, 32, 28, 64, 299, 96, 128, 256, 160, 192, 48, 40, 24, 20, 16, 12, 10, 8, 6, 5, 4, 384, 320, 512)
_SECONDS_OF_GUESSES = 2.0


class LayerPlan(NamedTuple):
    """What becomes of one layer.

    slim: the class that takes its place, or its own if it is of adjustable width already; None: it stays what it is.
    divisor: what its output channels are a multiple of.
    kept: why it keeps all output channels at every width; "" if it does not.
    reads: the name of the layer whose channels it reads, and the values side by side for each; None for an input that
        is whole.
    """

    slim: type | None
    divisor: int
    kept: str
    reads: tuple[str, int] | None


Plan = dict[str, LayerPlan]
Build = Callable[[nn.Module, LayerPlan], nn.Module]


def make_plan(
    model: nn.Module, widths: Iterable[float], divisor: int, keep: Iterable[str], example: Any, build: Build
) -> Plan:
    """What becomes of every layer of `model`, which is not touched.

    Args:
        widths: which must be right; others are then too, as far as runs without data tell.
        divisor: what all layers keep a multiple of.
        keep: names of layers, or of modules whose layers, keep their outputs.
        example: an input, a tuple of them, or the shape of one; None guesses.
        build: makes the layer that takes the place of another.

    Raises:
        ValueError: where a sub-network of first channels would not be right, in a sentence that names the layer.
    """
    names = {name: module for name, module in model.named_modules()}
    for name, module in names.items():
        if reason := refused_model(module):
            raise ValueError(f"convert needs a plain model, got {describe(name)}, which {reason}")
    kept = _named(names, keep)
    with _LOCK, UntouchedGenerators() as generators:
        run = _Followed(model, kept, divisor, None)
        try:
            run.follow(_examples(model, example), generators)
        except _NeedsValues as error:
            if not kept:
                raise ValueError(
                    f"convert cannot follow {type(model).__name__}, which {error}; keep=('name', ...) names the layers "
                    "that keep all their outputs, and both branches are followed then"
                ) from None
            run = _follow_branches(model, kept, divisor, example, generators)
        plan = run.decide()
        run.prove(plan, build, widths, generators)
    return plan


def _follow_branches(model: nn.Module, keep: set[str], divisor: int, example: Any, generators) -> "_Followed":
    """Every `if` on the value of a tensor taken, then none."""
    run = _Followed(model, keep, divisor, True)
    try:
        run.follow(_examples(model, example), generators)
        run.follow_again(False, generators)
    except (_NeedsValues, _Shapes) as error:
        raise ValueError(
            f"convert cannot follow {type(model).__name__} where values of tensors decide, which {error}"
        ) from None
    return run


def _named(names: dict[str, nn.Module], keep: Iterable[str]) -> set[str]:
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    found = set()
    for name in keep:
        if name not in names:
            raise ValueError(f"keep must have names of the model's layers, got {name!r}, and there is no such one")
        found |= {other for other in names if other == name or other.startswith(f"{name}.") or name == ""}
    return found


# ---- inputs


def _examples(model: nn.Module, example: Any) -> Iterable[tuple]:
    """Arguments to try, without data."""
    if example is None:
        yield from _guesses(model)
        return
    if isinstance(example, torch.Size) or (isinstance(example, tuple | list) and all(type(n) is int for n in example)):
        example = torch.empty(tuple(example), device="meta", dtype=_dtype(model))
    arguments = example if isinstance(example, tuple) else (example,)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(arguments)):
        raise ValueError(f"example must be a tensor, a tuple of arguments or a shape, got {type(example).__name__}")
    arguments = tree_map(without_data, arguments)
    batched = tree_map(_batch_of_two, arguments)
    yield batched
    if any(a is not b for a, b in zip(tree_leaves(batched), tree_leaves(arguments), strict=True)):
        yield arguments


def _batch_of_two(leaf):
    """A batch of one, whose dimension could be mistaken for one of size 1, as a batch of two."""
    if isinstance(leaf, Tensor) and leaf.dim() in (2, 4) and leaf.shape[0] == 1:
        return torch.empty((2, *leaf.shape[1:]), device="meta", dtype=leaf.dtype)
    return leaf


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _guesses(model: nn.Module) -> Iterable[tuple]:
    dtype, start = _dtype(model), time.thread_time()
    inputs = list(dict.fromkeys(_first_inputs(model)))
    for size in dict.fromkeys((*_SIZES, *range(1, 65), *range(72, 513, 8))):
        for channels, space in inputs:
            yield (torch.empty(2, channels, *[size] * space, device="meta", dtype=dtype),)
        if time.thread_time() - start > _SECONDS_OF_GUESSES or not any(space for _, space in inputs):
            return


def _first_inputs(model: nn.Module) -> Iterable[tuple[int, int]]:
    """Channels and dimensions of space that an input may have: what the first layer reads, or images."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    others = [module for module in model.modules() if isinstance(module, nn.Conv1d | nn.Conv3d | nn.ConvTranspose2d)]
    for first in (layers or others)[:1]:
        yield (first.in_features, 0) if isinstance(first, nn.Linear) else (first.in_channels, len(first.kernel_size))
    readers = {module.in_channels for module in layers if isinstance(module, nn.Conv2d)}
    yield from ((channels, 2) for channels in (3, 1, 4) if channels in readers)


# ---- the copy without data


def _shadow(model: nn.Module) -> nn.Module:
    """A copy of the modules, with tensors without data and without hooks; everything else is shared."""
    copies: dict[int, Any] = {}

    def copied(value):
        if id(value) in copies:
            return copies[id(value)][0]
        kind = type(value)
        if isinstance(value, nn.Parameter):
            result = nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
        elif isinstance(value, Tensor):
            result = torch.empty_like(value, device="meta")
        elif isinstance(value, nn.Module):
            result = object.__new__(kind._original if issubclass(kind, Fused) else kind)  # with its own forward
            copies[id(value)] = (result, value)
            for key, attribute in vars(value).items():
                without = key in HOOKS and isinstance(attribute, dict)
                vars(result)[key] = type(attribute)() if without else copied(attribute)
            return result
        elif kind in (list, set):
            result = kind(copied(item) for item in value) if value else kind()
        elif kind is tuple:
            result = tuple(copied(item) for item in value)
        elif isinstance(value, dict) and kind.__module__ in ("builtins", "collections"):
            result = value.copy()
            for key, item in value.items():
                result[key] = copied(item)
        elif kind is types.MethodType and isinstance(value.__self__, nn.Module):
            result = types.MethodType(value.__func__, copied(value.__self__))
        elif kind is functools.partial:
            result = functools.partial(copied(value.func), *copied(value.args), **copied(value.keywords))
        else:
            return value
        copies[id(value)] = (result, value)
        return result

    return copied(model)


# ---- following


class _NeedsValues(Exception):
    """The model's code asks for the value of a tensor."""


class _Followed:
    """A copy of a network, run at full width, and what that told."""

    def __init__(self, model: nn.Module, keep: set[str], divisor: int, answer: bool | None):
        self.model, self.keep, self.divisor, self.answer = model, keep, divisor, answer
        self.shadow = _shadow(model)
        self.layers = dict(self.shadow.named_modules())
        self.names = {id(module): name for name, module in self.layers.items()}
        tensors = [*self.shadow.named_parameters(), *self.shadow.named_buffers()]
        self.parameters = {id(tensor): name for name, tensor in tensors}
        self.adapters = {name: adapter(module) for name, module in model.named_modules()}
        self.forget()

    def forget(self) -> None:
        self.classes = Classes()
        self.uses: dict[str, Use] = {}
        self.kept: dict[str, str] = {}  # sources that are kept whole -> why
        self.groups: list[tuple[str, str]] = []  # a source and the grouped convolution that reads it
        self.reads: dict[str, tuple[str, int] | None] = {}
        self.touched: dict[str, str] = {}  # parameters and buffers that code beside their layers reads -> where
        self.padded: set[str] = set()  # layers that read channels with zeros behind them
        self.records: dict[tuple, list] = {}
        self.outputs: dict[tuple, list] = {}
        self.called: list[str] = []

    # -- at full width

    def follow(self, examples: Iterable[tuple], generators: UntouchedGenerators) -> None:
        """Run every mode with the first of the examples that the network takes."""
        first_error, first = None, ()
        for arguments in examples:
            self.forget()
            try:
                for training in (self.model.training, not self.model.training):
                    self._run(arguments, training, self.answer, generators)
            except Stopped as error:
                where = place_of_error(error, self.names)
                raise _NeedsValues(f"{error} at {where}") from error
            except _Shapes as error:
                if first_error is None:
                    first_error, first = error, arguments
                continue
            self.arguments = arguments
            return
        if first_error is None:
            raise ValueError(
                "convert needs a network with nn.Conv2d or nn.Linear layers, "
                f"got {type(self.model).__name__} without any"
            )
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tree_leaves(first) if isinstance(leaf, Tensor))
        raise ValueError(
            f"convert runs the network once without data, which failed for an input of shape {shapes} "
            f"({first_error}); example= takes an input that fits, or its shape"
        )

    def follow_again(self, answer: bool, generators: UntouchedGenerators) -> None:
        for training in (self.model.training, not self.model.training):
            try:
                self._run(self.arguments, training, answer, generators)
            except Stopped as error:
                raise _NeedsValues(f"{error} at {place_of_error(error, self.names)}") from error

    def _run(self, arguments: tuple, training: bool, answer, generators, narrow: dict | None = None, counted=None):
        generators.restart()
        key = (training, answer)
        follower = Follower(
            self.names,
            self.parameters,
            self.classes,
            answer=answer,
            **({} if narrow is None else {"expected": self.records[key], **narrow}),
        )
        modes = _set_modes(self.model, self.shadow, training)
        with _handlers(self, follower, narrow is not None), modes, _autograd(training):
            try:
                with follower, nullcontext() if counted is None else counted(follower):
                    outputs = self.shadow(*arguments)
                    if training:
                        with torch.no_grad():
                            follower.follow_backward()
            except (Stopped, Differs, _Refused):
                raise
            except Exception as error:  # anything a user's forward can raise
                message = str(error).strip().split("\n")[0] or type(error).__name__
                raise _Shapes(f"{type(error).__name__}: {message}, at {place_of_error(error, self.names)}") from error
        leaves = _output_leaves(outputs)
        if narrow is not None:
            if len(follower.record) != len(self.records[key]):
                raise Differs("computes less than at width 1")
            return leaves
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                value = follower.value(leaf)
                found = {d.source for d in value.dimensions if isinstance(d, Channels)}
                for source in sorted(found | value.sources):
                    self.kept.setdefault(source, "its output leaves the network")
        self.touched |= follower.touched
        for source, use in follower.uses.items():
            self.uses.setdefault(source, use)
        self.records[key] = follower.record
        self.outputs[key] = _shapes(leaves)
        return leaves

    # -- what a layer does to channels

    def reads_channels(self, follower: Follower, name: str, found, is_linear: bool) -> None:
        now = (found.source, found.inner) if isinstance(found, Channels) else None
        before = self.reads.setdefault(name, now)
        if before is not None and now is not None:
            if before[1] != now[1]:
                follower.mix({found.source, before[0]}, "reads, in two calls, flattened images of different sizes of")
            self.classes.join(before[0], now[0])
        elif before is not now:
            follower.mix({(before or now)[0]}, "reads, in two calls, values of fixed size and")
        if isinstance(found, Channels):
            if found.padded:
                self.padded.add(name)
            if found.inner != 1 and not is_linear:
                follower.mix({found.source}, "reads, flattened,")
            if found.padded and is_linear and found.inner != 1:
                follower.mix({found.source}, "reads, padded and flattened,")

    def other_dimensions(self, follower: Follower, dimensions: Dimensions, position: int) -> None:
        mixed = {d.source for p, d in enumerate(dimensions) if p != position and isinstance(d, Channels)}
        if mixed:
            follower.mix(mixed, "computes along")

    def makes_channels(self, name: str, count: int) -> Channels | None:
        if count == 1:
            self.kept.setdefault(name, "it has one output channel")
            return None
        return Channels(name)

    # -- decisions

    def decide(self) -> Plan:
        sliced = {name for name, found in self.adapters.items() if found.slim is not None}
        called = set(self.called)
        for name in self.called:
            module = self.layers[name]
            if name in sliced and not isinstance(module, nn.BatchNorm2d):
                if name in self.keep:
                    self.kept[name] = "keep"
                elif is_slim(module) and not module.slim_out:
                    self.kept.setdefault(name, "slim_out=False")
        self._spread_kept()
        for source, use in self.uses.items():
            if self.classes.find(source) not in self._kept_roots:
                raise ValueError(
                    f"convert needs a network whose sub-networks are its first channels, got one that {use.what} the "
                    f"channels of '{source}' ({use.where}); keep=('{source}',) keeps them whole"
                )
        if self.answer is not None:
            for name in sorted(sliced - called - self.keep):
                raise ValueError(
                    f"convert must see every layer of a model with branches that depend on values, got '{name}', which "
                    "no branch reached; keep= may name it"
                )
        if not any(self.adapters[name].slim not in (None, SlimBatchNorm2d) for name in called | self.keep):
            raise ValueError(
                "convert needs a network with nn.Conv2d or nn.Linear layers, "
                f"got {type(self.model).__name__} without any that it calls as a child"
            )
        divisors = self._divisors()
        plan = {}
        for name in [*self.called, *sorted(self.keep - called)]:
            slim = self.adapters[name].slim
            if slim is None:
                continue
            root, reads = self.classes.find(name), self.reads.get(name)
            if name in self.padded or (reads is not None and self.classes.find(reads[0]) in self._kept_roots):
                reads = None
            kept = ""
            if slim is SlimBatchNorm2d:
                kept = "" if reads is not None else "its input is whole"
            elif root in self._kept_roots or name not in called:
                kept = self.kept.get(name) or self._kept_roots.get(root, "keep")
            plan[name] = LayerPlan(slim, divisors.get(root, self.divisor), kept, reads)
        self._refuse_touched(plan)
        return plan

    def _refuse_touched(self, plan: Plan) -> None:
        """A sub-network has the first part of a sliced layer's parameters, other code would read them whole."""
        for tensor, where in self.touched.items():
            name, _, key = tensor.rpartition(".")
            found = plan.get(name)
            if found is None or key == "num_batches_tracked":
                continue
            if not found.kept or (found.reads is not None and key == "weight"):
                raise ValueError(
                    f"convert needs a network whose layers alone read their parameters, got one that reads '{tensor}' "
                    f"({where}), of which a sub-network has the first channels"
                )

    def _spread_kept(self) -> None:
        """Whole channels make all those whole that share them, and both sides of a grouped convolution."""
        roots: dict[str, str] = {}
        for name in self.kept:
            roots.setdefault(self.classes.find(name), f"it shares its channels with '{name}'")
        changed = True
        while changed:
            changed = False
            for source, layer in self.groups:
                a, b = self.classes.find(source), self.classes.find(layer)
                for one, other in ((a, b), (b, a)):
                    if one in roots and other not in roots:
                        roots[other] = f"the groups of '{layer}' are whole"
                        changed = True
        self._kept_roots = roots

    def _divisors(self) -> dict[str, int]:
        """What the channels of each class are a multiple of: whole groups, as many on both sides of a convolution."""
        divisors: dict[str, int] = {}
        for name in self.called:
            module = self.layers[name]
            own = module.divisor if is_slim(module) and hasattr(module, "divisor") else 1
            root = self.classes.find(name)
            divisors[root] = math.lcm(divisors.get(root, self.divisor), own)
        ends = []
        for source, name in self.groups:
            layer = self.layers[name]
            sizes = (layer.in_channels // layer.groups, layer.out_channels // layer.groups)
            ends.append((self.classes.find(source), self.classes.find(name), *sizes))
        changed, rounds = True, 0
        while changed and rounds < 100:
            changed, rounds = False, rounds + 1
            for a, b, size_a, size_b in ends:
                units = math.lcm(*(math.lcm(divisors[end], size) // size for end, size in ((a, size_a), (b, size_b))))
                for end, size in ((a, size_a), (b, size_b)):
                    if divisors[end] != math.lcm(divisors[end], size * units):
                        divisors[end] = math.lcm(divisors[end], size * units)
                        changed = True
        return divisors

    # -- the narrow run

    def prove(self, plan: Plan, build: Build, widths: Iterable[float], generators: UntouchedGenerators) -> None:
        """Run the copy with the layers that `build` makes for the plan, and compare with the run at full width."""
        slims = {name: build(self.layers[name], found) for name, found in plan.items()}
        swap(self.shadow, {id(self.layers[name]): slim for name, slim in slims.items()})
        self.replaced = {name: self.layers[name] for name, slim in slims.items() if slim is not self.layers[name]}
        for name, slim in slims.items():
            self.names[id(slim)] = name
            if self.layers[name] is self.shadow:
                self.shadow = slim
            self.layers[name] = slim
        for name, slim in slims.items():
            self.parameters |= {id(tensor): f"{name}.{key}" for key, tensor in slim.named_parameters(recurse=False)}
        grid = self._counts_at_every_width(slims, widths)
        modes = list(self.outputs)
        for i, width in enumerate(dict.fromkeys((*PROVEN_WIDTHS, *widths))):
            for slim in slims.values():
                slim._set_width(width)
            # The other mode differs in a dropout or so: once is enough.
            for mode in modes if i == 0 else [mode for mode in modes if mode[0] == self.model.training]:
                self._prove_at(width, mode, grid, generators)

    def _prove_at(self, width: float, mode: tuple, grid: dict[float, dict[str, int]], generators) -> None:
        @functools.cache
        def counts(source: str) -> tuple[int, ...]:
            return tuple(found[source] for found in grid.values())

        counted = functools.partial(CountedSizes, counts=counts, now=list(grid).index(width))
        narrow = {"width_of": grid[width].__getitem__, "kept": self._kept_roots}
        training, answer = mode
        try:
            leaves = self._run(self.arguments, training, answer, generators, narrow, counted)
        except (Differs, _Shapes, Stopped) as error:
            what = str(error)
            if not isinstance(error, _Shapes):
                what += f", at {place_of_error(error, self.names)}"
            raise ValueError(
                f"convert needs a network that computes the same at every width, got one that at width {width} "
                f"{'fails: ' if isinstance(error, _Shapes) else ''}{what}"
            ) from None
        found, outputs = _shapes(leaves), self.outputs[mode]
        if found != outputs:
            raise ValueError(
                f"convert needs outputs of the same shape at every width, got {found} at width {width} and "
                f"{outputs} at width 1"
            )

    def _counts_at_every_width(self, slims: dict[str, nn.Module], widths: Iterable[float]) -> dict:
        """Width -> layer -> its output channels, for all the widths of a fine grid that leave every layer a channel."""
        grid = {}
        least = min(_LEAST_WIDTH, *widths) if widths else _LEAST_WIDTH
        fine = (i / _GRID for i in range(1, _GRID + 1) if i / _GRID >= least)
        for width in sorted({*PROVEN_WIDTHS, *widths, *fine}):
            try:
                for slim in slims.values():
                    slim._set_width(width)
            except ValueError:
                if width in widths:
                    raise
                continue
            made = {name: slim for name, slim in slims.items() if not isinstance(slim, SlimBatchNorm2d)}
            grid[width] = {name: slim._out.shape[0] for name, slim in made.items()}
        return grid


def _shapes(leaves: list) -> list:
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


class _Refused(ValueError):
    """A layer that cannot be sliced is called."""


class _Shapes(Exception):
    """The network's own code failed in a run without data."""


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def swap(model: nn.Module, layers: dict[int, nn.Module]) -> None:
    """Put `layers`, by the id of what they replace, in the place of each, wherever in the model it is."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in layers:
                parent._modules[name] = layers[id(child)]


@contextmanager
def _set_modes(model: nn.Module, shadow: nn.Module, training: bool):
    """The modes of the copy: those of the model, or, for the other mode, that for all."""
    before = {module: module.training for module in shadow.modules()}
    if training != model.training:
        for module in before:
            module.training = training
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def _autograd(training: bool):
    """A network is trained with gradients and used without; autograd itself would take operators to pieces."""
    if training:
        with torch.inference_mode(False), torch._C._AutoDispatchBelowADInplaceOrView(), torch.enable_grad():
            yield
    else:
        with torch.inference_mode():
            yield


def _output_leaves(outputs, seen: tuple = ()) -> list:
    """Tensors and plain values of what a model returned, those among the attributes of objects too."""
    found = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor | str | int | float | bool | type(None) | torch.Size | torch.dtype | torch.device):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not any(leaf is other for other in seen):
            found += _output_leaves(list(vars(leaf).values()), (*seen, leaf))
        else:
            raise ValueError(f"convert must see the outputs of the model, got one of type {type(leaf).__name__}")
    return found


@contextmanager
def _handlers(run: _Followed, follower: Follower, narrow: bool):
    """Stand-ins for the forward of every layer that has an entry in the table of adapters."""
    before = []
    for name, module in run.layers.items():
        found = run.adapters[name]
        if found.slim is None and not found.reason:
            continue
        before.append((module, vars(module).get("forward")))
        if found.slim is None:
            stand_in = _opaque(run, follower, name, module, found.reason, found.makes_channels)
        else:
            stand_in = _STAND_INS[found.slim](run, follower, name, module, narrow)
        module.forward = stand_in
    if narrow:
        for name, module in run.replaced.items():
            before.append((module, vars(module).get("forward")))
            module.forward = _outside(name)
    try:
        yield
    finally:
        for module, forward in before:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def _outside(name: str):
    def forward(*_, **__):
        raise Differs(f"calls '{name}' by a reference that is no child of a module, which keeps the plain layer")

    return forward


def _input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _called(run: _Followed, name: str, narrow: bool) -> None:
    if not narrow and name not in run.called:
        run.called.append(name)


def _opaque(run, follower, name, module, reason, makes_channels):
    """A layer that is left as it is: refused where it reads sliced channels, or wherever it is called."""
    original = module.forward

    def forward(*args, **kwargs):
        _called(run, name, False)
        args, kwargs = tree_map(without_data, (args, kwargs))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        labelled = {d.source for t in tensors for d in follower.value(t).dimensions if isinstance(d, Channels)}
        where = f"{describe(name)}: {reason}"
        if makes_channels and name not in run.keep:
            raise _Refused(f"convert needs layers that can be sliced, got {_kind(module)} at {where}")
        if labelled and follower.expected is None:
            follower.mix(labelled, f"has {_kind(module)} at {where}, reading")
        follower._inside = True
        try:
            outputs = original(*args, **kwargs)
        finally:
            follower._inside = False
        return outputs

    return forward


def _convolution(run: _Followed, follower: Follower, name: str, module: nn.Conv2d, narrow: bool):
    def forward(*args, **kwargs):
        _called(run, name, narrow)
        x = _input(args, kwargs)
        position = x.dim() - 3

        def make(x):
            shape = type(module).forward(module, x).shape if narrow else _convolved(module, x.shape)
            layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format  # as of a converted layer
            return torch.empty(shape, device="meta", dtype=x.dtype, memory_format=layout)

        def dimensions(found: Dimensions) -> Dimensions:
            source = found[position]
            source = source if isinstance(source, Channels) else None
            run.other_dimensions(follower, found, position)
            run.reads_channels(follower, name, source, False)
            out = run.makes_channels(name, module.out_channels)
            if module.groups > 1:
                if source is None:
                    run.kept.setdefault(name, "the groups that it reads are whole")
                else:
                    if source.padded:
                        follower.mix({source.source}, "groups, padded with zeros,")
                    run.groups.append((source.source, name))
                    if module.in_channels == module.out_channels:
                        run.classes.join(source.source, name)
            return tuple(out if p == position else None for p in range(len(found)))

        return follower.layer(module, x, make, dimensions)

    return forward


def _convolved(module: nn.Conv2d, shape: torch.Size) -> tuple[int, ...]:
    if len(shape) not in (3, 4):
        raise RuntimeError(f"expected an input of 3 or 4 dimensions, got shape {tuple(shape)}")
    if shape[-3] != module.in_channels:
        raise RuntimeError(f"expected an input with {module.in_channels} channels, got {shape[-3]}")
    pads = module._reversed_padding_repeated_twice
    size = []
    for axis in (0, 1):
        padded = shape[len(shape) - 2 + axis] + pads[2 - 2 * axis] + pads[3 - 2 * axis]
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        if padded < reach:
            raise RuntimeError(f"expected an image that the kernel fits into, got shape {tuple(shape)}")
        size.append((padded - reach) // module.stride[axis] + 1)
    return (*shape[:-3], module.out_channels, *size)


def _linear(run: _Followed, follower: Follower, name: str, module: nn.Linear, narrow: bool):
    def forward(*args, **kwargs):
        _called(run, name, narrow)
        x = _input(args, kwargs)

        def make(x):
            if narrow:
                return type(module).forward(module, x)
            if x.shape[-1] != module.in_features:
                raise RuntimeError(f"expected an input with {module.in_features} features, got {x.shape[-1]}")
            return torch.empty((*x.shape[:-1], module.out_features), device="meta", dtype=x.dtype)

        def dimensions(found: Dimensions) -> Dimensions:
            source = found[-1] if isinstance(found[-1], Channels) else None
            run.reads_channels(follower, name, source, True)
            before = tuple(d if isinstance(d, Channels) else None for d in found[:-1])
            return (*before, run.makes_channels(name, module.out_features))

        return follower.layer(module, x, make, dimensions)

    return forward


def _batch_norm(run: _Followed, follower: Follower, name: str, module: nn.BatchNorm2d, narrow: bool):
    def forward(*args, **kwargs):
        _called(run, name, narrow)
        x = _input(args, kwargs)
        residual = args[1] if len(args) > 1 else kwargs.get("residual")
        if x.dim() != 4:
            raise RuntimeError(f"expected an input of 4 dimensions, got shape {tuple(x.shape)}")

        def make(x):
            fits = x.shape[1] <= module.num_features if narrow else x.shape[1] == module.num_features
            if not fits:
                raise RuntimeError(f"expected an input with {module.num_features} channels, got {x.shape[1]}")
            return torch.empty_like(x, device="meta")

        def dimensions(found: Dimensions) -> Dimensions:
            source = found[1] if isinstance(found[1], Channels) else None
            run.other_dimensions(follower, found, 1)
            run.reads_channels(follower, name, source, False)
            if source is not None and source.padded:
                follower.mix({source.source}, "normalises, padded with zeros,")
            return tuple(source if p == 1 else None for p in range(4))

        y = follower.layer(module, x, make, dimensions)
        return y if residual is None else y + residual

    return forward


_STAND_INS = {FastSlimConv2d: _convolution, SlimLinear: _linear, SlimBatchNorm2d: _batch_norm}
