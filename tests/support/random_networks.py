"""Small networks of random code: what converts, what must not, and what nobody has thought of."""

import math
import random

import torch
from torch import nn
from torch.nn import functional as F

RUNNING: list[nn.Module] = []  # the network whose forward runs: steps are shared by copies of a network


class RandomNetwork(nn.Module):
    """A network whose forward is a list of steps, each a function of the values so far and of modules.

    Args:
        seed: which network.
        odd: the probability of a step that is not the same for the first channels alone.
    """

    def __init__(self, seed: int, odd: float = 0.15):
        super().__init__()
        self.layers = nn.ModuleDict()
        self.steps, self.random = [], random.Random(seed)
        torch.manual_seed(seed)
        values = [torch.randn(2, 3, 8, 8)]
        self._step(values, self._convolution(values[-1]))
        for _ in range(self.random.randint(2, 8)):
            kind = self.random.choice(ODD if self.random.random() < odd else USUAL)
            self._step(values, kind(self, values[-1]))
        head = self.random.choice([_pooled_head, _flat_head, _dense_head, _two_heads, _norm_head])
        self._step(values, head(self, values[-1]))
        del self.random

    def _step(self, values, step):
        RUNNING.append(self)
        with torch.no_grad():
            values.append(step(values))
        RUNNING.pop()
        self.steps.append(step)

    def _layer(self, module: nn.Module) -> nn.Module:
        name = f"{type(module).__name__.lower()}{len(self.layers)}"
        self.layers[name] = module
        return lambda x: RUNNING[-1].layers[name](x)

    def _convolution(self, x, out=None):
        channels = x.shape[1]
        out = out or self.random.choice([2, 3, 4, 6, 8, 12])
        groups = self.random.choice([1, 1, 1, channels, math.gcd(channels, out)])
        out = out if out % groups == 0 else channels
        kernel = self.random.choice([1, 3])
        options = {"groups": groups, "padding": kernel // 2, "bias": self.random.random() < 0.5}
        layer = self._layer(nn.Conv2d(channels, out, kernel, **options))
        return lambda values: layer(values[-1])

    def forward(self, x):
        values = [x]
        RUNNING.append(self)
        try:
            for step in self.steps:
                values.append(step(values))
        finally:
            RUNNING.pop()
        return values[-1]


def _unary(function):
    return lambda net, x: lambda values: function(values[-1])


def _module(make):
    def kind(net, x):
        layer = net._layer(make(x))
        return lambda values: layer(values[-1])

    return kind


def _conv(net, x):
    return net._convolution(x)


def _residual(net, x):
    first, second = net._layer(nn.Conv2d(x.shape[1], 5, 1)), net._layer(nn.Conv2d(5, x.shape[1], 3, padding=1))
    return lambda values: values[-1] + second(first(values[-1]).relu())


def _combine(net, x):
    operation = net.random.choice([torch.add, torch.mul, torch.sub, torch.maximum])

    def step(values):
        fits = [v for v in values[1:] if v.shape == values[-1].shape]
        return operation(fits[0], fits[-1])

    return step


def _squeeze_excite(net, x):
    squeeze, excite = net._layer(nn.Conv2d(x.shape[1], 2, 1)), net._layer(nn.Conv2d(2, x.shape[1], 1))
    return lambda values: values[-1] * excite(squeeze(values[-1].mean((2, 3), keepdim=True)).relu()).sigmoid()


def _linear_excite(net, x):
    squeeze, excite = net._layer(nn.Linear(x.shape[1], 4)), net._layer(nn.Linear(4, x.shape[1]))

    def step(values):
        n, c = values[-1].shape[:2]
        gate = excite(squeeze(F.adaptive_avg_pool2d(values[-1], 1).reshape(n, c)).relu()).sigmoid()
        return values[-1] * gate.view(n, c, 1, 1).expand_as(values[-1])

    return step


def _channels_last_linear(net, x):
    layer = net._layer(nn.Linear(x.shape[1], 6))
    return lambda values: layer(values[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _spatial_attention(net, x):
    layer = net._layer(nn.Conv2d(x.shape[1], 1, 3, padding=1))
    return lambda values: values[-1] * layer(values[-1]).sigmoid()


def _twice(net, x):
    layer = net._layer(nn.Conv2d(x.shape[1], x.shape[1], 3, padding=1))
    return lambda values: layer(layer(values[-1]).relu())


def _pad_channels(net, x):
    first = net._layer(nn.Conv2d(x.shape[1], 4, 1))
    second = net._layer(nn.Conv2d(4, 7, 3, padding=1))

    def step(values):
        narrow = first(values[-1]).relu()
        wide = second(narrow)
        return wide + F.pad(narrow, (0, 0, 0, 0, 0, wide.shape[1] - narrow.shape[1]))

    return step


def _shuffle(net, x):
    groups = 2 if x.shape[1] % 2 == 0 else 1

    def step(values):
        n, c, h, w = values[-1].shape
        return values[-1].view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    return step


def _split(net, x):
    layer = net._layer(nn.Conv2d(x.shape[1] - x.shape[1] // 2, 4, 1))
    return lambda values: layer(values[-1].chunk(2, 1)[0])


def _concatenate(net, x):
    layer = net._layer(nn.Conv2d(x.shape[1], 3, 1))
    return lambda values: torch.cat([values[-1], layer(values[-1])], 1)


def _constant(net, x):
    scale = torch.randn(1, x.shape[1], 1, 1)
    return lambda values: values[-1] * scale.to(values[-1].dtype)


def _parameter(net, x):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.randn(x.shape[1], 1, 1))

        def forward(self, x):
            return x * self.gamma

    layer = net._layer(Scale())
    return lambda values: layer(values[-1])


def _functional(net, x):
    weight = torch.randn(4, x.shape[1], 1, 1)
    return lambda values: F.conv2d(values[-1], weight.to(values[-1].dtype))


USUAL = [
    *(_conv, _conv, _conv, _residual, _combine, _squeeze_excite, _linear_excite, _channels_last_linear, _twice),
    *(_spatial_attention, _pad_channels, _unary(F.relu), _unary(F.silu), _unary(torch.sigmoid), _unary(F.hardswish)),
    *(_module(lambda x: nn.BatchNorm2d(x.shape[1])), _module(lambda x: nn.BatchNorm2d(x.shape[1]))),
    *(
        _module(lambda x: nn.PReLU()),
        _module(lambda x: nn.ReLU(inplace=True)),
        _unary(lambda x: F.max_pool2d(x, 3, 1, 1)),
    ),
    *(_unary(lambda x: F.avg_pool2d(x, 3, 1, 1)), _unary(lambda x: x.transpose(2, 3)), _unary(lambda x: x.flip(2))),
    *(_unary(lambda x: x[:, :, ::1].contiguous()), _unary(lambda x: x.softmax(-1)), _unary(lambda x: x + 1)),
    *(_unary(lambda x: F.interpolate(F.avg_pool2d(x, 2), x.shape[2:])), _unary(lambda x: x * x.mean((2, 3), True))),
    *(
        _unary(lambda x: x.flatten(2).view_as(x)),
        _unary(lambda x: x + torch.zeros_like(x)),
        _unary(lambda x: 2 * x - 1),
    ),
]
ODD = [
    *(_shuffle, _split, _concatenate, _constant, _parameter, _functional, _unary(lambda x: x.flip(1))),
    *(_unary(lambda x: x.roll(1, 1)), _unary(lambda x: x.softmax(1)), _unary(lambda x: x - x.mean(1, keepdim=True))),
    *(
        _unary(lambda x: x.cumsum(1)),
        _unary(lambda x: x * x.shape[1] ** -0.5),
        _unary(lambda x: x[:, : x.shape[1] - 1]),
    ),
    *(_module(lambda x: nn.GroupNorm(1, x.shape[1])), _module(lambda x: nn.PReLU(x.shape[1]))),
    *(_module(lambda x: nn.LocalResponseNorm(2)), _unary(lambda x: F.normalize(x, dim=1)), _unary(lambda x: x[:, [0]])),
    *(_unary(lambda x: x.transpose(1, 2)), _unary(lambda x: x.reshape(x.shape[0], -1, x.shape[1], 8)[:, :8])),
    *(_unary(lambda x: x * torch.arange(x.shape[1])[:, None, None]), _unary(lambda x: x.sort(1).values)),
    *(_unary(lambda x: F.layer_norm(x, x.shape[1:])), _unary(lambda x: torch.einsum("nchw,nchv->nchw", x, x))),
    *(_unary(lambda x: torch.einsum("nchw,ndhw->ndhw", x, x)), _unary(lambda x: x.amax(1, keepdim=True) + x)),
    *(_unary(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))), _unary(lambda x: torch.where(x > x.mean(1, True), x, 0 * x))),
]


def _pooled_head(net, x):
    layer = net._layer(nn.Linear(x.shape[1], 5))
    return lambda values: layer(values[-1].mean((2, 3)))


def _flat_head(net, x):
    hidden = net._layer(nn.Linear(x.shape[1:].numel(), 7))
    layer = net._layer(nn.Linear(7, 5))
    return lambda values: layer(hidden(values[-1].flatten(1)).relu())


def _dense_head(net, x):
    layer = net._layer(nn.Conv2d(x.shape[1], 4, 1))
    return lambda values: F.log_softmax(layer(values[-1]), 1)


def _two_heads(net, x):
    one, two = net._layer(nn.Linear(x.shape[1], 5)), net._layer(nn.Conv2d(x.shape[1], 2, 1))
    return lambda values: {"kind": one(values[-1].amax((2, 3))), "map": [two(values[-1])]}


def _norm_head(net, x):
    layer = net._layer(nn.Linear(x.shape[1], 6, bias=False))
    return lambda values: F.normalize(layer(values[-1].mean((-1, -2))), dim=1)
