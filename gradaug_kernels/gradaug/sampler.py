"""Which sub-networks a step trains, and how a model becomes one of them.

A sampler draws sub-networks as plain values (a width, a width per class of layers, the kept blocks), so that draws can
be recorded and repeated. Sub-networks of a width are the first channels of each layer, which the kernels read in place;
`RandomChannels` chooses others.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..slim.channel_classes import ChannelClass, channel_classes, channels_in, channels_out, sliced_layers
from ..slim.layers import FastSlimConv2d, SlimBatchNorm2d, SlimLinear
from ..slim.width import check_width, refuse_replaced_layers, set_width, slim_modules

BELOW_ONE = math.nextafter(1.0, 0.0)  # keeps all channels of a layer in a network that is not the full one


class Sampler(Protocol):
    """What `GradAug` asks of a sampler."""

    def bind(self, model: nn.Module, num_subnets: int) -> None:
        """Find in `model` what is sampled. Raises: ValueError for a model or a number that does not fit."""

    def draw(self, num_subnets: int, generator: torch.Generator) -> list[Any]:
        """The sub-networks of one step, the largest first."""

    def select(self, subnet: Any) -> None:
        """Run the model as `subnet` from now on; None is the full network."""


class FullNetwork:
    """No sub-networks: plain training, of a model with or without layers of adjustable width."""

    def bind(self, model: nn.Module, num_subnets: int) -> None:
        self.model = model

    def draw(self, num_subnets: int, generator: torch.Generator) -> list[Any]:
        return []

    def select(self, subnet: None) -> None:
        for module in self.model.modules():
            if hasattr(module, "_set_width"):
                module._set_width(1.0)


class RandomWidth:
    """One width for all layers, the published sampler: min_width, and uniform draws from [min_width, 1).

    Args:
        min_width: alpha in (0, 1].
        widths: if given, min_width and draws without replacement from these, in place of uniform ones. As many
            sub-networks as widths trains each in every step, as slimmable networks do (Yu et al., ICLR 2019).

    Batch norm: width 1, drawn where min_width is 1, uses its batch's statistics and stores nothing, as every width
    without private statistics.
    """

    def __init__(self, min_width: float = 0.8, widths: Sequence[float] = ()):
        self.min_width = check_width(min_width)
        self.others = sorted({check_width(width) for width in widths} - {self.min_width})
        if self.others and self.others[0] < self.min_width:
            raise ValueError(f"widths must be at least min_width {self.min_width:g}, got {self.others[0]:g}")

    def bind(self, model: nn.Module, num_subnets: int) -> None:
        if self.others and num_subnets > 1 + len(self.others):
            raise ValueError(f"num_subnets must be at most {1 + len(self.others)}, the widths, got {num_subnets}")
        self.model, self.statistics = model, _RunningStatistics(model)
        set_width(model, 1.0)
        set_width(model, self.min_width)  # a width that leaves a layer without channels is refused here
        set_width(model, 1.0)

    def draw(self, num_subnets: int, generator: torch.Generator) -> list[float]:
        if self.others:
            order = torch.randperm(len(self.others), generator=generator)[: num_subnets - 1]
            free = [self.others[i] for i in order.tolist()]
        else:
            uniform = torch.rand(num_subnets - 1, generator=generator, dtype=torch.float64)
            free = (self.min_width + (1 - self.min_width) * uniform).tolist()
        return sorted([self.min_width, *free], reverse=True)

    def select(self, subnet: float | None) -> None:
        self.statistics.hold(subnet is not None and check_width(subnet) == 1.0)
        set_width(self.model, 1.0 if subnet is None else subnet)


class RandomLayerWidth:
    """A width of its own for every class of layers that share channels (`slim.channel_classes`).

    Layers whose outputs are added or multiplied, and the batch norms after them, are one class. A sub-network is a
    tuple of widths, one per class in the order of the graph: of min_width throughout, and of uniform draws from
    [min_width, 1).

    Args:
        min_width: in (0, 1].
    """

    def __init__(self, min_width: float = 0.8):
        self.min_width = check_width(min_width)

    def bind(self, model: nn.Module, num_subnets: int) -> None:
        set_width(model, 1.0)
        refuse_replaced_layers(model)
        model = _unwrapped(model)
        modules = dict(model.named_modules())
        self.classes = [[modules[name] for name in found.layers] for found in channel_classes(model)]
        classed = {module for layers in self.classes for module in layers}
        self.rest = [module for module in slim_modules(model) if module not in classed]  # never called
        self.statistics = _RunningStatistics(model)
        self.select((self.min_width,) * len(self.classes))
        self.select(None)

    def draw(self, num_subnets: int, generator: torch.Generator) -> list[tuple[float, ...]]:
        shape = (num_subnets - 1, len(self.classes))
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        drawn = [tuple(row) for row in (self.min_width + (1 - self.min_width) * uniform).tolist()]
        return [*sorted(drawn, key=sum, reverse=True), (self.min_width,) * len(self.classes)]

    def select(self, subnet: tuple[float, ...] | None) -> None:
        full = subnet is None or check_width(min(subnet)) == 1.0
        self.statistics.hold(full and subnet is not None)
        for layers, width in zip(self.classes, (1.0,) * len(self.classes) if full else subnet, strict=True):
            for layer in layers:
                layer._set_width(1.0 if full else min(check_width(width), BELOW_ONE))
        for layer in self.rest:
            layer._set_width(1.0 if full else min(subnet))


class ChannelDraw(NamedTuple):
    """A sub-network of `RandomChannels`."""

    subnet: Any  # of the sampler of widths
    seed: int  # of the choice of channels


class RandomChannels:
    """Random channels, in place of the first ones, of the widths that another sampler draws.

    Layers that share channels (`slim.channel_classes`) keep the same ones, as many as at that width, whole groups
    of a grouped convolution. Each pass gathers its weights and scatters their gradients, which the first channels do
    not need. A width then stands for no single sub-network, so none has private batch-norm statistics in training:
    sub-networks use their batch's and store nothing.

    Args:
        sampler: RandomWidth(...) or RandomLayerWidth(...).
    """

    def __init__(self, sampler: Sampler):
        if not isinstance(sampler, RandomWidth | RandomLayerWidth):
            raise TypeError(f"sampler must be a RandomWidth or a RandomLayerWidth, got {type(sampler).__name__}")
        self.sampler = sampler

    def bind(self, model: nn.Module, num_subnets: int) -> None:
        self.sampler.bind(model, num_subnets)
        model = _unwrapped(model)
        self.layers = {name: layer for name, layer in sliced_layers(model).items() if layer.weight is not None}
        self.classes = [
            found._replace(layers=[name for name in found.layers if name in self.layers])
            for found in channel_classes(model)
        ]
        self.statistics = _RunningStatistics(model)
        for name, layer in self.layers.items():
            if getattr(layer, "groups", 1) > 1 and layer.in_channels != layer.out_channels:
                raise ValueError(
                    "random channels need grouped convolutions with as many output as input channels, got "
                    f"{layer.in_channels} input and {layer.out_channels} output channels ('{name}')"
                )
        self.select(self.draw(1, torch.Generator())[0])
        self.select(None)

    def draw(self, num_subnets: int, generator: torch.Generator) -> list[ChannelDraw]:
        subnets = self.sampler.draw(num_subnets, generator)
        seeds = torch.randint(2**62, (num_subnets,), generator=generator).tolist()
        return [ChannelDraw(*drawn) for drawn in zip(subnets, seeds, strict=True)]

    def select(self, subnet: ChannelDraw | None) -> None:
        self.statistics.hold(False)
        self.sampler.select(None if subnet is None else subnet.subnet)
        if subnet is None:
            return
        self.statistics.hold(True)
        outputs, inputs = self._choose(torch.Generator().manual_seed(subnet.seed))
        for name in outputs.keys() | inputs.keys():
            layer = self.layers[name]
            if isinstance(layer, SlimBatchNorm2d):
                layer._keep(outputs[name])
            else:
                layer._keep(outputs.get(name), inputs.get(name))

    def _choose(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The kept output and input channels of the layers that do not keep all, by their names."""
        outputs, inputs = {}, {}
        for found in self.classes:
            numbers = self._numbers_of_channels(found)
            if all(kept == channels for channels, kept in numbers.items()):
                continue
            chosen = _choose_nested(numbers, found.unit, generator)
            for name in found.layers:
                layer = self.layers[name]
                outputs[name] = chosen[channels_out(layer)].to(layer.weight.device)
            for name, features in found.readers.items():
                layer = self.layers[name]
                channels = channels_in(layer) // features
                if channels not in chosen:
                    raise ValueError(f"the input of '{name}' must be channels of a layer, got {channels} padded ones")
                inputs[name] = _spread(chosen[channels], features).to(layer.weight.device)
        return outputs, inputs

    def _numbers_of_channels(self, found: ChannelClass) -> dict[int, int]:
        """The channels that layers of the class have at full width -> those that they keep now."""
        layers = (self.layers[name] for name in found.layers)
        makers = (layer for layer in layers if isinstance(layer, FastSlimConv2d | SlimLinear))
        return {channels_out(layer): layer._out.shape[0] for layer in makers if getattr(layer, "groups", 1) == 1}


def _choose_nested(numbers: dict[int, int], unit: int, generator: torch.Generator) -> dict[int, Tensor]:
    """`kept` of the first `channels` channels for each channels -> kept of numbers, in pieces of `unit`: int64 [kept].

    Those kept of a smaller number are the first of those kept of a larger one, as padding puts them there.
    """
    chosen, units, before = {}, torch.empty(0, dtype=torch.int64), 0
    for channels, kept in sorted(numbers.items()):
        count = channels // unit
        left_out = torch.ones(count, dtype=torch.bool)
        left_out[units] = False
        order = torch.randperm(count, generator=generator)
        candidates = torch.cat((order[order >= before], order[order < before]))  # those that were not there before
        added = candidates[left_out[candidates]][: kept // unit - len(units)]
        units, before = torch.cat((units, added.sort().values)), count
        chosen[channels] = _spread(units, unit)
    return chosen


def _spread(pieces: Tensor, size: int) -> Tensor:
    """The elements of pieces of that size: [n] -> [n size]."""
    return (pieces[:, None] * size + torch.arange(size)).flatten()


class RandomDepth:
    """The full width with some residual blocks left out, each on its own coin.

    Block l of L, counted from 1, is kept with probability 1 - (1 - min_survival) l / L: stochastic depth's linear rule
    (Huang et al., ECCV 2016) from close to 1 down to min_survival. A block that is left out hands on its shortcut. No
    branch is scaled, in training or in evaluation: the full network is trained and evaluated as it is, and a
    sub-network is the network without some blocks. Batch norm's running statistics are those of the full network;
    sub-networks use their batch's and store nothing. A sub-network is a tuple of bools, kept or not, one per block.

    With DistributedDataParallel, give it find_unused_parameters=True.

    Args:
        min_survival: of the last block, in (0, 1].
    """

    def __init__(self, min_survival: float = 0.8):
        if not 0.0 < min_survival <= 1.0:
            raise ValueError(f"min_survival must be in (0, 1], got {min_survival}")
        self.min_survival = min_survival

    def bind(self, model: nn.Module, num_subnets: int) -> None:
        self.blocks = [module for module in model.modules() if hasattr(module, "skipped")]
        if not self.blocks:
            raise ValueError(
                f"random depth needs a model of gradaug_kernels.models.ResidualStage, got {type(model).__name__} "
                "without any"
            )
        self.statistics, self.full = _RunningStatistics(model), FullNetwork()
        self.full.bind(model, num_subnets)
        self.select(None)

    @property
    def survival(self) -> list[float]:
        """The probability of each block."""
        count = len(self.blocks)
        return [1 - (1 - self.min_survival) * number / count for number in range(1, count + 1)]

    def draw(self, num_subnets: int, generator: torch.Generator) -> list[tuple[bool, ...]]:
        uniform = torch.rand(num_subnets, len(self.blocks), generator=generator, dtype=torch.float64)
        kept = uniform < torch.tensor(self.survival, dtype=torch.float64)
        return sorted((tuple(row) for row in kept.tolist()), key=sum, reverse=True)

    def select(self, subnet: tuple[bool, ...] | None) -> None:
        if subnet is None:
            self.full.select(None)
        self.statistics.hold(subnet is not None)
        for block, kept in zip(self.blocks, subnet or (True,) * len(self.blocks), strict=True):
            block.skipped = not kept


def _unwrapped(model: nn.Module) -> nn.Module:
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    return getattr(model, "module", model)  # of DistributedDataParallel


class _RunningStatistics:
    """The running statistics of a model's batch norms, of those that are in training and keep some."""

    def __init__(self, model: nn.Module):
        self.norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.held: list[_BatchNorm] = []

    def hold(self, held: bool) -> None:
        """Held: layers normalise with their batch's statistics and store nothing."""
        if held == bool(self.held):
            return
        changed = self.held or [norm for norm in self.norms if norm.training and norm.track_running_stats]
        for norm in changed:
            norm.track_running_stats = not held
            if isinstance(norm, SlimBatchNorm2d):
                norm._held = held
                norm._set_width(norm._slim_width)
        self.held = changed if held else []
