"""Weights in files: how `state_dict` gives weights that are stored NHWC, and a state_dict with nothing of ours in it.

A state_dict's tensors are the model's own memory: moving averages write into them, `torch.distributed.broadcast` fills
them, a checkpoint kept for later sees the weights of then. So a copy will not do, and a convolution's weight stays NHWC
there. safetensors refuses such a tensor although it is dense: it takes the bytes that `data_ptr()` points to, and only
where `is_contiguous()`. `ChannelsLastWeight` answers these questions of safetensors, and of nobody else, for a
contiguous copy of itself.
"""

import sys
from collections import OrderedDict

import torch
from torch import Tensor, nn


class ChannelsLastWeight(Tensor):
    """A weight [O, I, KH, KW] stored NHWC, as it is in a state_dict: the weight's memory, and an ordinary tensor.

    safetensors alone sees it as contiguous, and gets a copy of its elements in that order when it asks for its bytes.
    `detach`, `clone`, `cpu`, `cuda`, `to`, casts and deepcopy give one again; all else gives a `Tensor`. A pickle holds
    a `Tensor`, so that torch.load(weights_only=True) knows it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        if not _safetensors_asks():
            return super().is_contiguous(memory_format=memory_format)
        self._bytes().copy_(self)
        return True

    def data_ptr(self) -> int:
        return self._bytes().data_ptr() if _safetensors_asks() else super().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._bytes().untyped_storage() if _safetensors_asks() else super().untyped_storage()

    def to(self, *args, **kwargs) -> Tensor:
        moved = super().to(*args, **kwargs)
        return _plain(moved).contiguous() if _safetensors_asks() else in_state_dict(moved)

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            parameter = self._as_parameter(clone=True)
            memo[id(self)] = self.clone() if parameter is None else parameter
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        parameter = self._as_parameter(clone=False)
        return (_plain(self) if parameter is None else parameter).__reduce_ex__(protocol)

    def _as_parameter(self, clone: bool) -> nn.Parameter | None:
        """The parameter that torch.nn made of this tensor (load_state_dict(assign=True)); None where it made none."""
        if not isinstance(self, nn.Parameter):
            return None
        data = _plain(self.detach())
        return nn.Parameter(data.clone() if clone else data, self.requires_grad)

    def _bytes(self) -> Tensor:
        """A contiguous copy, one for as long as this tensor lives: what safetensors compares are addresses."""
        copy = self.__dict__.get("_copy")
        if copy is None:
            self._copy = copy = _plain(self.detach()).clone(memory_format=torch.contiguous_format)
        return copy


def _keeping_the_class(name: str):
    method = getattr(Tensor, name)

    def call(self, *args, **kwargs):
        return in_state_dict(method(self, *args, **kwargs))

    return call


for _name in ("detach", "clone", "cpu", "cuda", "float", "double", "half", "bfloat16"):
    setattr(ChannelsLastWeight, _name, _keeping_the_class(_name))


def _safetensors_asks() -> bool:
    """Whether safetensors calls the method that asks this."""
    return sys._getframe(2).f_globals.get("__name__", "").partition(".")[0] == "safetensors"


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor) if isinstance(tensor, ChannelsLastWeight) else tensor


def in_state_dict(weight: Tensor) -> Tensor:
    """The same memory as `weight`, so that safetensors takes it."""
    if type(weight) is Tensor and weight.dim() == 4 and not weight.is_contiguous():
        return weight.as_subclass(ChannelsLastWeight)
    return weight


def from_state_dict(weight: Tensor) -> Tensor:
    """The tensor itself of a `ChannelsLastWeight`; any other as it is."""
    return _plain(weight)


def plain_state_dict(model: nn.Module) -> "OrderedDict[str, Tensor]":
    """The state_dict of the model that `convert` was given: contiguous copies, without private batch-norm statistics.

    `original.load_state_dict(gk.plain_state_dict(converted))` has the weights of width 1. A converted model without
    private statistics has the same keys in its own state_dict, which loads there as well.

    Args:
        model: a model with layers of adjustable width.

    Returns:
        {name: tensor}, no memory of the model's in it, on its device.
    """
    private = {
        f"{name}.{statistic}" if name else statistic
        for name, module in model.named_modules(remove_duplicate=False)
        for statistic in getattr(module, "_private_statistics", ())
    }
    copies = OrderedDict()
    for name, value in model.state_dict().items():
        if name not in private:
            is_tensor = isinstance(value, Tensor)  # extra state need not be one
            copies[name] = _plain(value).clone(memory_format=torch.contiguous_format) if is_tensor else value
    return copies
