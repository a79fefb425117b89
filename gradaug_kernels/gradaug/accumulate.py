"""Weight gradients added straight into the slices of `weight.grad`, and weights cast once per step.

Stock autograd returns the gradient of a sliced weight as a new full-size tensor, filled with zeros around the slice,
and adds that to `weight.grad`, in every pass; and autocast casts every slice again in every pass. Inside this
with-block a layer's weight gradient is added to the slice of `weight.grad` by the kernel that computes it, and the
layer computes with one low-precision copy of its weight at full width, shared by all passes and both directions. The
CPU's kernels can round float32 weights as they read them, and do where the model trades time for memory.
"""

import torch
from torch import nn

from ..slim.fuse import saves_memory
from ..slim.layers import Accumulating, FastSlimConv2d, SlimLinear, may_accumulate_in_a_step


class AccumulateIntoGrad:
    """A with-block for forward and backward passes of one training step.

    The gradients are autograd's, and so is who gets one: `weight.grad` is looked up when a backward pass comes to it,
    and after `end_step` it is None for layers that had no part in the step. Autograd itself carries the gradients of
    weights that have hooks or are frozen, parametrised or not the layer's own parameter at the time (inside
    torch.func.functional_call, in replicas, after an assignment), of those whose .grad is of another dtype, layout or
    strides, and those that torch.autograd.grad asks for.

    Buffers stay from one step to the next: begin_step fills those of the last step with zeros and makes them the
    gradients again, so that a gradient kept beyond its step must be a copy.

    Args:
        model: with FastSlimConv2d or SlimLinear layers. One that was converted with recompute=True makes no copies on
            the CPU.
        dtype: of the copies of the weights to compute with, inside torch.autocast; None computes with the weights.

    Example:
        >>> accumulation = AccumulateIntoGrad(model, torch.bfloat16)
        >>> optimizer.zero_grad()
        >>> accumulation.begin_step()
        >>> with accumulation:
        ...     with torch.autocast("cpu", torch.bfloat16):
        ...         loss = criterion(model(images), targets)
        ...     loss.backward()
        >>> accumulation.end_step()
        >>> optimizer.step()
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        self.layers = [module for module in model.modules() if isinstance(module, FastSlimConv2d | SlimLinear)]
        self.dtype = dtype
        self.saves_memory = saves_memory(model)
        self._weights: dict[nn.Module, nn.Parameter] = {}
        self._versions: dict[nn.Module, int] = {}  # of the weights at the start of the step
        self._copies: dict[nn.Module, torch.Tensor] = {}
        self._buffers: dict[nn.Module, torch.Tensor] = {}  # gradients of the last step
        self._untouched: dict[nn.Module, tuple[torch.Tensor, int]] = {}  # buffers of zeros, and their versions
        self._idle: set[nn.Module] = set()  # had no part in the last step

    @property
    def copies(self) -> tuple[torch.Tensor, ...]:
        """The low-precision copies, which stay from one step to the next."""
        return tuple(self._copies.values())

    @torch.no_grad()
    def begin_step(self) -> None:
        """Make the gradients exist, where they are likely to be needed, and the low-precision copies current."""
        weights = {layer: layer._parameters.get("weight") for layer in self.layers}
        self._weights = {layer: weight for layer, weight in weights.items() if may_accumulate_in_a_step(weight)}
        self._versions = {layer: weight._version for layer, weight in self._weights.items()}
        self._attach_buffers()
        copied = [layer for layer, weight in self._weights.items() if self._is_copied(weight)]
        if self._copies.keys() != set(copied) or any(self._copies[c].device != c.weight.device for c in copied):
            self._copies = {
                layer: torch.empty_like(layer.weight, dtype=self.dtype).requires_grad_() for layer in copied
            }
        if copied:
            torch._foreach_copy_(list(self._copies.values()), [layer.weight for layer in self._copies])

    def end_step(self) -> None:
        """Take away the gradients that no backward pass added to, as autograd would not have made them."""
        for layer, weight in self._weights.items():
            buffer, version = self._untouched.get(layer, (None, None))
            if buffer is not None and weight.grad is buffer and buffer._version == version:
                weight.grad = None
                self._idle.add(layer)
            elif weight.grad is not None:
                self._idle.discard(layer)
        self._buffers = {layer: weight.grad for layer, weight in self._weights.items() if _is_whole(weight.grad)}
        self._untouched = {}

    def _attach_buffers(self) -> None:
        kept = []
        self._untouched = {}
        for layer, weight in self._weights.items():
            if weight.grad is not None or layer in self._idle:
                continue
            buffer = self._buffers.get(layer)
            if buffer is None or not _is_like(buffer, weight):
                buffer = torch.zeros_like(weight)
            else:
                kept.append(buffer)
            weight.grad = buffer
            self._untouched[layer] = (buffer, 0)
        if kept:
            torch._foreach_zero_(kept)
        self._untouched = {layer: (buffer, buffer._version) for layer, (buffer, _) in self._untouched.items()}

    def _is_copied(self, weight: nn.Parameter) -> bool:
        as_it_is = self.saves_memory and weight.device.type == "cpu" and weight.dtype == torch.float32
        return self.dtype is not None and not as_it_is

    def __enter__(self) -> None:
        for layer, weight in self._weights.items():
            computed = self._copies.get(layer, weight)
            layer._accumulating = Accumulating(weight, computed, self._versions[layer], weight.grad)

    def __exit__(self, *exception) -> None:
        for layer in self._weights:
            layer._accumulating = None


def _is_whole(buffer: torch.Tensor | None) -> bool:
    """Whether it has its memory and its version for itself, unlike a view of a DistributedDataParallel's bucket."""
    if buffer is None or buffer.layout != torch.strided:
        return False
    return buffer._base is None and buffer.untyped_storage().nbytes() == buffer.numel() * buffer.element_size()


def _is_like(buffer: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        buffer.layout == torch.strided
        and (buffer.dtype, buffer.device) == (weight.dtype, weight.device)
        and buffer.shape == weight.shape
        and buffer.stride() == weight.stride()
    )
