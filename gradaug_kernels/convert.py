"""Convert a CNN to adjustable width: its layers are swapped in place, its parameters are kept."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from . import channels
from .fuse import fuse
from .nn import FastSlimConv2d, SlimBatchNorm2d, SlimLinear, carry_over_hooks
from .width import remember_layers

_SLIM = {nn.Conv2d: FastSlimConv2d, nn.Linear: SlimLinear, nn.BatchNorm2d: SlimBatchNorm2d}
# Layers that fix a number of channels and have no sliced counterpart.
_UNSUPPORTED = (
    *(nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear),
    *(nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d),
    *(nn.MultiheadAttention, nn.RNNBase, nn.PReLU),
)


def convert(
    model: nn.Module,
    widths: Sequence[float] = (1.0,),
    divisor: int = 1,
    fuse_chains: bool = True,
    recompute: bool = False,
) -> nn.Module:
    """Make a CNN's convolutions, linear layers and batch norms adjustable in width.

    nn.Conv2d becomes FastSlimConv2d, nn.Linear SlimLinear and nn.BatchNorm2d SlimBatchNorm2d. The parameters and
    buffers are the same objects, so an optimizer made before stays valid; convolution weights become channels_last.
    At width 1 the model computes what it did before and has the same state_dict (and private statistics for the other
    `widths`). Layers whose output leaves the network keep all their outputs at every width.

    The model is traced with torch.fx, which is how classifiers are found and how the layers that feed a grouped
    convolution learn its group size (they keep a multiple of it). A model that cannot be traced is converted with its
    last convolution or linear layer as the classifier.

    Args:
        model: such as torchvision's ResNet, Wide-ResNet, ResNeXt or MobileNet. Changed in place.
        widths: the widths with private batch-norm statistics, each in (0, 1].
        divisor: layers keep a multiple of this many channels; 1 as published, 8 suits tensor cores.
        fuse_chains: run batch norm, residual add and ReLU in one operator, and batch norms where the next convolution
            reads its input, where the model's code shows them (`fuse`).
        recompute: of such chains, compute the result of a last 1x1 convolution twice instead of keeping it (`fuse`).

    Returns:
        The same model.

    Raises:
        ValueError: for a model without a convolution or linear layer, one with a layer that has no sliced
            counterpart, or one that concatenates or splits channels.
    """
    layers = {name: module for name, module in model.named_modules() if type(module) in _SLIM}
    for name, module in model.named_modules():
        if isinstance(module, _UNSUPPORTED):
            raise ValueError(
                "convert needs a network of nn.Conv2d, nn.Linear and nn.BatchNorm2d layers, "
                f"got {type(module).__name__} at '{name}'"
            )
    mixing = [name for name, module in layers.items() if not isinstance(module, nn.BatchNorm2d)]
    if not mixing:
        raise ValueError(f"convert needs a network with nn.Conv2d or nn.Linear layers, got {type(model).__name__}")

    graph = channels.trace(model)
    if graph is None:
        classifiers, divisors = {mixing[-1]}, {}
    else:
        classifiers, divisors = channels.classifiers(graph, layers), channels.divisors(graph, layers)
    for name, module in layers.items():
        if isinstance(module, nn.BatchNorm2d):
            slim = _batch_norm(module, widths)
        else:
            slim = _mixing_layer(module, math.lcm(divisor, divisors.get(name, 1)), name not in classifiers)
        slim.train(module.training)
        carry_over_hooks(module, slim)
        parent, _, child = name.rpartition(".")
        if name == "":
            return slim
        setattr(model.get_submodule(parent), child, slim)
    remember_layers(model)
    return fuse(model, recompute) if fuse_chains else model


def _mixing_layer(module: nn.Conv2d | nn.Linear, divisor: int, slim_out: bool) -> nn.Module:
    options = {"divisor": divisor, "slim_out": slim_out, "device": "meta", "bias": module.bias is not None}
    if isinstance(module, nn.Linear):
        slim = SlimLinear(module.in_features, module.out_features, **options)
    else:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        slim = FastSlimConv2d(*(getattr(module, n) for n in names), padding_mode=module.padding_mode, **options)
        module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    slim.weight, slim.bias = module.weight, module.bias
    return slim


def _batch_norm(module: nn.BatchNorm2d, widths: Sequence[float]) -> SlimBatchNorm2d:
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
    slim = SlimBatchNorm2d(*(getattr(module, n) for n in names), device="meta")
    slim.weight, slim.bias = module.weight, module.bias
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(slim, name, getattr(module, name))
    for width in widths:
        slim.add_width(width)
    return slim
