"""Widths: how many channels a sub-network keeps, and setting the width of a model."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def check_width(width: float) -> float:
    """The width as a float of six decimals, which is the one way in which widths are compared and named.

    Arithmetic leaves 0.7999999999999999 of 0.8 and 0.9999999999 of 1, float32 0.800000012; each is the width meant.

    Raises:
        ValueError: for a width outside (0, 1].
    """
    rounded = round(float(width), 6)
    if not 0.0 < rounded <= 1.0:
        raise ValueError(f"width must be in (0, 1], got {width}")
    return rounded


def whole_number(name: str, value: int) -> int:
    """The value as an int.

    Raises:
        ValueError: for a value that is none.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def round_channels(channels: int, width: float, divisor: int = 1) -> int:
    """The number of channels that a layer of `channels` keeps at `width`.

    `width * channels` rounded half up to a multiple of `divisor`, and one multiple more where that would lose over a
    tenth of it. This is the rounding of the published code (`make_divisible`, from slimmable networks), which uses
    divisor 1; 8 suits vector units and tensor cores. Unlike there, the result never exceeds `channels` and a
    sub-network without channels is an error instead of one channel.

    Args:
        channels: channels at width 1.
        width: in (0, 1], taken to six decimals.
        divisor: what the result is a multiple of, unless it is `channels`.

    Raises:
        ValueError: for a width outside (0, 1], channels or a divisor that are no whole numbers or below 1, or a width
            that leaves no channel.
    """
    kept = check_width(width) * channels
    if channels.__class__ is not int or divisor.__class__ is not int:
        channels, divisor = whole_number("channels", channels), whole_number("divisor", divisor)
    if divisor < 1:
        raise ValueError(f"divisor must be at least 1, got {divisor}")
    if int(kept + 0.5) < 1:
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        raise ValueError(
            f"width must leave at least 1 of {channels} channels (be at least {0.5 / channels:g}), got {width}"
        )
    rounded = max(divisor, int(kept + divisor / 2) // divisor * divisor)
    if rounded < 0.9 * kept:
        rounded += divisor
    return min(rounded, channels)


def slim_modules(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that have a width.

    Raises:
        ValueError: if there are none.
    """
    modules = [module for module in model.modules() if hasattr(module, "_set_width")]
    if not modules:
        raise ValueError(
            f"model must have layers of adjustable width, got {type(model).__name__} without any; "
            "convert(model) makes them"
        )
    return modules


def remember_layers(model: nn.Module) -> None:
    """Let `set_width` refuse layers without a width in the place of those that `model` has now."""
    layers = ((name, type(module).__name__) for name, module in model.named_modules() if hasattr(module, "_set_width"))
    model.__dict__["_layers_of_a_width"] = tuple((tuple(name.split(".")), kind) for name, kind in layers if name)


def refuse_replaced_layers(model: nn.Module) -> None:
    """Raises ValueError for a layer without a width where `remember_layers` saw one with it."""
    for root in model.modules():
        for path, kind in root.__dict__.get("_layers_of_a_width", ()):
            module = root
            for name in path:
                module = None if module is None else module._modules.get(name)
            if module is None or hasattr(module, "_set_width") or not _has_a_state_of_its_own(module):
                continue
            raise ValueError(
                f"'{'.'.join(path)}' must be of adjustable width below width 1, as the {kind} that convert made, "
                f"got {type(module).__name__}; put a {kind} of the same arguments there"
            )


def _has_a_state_of_its_own(module: nn.Module) -> bool:
    tensors = next(module.parameters(), next(module.buffers(), None))
    return tensors is not None and not any(hasattr(inner, "_set_width") for inner in module.modules())


def set_width(model: nn.Module, width: float) -> None:
    """Run `model` as its sub-network of `width` from now on: the first channels of every layer.

    Args:
        model: a model with FastSlimConv2d, SlimLinear or SlimBatchNorm2d layers.
        width: in (0, 1], taken to six decimals; 1 is the full network.

    Raises:
        ValueError: for a width outside (0, 1], one that leaves a layer no channel, a model without such layers, or one
            in which a layer of adjustable width was replaced by one that is not.
    """
    width = check_width(width)
    if width != 1.0:
        refuse_replaced_layers(model)
    modules = slim_modules(model)
    states = [module._at_width(width) for module in modules]  # all of them first: a refusal leaves the width as it was
    for module, state in zip(modules, states, strict=True):
        module.__dict__.update(state)


@contextmanager
def use_width(model: nn.Module, width: float) -> Iterator[None]:
    """`set_width` for the length of a with-block; then every layer has the width it had before."""
    modules = slim_modules(model)
    before = [module._slim_width for module in modules]
    set_width(model, width)
    try:
        yield
    finally:
        for module, previous in zip(modules, before, strict=True):
            module._set_width(previous)
