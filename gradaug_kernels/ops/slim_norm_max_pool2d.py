"""Batch norm, ReLU and max pooling, keeping nothing in between: the stem of a ResNet.

    a = relu?(batch_norm(x; mean, var, gamma[:C], beta[:C]))
    y[n, c, p, q] = max over the window of a[n, c, stride p - padding + i, stride q - padding + j]

    x                       [N, C, H, W]     any strides
    mean, var, gamma, beta  as in slim_batch_norm, of which mean and var may be known to be those of x (batch_stats)
    y                       [N, C, OH, OW]   dtype and memory format of x
    offset                  [N, C, OH, OW]   uint8: where in its window the maximum is, i KW + j

The backward pass needs x, y and offset: a is as large as x, and PyTorch's indices take eight bytes for each value of y.
"""

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .._library import composed, define, differentiable
from ._common import arguments_of, check_floating, check_same_device
from ._norm import NORM, norm_gradients_fake, norm_gradients_of, norm_of, normalised, statistics_fake
from .slim_batch_norm import (
    check_slim_batch_norm,
    check_slim_batch_norm_backward,
    slim_batch_norm_backward_composition,
    slim_batch_norm_backward_op,
    slim_batch_norm_op,
)

WINDOW = "SymInt[2] kernel, SymInt[2] stride, SymInt[2] padding"
SCHEMA = f"slim_norm_max_pool2d(Tensor x, {NORM}, {WINDOW}) -> (Tensor y, Tensor offset, Tensor mean, Tensor var)"
BACKWARD_SCHEMA = (
    "slim_norm_max_pool2d_backward(Tensor dy, Tensor? y, Tensor offset, Tensor x, Tensor mean, Tensor var, "
    f"Tensor? gamma, Tensor? beta, bool batch_stats, float eps, {WINDOW}) -> (Tensor dx, Tensor dgamma, Tensor dbeta)"
)
Arguments = arguments_of(SCHEMA)
BackwardArguments = arguments_of(BACKWARD_SCHEMA)


def check_slim_norm_max_pool2d(x, norm, kernel, stride, padding) -> None:
    """The contract of the arguments, for the operator and for its fake alike. norm: what slim_batch_norm takes after x.

    Raises:
        ValueError: for shapes that do not fit. TypeError: for dtypes that are not floating or that differ.
    """
    check_slim_batch_norm(x, *norm, names=("gamma", "beta"))
    _check_window(x.shape, kernel, stride, padding)


def check_slim_max_pool2d(x, kernel, stride, padding) -> None:
    """As check_slim_norm_max_pool2d, for the pooling alone."""
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {x.dim()} dimensions")
    check_floating("x", x)
    _check_window(x.shape, kernel, stride, padding)


def _check_window(x_size, kernel, stride, padding) -> None:
    for name, pair, least in (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} must be two integers of at least {least}, got {tuple(pair)}")
    if kernel[0] * kernel[1] > 255:
        raise ValueError(f"kernel must have at most 255 pixels, got {tuple(kernel)}")
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(f"padding must be at most half of the kernel, {tuple(kernel)}, got {tuple(padding)}")
    if any(size < 1 for size in x_size[1:]):
        raise ValueError(f"x must have channels, rows and columns, got shape {tuple(x_size)}")
    if any(size + 2 * p < k for size, p, k in zip(x_size[2:], padding, kernel, strict=True)):
        raise ValueError(f"the padded image must be at least as large as the kernel, got {tuple(x_size)}")


def check_slim_max_pool2d_backward(dy, y, offset, input_size, kernel, stride, padding) -> None:
    """As check_slim_max_pool2d, for the operator of the gradient."""
    if dy.dim() != 4 or len(input_size) != 4:
        raise ValueError(
            f"dy must be [N, C, OH, OW] and input_size four integers, got {dy.dim()} and {len(input_size)} of them"
        )
    check_floating("dy", dy)
    check_same_device(dy, y=y, offset=offset)
    _check_window(input_size, kernel, stride, padding)
    size = ((input_size[2 + a] + 2 * padding[a] - kernel[a]) // stride[a] + 1 for a in (0, 1))
    expected = (*input_size[:2], *size)
    for name, tensor, dtype in (("dy", dy, dy.dtype), ("y", y, dy.dtype), ("offset", offset, torch.uint8)):
        if tensor is not None and (tuple(tensor.shape) != expected or tensor.dtype != dtype):
            raise ValueError(
                f"{name} must have the shape of the output, {expected}, and be {dtype}, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )


# ---- pooling


def slim_max_pool2d_composition(x, kernel, stride, padding):
    y, index = torch.nn.functional.max_pool2d(
        x, kernel, stride, padding, return_indices=True
    )  # of a pixel of the image
    top = torch.arange(y.shape[2], device=x.device)[:, None] * stride[0] - padding[0]  # [OH, 1]
    left = torch.arange(y.shape[3], device=x.device) * stride[1] - padding[1]  # [OW]
    offset = (index // x.shape[3] - top) * kernel[1] + index % x.shape[3] - left
    return y, offset.to(torch.uint8)


def slim_max_pool2d_reference(x, *window):
    check_slim_max_pool2d(x, *window)
    memory_format = suggest_memory_format(x)
    y, offset = slim_max_pool2d_composition(x, *window)
    return y.contiguous(memory_format=memory_format), offset.contiguous(memory_format=memory_format)


def _max_pool2d_fake(x, kernel, stride, padding):
    check_slim_max_pool2d(x, kernel, stride, padding)
    size = ((x.shape[2 + a] + 2 * padding[a] - kernel[a]) // stride[a] + 1 for a in (0, 1))
    y = x.new_empty(*x.shape[:2], *size).contiguous(memory_format=suggest_memory_format(x))
    return y, torch.empty_like(y, dtype=torch.uint8)


_slim_max_pool2d = define(
    f"slim_max_pool2d(Tensor x, {WINDOW}) -> (Tensor y, Tensor offset)", slim_max_pool2d_reference, _max_pool2d_fake
)


def slim_max_pool2d_backward_composition(dy, y, offset, input_size, kernel, stride, padding):
    dy = dy if y is None else dy * (y > 0)
    offset = offset.to(torch.int64)
    row = torch.arange(dy.shape[2], device=dy.device)[:, None] * stride[0] - padding[0] + offset // kernel[1]
    column = torch.arange(dy.shape[3], device=dy.device) * stride[1] - padding[1] + offset % kernel[1]
    sums = dy.new_zeros(input_size, dtype=torch.promote_types(dy.dtype, torch.float32)).flatten(2)  # [N, C, H W]
    sums = sums.scatter_add(2, (row * input_size[3] + column).flatten(2), dy.to(sums.dtype).flatten(2))
    return sums.unflatten(2, input_size[2:]).to(dy.dtype)


def slim_max_pool2d_backward_reference(dy, y, offset, *arguments):
    check_slim_max_pool2d_backward(dy, y, offset, *arguments)
    dx = slim_max_pool2d_backward_composition(dy, y, offset, *arguments)
    return dx.contiguous(memory_format=suggest_memory_format(offset))


def _max_pool2d_backward_fake(dy, y, offset, input_size, kernel, stride, padding):
    check_slim_max_pool2d_backward(dy, y, offset, input_size, kernel, stride, padding)
    return dy.new_empty(input_size).contiguous(memory_format=suggest_memory_format(offset))


_slim_max_pool2d_backward = define(
    f"slim_max_pool2d_backward(Tensor dy, Tensor? y, Tensor offset, SymInt[4] input_size, {WINDOW}) -> Tensor",
    slim_max_pool2d_backward_reference,
    _max_pool2d_backward_fake,
)


# ---- norm and pooling: reference, fake


def slim_norm_max_pool2d_reference(*arguments):
    a = Arguments(*arguments)
    activation, mean, var = slim_batch_norm_op(a.x, *norm_of(a))
    return *_slim_max_pool2d(activation, *_window_of(a)), mean, var


def _window_of(arguments) -> tuple:
    return arguments.kernel, arguments.stride, arguments.padding


def _fake(*arguments):
    a = Arguments(*arguments)
    check_slim_norm_max_pool2d(a.x, norm_of(a), *_window_of(a))
    check_same_device(a.x, mean=a.mean, var=a.var, gamma=a.gamma, beta=a.beta)
    return *_max_pool2d_fake(a.x, *_window_of(a)), *statistics_fake(a.x)


_slim_norm_max_pool2d = define(SCHEMA, slim_norm_max_pool2d_reference, _fake, composite=True)


# ---- backward: y is given where there was a ReLU


def slim_norm_max_pool2d_backward_reference(*arguments):
    a = BackwardArguments(*arguments)
    da = _slim_max_pool2d_backward(a.dy, a.y, a.offset, a.x.shape, *_window_of(a))
    dx, _, dgamma, dbeta = slim_batch_norm_backward_op(da, a.x, *norm_gradients_of(a, None))
    return dx, dgamma, dbeta


def _backward_fake(*arguments):
    a = BackwardArguments(*arguments)
    check_slim_max_pool2d_backward(a.dy, a.y, a.offset, a.x.shape, *_window_of(a))
    check_slim_batch_norm_backward(a.x, a.x, *norm_gradients_of(a, None))
    check_same_device(a.x, dy=a.dy)
    return norm_gradients_fake(a.x, a.mean, a.gamma, a.beta, True)


_slim_norm_max_pool2d_backward = define(
    BACKWARD_SCHEMA, slim_norm_max_pool2d_backward_reference, _backward_fake, composite=True
)


# ---- autograd


def _setup_context(ctx, inputs, output):
    given = Arguments(*inputs)
    y, offset, mean, var = output
    ctx.mark_non_differentiable(offset, mean, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y if given.relu else None, offset, given.x, mean, var, given.gamma, given.beta)
    ctx.batch_stats, ctx.eps = given.batch_stats or given.mean is None, given.eps
    ctx.window = _window_of(given)


def _backward(ctx, saved, needs, dy, *_):
    if dy is None:
        return Arguments()
    needs = Arguments(*needs)
    dx, dgamma, dbeta = _slim_norm_max_pool2d_backward(dy, *saved, ctx.batch_stats, ctx.eps, *ctx.window)
    return Arguments(
        x=dx if needs.x else None, gamma=dgamma if needs.gamma else None, beta=dbeta if needs.beta else None
    )


def slim_norm_max_pool2d_composition(*arguments):
    a = Arguments(*arguments)
    activation, mean, var = normalised(a)
    return *slim_max_pool2d_composition(activation, *_window_of(a)), mean, var


def slim_norm_max_pool2d_backward_composition(*arguments):
    a = BackwardArguments(*arguments)
    da = slim_max_pool2d_backward_composition(a.dy, a.y, a.offset, a.x.shape, *_window_of(a))
    dx, _, *parameters = slim_batch_norm_backward_composition(da, a.x, *norm_gradients_of(a, None))
    return dx, *parameters


_apply = differentiable(_slim_norm_max_pool2d, _setup_context, _backward, slim_norm_max_pool2d_composition)
composed(_slim_max_pool2d, slim_max_pool2d_composition)
composed(_slim_max_pool2d_backward, slim_max_pool2d_backward_composition)
composed(_slim_norm_max_pool2d_backward, slim_norm_max_pool2d_backward_composition)


# ---- public function


def slim_norm_max_pool2d(
    x: Tensor,
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    *,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    batch_stats: bool = False,
    relu: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """`max_pool2d(relu?(slim_batch_norm(x, gamma, beta, mean, var)), kernel, stride, padding)`, keeping neither.

    Args:
        x: [N, C, H, W], floating point, any strides: what the convolution before wrote.
        kernel, stride, padding: in pixels, one integer or (vertical, horizontal); at most 255 pixels in a window. The
            stride is the kernel where it is None.
        gamma, beta: [F], F >= C, float32 or dtype of x; None is 1 and 0.
        mean, var: [C], float32 (float64 for float64 x): statistics to normalise with; None takes the batch's.
        batch_stats: mean and var are those of x, so that the backward pass differentiates through them.
        relu: apply a ReLU after the norm.
        eps: added to the variance.

    Returns:
        y [N, C, OH, OW] in dtype and memory format of x, and the mean and biased variance [C] that were used.

    Raises:
        ValueError, TypeError: as `check_slim_norm_max_pool2d`, when shapes or dtypes do not fit.
    """
    stride = kernel if stride is None else stride
    window = [[v, v] if isinstance(v, int) else list(v) for v in (kernel, stride, padding)]
    check_slim_norm_max_pool2d(x, (gamma, beta, mean, var, None, relu, eps), *window)
    y, _, mean, var = _apply(x, mean, var, gamma, beta, batch_stats, relu, eps, *window)
    return y, mean, var
