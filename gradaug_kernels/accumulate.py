"""Weight gradients added straight into the slices of `weight.grad`, and weights cast once per step.

Stock autograd returns the gradient of a sliced weight as a new full-size tensor, filled with zeros around the slice,
and adds that to `weight.grad`, in every pass; and autocast casts every slice again in every pass. Inside this
with-block a layer's weight gradient is added to the slice of `weight.grad` by the kernel that computes it, and the
layer computes with one low-precision copy of its weight at full width, shared by all passes and both directions. The
CPU's kernels can round float32 weights as they read them, and do where the model trades time for memory.
"""

import torch
from torch import nn

from .fuse import saves_memory
from .nn import FastSlimConv2d, SlimLinear


class AccumulateIntoGrad:
    """A with-block for forward and backward passes of one training step.

    Layers whose weight carries a hook, or takes no gradient, are left to autograd.

    Args:
        model: with FastSlimConv2d or SlimLinear layers. One that was converted with recompute=True makes no copies on
            the CPU.
        dtype: of the copies of the weights to compute with, inside torch.autocast; None computes with the weights.

    Example:
        >>> accumulation = AccumulateIntoGrad(model, torch.bfloat16)
        >>> optimizer.zero_grad(set_to_none=False)
        >>> accumulation.begin_step()
        >>> with accumulation, torch.autocast("cpu", torch.bfloat16):
        ...     loss = criterion(model(images), targets)
        >>> with accumulation:
        ...     loss.backward()
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        self.layers = [module for module in model.modules() if isinstance(module, FastSlimConv2d | SlimLinear)]
        self.dtype = dtype
        self.saves_memory = saves_memory(model)
        self._active: list[nn.Module] = []
        self._copies: dict[nn.Module, torch.Tensor] = {}

    @property
    def copies(self) -> tuple[torch.Tensor, ...]:
        """The low-precision copies, which stay from one step to the next."""
        return tuple(self._copies.values())

    @torch.no_grad()
    def begin_step(self) -> None:
        """Make the gradients exist and the low-precision copies current."""
        active = [layer for layer in self.layers if _may_accumulate(layer.weight)]
        for layer in active:
            if layer.weight.grad is None:
                layer.weight.grad = torch.zeros_like(layer.weight)
        self._active = active
        copied = [layer for layer in active if self._is_copied(layer.weight)]
        if self._copies.keys() != set(copied) or any(self._copies[c].device != c.weight.device for c in copied):
            self._copies = {
                layer: torch.empty_like(layer.weight, dtype=self.dtype).requires_grad_() for layer in copied
            }
        if copied:
            torch._foreach_copy_(list(self._copies.values()), [layer.weight for layer in self._copies])

    def _is_copied(self, weight: nn.Parameter) -> bool:
        as_it_is = self.saves_memory and weight.device.type == "cpu" and weight.dtype == torch.float32
        return self.dtype is not None and not as_it_is

    def __enter__(self) -> None:
        for layer in self._active:
            layer._accumulating = (self._copies.get(layer, layer.weight), layer.weight.grad)

    def __exit__(self, *exception) -> None:
        for layer in self._active:
            layer._accumulating = None


def _may_accumulate(weight: nn.Parameter) -> bool:
    hooked = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    return type(weight) is nn.Parameter and weight.requires_grad and not hooked
