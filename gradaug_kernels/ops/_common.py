"""What the operators share: arguments by name, autocast, and checks of what they are given."""

from collections import namedtuple

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


def arguments_of(schema: str) -> type[tuple]:
    """The class of an operator's arguments by name, in the schema's order.

    It serves for what is said of each of them as well: which take a gradient, and their gradients. What is left out is
    None.
    """
    names = [argument.name for argument in torch._C.parse_schema(schema).arguments]
    return namedtuple("Arguments", names, defaults=[None] * len(names), module=__name__)


def autocast_parameter(dtype: torch.dtype, parameter: Tensor | None) -> Tensor | None:
    """A weight or bias inside autocast; on the CPU float32 ones stay, as kernels round what they read."""
    if parameter is None or (parameter.device.type == "cpu" and parameter.dtype == torch.float32):
        return parameter
    return parameter if parameter.dtype == torch.float64 else parameter.to(dtype)


def in_autocast(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of x; never for one that has no autocast, such as meta."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What autocast casts x to: never float64, as in PyTorch."""
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError for integers, booleans and complex numbers."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def check_same_dtype_and_device(x: Tensor, name: str = "x", **others: Tensor | None) -> None:
    """Raises TypeError or ValueError where a parameter does not fit x, which the error calls `name`.

    On the CPU float32 parameters fit a low-precision x: the kernels round what they read. Inside autocast, which casts
    all, dtypes may differ.
    """
    rounded = x.device.type == "cpu" and x.dtype in LOW_PRECISION
    autocast = in_autocast(x)
    for other, tensor in others.items():
        fits = tensor is None or tensor.dtype == x.dtype or (rounded and tensor.dtype == torch.float32)
        if not fits and not autocast:
            alternative = " or be torch.float32," if rounded else ""
            raise TypeError(f"{other} must have the dtype of {name}, {x.dtype},{alternative} got {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{other} must be on the device of {name}, {x.device}, got {tensor.device}")


def check_same_device(x: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError where a tensor is not on the device of x."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def check_gradients_beside(x: Tensor, dy: Tensor, dweight: Tensor) -> None:
    """Raises TypeError or ValueError where dy is not like x, or dweight, of any floating dtype, is elsewhere."""
    for name, tensor in (("x", x), ("dweight", dweight)):
        check_floating(name, tensor)
    if dy.dtype != x.dtype:
        raise TypeError(f"dy must have the dtype of x, {x.dtype}, got {dy.dtype}")
    check_same_device(x, dy=dy, dweight=dweight)


def check_written(name: str, buffer: Tensor, **read: Tensor) -> None:
    """Raises ValueError for a buffer of which several elements are one in memory, or are elements of what is read."""
    if not buffer.is_contiguous() and _overlaps_itself(buffer):
        raise ValueError(
            f"{name} must not overlap itself, got shape {tuple(buffer.shape)} with strides {buffer.stride()}"
        )
    storage = buffer.untyped_storage().data_ptr()
    for other, tensor in read.items():
        if tensor.untyped_storage().data_ptr() == storage and tensor.numel() and buffer.numel():
            (begin, end), (other_begin, other_end) = _extent(buffer), _extent(tensor)
            if begin < other_end and other_begin < end:
                raise ValueError(f"{name} must not share memory with {other}, got one buffer for both")


def _overlaps_itself(t: Tensor) -> bool:
    """Also for windows that interleave without meeting, which no slice of a dense tensor is."""
    covered = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride < covered:
            return True
        covered += (size - 1) * stride
    return False


def _extent(t: Tensor) -> tuple[int, int]:
    elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + elements * t.element_size()


def check_gradient_buffer(weight_grad: Tensor, weight: Tensor) -> None:
    """Raises ValueError if neither the buffer nor the parameter's .grad can take the gradient of weight."""
    if weight_grad.shape != weight.shape or not weight_grad.is_leaf:
        raise ValueError(
            f"weight_grad must be a buffer of shape {tuple(weight.shape)} or a parameter of it, "
            f"got shape {tuple(weight_grad.shape)}, is_leaf={weight_grad.is_leaf}"
        )
    if weight_grad.requires_grad or torch.compiler.is_compiling():  # whose graph knows neither memory nor negation
        return
    if weight_grad.is_neg():
        raise ValueError("weight_grad must be memory of its own, got the imaginary part of a conjugate")
    if torch._C._is_alias_of(weight_grad, weight):
        check_written("weight_grad", weight_grad, weight=weight)


def bias_grad(dy: Tensor, channel_dim: int, size: int) -> Tensor:
    """The gradient [size] of a full-width bias: dy summed over all but its channels, then zeros."""
    dbias = dy.new_zeros(size)
    others = [d for d in range(dy.dim()) if d != channel_dim % dy.dim()]
    dbias[: dy.shape[channel_dim]] = dy.sum(others) if others else dy  # sum([]) would sum everything
    return dbias
