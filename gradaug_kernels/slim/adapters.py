"""What each kind of layer becomes in a network of adjustable width.

A layer is looked up by isinstance, the most derived kind first. Kinds that are not here are judged by what their code
does with channels (follow.py): an activation, a pooling or a container needs no entry, and a parameter or buffer of
fixed size that meets channels is found there.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from .layers import FastSlimConv2d, SlimBatchNorm2d, SlimLinear


class Adapter(NamedTuple):
    """What becomes of a layer.

    slim: the layer of adjustable width that takes its place, or None.
    reason: why a layer without one is refused; "" where it has none because it needs none.
    makes_channels: refused wherever it is called, and not only where it reads channels that are sliced: what it makes
        would be whole in every sub-network, and all that reads that.
    """

    slim: type | None = None
    reason: str = ""
    makes_channels: bool = False


def _no_slice(kind: str) -> Adapter:
    return Adapter(None, f"{kind} has no counterpart of adjustable width", True)


def _over_channels(kind: str) -> Adapter:
    return Adapter(None, f"{kind} has parameters per channel or statistics over channels")


_TABLE: tuple[tuple[type | tuple[type, ...], Adapter], ...] = (
    (FastSlimConv2d, Adapter(FastSlimConv2d)),
    (SlimLinear, Adapter(SlimLinear)),
    (SlimBatchNorm2d, Adapter(SlimBatchNorm2d)),
    (nn.Conv2d, Adapter(FastSlimConv2d)),
    (nn.Linear, Adapter(SlimLinear)),
    (nn.BatchNorm2d, Adapter(SlimBatchNorm2d)),
    (nn.SyncBatchNorm, _over_channels("nn.SyncBatchNorm, which can be made after the conversion instead,")),
    ((nn.BatchNorm1d, nn.BatchNorm3d), _over_channels("a batch norm of other than images")),
    (nn.GroupNorm, _over_channels("nn.GroupNorm")),
    ((nn.LayerNorm, nn.RMSNorm), _over_channels("a norm over channels")),
    (nn.LocalResponseNorm, _over_channels("nn.LocalResponseNorm")),
    ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _over_channels("an instance norm")),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _no_slice("a transposed convolution")),
    ((nn.Conv1d, nn.Conv3d), _no_slice("a convolution of other than images")),
    (nn.Bilinear, _no_slice("nn.Bilinear")),
    ((nn.RNNBase, nn.RNNCellBase), _no_slice("a recurrent layer")),
    (nn.MultiheadAttention, _no_slice("nn.MultiheadAttention")),
)
_PLAIN = {FastSlimConv2d: nn.Conv2d, SlimLinear: nn.Linear, SlimBatchNorm2d: nn.BatchNorm2d}


def adapter(module: nn.Module) -> Adapter:
    """What becomes of a layer of a network."""
    for kind, found in _TABLE:
        if isinstance(module, kind):
            if found.slim is None:
                return found
            reason = _own_code(module, kind) or _own_parameters(module)
            return Adapter(None, reason, found.slim is not SlimBatchNorm2d) if reason else found
    return Adapter()


def is_slim(module: nn.Module) -> bool:
    return isinstance(module, tuple(_PLAIN))


def refused_model(module: nn.Module) -> str:
    """Why a model with such a module cannot be converted whatever it does, or ""."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by torch.jit: convert the model, then script it"
    if hasattr(module, "_orig_mod"):
        return "is compiled by torch.compile: convert the model, then compile it"
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "wraps a model for several devices: convert the model, then wrap it"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "has no parameters yet: run the model once, then convert it"
    if kind.__module__.startswith(("torch.ao.nn", "torch.nn.quantized")) and not isinstance(module, nn.Identity):
        return "is quantised: convert the model, then quantise it"
    return ""


def _own_code(module: nn.Module, kind: type) -> str:
    """Whether a subclass of a known kind does something of its own; one that adds a constructor only does not."""
    added = set()
    for cls in type(module).__mro__:
        if cls is kind:
            break
        if not issubclass(kind, cls):
            added |= {name for name, value in vars(cls).items() if not name.startswith("__") or name == "__call__"}
    added -= {"_abc_impl", "_is_full_backward_hook"}
    overridden = {name for name in added if callable(getattr(type(module), name, None)) or hasattr(kind, name)}
    if overridden or "forward" in vars(module):
        names = ", ".join(sorted(overridden)) or "forward"
        return f"it is an nn.{_name(kind)} with code of its own ({names})"
    return ""


def _own_parameters(module: nn.Module) -> str:
    if parametrize.is_parametrized(module):
        return (
            "its weight is parametrised; torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') leaves "
            "the value that it has now"
        )
    expected = {"weight", "bias"}
    if own := set(module._parameters) - expected | (expected - set(module._parameters)):
        return (
            f"its parameters are not those of an nn.{_name(type(module))} ({', '.join(sorted(own))}), as with weight "
            "norm, spectral norm or pruning, which has a function that removes it"
        )
    buffers = {"running_mean", "running_var", "num_batches_tracked"} if isinstance(module, nn.BatchNorm2d) else set()
    if own := {name for name in module._buffers if not name.startswith(tuple(buffers) or "\0")}:
        return (
            f"it has buffers of its own ({', '.join(sorted(own))}), as with pruning, which has a function to remove it"
        )
    if module._modules:
        return f"it has modules of its own ({', '.join(sorted(module._modules))})"
    weight = module.weight
    if weight is not None and not weight.is_floating_point():
        return f"its weight is of {weight.dtype}, and the kernels compute with real floating-point numbers"
    if isinstance(module, nn.BatchNorm2d) and (module.weight is None) != (module.bias is None):
        return "it has a scale without a shift, or a shift without a scale"
    return ""


def _name(kind: type) -> str:
    return _PLAIN.get(kind, kind).__name__
