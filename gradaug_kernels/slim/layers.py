"""Layers of adjustable width. At width 1 each is its torch.nn namesake: same arguments, parameters and state_dict.

A sub-network of width w is the first channels of every layer. The number of input channels is read off the input, so
only the number of output channels depends on the width (`round_channels`). `set_width(model, w)` sets it. `_keep`
chooses other channels than the first, until the next width is set; the number of them is that of the indices.
"""

import copy
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from .._library import has_prehooks
from ..ops import slim_batch_norm, slim_conv2d, slim_linear
from ..ops.slim_batch_norm import slim_batch_norm_record_
from .chosen_channels import gather_weight
from .private_statistics import Origin, negative_variance, statistics_fault, written_channels
from .state_dict import from_state_dict, in_state_dict
from .width import check_width, round_channels


def _number(n: int) -> Tensor:
    """n as the size of a tensor that holds next to nothing: torch.compile then takes it as a dynamic size.

    As an integer attribute it would be a constant of the compiled graph, and every new width would compile again.
    """
    return torch.empty(1).expand(n)


def _set(module: nn.Module, **attributes) -> None:
    """Set attributes that are no parameters, buffers or modules, without nn.Module's search for those.

    A step sets some two thousand of them.
    """
    module.__dict__.update(attributes)


def _parameters(layer: "FastSlimConv2d | SlimLinear") -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The weight and bias whose first channels are those of the sub-network, and where the weight's gradient is added.

    That is None where autograd carries the gradient.
    """
    weight, weight_grad = layer.weight, None
    if layer._accumulating is not None:
        weight, weight_grad = layer._accumulating.resolve(weight)
    if layer._kept is None:
        return weight, layer.bias, weight_grad
    outputs, inputs = layer._kept
    bias = layer.bias if layer.bias is None or outputs is None else layer.bias[outputs]
    return gather_weight(weight, outputs, inputs, weight_grad), bias, None


def _is_traced(x: Tensor | fx.Proxy) -> bool:
    """Whether torch.fx traces: a layer of adjustable width is one call there, as a layer of torch.nn is."""
    return x.__class__ is not Tensor and isinstance(x, fx.Proxy)


def _as_one_call(layer: nn.Module, x: fx.Proxy, *args) -> fx.Proxy:
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x, *args), {})


HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def carry_over_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give `target`, made in place of `source`, the hooks of `source`; the handles that remove them stay valid."""
    _set(target, **{name: source.__dict__[name] for name in HOOKS})
    for hook in target._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):  # torch.nn binds these to their module
            hook.module = weakref.ref(target)


def _state_outside_of_a_step(layer: nn.Module) -> dict:
    """What a copy or a pickle of a layer has: nothing of a step in the middle of which it may be made."""
    state = dict(layer.__dict__)
    for name in ("_accumulating", "_substitute"):
        state.pop(name, None)
    if state.pop("_held", False):
        state["track_running_stats"] = True
    return state


class Accumulating(NamedTuple):
    """What `AccumulateIntoGrad` knows of a layer's weight."""

    weight: nn.Parameter
    computed: Tensor  # what the layer computes with: the weight, or a low-precision copy of it
    version: int  # of the weight, when it was copied
    grad: Tensor | None  # weight.grad at the start of the with-block

    def resolve(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight to compute with, and the parameter or buffer that its gradient is added to.

        weight: the layer's now. Autograd carries the gradient, None, where it is another one, as inside
        torch.func.functional_call or in a replica, is frozen or has hooks, or has changed since it was copied.
        """
        if weight is not self.weight:
            return weight, None
        if torch.compiler.is_compiling():  # a graph takes buffers as inputs; their versions and hooks are not to be had
            return (weight, None) if self.grad is None else (self.computed, self.grad)
        if not may_accumulate(weight) or (self.computed is not weight and weight._version != self.version):
            return weight, None
        return self.computed, weight


def may_accumulate(weight: Tensor | None) -> bool:
    """Whether kernels may add the gradient of a layer's weight to its .grad: a parameter, trained and without hooks."""
    return (
        type(weight) is nn.Parameter
        and weight.requires_grad
        and not weight._backward_hooks
        and not weight._post_accumulate_grad_hooks
    )


def may_accumulate_in_a_step(weight: Tensor | None) -> bool:
    """The same of a whole step, for which hooks of autograd's own node are looked at too."""
    return may_accumulate(weight) and not has_prehooks(weight)


class FastSlimConv2d(nn.Conv2d):
    """nn.Conv2d of adjustable width, a drop-in: same arguments, parameter names and state_dict.

    Args:
        in_channels, ..., dtype: as nn.Conv2d, string paddings and padding modes included.
        divisor: output channels are a multiple of it; see `round_channels`.
        slim_out: False keeps all output channels at every width, for the last layer of a network.

    A grouped convolution keeps the size of its groups and drops whole groups: an input of k * in_channels / groups
    channels runs the first k groups, whatever the width. Its input must therefore be a multiple of the group size:
    give the layer that produces it that `divisor`.

    The weight is stored NHWC (channels_last), the layout the kernels read in place; the output then is NHWC as well.
    `state_dict` gives that memory, as of every module, so that what is written there is written to the weight; and
    safetensors saves it (`state_dict.ChannelsLastWeight`). `load_state_dict` keeps the weight NHWC.

    Shape:
        input [N, C, H, W], C at most in_channels, and in_channels at width 1; output [N, out, OH, OW]. Either may be
        without N.

    Raises:
        ValueError: for an input whose channels do not fit, or a width that leaves no channel.
    """

    _accumulating = None  # an Accumulating, inside AccumulateIntoGrad

    def __init__(self, *args, divisor: int = 1, slim_out: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.divisor = divisor
        self.slim_out = slim_out
        self._set_width(1.0)
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    # Read at every call, as nn.Conv2d does: `layer.padding` may be set at any time.
    @property
    def _explicit_padding(self) -> list[int] | None:
        """F.pad's [left, right, top, bottom] where zero padding inside the convolution cannot express it."""
        if self.padding_mode != "zeros":
            return list(self._reversed_padding_repeated_twice)
        if self.padding.__class__ is not str:
            return None
        pads = self._pads_of_a_name()
        return None if pads[0] == pads[1] and pads[2] == pads[3] else pads

    def _padding_in_the_operator(self) -> tuple[int, int]:
        padding = self.padding
        if self._explicit_padding is not None:
            return 0, 0
        if padding.__class__ is str:
            pads = self._pads_of_a_name()
            return pads[2], pads[0]
        return padding if padding.__class__ is tuple else _pair(padding)

    def _pads_of_a_name(self) -> list[int]:
        """[left, right, top, bottom] of the paddings "valid" and "same"."""
        if self.padding == "valid":
            return [0, 0, 0, 0]
        height, width = (d * (k - 1) for d, k in zip(_pair(self.dilation), self.kernel_size, strict=True))
        return [width // 2, width - width // 2, height // 2, height - height // 2]

    def _set_width(self, width: float) -> None:
        self.__dict__.update(self._at_width(width))

    def _at_width(self, width: float) -> dict:
        out = round_channels(self.out_channels, width, self.divisor) if self.slim_out else self.out_channels
        return {"_slim_width": width, "_is_full": width == 1.0, "_out": _number(out), "_kept": None}

    def _keep(self, outputs: Tensor | None, inputs: Tensor | None) -> None:
        """Compute these channels from those, int64 [out] and [C] in ascending order, None being the first ones.

        A grouped convolution is given whole groups, the same on both sides.
        """
        self._kept = (outputs, inputs if self.groups == 1 else None)
        if outputs is not None:
            self._out = _number(len(outputs))

    def forward(self, input: Tensor) -> Tensor:
        if _is_traced(input):
            return _as_one_call(self, input)
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        arguments, weight_grad = self._arguments(input)
        return slim_conv2d(self._padded(input), *arguments, weight_grad=weight_grad)

    def _arguments(self, x: Tensor) -> tuple[tuple, Tensor | None]:
        """What the operator takes after x, and the buffer for the weight's gradient, if there is one."""
        groups, out_channels = self._groups_and_out_channels(x)
        weight, bias, weight_grad = _parameters(self)
        geometry = (self.stride, self._padding_in_the_operator(), self.dilation, groups)
        return (weight, bias, out_channels, *geometry), weight_grad

    def _padded(self, x: Tensor) -> Tensor:
        """x, with the padding that the operator cannot express."""
        pads = self._explicit_padding
        if pads is None:
            return x
        return F.pad(x, pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _groups_and_out_channels(self, x: Tensor) -> tuple[int, int]:
        channels = x.shape[1] if x.dim() == 4 else None
        if channels is None:
            raise ValueError(f"input must be [N, C, H, W] or [C, H, W], got shape {tuple(x.shape)}")
        if self._is_full and channels != self.in_channels:
            raise ValueError(f"input must have {self.in_channels} channels at width 1, got {channels}")
        if self.groups == 1:
            return 1, self._out.shape[0]
        group_size = self.in_channels // self.groups
        if channels % group_size or channels > self.in_channels:
            raise ValueError(
                f"input must have a multiple of {group_size} channels (the group size), at most {self.in_channels}, "
                f"got {channels}; give the layer that produces it divisor={group_size}"
            )
        groups = channels // group_size
        return groups, groups * (self.out_channels // self.groups)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}weight"
        if not keep_vars and name in destination:
            destination[name] = in_state_dict(destination[name])

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        name = f"{prefix}weight"
        if isinstance(state_dict.get(name), Tensor):
            state_dict[name] = from_state_dict(state_dict[name])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        weight = self._parameters.get("weight")
        if weight is not None and local_metadata.get("assign_to_params_buffers", False):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def __getstate__(self) -> dict:
        return _state_outside_of_a_step(self)

    def extra_repr(self) -> str:
        slim = f", divisor={self.divisor}" if self.divisor != 1 else ""
        return super().extra_repr() + slim + ("" if self.slim_out else ", slim_out=False")


class SlimLinear(nn.Linear):
    """nn.Linear of adjustable width, a drop-in: same arguments, parameter names and state_dict.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        divisor: output features are a multiple of it; see `round_channels`.
        slim_out: True slims the output too, for hidden layers. The default suits a classifier: all classes at every
            width.

    Shape:
        input [..., F], F at most in_features, and in_features at width 1; output [..., out].

    Raises:
        ValueError: for an input whose features do not fit, or a width that leaves no feature.
    """

    _accumulating = None  # an Accumulating, inside AccumulateIntoGrad
    _flattened = None  # (layer whose channels are flattened in the input, pixels of each), where convert found them

    def __init__(self, *args, divisor: int = 1, slim_out: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.divisor = divisor
        self.slim_out = slim_out
        self._set_width(1.0)

    def _set_width(self, width: float) -> None:
        self.__dict__.update(self._at_width(width))

    def _at_width(self, width: float) -> dict:
        out = round_channels(self.out_features, width, self.divisor) if self.slim_out else self.out_features
        return {"_slim_width": width, "_is_full": width == 1.0, "_out": _number(out), "_kept": None}

    def _keep(self, outputs: Tensor | None, inputs: Tensor | None) -> None:
        """Compute these features from those, int64 [out] and [F] in ascending order, None being the first ones."""
        self._kept = (outputs, inputs)
        if outputs is not None:
            self._out = _number(len(outputs))

    def forward(self, input: Tensor) -> Tensor:
        if _is_traced(input):
            return _as_one_call(self, input)
        if not input.shape:
            raise ValueError("input must be [..., F], got a number")
        if self._is_full and input.shape[-1] != self.in_features:
            raise ValueError(f"input must have {self.in_features} features at width 1, got {input.shape[-1]}")
        if self._flattened is not None:
            source, pixels = self._flattened
            if input.shape[-1] != source._out.shape[0] * pixels:
                raise ValueError(
                    f"input must have {source._out.shape[0]} channels of {pixels} pixels, as at width 1, got "
                    f"{input.shape[-1]} features"
                )
        out_features = self._out.shape[0]
        weight, bias, weight_grad = _parameters(self)
        return slim_linear(input, weight, bias, out_features, weight_grad)

    def __getstate__(self) -> dict:
        return _state_outside_of_a_step(self)

    def extra_repr(self) -> str:
        slim = f", divisor={self.divisor}" if self.divisor != 1 else ""
        return super().extra_repr() + slim + (", slim_out=True" if self.slim_out else "")


def _suffix(width: float) -> str:
    """What ends the names of a width's statistics."""
    return repr(width).replace(".", "_")


class SlimBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d of adjustable width: affine parameters shared and sliced, statistics private to each width.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as nn.BatchNorm2d.
        widths: the widths with private running statistics. Width 1 always has them.

    In training every width normalises with the batch's statistics. Then
        a listed width      updates its own running statistics ("private"); width 1 those of nn.BatchNorm2d;
        an unlisted width   stores nothing ("batch"), as GradAug's sub-networks.
    In evaluation a width normalises with its own statistics. `calibrate` makes and fills them for any width.

    torch.compile makes one graph for each width with private statistics, and one for all others together; above 8, its
    limit, set torch._dynamo.config.recompile_limit to as many.

    The statistics of width w are named `running_mean_w` and so on, with the point of w as an underscore; they have
    num_features elements, of which the first channels of that width are used. Those of `widths` and `add_width` are
    buffers. Those that `calibrate` makes, or that only a loaded state_dict has, are in state_dict, move and are copied
    like buffers, but are not in `buffers()`: a copy of the model made before, whose buffers are updated one by one
    (`torch.optim.swa_utils.AveragedModel`), goes on. An nn.BatchNorm2d's state_dict loads as it is; the statistics of
    widths that only the layer has are forgotten then, being those of other weights.

    Shape:
        input and residual [N, C, H, W], C at most num_features, and num_features at width 1; output the same.

    Raises:
        ValueError: for an input whose channels do not fit, or one value per channel in training.
        RuntimeError: for evaluation at a width that has no statistics yet, or stale ones (`calibrate` says which).
    """

    _slim_width = 1.0
    _beside: tuple[str, ...] = ()  # names of the statistics that are not buffers
    _held = False  # a GradAug step has set track_running_stats to False
    _substitute = None  # "batch" or "full": what it takes in a GradAug step for statistics that it does not have

    def __init__(self, *args, widths: tuple[float, ...] = (1.0,), **kwargs):
        super().__init__(*args, **kwargs)
        self._names = {1.0: ("running_mean", "running_var", "num_batches_tracked")}
        self._unconfirmed: set[float] = set()  # widths whose statistics may be empty still, or are stale
        self._stale: set[float] = set()  # widths whose statistics are those of the weights before training went on
        self._origins: dict[float, Origin] = {}  # of statistics that were calibrated or loaded
        self._written: dict[float, int] = {}  # channels of loaded statistics, until an evaluation has met them
        self._set_width(1.0)
        for width in widths:
            self.add_width(width)

    def _set_width(self, width: float) -> None:
        self.__dict__.update(self._at_width(width))

    def _at_width(self, width: float) -> dict:
        statistics = self._names.get(width)
        return {"_slim_width": width, "_is_full": width == 1.0, "_statistics": statistics, "_kept": None}

    def _keep(self, channels: Tensor | None) -> None:
        """Scale and shift by the parameters of these channels, int64 [C] in ascending order, None being the first."""
        self._kept = channels

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """gamma and beta, whose first channels are those of the sub-network; None and None without them."""
        weight, bias, kept = self.weight, self.bias, self._kept
        if kept is None or weight is None:
            return weight, bias
        return weight[kept], None if bias is None else bias[kept]

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths with private running statistics, in ascending order."""
        return tuple(sorted(self._names))

    def add_width(self, width: float) -> None:
        """Give `width` private running statistics, empty for now. A width that has some keeps them."""
        self._add_width(width, as_buffers=True)

    def _add_width(self, width: float, as_buffers: bool) -> None:
        width = check_width(width)
        if width in self._names or not self.track_running_stats:
            return
        suffix = _suffix(width)
        names = tuple(f"{name}_{suffix}" for name in self._names[1.0])
        for name, full in zip(names, self._names[1.0], strict=True):
            with torch.inference_mode(False):  # whose tensors could not be written to, as by load_state_dict
                empty = torch.zeros_like(getattr(self, full))
            if as_buffers:
                self.register_buffer(name, empty)
            else:
                _set(self, **{name: empty})
        if not as_buffers:
            self._beside = (*self._beside, *names)
        getattr(self, names[1]).fill_(1)
        self._names[width] = names
        self._unconfirmed.add(width)
        self._set_width(self._slim_width)

    @property
    def _private_statistics(self) -> tuple[str, ...]:
        return tuple(name for width, names in self._names.items() if width != 1.0 for name in names)

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalise; then add `residual`, then apply a ReLU, where asked for."""
        if _is_traced(input):
            return _as_one_call(self, input, *((residual, relu) if residual is not None or relu else ()))
        if residual is not None and (residual.shape != input.shape or residual.dtype != input.dtype):
            y = self(input) + residual  # broadcast or promoted as the sum of any two tensors
            return y.relu() if relu else y
        self._check(input.shape)
        mean, var = self._given_statistics(input.shape[1], input.dtype)
        y, batch_mean, batch_var = slim_batch_norm(input, *self._affine(), mean, var, residual, relu, self.eps)
        if mean is None:
            self._record(input.shape, batch_mean, batch_var)
        return y

    def _check(self, shape: torch.Size) -> None:
        """The contract of the input's shape; raises what the class says."""
        if len(shape) != 4:
            raise ValueError(f"input must be [N, C, H, W], got shape {tuple(shape)}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")
        channels, width = shape[1], self._slim_width
        if channels > self.num_features or (width == 1.0 and channels != self.num_features):
            bound = "" if width == 1.0 else "at most "
            raise ValueError(f"input must have {bound}{self.num_features} channels at width {width:g}, got {channels}")
        if self._takes_batch_statistics and shape[0] * shape[2] * shape[3] == 1:
            raise ValueError(
                f"training needs more than 1 value per channel for statistics, got input of shape {tuple(shape)}"
            )

    @property
    def _takes_batch_statistics(self) -> bool:
        if self.training or self._buffers["running_mean"] is None:
            return True
        return not self._has_statistics and (self._substitute == "batch" or not self.track_running_stats)

    @property
    def _has_statistics(self) -> bool:
        return self._statistics is not None and self.is_calibrated(self._slim_width)

    def _given_statistics(self, channels: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The statistics [channels] of this width for an input of dtype; None and None where the batch's are taken."""
        if self._takes_batch_statistics:
            return None, None
        if not self._has_statistics and self._substitute is None:
            raise RuntimeError(self._complaint())
        names = self._statistics if self._has_statistics else self._names[1.0]
        if self._written:
            self._check_written(channels)
        chosen = slice(channels) if self._kept is None else self._kept
        stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        mean, var = (getattr(self, name)[chosen].to(stats_dtype) for name in names[:2])
        return mean, var

    def _complaint(self) -> str:
        width = self._slim_width
        if width in self._stale:
            found = "ones from before the network was trained on"
        else:
            found = f"those of widths {', '.join(f'{w:g}' for w in self.widths if self.is_calibrated(w))}"
        return (
            f"evaluation needs the statistics of width {width:g}, got {found}; "
            f"gradaug_kernels.calibrate(model, [{width:g}], loader) makes them, and in training norm.train() takes the "
            "batch's"
        )

    def _check_written(self, channels: int) -> None:
        """Raises RuntimeError where the loaded statistics of this width are of another number of channels."""
        width = self._slim_width
        if width not in self._written or self._kept is not None or not self._has_statistics:
            return
        if self._written[width] != channels:
            raise RuntimeError(
                f"statistics of width {width:g} must be of {channels} channels, got loaded ones of "
                f"{self._written[width]}, as of another divisor; gradaug_kernels.calibrate(model, [{width:g}], loader) "
                "makes them"
            )
        if not torch.compiler.is_compiling():
            del self._written[width]

    def _record(self, shape: torch.Size, mean: Tensor, var: Tensor) -> None:
        """Update the running statistics of this width, if it has some, with those of a batch of that shape."""
        values_per_channel = shape[0] * shape[2] * shape[3]
        names = self._statistics
        if not (self.training and self.track_running_stats) or names is None or self._buffers["running_mean"] is None:
            return
        running_mean, running_var, num_batches = (getattr(self, name) for name in names)
        if values_per_channel == 0:
            num_batches.add_(1)  # as nn.BatchNorm2d counts them
            return
        slim_batch_norm_record_(running_mean, running_var, num_batches, mean, var, values_per_channel, self.momentum)

    def train(self, mode: bool = True) -> "SlimBatchNorm2d":
        """As nn.Module.train. Evaluation notes which widths are calibrated, which a tracer or exporter cannot ask."""
        super().train(mode)
        if not mode:
            for width in tuple(self._origins):
                self._note_staleness(width)
            for width in tuple(self._unconfirmed):
                self.is_calibrated(width)
        return self

    def is_calibrated(self, width: float) -> bool:
        """Whether `width` has statistics of at least one batch, not stale. Width 1 always counts as having them.

        Asked in evaluation, not noted in training, where torch.compile would make another graph for it.
        """
        if width in self._unconfirmed and width not in self._stale:
            num_batches = getattr(self, self._names[width][2])
            if num_batches.is_meta or num_batches > 0:
                self._unconfirmed.discard(width)
        return width in self._names and width not in self._unconfirmed

    def _origin(self, width: float) -> Origin | None:
        """What tells later whether training went on; None where nothing does."""
        weight, (own_mean, _, own_batches) = self._parameters.get("weight"), self._names[width]
        if type(weight) is not nn.Parameter:
            return None
        return Origin(weight, *(getattr(self, name) for name in (self._names[1.0][2], own_batches, own_mean)))

    def _note_origin(self, width: float) -> None:
        """Note that the statistics of a width are those of the present weights."""
        self._forget_origin(width)
        origin = self._origin(width)
        if origin is not None and width != 1.0:
            self._origins[width] = origin.kept()

    def _forget_origin(self, width: float) -> None:
        self._origins.pop(width, None)
        self._written.pop(width, None)
        self._stale.discard(width)

    def _note_staleness(self, width: float) -> None:
        """Note whether training went on since the statistics of a width were made."""
        now = self._origin(width)
        if now is not None and self._origins[width].precedes_training(now):
            self._stale.add(width)
            self._unconfirmed.add(width)
        else:
            self._stale.discard(width)

    def reset_running_stats(self) -> None:
        """Forget the running statistics of the present width, as `torch.optim.swa_utils.update_bn` asks for.

        Raises:
            ValueError: for a width that has none.
        """
        if self._slim_width == 1.0:
            super().reset_running_stats()
        elif self.track_running_stats:
            self.reset_width_stats(self._slim_width)

    def reset_parameters(self) -> None:
        """As nn.BatchNorm2d.reset_parameters; the statistics of all widths are forgotten."""
        super().reset_parameters()
        if self.running_mean is not None:
            for width in self.__dict__.get("_names", ()):  # which torch.nn's constructor comes before
                self.reset_width_stats(width)

    def _keep_statistics(self) -> tuple[dict, dict]:
        """What `_restore_statistics` takes to make the statistics of now the present ones again."""
        values = {name: getattr(self, name).clone() for names in self._names.values() for name in names}
        noted = ("_names", "_beside", "_unconfirmed", "_stale", "_origins", "_written")
        return values, {name: copy.copy(getattr(self, name)) for name in noted}

    def _restore_statistics(self, kept: tuple[dict, dict]) -> None:
        values, noted = kept
        for name, value in values.items():
            getattr(self, name).copy_(value)
        for name in set(self._beside) - set(noted["_beside"]):
            delattr(self, name)
        _set(self, **noted)
        self._set_width(self._slim_width)

    def reset_width_stats(self, width: float) -> None:
        """Forget the running statistics of one width.

        Raises:
            ValueError: for a width that has none.
        """
        width = check_width(width)
        if width not in self._names:
            raise ValueError(f"width must be one of {', '.join(f'{w:g}' for w in self.widths)}, got {width:g}")
        mean, var, num_batches = (getattr(self, name) for name in self._names[width])
        mean.zero_()
        var.fill_(1)
        num_batches.zero_()
        self._forget_origin(width)
        if width != 1.0:
            self._unconfirmed.add(width)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        with torch.no_grad():
            _set(self, **{name: fn(getattr(self, name)) for name in self._beside})
            self._origins = {width: Origin(*map(fn, origin)) for width, origin in self._origins.items()}
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._beside:
            value = getattr(self, name)
            destination[prefix + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        for width in self._widths_in(state_dict, prefix):
            self._add_width(width, as_buffers=False)
        is_of_another = any(prefix + name in state_dict for name in (*self._parameters, *self._names[1.0]))
        loaded = self._loadable(state_dict, prefix, error_msgs)
        full = f"{prefix}running_mean"
        written = {width: written_channels(state_dict, keys, full) for width, keys in loaded.items()}
        beside = {name: state_dict.pop(prefix + name) for name in self._beside if prefix + name in state_dict}
        arguments = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(*arguments)
        private = {prefix + name for name in self._private_statistics}
        missing_keys[:] = [key for key in missing_keys if key not in private]
        for name, value in beside.items():
            if local_metadata.get("assign_to_params_buffers", False):
                _set(self, **{name: value})
            else:
                getattr(self, name).copy_(value)
        for width in self._names:
            if width in loaded:
                self._unconfirmed.add(width)
                self._note_origin(width)
                if written[width] is not None:
                    self._written[width] = written[width]
            elif is_of_another and width != 1.0:
                self.reset_width_stats(width)

    def _loadable(self, state_dict, prefix, error_msgs) -> dict[float, list[str]]:
        """{width: keys} of the private statistics in a state_dict, from which those with a fault are removed."""
        found = {}
        for width, names in self._names.items():
            keys = [prefix + name for name in names]
            if width == 1.0:
                fault = negative_variance(state_dict, keys[1])
            elif state_dict.keys().isdisjoint(keys):
                continue
            else:
                fault = statistics_fault(state_dict, keys, [getattr(self, name).shape for name in names])
                if fault is None:
                    found[width] = keys
                    continue
                for key in keys:
                    state_dict.pop(key, None)
            if fault is not None:
                error_msgs.append(fault)
        return found

    def _widths_in(self, state_dict, prefix) -> list[float]:
        """The widths with private statistics in a state_dict, in which their names are made ours."""
        found = []
        stem = f"{prefix}num_batches_tracked_"
        for key in [key for key in state_dict if key.startswith(stem)]:
            suffix = key.removeprefix(stem)
            try:
                width = check_width(float(suffix.replace("_", ".")))
            except ValueError:
                continue  # an unexpected key as any other
            if width == 1.0 or not self.track_running_stats:
                continue
            renamed = {f"{prefix}{n}_{suffix}": f"{prefix}{n}_{_suffix(width)}" for n in self._names[1.0]}
            if suffix != _suffix(width):
                if any(new in state_dict for new in renamed.values()):
                    continue  # two names of one width
                for old, new in renamed.items():
                    if old in state_dict:
                        state_dict[new] = state_dict.pop(old)
            found.append(width)
        return found

    def __getstate__(self) -> dict:
        return _state_outside_of_a_step(self)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", widths={self.widths}"
