"""Residual networks for 32x32 images: He, Zhang, Ren, Sun 2015 (arXiv 1512.03385), section 4.2."""

import torch.nn.functional as F
from torch import nn

from .residual import ResidualBlock, ResidualStage, pad_channels


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions beside a shortcut without parameters.

    Where the size changes, the shortcut takes every second pixel and appends zero channels, so that the first channels
    of a wide network's shortcut are a narrow network's shortcut.
    x: [N, C_in, H, W]. Returns: [N, C_out, H / stride, W / stride].
    """

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride

    def forward(self, x):
        y = self.conv2(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(y) + self._shortcut(x, y.shape[1]))

    def skip(self, x):
        return self._shortcut(x, self.conv2.out_channels)  # x comes from a ReLU, so another would change nothing

    def _shortcut(self, x, channels):
        return x if self.stride == 1 else pad_channels(x[:, :, :: self.stride, :: self.stride], channels)


class CifarResNet(nn.Module):
    """6n + 2 layers: a 3x3 convolution, three stages of n blocks with base_width, 2 and 4 times base_width channels,
    average pooling over whatever size arrives, and a linear layer.

    stem_stride: of the first convolution, 1 as published; 2 takes a quarter of the arithmetic, for slow machines.
    x: [N, in_channels, H, W], any H and W. Returns: logits [N, num_classes].
    """

    def __init__(self, depth=20, num_classes=10, in_channels=3, base_width=16, stem_stride=1):
        super().__init__()
        if not 8 <= depth <= 10_000 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 with n at least 1 (8, 14, 20, ..., 9998), got {depth}")
        if base_width < 1:
            raise ValueError(f"base_width must be at least 1, got {base_width}")
        if stem_stride < 1:
            raise ValueError(f"stem_stride must be at least 1, got {stem_stride}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, base_width, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.layer1 = self._stage(blocks, base_width, base_width, 1)
        self.layer2 = self._stage(blocks, base_width, 2 * base_width, 2)
        self.layer3 = self._stage(blocks, 2 * base_width, 4 * base_width, 2)
        self.fc = nn.Linear(4 * base_width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    @staticmethod
    def _stage(blocks, in_channels, out_channels, stride):
        first = BasicBlock(in_channels, out_channels, stride)
        return ResidualStage(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))  # [N, base_width, H / stem_stride, W / stem_stride]
        x = self.layer3(self.layer2(self.layer1(x)))  # [N, 4 * base_width, a quarter of that height and width]
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def cifar_resnet(
    num_classes: int, in_channels: int = 3, *, depth: int = 20, base_width: int = 16, stem_stride: int = 1
) -> CifarResNet:
    """CifarResNet with `depth` = 6n + 2 layers and `base_width` channels in its first stage."""
    return CifarResNet(depth, num_classes, in_channels, base_width, stem_stride)
