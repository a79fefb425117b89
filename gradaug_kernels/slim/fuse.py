"""Find chains of convolution, batch norm, residual add, ReLU and max pooling in a model's forward code, and fuse them.

Each module that calls a SlimBatchNorm2d directly is traced on its own with torch.fx, its children as leaves, and its
forward is replaced by one that calls the batch norm with the residual and the ReLU, and runs convolutions, batch norms
and max pooling that follow each other as one chain (fused_chain.py). Nothing else of the module changes: its class
stays a subclass of what it was, its children, parameters, state_dict and hooks are the same. Only code that does what
was traced in every run is fused (tracing.py), and where it is no longer what was traced, because a layer was replaced
or has a hook or what the code read has changed, it runs its own forward again.
"""

import copy
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module

from .fused_chain import run_chain
from .layers import FastSlimConv2d, SlimBatchNorm2d
from .tracing import FaithfulTracer, same

_RELU_CALLS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ADD_CALLS = {operator.add, torch.add, "add"}
_ADD_IN_PLACE_CALLS = {operator.iadd, "add_"}
_IN_PLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


def fuse(model: nn.Module, recompute: bool = False) -> nn.Module:
    """Let every batch norm of `model` do the residual add and the ReLU that follow it, and a convolution or a max
    pooling that follows apply the batch norm where it reads its input, where the model's code shows them.

    Of a chain conv, norm, ReLU, conv, ... the backward pass then keeps the convolutions' results alone. A batch norm
    whose output has other uses stays a layer of its own. `fused_chains` tells what was found.

    A module runs its own code, as it did before, if that could do something else in another run than in the two that
    are traced, one in training and one in evaluation, or does what a graph of operators does not show: random numbers
    of Python, NumPy or `torch.rand`; `no_grad`, `autocast`, checkpoints, autograd functions, and questions whether they
    are active; attributes or variables that are written, or that hold lists, dictionaries and the like; `vars(self)`;
    the class or identity of a value; caught exceptions; imports; functions in C or of PyTorch's Python code other than
    those of tensors; anything that cannot be traced or differs between training and evaluation, such as
    `F.dropout(x, training=self.training)` (`nn.Dropout` does not). What a layer does inside its own call is no matter.

    A fused module runs its own code in calls with other arguments than tensors for those without a default, while
    torch.fx traces it, and as long as one of its layers is another than the one that was traced, has hooks, or a
    number, string, function or method that the code read (of a module, a class or a Python module) has changed. Not
    noticed are Python functions outside of modules that are replaced by others of their name.

    Args:
        model: a model with SlimBatchNorm2d layers; `convert` calls this on its result. Changed in place.
        recompute: where a 1x1 convolution and a batch norm end a chain, as in a bottleneck block, do not keep the
            convolution's result, the largest tensor of the block, but compute it again in the backward pass. `GradAug`
            then makes no low-precision copies of the weights on the CPU either.

    Returns:
        The same model.
    """
    for module in reversed(list(model.modules())):  # inner ones first: fusing changes the class that outer ones note
        if not isinstance(module, Fused) and _batch_norms(module):
            _fuse_module(module, recompute)
    return model


def fused_chains(model: nn.Module) -> dict[str, str]:
    """What each batch norm runs in one operator now: {"layer1.0.bn2": "batch_norm + relu + convolution", ...}.

    A convolution before it is named where the backward pass computes that again ("recomputed convolution + ...").
    """
    chains = {name: "batch_norm" for name, module in model.named_modules() if isinstance(module, SlimBatchNorm2d)}
    for name, module in model.named_modules():
        if isinstance(module, Fused) and module._traced.is_still_true(module):
            for child, chain in module._chains.items():
                chains[f"{name}.{child}" if name else child] = chain
    return chains


def saves_memory(model: nn.Module) -> bool:
    """Whether it was fused with `recompute`."""
    return any(isinstance(module, Fused) and module._recompute for module in model.modules())


def _batch_norms(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_children() if isinstance(child, SlimBatchNorm2d)}


def _fuse_module(module: nn.Module, recompute: bool) -> None:
    trace = _trace(module)
    if trace is None:
        return
    graph, traced = trace.graph, _Traced.of(module, trace)
    chains = {node.target: chain for node, chain in _join_adds_and_relus(graph, module)}
    for nodes in _find_chains(graph, module):
        chains |= _replace_chain(graph, module, nodes, recompute)
    if not chains:
        return
    graph.lint()
    fused, original = fx.GraphModule(module, graph).__class__.forward, type(module)
    own, arguments = original.forward, len(trace.names)

    @functools.wraps(own)
    def forward(self, *args, **kwargs):
        are_traced = len(args) + len(kwargs) == arguments and _are_tensors(args) and _are_tensors(kwargs.values())
        if original.forward is not own or not are_traced or not self._traced.is_still_true(self):
            return original.forward(self, *args, **kwargs)
        return fused(self, *args, **kwargs)

    module.__dict__.update(_traced=traced, _chains=chains, _recompute=recompute)
    module.__class__ = type(
        original.__name__, (Fused, original), {"forward": forward, "_original": original, "__doc__": original.__doc__}
    )


def _are_tensors(args: Iterable) -> bool:
    return all([isinstance(arg, Tensor) for arg in args])  # a list takes half the time of a generator for one


class _Called(NamedTuple):
    """A module that the traced code calls, or reads: siblings[name] is it."""

    siblings: dict[str, nn.Module]
    name: str
    module: nn.Module
    kind: type


class _Traced(NamedTuple):
    """What must be as it was for the fused forward to be the module's own."""

    called: tuple[_Called, ...]
    read: tuple[tuple[nn.Module | None, str, Any], ...]  # attributes that its code read; None stands for the module
    required: tuple[tuple[Callable[[nn.Module], bool], nn.Module | None], ...]

    @classmethod
    def of(cls, module: nn.Module, trace: "_Trace") -> "_Traced":
        children = dict(trace.children)
        for node in trace.graph.nodes:
            if node.op == "call_module":
                owner = module
                for name in node.target.split("."):
                    children[id(owner), name] = owner, name, owner._modules[name]
                    owner = owner._modules[name]
        called = tuple(_Called(owner._modules, name, child, type(child)) for owner, name, child in children.values())
        required = [
            (condition, call.module)
            for call in called
            for kind, condition in _REQUIRED.items()
            if call.kind is kind and condition(call.module)
        ]
        # Without the module itself, which would then be freed by the garbage collector alone.
        read = [(None if of is module else of, name, value) for of, name, value in trace.values.values()]
        required += [(condition, None if of is module else of) for condition, of in trace.required.values()]
        return cls(called, tuple(read), tuple(required))

    def is_still_true(self, module: nn.Module) -> bool:
        for siblings, name, child, kind in self.called:
            if siblings.get(name) is not child or child.__class__ is not kind or _is_hooked(child.__dict__):
                return False
        for of, name, value in self.read:
            attributes = module.__dict__ if of is None else of.__dict__
            now = attributes.get(name, attributes)
            if now is not value and not same(now, value):
                return False
        for condition, of in self.required:
            if not condition(module if of is None else of):
                return False
        return not _is_hooked_everywhere()


def _is_hooked(of: dict[str, Any]) -> bool:
    """Whether a call of the module of these attributes is more than its class's forward."""
    hooks = of["_forward_hooks"] or of["_forward_pre_hooks"] or of["_backward_hooks"] or of["_backward_pre_hooks"]
    return bool(hooks) or "forward" in of


def _is_hooked_everywhere() -> bool:
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


class Fused:
    """Mixed into the class of a module with a rewritten forward, which pickles make again."""

    def __deepcopy__(self, memo):
        # Of the same class, as torch.func.stack_module_state wants it.
        memo[id(self)] = copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol):
        state = {name: value for name, value in vars(self).items() if name not in ("_traced", "_chains", "_recompute")}
        return _Unfused.make, (self._original, self._recompute), state

    def __getitem__(self, index):
        # A slice of an nn.Sequential is another Sequential: of the original layers, not with this one's forward.
        if isinstance(index, slice):
            return nn.Sequential(*list(self.children())[index])
        return super().__getitem__(index)


class _Unfused:
    """Mixed into the class of a module read from a pickle that is yet to get its attributes, which may refer to it."""

    @staticmethod
    def make(original: type, recompute: bool) -> nn.Module:
        cls = type(original.__name__, (_Unfused, original), {"_original": original, "_recompute": recompute})
        return cls.__new__(cls)

    def __setstate__(self, state: dict) -> None:
        recompute, self.__class__ = self._recompute, self._original
        self.__setstate__(state)
        _fuse_module(self, recompute)


# ---- the graph


class _Trace(NamedTuple):
    """The graph of a module's forward, the arguments that it is called with, and what it is true for."""

    graph: fx.Graph
    names: tuple[str, ...]
    children: dict[tuple, tuple]
    values: dict[tuple, tuple]
    required: dict[tuple, tuple]


def _trace(module: nn.Module) -> _Trace | None:
    """None where there is no graph, or not the same in training and evaluation."""
    mode, tracers = module.training, []
    try:
        for module.training in (True, False):
            tracers.append(FaithfulTracer())
            tracers[-1].trace(module)
    except Exception:  # anything a user's forward can raise when it is traced
        return None
    finally:
        module.training = mode
    first, second = tracers
    if _described(first.graph) != _described(second.graph):
        return None
    noted = (getattr(first, name) | getattr(second, name) for name in ("children", "values", "required"))
    return _Trace(first.graph, first.names, *noted)


def _described(graph: fx.Graph) -> list[tuple]:
    return [(node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


# ---- batch norm, add and ReLU


def _join_adds_and_relus(graph: fx.Graph, module: nn.Module) -> Iterator[tuple[fx.Node, str]]:
    """Replace batch norm, add and ReLU by one call of the batch norm; yields each such call and what it does."""
    norms = _batch_norms(module)
    for node in list(graph.nodes):
        if node.op != "call_module" or node.target not in norms or len(node.args) != 1 or node.kwargs:
            continue
        chained, residual, relu, names = [node], None, False, ["batch_norm"]
        following = _only_user(node)
        if following is not None and (operand := _added_to(following, node)) is not None:
            residual = operand
            chained.append(following)
            names.append("add")
            following = _only_user(following)
        if following is not None and _is_relu(following, module):
            relu = True
            chained.append(following)
            names.append("relu")
        if len(chained) == 1:
            continue
        last = chained[-1]
        if _written_in_place_between(node, last, module, but=chained):
            continue
        with graph.inserting_before(last):
            fused = graph.call_module(node.target, (node.args[0], residual, relu))
        last.replace_all_uses_with(fused)
        for replaced in reversed(chained):
            graph.erase_node(replaced)
        yield fused, " + ".join(names)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _added_to(node: fx.Node, norm: fx.Node) -> fx.Node | None:
    """The other operand, if `node` adds one to the output of `norm`; in place only onto that output."""
    if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if node.target in _ADD_IN_PLACE_CALLS and left is not norm:
        return None
    if node.target not in _ADD_CALLS | _ADD_IN_PLACE_CALLS or left is right:
        return None
    other = right if left is norm else left
    return other if isinstance(other, fx.Node) else None


def _is_relu(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(node.target)) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in _RELU_CALLS


# ---- convolutions and batch norms


def _find_chains(graph: fx.Graph, module: nn.Module) -> list[list[fx.Node]]:
    """The longest chains of at least two calls, each used by the next alone, as in chain.py."""
    chains: dict[fx.Node, list[fx.Node]] = {}  # last call -> the calls
    for node in graph.nodes:
        if not _is_layer(node, module):
            continue
        before = _source(node, module)
        chain = chains.get(before, [])
        if chain and _may_follow(node, before, module) and not _written_in_place_between(chain[0], node, module):
            del chains[before]
            chains[node] = [*chain, node]
        else:
            chains[node] = [node]
    return [chain for chain in chains.values() if len(chain) > 1]


def _is_layer(node: fx.Node, module: nn.Module) -> bool:
    if node.op != "call_module" or node.kwargs:
        return False
    layer = module.get_submodule(node.target)
    if type(layer) is nn.MaxPool2d:
        return len(node.args) == 1 and _is_plain_pooling(layer)
    return type(layer) is SlimBatchNorm2d or (type(layer) is FastSlimConv2d and len(node.args) == 1)


def _is_plain_convolution(layer: FastSlimConv2d) -> bool:
    """Whether it pads with zeros, the same on opposite sides."""
    return layer._explicit_padding is None


def _is_plain_pooling(layer: nn.MaxPool2d) -> bool:
    """Whether it is one that `slim_norm_max_pool2d` computes."""
    kernel = layer.kernel_size
    pixels = kernel**2 if isinstance(kernel, int) else math.prod(kernel)
    return layer.dilation in (1, (1, 1)) and not layer.return_indices and not layer.ceil_mode and pixels <= 255


def _source(node: fx.Node, module: nn.Module) -> fx.Node | None:
    """The value that a layer reads, behind dropouts that drop nothing."""
    source = node.args[0]
    while isinstance(source, fx.Node) and _drops_nothing(source, module) and _only_user(source) is not None:
        source = source.args[0]
    return source if isinstance(source, fx.Node) else None


def _drops_nothing(node: fx.Node, module: nn.Module) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    layer = module.get_submodule(node.target)
    return type(layer) is nn.Dropout and _is_identity(layer)


def _is_identity(layer: nn.Dropout) -> bool:
    return layer.p == 0


# What is asked of a layer when it is fused; where it was true then, it must be so at every call.
_REQUIRED = {nn.MaxPool2d: _is_plain_pooling, nn.Dropout: _is_identity, FastSlimConv2d: _is_plain_convolution}


def _may_follow(node: fx.Node, before: fx.Node, module: nn.Module) -> bool:
    layer, previous = module.get_submodule(node.target), module.get_submodule(before.target)
    if type(layer) is type(previous) or len(before.users) != 1 or node.args.count(node.args[0]) > 1:
        return False
    if isinstance(layer, SlimBatchNorm2d):
        return isinstance(previous, FastSlimConv2d)
    if not isinstance(previous, SlimBatchNorm2d) or _norm_arguments(before)[1] is not None:  # [1]: the residual
        return False
    return isinstance(layer, nn.MaxPool2d) or _is_plain_convolution(layer)


def _norm_arguments(node: fx.Node) -> tuple:
    """Input, residual and ReLU of a batch norm's call."""
    return node.args if len(node.args) == 3 else (node.args[0], None, False)


def _written_in_place_between(first: fx.Node, last: fx.Node, module: nn.Module, but: Sequence[fx.Node] = ()) -> bool:
    """Whether a call between the two writes in place: what is fused reads its input where its last layer stood."""
    for node in _between(first, last):
        if node in but:
            continue
        in_place = node.kwargs.get("inplace", False)
        if node.op == "call_module":
            in_place = in_place or getattr(module.get_submodule(node.target), "inplace", False)
        elif node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            in_place = in_place or node.target in _IN_PLACE_OPERATORS or (name.endswith("_") and name[:1] != "_")
        elif node.op == "call_method":
            in_place = in_place or (node.target.endswith("_") and node.target[:1] != "_")
        if in_place:
            return True
    return False


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _replace_chain(graph: fx.Graph, module: nn.Module, nodes: list[fx.Node], recompute: bool) -> dict[str, str]:
    """Replace the calls by one of `run_chain`; what each of the batch norms does then."""
    layers = [module.get_submodule(node.target) for node in nodes]
    norms = [isinstance(layer, SlimBatchNorm2d) for layer in layers]
    relus = tuple(norm and _norm_arguments(node)[2] for node, norm in zip(nodes, norms, strict=True))
    residual = _norm_arguments(nodes[-1])[1] if norms[-1] else None
    recompute = recompute and norms[-1] and layers[-2].kernel_size == (1, 1)
    last = nodes[-1]
    with graph.inserting_before(last):
        modules = tuple(graph.get_attr(node.target) for node in nodes)
        chain = graph.call_function(run_chain, (nodes[0].args[0], residual, modules, relus, recompute))
    last.replace_all_uses_with(chain)
    for node in reversed(nodes):
        source = node.args[0]
        graph.erase_node(node)
        while isinstance(source, fx.Node) and _drops_nothing(source, module) and not source.users:
            dropout, source = source, source.args[0]
            graph.erase_node(dropout)

    described = {}
    for i, node in enumerate(nodes):
        if norms[i]:
            names = ["recomputed convolution"] if recompute and i == len(nodes) - 1 else []
            names += ["batch_norm"] + ["add"] * (residual is not None and i == len(nodes) - 1) + ["relu"] * relus[i]
            if i < len(nodes) - 1:
                names.append("max_pool" if isinstance(layers[i + 1], nn.MaxPool2d) else "convolution")
            described[node.target] = " + ".join(names)
    return described
