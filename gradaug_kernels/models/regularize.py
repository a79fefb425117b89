"""Regularisers inside a network: dropout, DropBlock and stochastic depth, from torchvision.ops and torch.nn.

They are put into a plain network before `convert`. A layer that gets one behind it becomes `<name>.0` of a Sequential.
"""

import torch
from torch import Tensor, nn

from .._torchvision import torchvision_module
from . import cifar_resnet, pyramidnet, wide_resnet

ops, resnet = torchvision_module("ops"), torchvision_module("models.resnet")

# The last layer of each residual block's branch, before the addition.
_BRANCH_ENDS = {
    resnet.BasicBlock: "bn2",
    resnet.Bottleneck: "bn3",
    cifar_resnet.BasicBlock: "bn2",
    wide_resnet.PreActivationBlock: "conv2",
    pyramidnet.PyramidBlock: "last",
}


@torch.fx.wrap
def _drop_block(x: Tensor, p: float, block_size: int, training: bool) -> Tensor:
    fitting = min(block_size, *x.shape[2:])
    return ops.drop_block2d(x, p, fitting - (fitting % 2 == 0), training=training)


class DropBlock(ops.DropBlock2d):
    """torchvision's DropBlock2d, for any size: where the activation is smaller than the block, its largest odd size."""

    def forward(self, x: Tensor) -> Tensor:
        return _drop_block(x, self.p, self.block_size, self.training)


def regularise(
    model: nn.Module,
    *,
    dropout: float = 0.0,
    drop_block: float = 0.0,
    drop_block_size: int = 7,
    stochastic_depth: float = 0.0,
) -> nn.Module:
    """Put regularisers into a residual network of torchvision or of this package, in place.

    dropout: probability, of the features before the classifier `fc`.
    drop_block: probability, of squares of drop_block_size pixels at the ends of the branches of the last two stages
        (Ghiasi et al. 2018, arXiv 1810.12890).
    stochastic_depth: probability that the last block's branch is left out for an image, growing linearly from the
        first block's (Huang et al. 2016, arXiv 1603.09382). Kept branches are divided by their survival probability.

    Returns: the same model.
    Raises: ValueError for a model without such blocks, or without `fc`.
    """
    if dropout > 0:
        if not isinstance(getattr(model, "fc", None), nn.Linear):
            raise ValueError(f"dropout needs a model with a linear classifier fc, got {type(model).__name__}")
        model.fc = nn.Sequential(nn.Dropout(dropout), model.fc)
    if drop_block > 0 or stochastic_depth > 0:
        blocks = [(name, module) for name, module in model.named_modules() if type(module) in _BRANCH_ENDS]
        if not blocks:
            raise ValueError(
                f"DropBlock and stochastic depth need a model of known residual blocks, got {type(model).__name__}"
            )
        last_stages = sorted({name.split(".")[0] for name, _ in blocks})[-2:]
        for number, (name, block) in enumerate(blocks, 1):
            if stochastic_depth > 0:
                _append(block, ops.StochasticDepth(stochastic_depth * number / len(blocks), "row"))
            if drop_block > 0 and name.split(".")[0] in last_stages:
                _append(block, DropBlock(drop_block, drop_block_size))
    return model


def _append(block: nn.Module, regulariser: nn.Module) -> None:
    name = _BRANCH_ENDS[type(block)]
    if name == "last":
        name = "bn4" if block.bottleneck else "bn3"
    layer = getattr(block, name)
    if not isinstance(layer, nn.Sequential):
        layer = nn.Sequential(layer)
        setattr(block, name, layer)
    layer.append(regulariser)
