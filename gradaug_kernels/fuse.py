"""Find batch norm, residual add and ReLU in a model's forward code, and run each such chain in one operator.

Each module that calls a SlimBatchNorm2d directly is traced on its own with torch.fx, its children as leaves, and its
forward is replaced by one that calls the batch norm with the residual and the ReLU. Nothing else of the module
changes: its class stays a subclass of what it was, its children, parameters, state_dict and hooks are the same.
"""

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F

from .nn import SlimBatchNorm2d

_RELU_CALLS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ADD_CALLS = {operator.add, torch.add, "add"}
_ADD_IN_PLACE_CALLS = {operator.iadd, "add_"}


def fuse(model: nn.Module) -> nn.Module:
    """Let every batch norm of `model` do the residual add and the ReLU that follow it, where its code shows them.

    A module whose forward cannot be traced, or does something else in training than in evaluation, is left as it is;
    `fused_chains` tells. A fused ReLU module is no longer called, so hooks on it do not fire. What a traced forward
    read from other attributes of its module stays what it was.

    Args:
        model: a model with SlimBatchNorm2d layers; `convert` calls this on its result. Changed in place.

    Returns:
        The same model.
    """
    for module in list(model.modules()):
        if not isinstance(module, _Fused) and _batch_norms(module):
            _fuse_module(module)
    return model


def fused_chains(model: nn.Module) -> dict[str, str]:
    """What each batch norm runs in one operator: {"layer1.0.bn2": "batch_norm + add + relu", ...}."""
    chains = {name: "batch_norm" for name, module in model.named_modules() if isinstance(module, SlimBatchNorm2d)}
    for name, module in model.named_modules():
        if isinstance(module, _Fused):
            for child, chain in module._chains.items():
                chains[f"{name}.{child}" if name else child] = chain
    return chains


def _batch_norms(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_children() if isinstance(child, SlimBatchNorm2d)}


def _fuse_module(module: nn.Module) -> None:
    graph = _trace(module)
    if graph is None:
        return
    chains = {node.target: chain for node, chain in _rewrite(graph, module)}
    if not chains:
        return
    graph.lint()
    forward = fx.GraphModule(module, graph).__class__.forward
    original = type(module)
    module._chains = chains
    module.__class__ = type(
        original.__name__, (_Fused, original), {"forward": forward, "_original": original, "__doc__": original.__doc__}
    )


class _Fused:
    """Mixed into the class of a module with a rewritten forward, which is made again by copies and pickles."""

    def __reduce_ex__(self, protocol):
        return _rebuild, (self._original, self.__dict__)

    def __getitem__(self, index):
        # A slice of an nn.Sequential is another Sequential: of the original layers, not with this one's forward.
        if isinstance(index, slice):
            return nn.Sequential(*list(self.children())[index])
        return super().__getitem__(index)


def _rebuild(original: type, state: dict) -> nn.Module:
    module = original.__new__(original)
    module.__setstate__(state)
    _fuse_module(module)
    return module


# ---- the graph


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, module, name):
        return True


def _trace(module: nn.Module) -> fx.Graph | None:
    """The graph of a module's forward; None where there is none, or not the same in training and evaluation."""
    mode, graphs = module.training, []
    try:
        for module.training in (True, False):
            graphs.append(_ChildrenAreLeaves().trace(module))
    except Exception:  # anything a user's forward can raise when it is traced
        return None
    finally:
        module.training = mode
    first, second = ([(node.op, node.target, str(node.args)) for node in graph.nodes] for graph in graphs)
    return graphs[0] if first == second else None


def _rewrite(graph: fx.Graph, module: nn.Module) -> Iterator[tuple[fx.Node, str]]:
    """Replace chains by calls of their batch norm; yields each such call and what it does."""
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
