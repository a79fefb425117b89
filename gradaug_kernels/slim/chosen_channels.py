"""The channels of a weight that a sub-network of chosen channels computes with, copied together.

The kernels read the first channels of a weight in place. Any other choice is gathered into a small weight first, whose
first channels are all it has; its gradient is scattered back into the chosen channels.
"""

import torch
from torch import Tensor

from .._library import Destination, is_transformed


def gather_weight(
    weight: Tensor, outputs: Tensor | None, inputs: Tensor | None, weight_grad: Tensor | None = None
) -> Tensor:
    """weight[outputs][:, inputs].

    Args:
        weight: [O, I, ...], of a convolution in NHWC.
        outputs, inputs: int64 [out] and [in], distinct; None keeps all.
        weight_grad: of weight's shape, a buffer or a parameter whose .grad is one: the backward pass adds the gradient
            to its chosen channels, and autograd gets none.

    Returns:
        [out, in, ...], of a convolution in NHWC.
    """
    if weight_grad is None:
        return _gather(weight, outputs, inputs)
    if is_transformed() and weight_grad.requires_grad:  # left to autograd
        return _gather(weight_grad.to(weight.dtype), outputs, inputs)
    return _GatherIntoBuffer.apply(weight, outputs, inputs, weight_grad)


def _gather(weight: Tensor, outputs: Tensor | None, inputs: Tensor | None) -> Tensor:
    rows = weight.movedim(1, -1)  # input channels last, as they are stored
    rows = rows if outputs is None else rows.index_select(0, outputs)
    rows = rows if inputs is None else rows.index_select(-1, inputs)
    return rows.movedim(-1, 1)


class _GatherIntoBuffer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, outputs, inputs, weight_grad):
        ctx.outputs, ctx.inputs, ctx.destination = outputs, inputs, Destination(weight_grad)
        return _gather(weight, outputs, inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        weight_grad, for_autograd = ctx.destination.take(ctx)
        buffer, gradient = weight_grad.movedim(1, -1), gradient.movedim(1, -1).to(weight_grad.dtype)
        if ctx.outputs is None:
            buffer.index_add_(-1, ctx.inputs, gradient)
        elif ctx.inputs is None:
            buffer.index_add_(0, ctx.outputs, gradient)
        else:
            rows = buffer.index_select(0, ctx.outputs).index_add_(-1, ctx.inputs, gradient)
            buffer.index_copy_(0, ctx.outputs, rows)
        return None, None, None, for_autograd
