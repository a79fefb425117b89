"""Layers of adjustable width. At width 1 each is its torch.nn namesake: same arguments, parameters and state_dict.

A sub-network of width w is the first channels of every layer. The number of input channels is read off the input, so
only the number of output channels depends on the width (`round_channels`). `set_width(model, w)` sets it. `_keep`
chooses other channels than the first, until the next width is set; the number of them is that of the indices.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gather import gather_weight
from .ops import slim_batch_norm, slim_conv2d, slim_linear
from .ops.slim_batch_norm import slim_batch_norm_record_
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
    """The weight and bias whose first channels are those of the sub-network, and the buffer for the weight's gradient.

    That buffer is None where autograd carries the gradient.
    """
    weight, weight_grad = layer._accumulating or (layer.weight, None)
    if layer._kept is None:
        return weight, layer.bias, weight_grad
    outputs, inputs = layer._kept
    bias = layer.bias if layer.bias is None or outputs is None else layer.bias[outputs]
    return gather_weight(weight, outputs, inputs, weight_grad), bias, None


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

    Shape:
        input [N, C, H, W], C at most in_channels, and in_channels at width 1; output [N, out, OH, OW].

    Raises:
        ValueError: for an input whose channels do not fit, or a width that leaves no channel.
    """

    _accumulating = None  # (weight to compute with, buffer for its gradient) inside AccumulateIntoGrad

    def __init__(self, *args, divisor: int = 1, slim_out: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.divisor = divisor
        self.slim_out = slim_out
        self._set_width(1.0)
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)
        self._explicit_padding = self._padding_before_the_kernel()

    def _padding_before_the_kernel(self) -> list[int] | None:
        """F.pad's [left, right, top, bottom] where zero padding inside the convolution cannot express it."""
        pads = list(self._reversed_padding_repeated_twice)  # nn.Conv2d: string paddings resolved
        symmetric = pads[0] == pads[1] and pads[2] == pads[3]
        return pads if self.padding_mode != "zeros" or not symmetric else None

    def _set_width(self, width: float) -> None:
        out = round_channels(self.out_channels, width, self.divisor) if self.slim_out else self.out_channels
        _set(self, _slim_width=width, _is_full=width == 1.0, _out=_number(out), _kept=None)

    def _keep(self, outputs: Tensor | None, inputs: Tensor | None) -> None:
        """Compute these channels from those, int64 [out] and [C] in ascending order, None being the first ones.

        A grouped convolution is given whole groups, the same on both sides.
        """
        self._kept = (outputs, inputs if self.groups == 1 else None)
        if outputs is not None:
            self._out = _number(len(outputs))

    def forward(self, x: Tensor) -> Tensor:
        arguments, weight_grad = self._arguments(x)
        return slim_conv2d(self._padded(x), *arguments, weight_grad=weight_grad)

    def _arguments(self, x: Tensor) -> tuple[tuple, Tensor | None]:
        """What the operator takes after x, and the buffer for the weight's gradient, if there is one."""
        groups, out_channels = self._groups_and_out_channels(x)
        weight, bias, weight_grad = _parameters(self)
        pads = self._reversed_padding_repeated_twice
        padding = (pads[2], pads[0]) if self._explicit_padding is None else (0, 0)
        return (weight, bias, out_channels, self.stride, padding, self.dilation, groups), weight_grad

    def _padded(self, x: Tensor) -> Tensor:
        """x, with the padding that the operator cannot express."""
        if self._explicit_padding is None:
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._explicit_padding, mode=mode)

    def _groups_and_out_channels(self, x: Tensor) -> tuple[int, int]:
        channels = x.shape[1] if x.dim() == 4 else None
        if channels is None:
            raise ValueError(f"input must be [N, C, H, W], got shape {tuple(x.shape)}")
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

    _accumulating = None  # (weight to compute with, buffer for its gradient) inside AccumulateIntoGrad

    def __init__(self, *args, divisor: int = 1, slim_out: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.divisor = divisor
        self.slim_out = slim_out
        self._set_width(1.0)

    def _set_width(self, width: float) -> None:
        out = round_channels(self.out_features, width, self.divisor) if self.slim_out else self.out_features
        _set(self, _slim_width=width, _is_full=width == 1.0, _out=_number(out), _kept=None)

    def _keep(self, outputs: Tensor | None, inputs: Tensor | None) -> None:
        """Compute these features from those, int64 [out] and [F] in ascending order, None being the first ones."""
        self._kept = (outputs, inputs)
        if outputs is not None:
            self._out = _number(len(outputs))

    def forward(self, x: Tensor) -> Tensor:
        if self._is_full and x.shape[-1] != self.in_features:
            raise ValueError(f"input must have {self.in_features} features at width 1, got {x.shape[-1]}")
        out_features = self._out.shape[0]
        weight, bias, weight_grad = _parameters(self)
        return slim_linear(x, weight, bias, out_features, weight_grad)

    def extra_repr(self) -> str:
        slim = f", divisor={self.divisor}" if self.divisor != 1 else ""
        return super().extra_repr() + slim + (", slim_out=True" if self.slim_out else "")


class SlimBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d of adjustable width: affine parameters shared and sliced, statistics private to each width.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as nn.BatchNorm2d.
        widths: the widths with private running statistics. Width 1 always has them.

    In training every width normalises with the batch's statistics. Then
        a listed width      updates its own running statistics ("private"); width 1 those of nn.BatchNorm2d;
        an unlisted width   stores nothing ("batch"), as GradAug's sub-networks.
    In evaluation a width normalises with its own statistics. `calibrate` makes and fills them for any width.

    The statistics of width w are buffers named `running_mean_w`, with the point of w as an underscore; they have
    num_features elements, of which the first channels of that width are used. Loading a state_dict adds the widths that
    only it has, and leaves alone those that only the layer has: an nn.BatchNorm2d's loads as it is.

    Shape:
        input and residual [N, C, H, W], C at most num_features, and num_features at width 1; output the same.

    Raises:
        ValueError: for an input whose channels do not fit, or one value per channel in training.
        RuntimeError: for evaluation at a width that has no statistics yet.
    """

    def __init__(self, *args, widths: tuple[float, ...] = (1.0,), **kwargs):
        super().__init__(*args, **kwargs)
        self._names = {1.0: ("running_mean", "running_var", "num_batches_tracked")}
        self._uncalibrated: set[float] = set()
        self._set_width(1.0)
        for width in widths:
            self.add_width(width)

    def _set_width(self, width: float) -> None:
        statistics = self._names.get(width) if self.track_running_stats else None
        _set(self, _slim_width=width, _is_full=width == 1.0, _statistics=statistics, _kept=None)

    def _keep(self, channels: Tensor | None) -> None:
        """Scale and shift by the parameters of these channels, int64 [C] in ascending order, None being the first."""
        self._kept = channels

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """gamma and beta, whose first channels are those of the sub-network; None and None without them."""
        if self._kept is None or not self.affine:
            return self.weight, self.bias
        return self.weight[self._kept], self.bias[self._kept]

    @property
    def widths(self) -> tuple[float, ...]:
        """The widths with private running statistics, in ascending order."""
        return tuple(sorted(self._names))

    def add_width(self, width: float) -> None:
        """Give `width` private running statistics, empty for now. A width that has some keeps them."""
        width = check_width(width)
        if width in self._names or not self.track_running_stats:
            return
        suffix = repr(width).replace(".", "_")
        names = tuple(f"{name}_{suffix}" for name in self._names[1.0])
        for name, full in zip(names, self._names[1.0], strict=True):
            self.register_buffer(name, torch.zeros_like(getattr(self, full)))
        getattr(self, names[1]).fill_(1)
        self._names[width] = names
        self._uncalibrated.add(width)
        self._set_width(self._slim_width)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalise; then add `residual`, then apply a ReLU, where asked for."""
        if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
            y = self(x) + residual  # broadcast or promoted as the sum of any two tensors
            return y.relu() if relu else y
        self._check(x.shape)
        mean, var = self._given_statistics(x.shape[1], x.dtype)
        y, batch_mean, batch_var = slim_batch_norm(x, *self._affine(), mean, var, residual, relu, self.eps)
        if mean is None:
            self._record(x.shape, batch_mean, batch_var)
        return y

    def _check(self, shape: torch.Size) -> None:
        """The contract of the input's shape; raises what the class says."""
        if len(shape) != 4:
            raise ValueError(f"input must be [N, C, H, W], got shape {tuple(shape)}")
        channels, width = shape[1], self._slim_width
        if channels > self.num_features or (width == 1.0 and channels != self.num_features):
            bound = "" if width == 1.0 else "at most "
            raise ValueError(f"input must have {bound}{self.num_features} channels at width {width:g}, got {channels}")
        if self.training and shape[0] * shape[2] * shape[3] == 1:
            raise ValueError(
                f"training needs more than 1 value per channel for statistics, got input of shape {tuple(shape)}"
            )

    @property
    def _takes_batch_statistics(self) -> bool:
        return self.training or not self.track_running_stats

    def _given_statistics(self, channels: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The statistics [channels] of this width for an input of dtype; None and None where the batch's are taken."""
        if self._takes_batch_statistics:
            return None, None
        width = self._slim_width
        if self._statistics is None or width in self._uncalibrated:
            raise RuntimeError(
                f"evaluation needs the statistics of width {width:g}, got those of widths "
                f"{', '.join(f'{w:g}' for w in self.widths if w not in self._uncalibrated)}; "
                f"gradaug_kernels.calibrate(model, [{width:g}], loader) makes them"
            )
        mean, var = (getattr(self, name) for name in self._statistics[:2])
        stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return mean[:channels].to(stats_dtype), var[:channels].to(stats_dtype)

    def _record(self, shape: torch.Size, mean: Tensor, var: Tensor) -> None:
        """Update the running statistics of this width, if it has some, with those of a batch of that shape."""
        values_per_channel = shape[0] * shape[2] * shape[3]
        recorded = self.training and self.track_running_stats and self._statistics is not None
        if recorded and values_per_channel > 0:
            running = (self._buffers[name] for name in self._statistics)
            slim_batch_norm_record_(*running, mean, var, values_per_channel, self.momentum)
            self._uncalibrated.discard(self._slim_width)

    def reset_width_stats(self, width: float) -> None:
        """Forget the running statistics of one width."""
        mean, var, num_batches = (getattr(self, name) for name in self._names[width])
        mean.zero_()
        var.fill_(1)
        num_batches.zero_()
        if width != 1.0:
            self._uncalibrated.add(width)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args):
        stem = f"{prefix}num_batches_tracked_"
        for key in [key for key in state_dict if key.startswith(stem)]:
            width = float(key.removeprefix(stem).replace("_", "."))
            self.add_width(width)
            if state_dict[key] > 0:
                self._uncalibrated.discard(width)
            else:
                self._uncalibrated.add(width)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        private = {prefix + name for width, names in self._names.items() if width != 1.0 for name in names}
        missing_keys[:] = [key for key in missing_keys if key not in private]

    def extra_repr(self) -> str:
        return super().extra_repr() + f", widths={self.widths}"
