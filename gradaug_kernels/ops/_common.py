"""What the convolution and the linear layer share."""

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


def autocast_parameter(dtype: torch.dtype, parameter: Tensor | None) -> Tensor | None:
    """A weight or bias inside autocast; on the CPU float32 ones stay, as kernels round what they read."""
    if parameter is None or (parameter.device.type == "cpu" and parameter.dtype == torch.float32):
        return parameter
    return parameter.to(dtype)


def in_autocast(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of x; never for one that has no autocast, such as meta."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_same_dtype_and_device(x: Tensor, **others: Tensor | None) -> None:
    """Raises TypeError or ValueError where a parameter does not fit x.

    On the CPU float32 parameters fit a low-precision x: the kernels round what they read. Inside autocast, which casts
    all, dtypes may differ.
    """
    rounded = x.device.type == "cpu" and x.dtype in LOW_PRECISION
    autocast = in_autocast(x)
    for name, tensor in others.items():
        fits = tensor is None or tensor.dtype == x.dtype or (rounded and tensor.dtype == torch.float32)
        if not fits and not autocast:
            alternative = " or be torch.float32," if rounded else ""
            raise TypeError(f"{name} must have the dtype of x, {x.dtype},{alternative} got {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def check_gradient_buffer(weight_grad: Tensor, weight: Tensor) -> None:
    """Raises ValueError if neither the buffer nor the parameter's .grad can take the gradient of weight."""
    if weight_grad.shape != weight.shape or not weight_grad.is_leaf:
        raise ValueError(
            f"weight_grad must be a buffer of shape {tuple(weight.shape)} or a parameter of it, "
            f"got shape {tuple(weight_grad.shape)}, is_leaf={weight_grad.is_leaf}"
        )


def bias_grad(dy: Tensor, channel_dim: int, size: int) -> Tensor:
    """The gradient [size] of a full-width bias: dy summed over all but its channels, then zeros."""
    dbias = dy.new_zeros(size)
    others = [d for d in range(dy.dim()) if d != channel_dim % dy.dim()]
    dbias[: dy.shape[channel_dim]] = dy.sum(others) if others else dy  # sum([]) would sum everything
    return dbias
