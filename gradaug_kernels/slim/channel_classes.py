"""What a model's traced graph tells of its channels: who shares them, and who reads them.

Values that share their channels (through batch norm, ReLU, pooling, addition, padding, a slice of rows and columns)
form one class, joined by union-find; only a convolution or a linear layer starts a new one.
"""

import math
import operator
from typing import NamedTuple

from torch import fx, nn

from .tracing import Tracer

Layers = dict[str, nn.Module]  # convolutions, linear layers and batch norms by their names


class ChannelClass(NamedTuple):
    """Channels that several layers share, and keep together in a sub-network.

    Layers of one class may have different numbers of channels, where those of one are padded with zeros for another:
    channel c of the one is channel c of the other.
    """

    layers: list[str]  # those with these output channels, in the order of the graph
    readers: dict[str, int]  # those that mix these channels -> features per channel, above 1 for flattened images
    unit: int  # channels side by side that are kept or left out together: a group of a grouped convolution


def sliced_layers(model: nn.Module) -> Layers:
    """The convolutions, linear layers and batch norms of `model`, plain or of adjustable width."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)}


def trace(model: nn.Module) -> fx.Graph | None:
    """The graph of `model` down to its sliced layers; None for a model that torch.fx cannot trace."""

    class LeafTracer(Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d) or super().is_leaf_module(module, name)

    try:
        return LeafTracer().trace(model)
    except Exception:  # anything a user's forward can raise when it is traced
        return None


def channel_classes(model: nn.Module) -> list[ChannelClass]:
    """The classes of the channels of `model`, in the order of the graph.

    The layers of a class have the same width in every sub-network; those of two classes need not. The two sides of a
    grouped convolution are one class. The channels of the images are none.

    Raises:
        ValueError: for a model that torch.fx cannot trace.
    """
    graph, layers = trace(model), sliced_layers(model)
    if graph is None:
        raise ValueError(
            "widths per layer and random channels need a model that torch.fx can trace, got "
            f"{type(model).__name__}, which it cannot"
        )
    find, join = _classes(graph, layers)
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target in layers]
    first_call = {}
    for node in nodes:
        if getattr(layers[node.target], "groups", 1) > 1:
            join(node.all_input_nodes[0], node)
        join(first_call.setdefault(node.target, node), node)  # a layer that is called twice
        join(first_call[node.target].all_input_nodes[0], node.all_input_nodes[0])
    sizes = _sizes(graph, layers)
    classes: dict[fx.Node, ChannelClass] = {}
    for name, node in first_call.items():
        classes.setdefault(find(node), ChannelClass([], {}, 1)).layers.append(name)
    for name, node in first_call.items():
        source, layer = node.all_input_nodes[0], layers[name]
        if find(source) in classes and _mixes_channels(node, layers):
            features = channels_in(layer) // sizes[source] if isinstance(layer, nn.Linear) else 1
            classes[find(source)].readers[name] = features
    return [found._replace(unit=_unit(found, layers)) for found in classes.values()]


def _sizes(graph: fx.Graph, layers: Layers) -> dict[fx.Node, int]:
    """The channels of each value at full width, before it is flattened; 0 where no layer tells."""
    sizes: dict[fx.Node, int] = {}
    for node in graph.nodes:
        made_by_layer = node.op == "call_module" and node.target in layers
        operands = (sizes[operand] for operand in node.all_input_nodes)
        sizes[node] = channels_out(layers[node.target]) if made_by_layer else max(operands, default=0)
    return sizes


def _unit(found: ChannelClass, layers: Layers) -> int:
    grouped = (layers[name] for name in found.layers if getattr(layers[name], "groups", 1) > 1)
    return math.lcm(*(layer.out_channels // layer.groups for layer in grouped))


def channels_out(layer: nn.Module) -> int:
    """The channels or features of the layer's output at full width."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels
    return layer.out_features if isinstance(layer, nn.Linear) else layer.num_features


def channels_in(layer: nn.Conv2d | nn.Linear) -> int:
    """The channels or features of the layer's input at full width."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


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
    if not isinstance(index, tuple):
        return isinstance(index, slice) or index is Ellipsis
    if len(index) < 2 or index[0] is Ellipsis:
        return True
    return index[1] is Ellipsis or (
        isinstance(index[1], slice) and index[1].start in (None, 0) and index[1].step in (None, 1)
    )


def _mixes_channels(node: fx.Node, layers: Layers) -> bool:
    return node.op == "call_module" and isinstance(layers.get(node.target), nn.Conv2d | nn.Linear)
