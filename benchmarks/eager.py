"""GradAug in plain PyTorch: the baseline of every benchmark and the oracle of the tests.

Written from the paper and its published code, with none of this package's: each layer slices its full-width weight and
calls torch.nn.functional, as that code does. Two of its faults are mended because models need it: grouped convolutions
keep whole groups, and a sliced linear layer slices its bias.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F


def sliced_channels(channels: int, width: float, divisor: int) -> int:
    kept = max(divisor, int(channels * width + divisor / 2) // divisor * divisor)
    return min(channels, kept + divisor if kept < 0.9 * channels * width else kept)


class EagerConv2d(nn.Conv2d):
    width, divisor, slim_out = 1.0, 1, True

    def forward(self, x):
        if self.groups > 1:
            groups = x.shape[1] * self.groups // self.in_channels
            out = groups * self.out_channels // self.groups
        else:
            groups = 1
            out = sliced_channels(self.out_channels, self.width, self.divisor) if self.slim_out else self.out_channels
        weight = self.weight[:out, : x.shape[1] // groups]
        bias = None if self.bias is None else self.bias[:out]
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)


class EagerLinear(nn.Linear):
    width, divisor, slim_out = 1.0, 1, True

    def forward(self, x):
        out = sliced_channels(self.out_features, self.width, self.divisor) if self.slim_out else self.out_features
        return F.linear(x, self.weight[:out, : x.shape[1]], None if self.bias is None else self.bias[:out])


class EagerBatchNorm2d(nn.BatchNorm2d):
    """Width 1 keeps nn.BatchNorm2d's statistics; a sub-network normalises with its batch's, in training."""

    width = 1.0

    def forward(self, x):
        if self.width == 1.0:
            return super().forward(x)
        c = x.shape[1]
        return F.batch_norm(x, None, None, self.weight[:c], self.bias[:c], True, self.momentum, self.eps)


_EAGER = {nn.Conv2d: EagerConv2d, nn.Linear: EagerLinear, nn.BatchNorm2d: EagerBatchNorm2d}


def eager_slimmable(model: nn.Module, divisor: int = 1) -> nn.Module:
    """A copy of a torchvision-like CNN whose layers slice themselves; its last linear layer keeps all outputs."""
    model = copy.deepcopy(model)
    layers = [module for module in model.modules() if type(module) in _EAGER]
    for i, module in enumerate(layers):
        module.__class__ = _EAGER[type(module)]
        module.divisor = divisor
        # A layer that feeds a grouped convolution keeps whole groups of it.
        following = next((m for m in layers[i + 1 :] if isinstance(m, nn.Conv2d)), None)
        if isinstance(module, nn.Conv2d) and following is not None and following.groups > 1:
            size = following.in_channels // following.groups
            module.divisor = max(divisor, size) if max(divisor, size) % min(divisor, size) == 0 else divisor * size
    [module for module in layers if isinstance(module, nn.Linear)][-1].slim_out = False
    return model


def set_eager_width(model: nn.Module, width: float) -> None:
    for module in model.modules():
        if hasattr(module, "width"):
            module.width = width


def eager_step(model, optimizer, images, targets, subnets, autocast_dtype=None):
    """One published GradAug step for sub-networks [(width, resolution)]. Returns the losses, the full one first."""

    def forward(x):
        with torch.autocast(x.device.type, autocast_dtype, enabled=autocast_dtype is not None):
            return model(x)

    optimizer.zero_grad()
    set_eager_width(model, 1.0)
    logits = forward(images)
    loss = F.cross_entropy(logits, targets)
    loss.backward()
    losses = [loss.detach()]
    teacher = F.softmax(logits.detach(), dim=1)
    for width, resolution in subnets:
        set_eager_width(model, width)
        resized = F.interpolate(images, (resolution, resolution), mode="bilinear", align_corners=True)
        loss = F.kl_div(F.log_softmax(forward(resized), dim=1), teacher, reduction="batchmean")
        loss.backward()
        losses.append(loss.detach())
    set_eager_width(model, 1.0)
    optimizer.step()
    return losses
