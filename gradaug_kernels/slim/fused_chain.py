"""Convolutions and batch norms that follow each other, run so that little between them is stored.

    conv1, norm1 + relu, conv2, norm2 + relu, conv3, norm3 + add + relu
    conv1, norm1 + relu, max_pool

A norm before a convolution is applied where the convolution reads its input (`slim_norm_conv2d`), one before a max
pooling on the CPU together with that (`slim_norm_max_pool2d`); where kernels sum their output's statistics, a norm gets
those of the convolution before. `fuse` finds such chains in a module's code.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._library import is_composed
from ..ops import slim_batch_norm, slim_conv2d_norm, slim_conv2d_statistics, slim_norm_conv2d, slim_norm_max_pool2d
from ..ops._common import in_autocast
from .layers import FastSlimConv2d, SlimBatchNorm2d

Layer = FastSlimConv2d | SlimBatchNorm2d | nn.MaxPool2d


def run_chain(
    x: Tensor, residual: Tensor | None, layers: tuple[Layer, ...], relus: tuple[bool, ...], recompute: bool
) -> Tensor:
    """The result of layers that are called one after the other.

    Args:
        x: [N, C, H, W].
        residual: added to the result of the last layer, a batch norm, before its ReLU; or None.
        layers: convolutions and batch norms in turn, and perhaps a max pooling after a last batch norm. Only a first
            convolution may pad with anything but zeros.
        relus: whether a ReLU follows each layer; only batch norms have one.
        recompute: compute the input of a last batch norm again in the backward pass, where a 1x1 convolution made it.

    An x of other dimensions gets the answer or the error of the layers themselves.
    """
    if x.dim() != 4:
        return _call_one_by_one(x, residual, layers, relus)
    norm, statistics, last = None, (None, None), len(layers) - 1  # statistics: of x, where its producer summed them
    for i, (layer, relu) in enumerate(zip(layers, relus, strict=True)):
        if isinstance(layer, SlimBatchNorm2d):
            norm = _Norm.of(x, layer, relu, statistics)
            continue
        if isinstance(layer, nn.MaxPool2d):
            return norm.apply_and_pool(x, layer)
        following = layers[i + 1] if i < last else None
        if recompute and i == last - 1 and _is_worth_recomputing(layer, x, residual):
            return _convolve_and_normalise(x, layer, norm, following, relus[last], residual)
        x, statistics = _convolve(x, layer, norm, following)
        norm = None
    return x if norm is None else norm.apply(x, residual)


def _call_one_by_one(x, residual, layers, relus):
    for i, (layer, relu) in enumerate(zip(layers, relus, strict=True)):
        if isinstance(layer, SlimBatchNorm2d):
            x = layer(x, residual if i == len(layers) - 1 else None, relu)
        else:
            x = layer(x)
    return x


class _Norm(NamedTuple):
    """A batch norm of x that is yet to be applied: by the convolution that reads x, or at the end of the chain."""

    layer: SlimBatchNorm2d
    relu: bool
    mean: Tensor | None  # [C] to normalise with; None for those of the batch that nobody computed yet
    var: Tensor | None
    of_batch: bool

    @classmethod
    def of(cls, x: Tensor, layer: SlimBatchNorm2d, relu: bool, statistics: tuple) -> "_Norm":
        layer._check(x.shape)
        mean, var = layer._given_statistics(x.shape[1], x.dtype)
        return cls(layer, relu, *statistics, True) if mean is None else cls(layer, relu, mean, var, False)

    def arguments(self) -> dict:
        """Those of slim_norm_conv2d."""
        gamma, beta = self.layer._affine()
        options = {"gamma": gamma, "beta": beta, "eps": self.layer.eps, "relu": self.relu}
        return {**options, "mean": self.mean, "var": self.var, "batch_stats": self.of_batch}

    def record(self, shape: torch.Size, mean: Tensor, var: Tensor) -> None:
        if self.of_batch:
            self.layer._record(shape, mean, var)

    def apply(self, x: Tensor, residual: Tensor | None) -> Tensor:
        layer = self.layer
        fits = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
        if self.mean is None or not self.of_batch or not fits:
            return layer(x, residual, self.relu)
        norm = (*layer._affine(), self.mean, self.var, residual, self.relu, layer.eps)
        y, mean, var = slim_batch_norm(x, *norm, batch_stats=True)
        self.record(x.shape, mean, var)
        return y

    def apply_and_pool(self, x: Tensor, pooling: nn.MaxPool2d) -> Tensor:
        if x.device.type != "cpu":
            return pooling(self.apply(x, None))
        window = (pooling.kernel_size, pooling.stride, pooling.padding)
        y, mean, var = slim_norm_max_pool2d(x, *window, **self.arguments())
        self.record(x.shape, mean, var)
        return y


def _convolve(x, layer: FastSlimConv2d, norm: _Norm | None, following: SlimBatchNorm2d | None) -> tuple[Tensor, tuple]:
    """The convolution's result and its statistics, (None, None) where they were not computed."""
    statistics = following is not None and following._takes_batch_statistics and _sums_outputs(x.device)
    if norm is None and not statistics:
        return layer(x), (None, None)
    arguments, weight_grad = layer._arguments(x)
    if norm is None:
        y, *found = slim_conv2d_statistics(layer._padded(x), *arguments, weight_grad=weight_grad)
        return y, tuple(found)
    y, mean, var, *found = slim_norm_conv2d(
        x, *arguments, **norm.arguments(), statistics=statistics, weight_grad=weight_grad
    )
    norm.record(x.shape, mean, var)
    return y, tuple(found)


def _sums_outputs(device: torch.device) -> bool:
    """Whether convolutions have kernels that sum their output; elsewhere the next batch norm does that as cheaply."""
    return not is_composed("slim_conv2d_statistics", device.type)


def _is_worth_recomputing(layer: FastSlimConv2d, x: Tensor, residual: Tensor | None) -> bool:
    """Whether the layer is a 1x1 convolution, in training, whose result a residual, if there is one, fits."""
    if layer.kernel_size != (1, 1) or layer._explicit_padding is not None or not torch.is_grad_enabled():
        return False
    dtype = torch.get_autocast_dtype(x.device.type) if in_autocast(x) else x.dtype
    return residual is None or (residual.dtype == dtype and residual.shape == _result_shape(layer, x))


def _result_shape(layer: FastSlimConv2d, x: Tensor) -> torch.Size:
    """The shape of a 1x1 convolution's result."""
    (_, _, out_channels, stride, padding, *_), _ = layer._arguments(x)
    height, width = ((x.shape[2 + a] + 2 * padding[a] - 1) // stride[a] + 1 for a in (0, 1))
    return torch.Size((x.shape[0], out_channels, height, width))


def _convolve_and_normalise(x, layer: FastSlimConv2d, norm: _Norm | None, last: SlimBatchNorm2d, relu, residual):
    arguments, weight_grad = layer._arguments(x)
    shape = _result_shape(layer, x)
    last._check(shape)
    out_mean, out_var = last._given_statistics(shape[1], x.dtype)
    out_gamma, out_beta = last._affine()
    y, batch_mean, batch_var, mean, var = slim_conv2d_norm(
        x,
        *arguments,
        normalise=norm is not None,
        **({} if norm is None else norm.arguments()),
        **{"out_gamma": out_gamma, "out_beta": out_beta, "out_mean": out_mean, "out_var": out_var},
        **{"residual": residual, "out_relu": relu, "out_eps": last.eps, "weight_grad": weight_grad},
    )
    if norm is not None:
        norm.record(x.shape, mean, var)
    if out_mean is None:
        last._record(shape, batch_mean, batch_var)
    return y
