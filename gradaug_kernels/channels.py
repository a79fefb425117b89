"""What a model's traced graph tells of its channels: who shares them, who must keep whole groups, who feeds the output.

Values that share their channels (through batch norm, ReLU, pooling, addition, padding, a slice of rows and columns)
form one class, joined by union-find; only a convolution or a linear layer starts a new one.
"""

import math
import operator

import torch
from torch import fx, nn

Layers = dict[str, nn.Module]  # convolutions, linear layers and batch norms by their names

# Calls that place channels side by side or apart: the first channels of the result are not those of each operand.
_REARRANGING = (torch.cat, torch.concat, torch.stack, torch.split, torch.chunk, torch.unbind)
_REARRANGING_METHODS = ("split", "chunk", "unbind")


def sliced_layers(model: nn.Module) -> Layers:
    """The convolutions, linear layers and batch norms of `model`, plain or of adjustable width."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)}


def trace(model: nn.Module) -> fx.Graph | None:
    """The graph of `model` down to its sliced layers; None for a model that torch.fx cannot trace."""

    class LeafTracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d) or super().is_leaf_module(module, name)

    try:
        return LeafTracer().trace(model)
    except Exception:  # anything a user's forward can raise when it is traced
        return None


def classifiers(graph: fx.Graph, layers: Layers) -> set[str]:
    """The convolutions and linear layers with a path to the output that meets no other one."""
    found, stack, seen = set(), list(graph.find_nodes(op="output")), set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if _mixes_channels(node, layers):
            found.add(node.target)
        else:
            stack.extend(node.all_input_nodes)
    return found


def divisors(graph: fx.Graph, layers: Layers) -> dict[str, int]:
    """What the output channels of each layer must be a multiple of for the grouped convolutions downstream.

    A grouped convolution asks for its group size in the classes of its input and of its output.

    Raises:
        ValueError: for a graph that concatenates or splits channels.
    """
    for node in graph.nodes:
        _refuse_rearranging(node)
    find, join = _classes(graph, layers)
    multiple = {node: 1 for node in graph.nodes}
    for node in graph.nodes:
        module = layers.get(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            source, result = find(node.all_input_nodes[0]), find(node)
            if module.in_channels == module.out_channels:
                join(source, result)  # whole groups are kept: the two numbers of channels are one
                multiple[result] = math.lcm(multiple[result], multiple[source])
            for end, channels in ((find(source), module.in_channels), (result, module.out_channels)):
                multiple[end] = math.lcm(multiple[end], channels // module.groups)
    return {node.target: multiple[find(node)] for node in graph.nodes if _mixes_channels(node, layers)}


def shared_channels(model: nn.Module) -> list[list[str]]:
    """The names of the layers of each class, in the order of the graph.

    The layers of a class keep the same channels in every sub-network, so they must have the same width; those of two
    classes need not. The two sides of a grouped convolution are one class.

    Raises:
        ValueError: for a model that torch.fx cannot trace.
    """
    graph, layers = trace(model), sliced_layers(model)
    if graph is None:
        raise ValueError(
            f"widths per layer need a model that torch.fx can trace, got {type(model).__name__}, which it cannot"
        )
    find, join = _classes(graph, layers)
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target in layers]
    first_call = {}
    for node in nodes:
        if getattr(layers[node.target], "groups", 1) > 1:
            join(node.all_input_nodes[0], node)
        join(first_call.setdefault(node.target, node), node)  # a layer that is called twice
    classes = {}
    for name, node in first_call.items():
        classes.setdefault(find(node), []).append(name)
    return list(classes.values())


def _classes(graph, layers):
    """find(node): the representative of its class; join(a, b) makes the classes of two nodes that of b."""
    parent = {node: node for node in graph.nodes}

    def find(node):
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def join(a, b):
        parent[find(a)] = find(b)

    for node in graph.nodes:
        if node.target is operator.getitem:
            if _keeps_channels(node.args[1]):
                join(node.args[0], node)
        elif not _mixes_channels(node, layers) and node.op != "output":
            for operand in node.all_input_nodes:
                join(operand, node)
    return find, join


def _keeps_channels(index) -> bool:
    """Whether x[index] of x [N, C, H, W] has the first channels of x, as x[:, :, ::2, ::2] and unlike x.shape[1]."""
    return isinstance(index, tuple) and (
        len(index) < 2 or (isinstance(index[1], slice) and index[1].start in (None, 0) and index[1].step in (None, 1))
    )


def _mixes_channels(node: fx.Node, layers: Layers) -> bool:
    return node.op == "call_module" and isinstance(layers.get(node.target), nn.Conv2d | nn.Linear)


def _refuse_rearranging(node: fx.Node) -> None:
    called = node.op == "call_function" and node.target in _REARRANGING
    if called or (node.op == "call_method" and node.target in _REARRANGING_METHODS):
        raise ValueError(
            "convert needs a network whose layers pass their channels on in order, "
            f"got one that concatenates or splits them ('{node.name}')"
        )
