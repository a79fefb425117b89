"""Pyramidal residual networks for 32x32 images: Han, Kim, Kim, CVPR 2017 (arXiv 1610.02915)."""

import torch.nn.functional as F
from torch import nn

from .residual import ResidualBlock, ResidualStage, pad_channels


class PyramidBlock(ResidualBlock):
    """Two 3x3 convolutions, or with `bottleneck` 1x1, 3x3 and 1x1 to four times the channels. Batch norm stands before
    the first, between them (with ReLU) and after the last; the shortcut is averaged where the size halves, and padded
    with zero channels.

    x: [N, C_in, H, W]. Returns: [N, C_out, H / stride, W / stride], C_out = channels, or 4 * channels with bottleneck.
    """

    def __init__(self, in_channels, channels, stride, bottleneck):
        super().__init__()
        self.stride = stride
        self.out_channels = 4 * channels if bottleneck else channels
        self.bn1 = nn.BatchNorm2d(in_channels)
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
            self.bn3 = nn.BatchNorm2d(channels)
            self.conv3 = nn.Conv2d(channels, self.out_channels, 1, bias=False)
            self.bn4 = nn.BatchNorm2d(self.out_channels)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn3 = nn.BatchNorm2d(channels)
        self.bottleneck = bottleneck

    def forward(self, x):
        y = self.conv2(F.relu(self.bn2(self.conv1(self.bn1(x)))))
        if self.bottleneck:
            y = self.conv3(F.relu(self.bn3(y)))
        shortcut = self._shortcut(x, y.shape[1])
        return self.bn4(y) + shortcut if self.bottleneck else self.bn3(y) + shortcut

    def skip(self, x):
        return self._shortcut(x, self.out_channels)

    def _shortcut(self, x, channels):
        if self.stride != 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)  # odd sizes round up, as the convolution's do
        return pad_channels(x, channels)


class PyramidNet(nn.Module):
    """Three stages of blocks whose channels grow by a constant step, from 16 to 16 + alpha (times 4 with bottleneck),
    average pooling over whatever size arrives, and a linear layer. 9n + 2 layers with bottleneck, otherwise 6n + 2.

    x: [N, in_channels, H, W], any H and W. Returns: logits [N, num_classes].
    """

    def __init__(self, depth=200, alpha=240, bottleneck=True, num_classes=100, in_channels=3):
        super().__init__()
        layers = 9 if bottleneck else 6
        if not layers + 2 <= depth <= 10_000 or (depth - 2) % layers:
            raise ValueError(f"depth must be {layers}n + 2 with n at least 1, and at most 10000, got {depth}")
        if alpha < 1:
            raise ValueError(f"alpha must be at least 1, got {alpha}")
        blocks = (depth - 2) // layers
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels, stages = 16, []
        for stage in range(3):
            row = []
            for block in range(blocks):
                number = stage * blocks + block + 1
                grown = round(16 + alpha * number / (3 * blocks))
                row.append(PyramidBlock(channels, grown, 2 if stage > 0 and block == 0 else 1, bottleneck))
                channels = row[-1].out_channels
            stages.append(ResidualStage(*row))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)))))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn2(x)), 1).flatten(1))


def pyramidnet(
    num_classes: int, in_channels: int = 3, *, depth: int = 200, alpha: int = 240, bottleneck: bool = True
) -> PyramidNet:
    """PyramidNet with `depth` layers whose channels grow by `alpha`; by default as published with GradAug."""
    return PyramidNet(depth, alpha, bottleneck, num_classes, in_channels)
