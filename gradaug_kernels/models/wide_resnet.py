"""Wide residual networks for 32x32 images: Zagoruyko, Komodakis 2016 (arXiv 1605.07146)."""

import torch.nn.functional as F
from torch import nn

from .residual import ResidualBlock, ResidualStage


class PreActivationBlock(ResidualBlock):
    """Batch norm and ReLU before each of two 3x3 convolutions, with dropout between them; a 1x1 convolution on the
    shortcut where the number of channels or the size changes.

    x: [N, C_in, H, W]. Returns: [N, C_out, H / stride, W / stride].
    """

    def __init__(self, in_channels, out_channels, stride, dropout):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        return x + self.conv2(self.dropout(F.relu(self.bn2(y))))

    def skip(self, x):
        return x if self.shortcut is None else self.shortcut(F.relu(self.bn1(x)))


class WideResNet(nn.Module):
    """6n + 4 layers: three stages of n pre-activation blocks with 16, 32 and 64 times `widen_factor` channels, average
    pooling over whatever size arrives, and a linear layer.

    x: [N, in_channels, H, W], any H and W. Returns: logits [N, num_classes].
    """

    def __init__(self, depth=28, widen_factor=10, num_classes=100, in_channels=3, dropout=0.0):
        super().__init__()
        if not 10 <= depth <= 10_000 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 with n at least 1 (10, 16, 22, 28, ..., 9998), got {depth}")
        if widen_factor < 1:
            raise ValueError(f"widen_factor must be at least 1, got {widen_factor}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        channels = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.layer1 = self._stage(blocks, channels[0], channels[1], 1, dropout)
        self.layer2 = self._stage(blocks, channels[1], channels[2], 2, dropout)
        self.layer3 = self._stage(blocks, channels[2], channels[3], 2, dropout)
        self.bn = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    @staticmethod
    def _stage(blocks, in_channels, out_channels, stride, dropout):
        first = PreActivationBlock(in_channels, out_channels, stride, dropout)
        rest = (PreActivationBlock(out_channels, out_channels, 1, dropout) for _ in range(blocks - 1))
        return ResidualStage(first, *rest)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))  # [N, 64 * widen_factor, H / 4, W / 4]
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1).flatten(1))


def wide_resnet(
    num_classes: int, in_channels: int = 3, *, depth: int = 28, widen_factor: int = 10, dropout: float = 0.0
) -> WideResNet:
    """WideResNet with `depth` = 6n + 4 layers, `widen_factor` times the channels, `dropout` between convolutions."""
    return WideResNet(depth, widen_factor, num_classes, in_channels, dropout)
