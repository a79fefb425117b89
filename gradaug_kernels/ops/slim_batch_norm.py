"""Batch norm over the first channels of full-width affine parameters, with residual add and ReLU fused.

    x_hat = (x - mean) * rstd,  rstd = 1 / sqrt(var + eps)
    y     = relu?(x_hat * weight[:C] + bias[:C] + residual?)

mean and var are those of the batch (var biased), or the given ones: the operator stores nothing, and the layer decides
whose running statistics, if anyone's, a batch updates. Ioffe & Szegedy, 2015; the backward is their section 3 with
dz = dy * (y > 0):

    dx = rstd * weight * (dz - sum(dz) / M - x_hat * sum(dz * x_hat) / M)      batch statistics, M = N * H * W
    dx = rstd * weight * dz                                                    given statistics

    x, residual, y   [N, C, H, W]      any strides; y has the memory format of x
    weight, bias     [F] or None       F >= C: the full width; float32, or the dtype of x
    mean, var        [C]               float32; float64 where x is; not differentiable

var is returned rather than rstd because running statistics need it, and rstd would lose it where var << eps.
"""

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .._library import batched, composed, define, differentiable
from ._common import arguments_of, check_same_device, check_written

SCHEMA = (
    "slim_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? residual, "
    "bool relu, float eps) -> (Tensor y, Tensor mean, Tensor var)"
)
Arguments = arguments_of(SCHEMA)


def stats_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(v: Tensor) -> Tensor:
    return v[:, None, None]  # [C] -> [C, 1, 1]


def check_slim_batch_norm(x, weight, bias, mean, var, residual, relu, eps, names=("weight", "bias")) -> None:
    """The contract of the arguments, for the operator and for its fake alike. names: what weight and bias are called.

    Raises:
        ValueError: for shapes that do not fit. TypeError: for dtypes that are not floating or that differ.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {x.dim()} dimensions")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}; scale integer images to floats first")
    channels = x.shape[1]
    for name, tensor in zip(names, (weight, bias), strict=True):
        if tensor is None:
            continue
        if tensor.dim() != 1 or tensor.shape[0] < channels:
            raise ValueError(f"{name} must have at least {channels} elements, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in (x.dtype, stats_dtype(x)):
            raise TypeError(f"{name} must be {stats_dtype(x)} or the dtype of x, got {tensor.dtype}")
    if (mean is None) != (var is None):
        raise ValueError(f"mean and var must be given together, got only {'var' if mean is None else 'mean'}")
    for name, tensor in (("mean", mean), ("var", var)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (channels,):
            raise ValueError(f"{name} must have {channels} elements, got shape {tuple(tensor.shape)}")
        if tensor.dtype != stats_dtype(x):
            raise TypeError(f"{name} must be {stats_dtype(x)}, got {tensor.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must have the shape and dtype of x, {tuple(x.shape)} {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


# ---- forward: schema, composition, reference, fake


def slim_batch_norm_composition(x, weight, bias, mean, var, residual, relu, eps):
    dtype = stats_dtype(x)
    z = x.to(dtype)
    if mean is None:
        # An empty batch has no statistics: zeros, so that nothing downstream turns into NaN.
        mean = z.mean((0, 2, 3)) if x.numel() else z.new_zeros(x.shape[1])
        var = z.var((0, 2, 3), correction=0) if x.numel() else z.new_zeros(x.shape[1])
    else:
        mean, var = mean.detach().clone(), var.detach().clone()
    z = (z - _per_channel(mean)) * _per_channel(torch.rsqrt(var + eps))
    if weight is not None:
        z = z * _per_channel(weight[: x.shape[1]].to(dtype))
    if bias is not None:
        z = z + _per_channel(bias[: x.shape[1]].to(dtype))
    if residual is not None:
        z = z + residual.to(dtype)
    y = z.relu() if relu else z
    return y.to(x.dtype), mean.detach(), var.detach()


def slim_batch_norm_reference(x, *arguments):
    check_slim_batch_norm(x, *arguments)
    y, mean, var = slim_batch_norm_composition(x, *arguments)
    return y.contiguous(memory_format=suggest_memory_format(x)), mean, var


def _fake(x, weight, bias, mean, var, residual, relu, eps):
    check_slim_batch_norm(x, weight, bias, mean, var, residual, relu, eps)
    check_same_device(x, weight=weight, bias=bias, mean=mean, var=var, residual=residual)
    stats = x.new_empty(x.shape[1], dtype=stats_dtype(x))
    y = x.new_empty(x.shape).contiguous(memory_format=suggest_memory_format(x))
    return y, stats, torch.empty_like(stats)


slim_batch_norm_op = define(SCHEMA, slim_batch_norm_reference, _fake)


# ---- backward: y is given where there was a ReLU, so that dz = dy * (y > 0).
# dz is the residual's gradient; without a ReLU it would be dy itself, so it is computed only with one.


def check_slim_batch_norm_backward(dy, x, y, weight, bias, mean, var, batch_stats, needs_dz, eps) -> None:
    """As check_slim_batch_norm, for the operator of the gradients."""
    check_slim_batch_norm(x, weight, bias, mean, var, None, False, eps)
    check_same_device(x, dy=dy, y=y, weight=weight, bias=bias, mean=mean, var=var)
    for name, tensor in (("dy", dy), ("y", y)):
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype != x.dtype):
            raise ValueError(
                f"{name} must have the shape and dtype of x, {tuple(x.shape)} {x.dtype}, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )


def slim_batch_norm_backward_composition(dy, x, y, weight, bias, mean, var, batch_stats, needs_dz, eps):
    if batch_stats and x.numel() > 0:  # again, from x: they are functions of it
        z = x.to(mean.dtype)
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
    return _batch_norm_gradients(dy, x, y, weight, bias, mean, var, batch_stats, needs_dz, eps)


def slim_batch_norm_backward_reference(dy, x, *arguments):
    check_slim_batch_norm_backward(dy, x, *arguments)
    dx, dz, *parameters = _batch_norm_gradients(dy, x, *arguments)
    memory_format = suggest_memory_format(x)
    dz = dz.contiguous(memory_format=memory_format) if dz.dim() == 4 else dz
    return dx.contiguous(memory_format=memory_format), dz, *parameters


def _batch_norm_gradients(dy, x, y, weight, bias, mean, var, batch_stats, needs_dz, eps):
    dtype, channels = mean.dtype, x.shape[1]
    dz = dy.to(dtype)
    if y is not None:
        dz = dz * (y > 0)
    rstd = torch.rsqrt(var + eps)  # [C]
    x_hat = (x.to(dtype) - _per_channel(mean)) * _per_channel(rstd)
    sum_dz = dz.sum((0, 2, 3))  # [C]
    sum_dz_x_hat = (dz * x_hat).sum((0, 2, 3))  # [C]
    scale = rstd if weight is None else rstd * weight[:channels].to(dtype)
    dx = dz
    if batch_stats and x.numel() > 0:
        m = x.numel() // channels
        dx = dz - _per_channel(sum_dz / m) - x_hat * _per_channel(sum_dz_x_hat / m)
    dx = (dx * _per_channel(scale)).to(x.dtype)
    dweight, dbias = (full_width(s, p) for s, p in ((sum_dz_x_hat, weight), (sum_dz, bias)))
    return dx, dz.to(x.dtype) if needs_dz else x.new_empty(0), dweight, dbias


def full_width(grad: Tensor, parameter: Tensor | None) -> Tensor:
    """The gradient of a full-width parameter from that of its first channels; empty for no parameter."""
    if parameter is None:
        return grad.new_empty(0)
    return torch.nn.functional.pad(grad, (0, parameter.shape[0] - grad.shape[0])).to(parameter.dtype)


def _backward_fake(dy, x, y, weight, bias, mean, var, batch_stats, needs_dz, eps):
    check_slim_batch_norm_backward(dy, x, y, weight, bias, mean, var, batch_stats, needs_dz, eps)
    dx = x.new_empty(x.shape).contiguous(memory_format=suggest_memory_format(x))
    dz = torch.empty_like(dx) if needs_dz else x.new_empty(0)
    dweight, dbias = (mean.new_empty(0) if p is None else torch.empty_like(p) for p in (weight, bias))
    return dx, dz, dweight, dbias


slim_batch_norm_backward_op = define(
    "slim_batch_norm_backward(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "bool batch_stats, bool needs_dz, float eps) -> (Tensor dx, Tensor dz, Tensor dweight, Tensor dbias)",
    slim_batch_norm_backward_reference,
    _backward_fake,
)


# ---- autograd


def _setup_context(ctx, inputs, output):
    given = Arguments(*inputs)
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(given.x, y if given.relu else None, given.weight, given.bias, mean, var)
    ctx.batch_stats, ctx.eps = given.mean is None, given.eps
    ctx.has_residual = given.residual is not None


def _backward(ctx, saved, needs, dy, *_):
    if dy is None:
        return Arguments()
    x, y, weight, bias, mean, var = saved
    needs = Arguments(*needs)
    needs_dresidual = ctx.has_residual and needs.residual
    dx, dz, dweight, dbias = slim_batch_norm_backward_op(
        dy, x, y, weight, bias, mean, var, ctx.batch_stats, needs_dresidual and y is not None, ctx.eps
    )
    return Arguments(
        x=dx if needs.x else None,
        weight=None if weight is None else dweight,
        bias=None if bias is None else dbias,
        residual=(dy if y is None else dz) if needs_dresidual else None,
    )


_apply = differentiable(slim_batch_norm_op, _setup_context, _backward, slim_batch_norm_composition, cpp=True)
composed(slim_batch_norm_backward_op, slim_batch_norm_backward_composition)


# ---- statistics of the batch that are known already: those of the convolution that wrote x


def slim_batch_norm_precomputed_reference(x, weight, bias, mean, var, residual, relu, eps):
    return slim_batch_norm_op(x, weight, bias, mean, var, residual, relu, eps)[0]


_slim_batch_norm_precomputed = define(
    "slim_batch_norm_precomputed(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? residual, "
    "bool relu, float eps) -> Tensor",
    slim_batch_norm_precomputed_reference,
    lambda *arguments: _fake(*arguments)[0],
    composite=True,
)


def _precomputed_setup_context(ctx, inputs, output):
    given = Arguments(*inputs)
    ctx.save_for_backward(given.x, output if given.relu else None, given.weight, given.bias, given.mean, given.var)
    ctx.batch_stats, ctx.eps, ctx.has_residual = True, given.eps, given.residual is not None


def _precomputed_composition(x, weight, bias, mean, var, residual, relu, eps):
    return slim_batch_norm_composition(x, weight, bias, None, None, residual, relu, eps)[0]  # functions of x


_apply_precomputed = differentiable(
    _slim_batch_norm_precomputed, _precomputed_setup_context, _backward, _precomputed_composition
)


# ---- running statistics


def check_slim_batch_norm_record_(running_mean, running_var, num_batches, mean, var, values, momentum) -> None:
    """Raises ValueError or TypeError where shapes or dtypes do not fit."""
    for name, running, batch_name, of_batch in (
        ("running_mean", running_mean, "mean", mean),
        ("running_var", running_var, "var", var),
    ):
        for tensor_name, tensor in ((name, running), (batch_name, of_batch)):
            if tensor.dim() != 1:
                raise ValueError(f"{tensor_name} must have one dimension, got {tensor.dim()}")
            if not tensor.is_floating_point():
                raise TypeError(f"{tensor_name} must be a floating-point tensor, got {tensor.dtype}")
        if running.shape[0] < of_batch.shape[0]:
            raise ValueError(f"{name} must have at least {of_batch.shape[0]} elements, got {running.shape[0]}")
    if mean.shape != var.shape:
        raise ValueError(f"mean and var must have as many elements, got {mean.shape[0]} and {var.shape[0]}")
    if num_batches.numel() != 1 or num_batches.dtype != torch.int64:
        raise ValueError(f"num_batches must be one int64, got shape {tuple(num_batches.shape)} {num_batches.dtype}")
    check_same_device(mean, running_mean=running_mean, running_var=running_var, num_batches=num_batches, var=var)
    if values < 2:
        raise ValueError(f"values must be at least 2, got {values}")


def slim_batch_norm_record__reference(running_mean, running_var, num_batches, mean, var, values, momentum):
    check_slim_batch_norm_record_(running_mean, running_var, num_batches, mean, var, values, momentum)
    check_written("running_mean", running_mean, mean=mean, running_var=running_var)
    check_written("running_var", running_var, var=var)
    _record(running_mean, running_var, num_batches, mean, var, values, momentum)


def _record(running_mean, running_var, num_batches, mean, var, values, momentum):
    num_batches += 1
    factor = 1.0 / float(num_batches) if momentum is None else momentum
    channels, unbiased = mean.shape[0], var * (values / (values - 1))
    running_mean[:channels].lerp_(mean.to(running_mean.dtype), factor)
    running_var[:channels].lerp_(unbiased.to(running_var.dtype), factor)


_slim_batch_norm_record_ = define(
    "slim_batch_norm_record_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) num_batches, Tensor mean, "
    "Tensor var, SymInt values, float? momentum) -> ()",
    slim_batch_norm_record__reference,
    check_slim_batch_norm_record_,
)


@batched(_slim_batch_norm_record_)
def _record_batched(running_mean, running_var, num_batches, mean, var, values, momentum):
    if not torch._C._functorch.is_batchedtensor(running_mean):
        raise RuntimeError(
            "running statistics must be batched inside vmap to be updated, got those of one network; "
            "torch.func.replace_all_batch_norm_modules_(model) does without them"
        )
    _record(running_mean, running_var, num_batches, mean, var, values, momentum)


@torch.no_grad()
def slim_batch_norm_record_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    mean: Tensor,
    var: Tensor,
    values: int,
    momentum: float | None,
) -> None:
    """Move the first running statistics towards those of a batch, as nn.BatchNorm2d does.

    Args:
        running_mean, running_var: [F], floating point, changed in place: the first C of them.
        num_batches: [] int64, increased by one.
        mean, var: [C], C <= F: of the batch, var the biased variance.
        values: that each of them is taken of, at least 2.
        momentum: the weight of the batch; None is 1 / num_batches, the average of all batches.
    """
    _slim_batch_norm_record_(running_mean, running_var, num_batches, mean, var, values, momentum)


# ---- public function


def slim_batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    eps: float = 1e-5,
    batch_stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with `weight[:C]` and `bias[:C]`, then an optional residual add, then an optional ReLU.

    Args:
        x: [N, C, H, W], floating point, any strides.
        weight, bias: [F], F >= C, float32 or dtype of x; None is 1 and 0.
        mean, var: [C], float32 (float64 for float64 x): statistics to normalise with; None takes the batch's.
        residual: [N, C, H, W], dtype of x, added before the ReLU.
        eps: added to the variance.
        batch_stats: mean and var are those of x, so that the backward pass differentiates through them.

    Returns:
        y [N, C, H, W] in dtype and memory format of x, and the mean and biased variance [C] that were used.

    Raises:
        ValueError, TypeError: as `check_slim_batch_norm`, when shapes or dtypes do not fit.
    """
    check_slim_batch_norm(x, weight, bias, mean, var, residual, relu, eps)
    if batch_stats and mean is not None:
        return _apply_precomputed(x, weight, bias, mean, var, residual, relu, eps), mean, var
    return _apply(x, weight, bias, mean, var, residual, relu, eps)
