"""Convert a CNN to adjustable width: its layers are swapped in place, its parameters are kept."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .adapters import adapter, is_slim
from .channel_classes import channels_out
from .fuse import fuse
from .layers import FastSlimConv2d, SlimBatchNorm2d, SlimLinear, carry_over_hooks
from .plan import LayerPlan, Plan, make_plan, swap
from .width import check_width, remember_layers


def convert(
    model: nn.Module,
    widths: Sequence[float] = (1.0,),
    divisor: int = 1,
    fuse_chains: bool = True,
    recompute: bool = False,
    keep: Sequence[str] = (),
    example: Tensor | tuple | torch.Size | None = None,
) -> nn.Module:
    """Make a CNN's convolutions, linear layers and batch norms adjustable in width.

    nn.Conv2d becomes FastSlimConv2d, nn.Linear SlimLinear and nn.BatchNorm2d SlimBatchNorm2d. The parameters and
    buffers are the same objects, so an optimizer made before stays valid; convolution weights become channels_last.
    At width 1 the model computes what it did before and has the same state_dict (and private statistics for the other
    `widths`). At width w it is the network of the first channels of every layer, which neither make nor read the
    others. Layers whose output leaves the network keep all their outputs at every width, and so do those that share
    channels with them; `summary` tells which.

    Whether that is so is found out before anything is changed. A copy of the model without data (on the meta device)
    runs once at full width, in training and in evaluation, which tells who shares channels with whom, who must keep
    whole groups, and where a model does what is not the same for the first channels alone: a reduction over channels,
    a shuffle, a concatenation, a parameter of fixed size, a layer without counterpart, also in backward code of its own
    (autograd functions, hooks of tensors). Then the sliced copy runs at two smaller widths and at `widths`, which must
    do the same, each layer as narrow as it should be; where the code compares numbers of channels, the answer must be
    that of all widths from 0.1 on (of what int(), range() or a logarithm makes of one, that of the widths run).
    Whatever does not fit is refused with the layer and the line of code, and the model is as it was. Not looked at are
    hooks of modules, which are carried over, and code that does something else for another size of the batch or the
    image than that of the example, or on another device. Layers that the model never calls stay what they are.

    A converted model is converted again to give its batch norms more `widths`, or where plain layers have been added.

    Args:
        model: such as torchvision's ResNet, Wide-ResNet, ResNeXt, MobileNet, RegNet or EfficientNet. Changed in place.
        widths: the widths with private batch-norm statistics, each in (0, 1].
        divisor: layers keep a multiple of this many channels; 1 as published, 8 suits tensor cores.
        fuse_chains: run batch norm, residual add and ReLU in one operator, and batch norms where the next convolution
            reads its input, where the model's code shows them (`fuse`).
        recompute: of such chains, compute the result of a last 1x1 convolution twice instead of keeping it (`fuse`).
        keep: names of layers, or of modules with layers, that keep all their outputs, with all that share channels
            with them. A model whose code asks for values (`if x.sum() > 0`) needs them for its heads: of such code both
            branches are followed.
        example: an input of the model, a tuple of its arguments, or the shape of an input; data is not looked at. None
            guesses from the first layer, which a network that flattens an image may need more luck for than there is.

    Returns:
        The same model.

    Raises:
        ValueError: for a model whose sub-networks would not be right, or that cannot be followed without data.
    """
    widths = [check_width(width) for width in widths]
    if divisor < 1:
        raise ValueError(f"divisor must be at least 1, got {divisor}")
    if _is_converted(model):
        return _add_widths(model, widths)
    plan = make_plan(model, widths, divisor, keep, example, _build)
    modules = dict(model.named_modules())
    layers = {name: _build(modules[name], found) for name, found in plan.items()}
    with torch.inference_mode(False):  # a weight that is stored anew there could not be trained
        for name, layer in layers.items():
            _finish(layer, plan, layers, plan[name], widths)
    for name, layer in layers.items():
        if layer is not modules[name]:
            carry_over_hooks(modules[name], layer)
    swap(model, {id(modules[name]): layer for name, layer in layers.items()})
    model = layers.get("", model)
    remember_layers(model)
    return fuse(model, recompute) if fuse_chains else model


def _finish(
    layer: nn.Module, plan: Plan, layers: dict[str, nn.Module], own: LayerPlan, widths: Sequence[float]
) -> None:
    """What a layer has beside its namesake: statistics, its weight's layout, and what `summary` and checks ask for."""
    described = None
    if own.reads is not None:
        source, inner = own.reads
        described = (channels_out(layers[source]), plan[source].divisor, inner)
        if inner > 1:
            vars(layer)["_flattened"] = (layers[source], inner)
    vars(layer).update(_input_channels=described, _kept_whole=own.kept)
    if isinstance(layer, SlimBatchNorm2d):
        for width in widths:
            layer.add_width(width)
    elif isinstance(layer, FastSlimConv2d):
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def _is_converted(model: nn.Module) -> bool:
    """Whether all layers that could have a width have one, by `convert`."""
    layers = [module for module in model.modules() if adapter(module).slim is not None]
    return bool(layers) and all("_kept_whole" in vars(layer) for layer in layers)


def _add_widths(model: nn.Module, widths: Sequence[float]) -> nn.Module:
    norms = [module for module in model.modules() if isinstance(module, SlimBatchNorm2d)]
    new = sorted({width for norm in norms for width in widths if width not in norm.widths})
    if not new:
        raise ValueError(
            f"model must have layers that are not converted, got a {type(model).__name__} that is already converted; "
            "converted again it takes new widths= for its batch norms"
        )
    for norm in norms:
        for width in new:
            norm.add_width(width)
    return model


def _build(module: nn.Module, plan: LayerPlan) -> nn.Module:
    """The layer of adjustable width that has the parameters, buffers, hooks and flags of `module`."""
    if is_slim(module):
        if not isinstance(module, SlimBatchNorm2d):
            module.divisor, module.slim_out = plan.divisor, not plan.kept
            module._set_width(module._slim_width)
        return module
    if isinstance(module, nn.BatchNorm2d):
        names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
        slim = SlimBatchNorm2d(*(getattr(module, n) for n in names), device="meta")
    else:
        options = {"divisor": plan.divisor, "slim_out": not plan.kept, "device": "meta"}
        options["bias"] = module.bias is not None
        if isinstance(module, nn.Linear):
            slim = SlimLinear(module.in_features, module.out_features, **options)
        else:
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
            slim = FastSlimConv2d(*(getattr(module, n) for n in names), padding_mode=module.padding_mode, **options)
    for name in slim._parameters:
        slim._parameters[name] = module._parameters[name]
    for name in slim._buffers:
        slim._buffers[name] = module._buffers[name]
    for name, value in vars(module).items():
        if name not in vars(slim):  # what a user has set on it
            vars(slim)[name] = value
    slim.training = module.training
    return slim
