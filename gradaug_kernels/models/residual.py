"""Residual blocks in a row, each of which can be left out: the interface of `gradaug_kernels.RandomDepth`."""

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """A block whose output is its shortcut plus a branch of convolutions.

    skipped: set by the sampler; `ResidualStage` then calls `skip(x)`, the block's output without the branch, which must
    have the shape of the block's own output at full width.
    """

    skipped = False

    def skip(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must have skip(x), its output without the branch")


class ResidualStage(nn.Sequential):
    """Residual blocks in a row. A module of its own, so that `fuse` may rewrite the blocks' forward code."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block.skip(x) if block.skipped else block(x)
        return x


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """Zero channels appended to x [N, C, H, W] up to `channels`, on any device.

    The first channels of the result are x's, so the first channels of a wide network's are a narrow network's.
    """
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))
