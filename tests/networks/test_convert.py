"""convert: torchvision's models at width 1 are what they were, and run at any width."""

import copy
import random
import threading
import types

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
import torchvision
from support import masked
from support.random_networks import RandomNetwork
from torch import nn
from torch.nn import functional as F

import gradaug_kernels as gk

MODELS = ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "mobilenet_v3_large"]


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """A torchvision model, and its converted copy."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(request.param, num_classes=100)
    for module in model.modules():  # statistics and affine parameters away from 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, gk.convert(copy.deepcopy(model))


def test_logits_at_width_1(pair):
    model, converted = pair
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval()(x)
        actual = converted.eval()(x)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gradients_and_state_at_width_1(pair):
    model, converted = (copy.deepcopy(m).double().train() for m in pair)
    x = torch.randn(4, 3, 64, 64, dtype=torch.double)  # 16 values per channel in the last stage: well conditioned
    for m in (model, converted):
        m(x).square().sum().backward()
    assert list(converted.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name], value, msg=name, rtol=1e-9, atol=1e-9)
    scale = max(p.grad.abs().max() for p in model.parameters())
    for (name, p), q in zip(model.named_parameters(), converted.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-9 * scale, name


@pytest.mark.parametrize("width", [0.25, 0.5, 0.8, 0.93])
def test_widths_run_forward_and_backward(pair, width):
    converted = pair[1].train()
    converted.zero_grad()
    with gk.use_width(converted, width):
        logits = converted(torch.randn(2, 3, 48, 48))
        logits.square().sum().backward()
    assert logits.shape == (2, 100)
    for name, p in converted.named_parameters():
        assert p.grad.shape == p.shape
        assert torch.isfinite(p.grad).all(), name
    convs = [m for m in converted.modules() if isinstance(m, gk.FastSlimConv2d)]
    assert all(m.weight.grad[-1].abs().sum() == 0 for m in convs), "the last channel is beyond every slice"
    assert all(m.weight.grad[0].abs().sum() > 0 for m in convs[:1])


def test_parameters_are_the_same_objects_and_the_optimizer_stays_valid():
    model = torchvision.models.resnet18(num_classes=10)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    converted = gk.convert(model)
    assert converted is model
    assert all(p is q for p, q in zip(parameters, converted.parameters(), strict=True))
    before = converted.conv1.weight.detach().clone()
    converted(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(converted.conv1.weight, before)


def test_torchvision_checkpoint_loads_with_listed_widths():
    plain = torchvision.models.resnet18()
    converted = gk.convert(torchvision.models.resnet18(), widths=(0.5, 0.9, 1.0))
    assert converted.load_state_dict(plain.state_dict()).missing_keys == []
    assert converted.bn1.widths == (0.5, 0.9, 1.0)


def test_classifier_keeps_its_outputs_and_hidden_layers_slim():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 20), nn.ReLU(), nn.Linear(20, 7))
    gk.convert(model)
    assert [module.slim_out for module in (model[0], model[2], model[4])] == [True, True, False]
    with gk.use_width(model, 0.5):
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 7)


def test_layers_before_a_grouped_convolution_keep_whole_groups():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 1)
            self.grouped = nn.Conv2d(24, 12, 3, groups=6, padding=1)
            self.head = nn.Conv2d(12, 5, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.grouped((x + self.branch(x)).relu())).mean((2, 3))

    model = gk.convert(Residual(), divisor=3)
    assert (model.stem.divisor, model.branch.divisor) == (12, 12)  # lcm of 3 and the group size 4
    assert not model.head.slim_out
    for width in (0.3, 0.45, 0.6, 0.99):
        with gk.use_width(model, width):
            assert model(torch.randn(2, 3, 4, 4)).shape == (2, 5)


# ---- what converts is right, and the rest is refused


def classifier(*layers, channels=8):
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers, *head)


def error_at(model, width, x=None, **options):
    """The error of the sub-network against the masked network; what cannot be converted raises."""
    model = masked.randomise(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.double) if x is None else x
    return masked.relative_error(model, masked.converted(model, width, **options), (x,), width)


@pytest.mark.parametrize("part", range(4))
def test_random_networks_are_right_or_refused(part):
    right = narrow = 0
    for seed in range(20 * part, 20 * (part + 1)):
        network = masked.randomise(RandomNetwork(seed))
        x = torch.randn(2, 3, 8, 8, dtype=torch.double)
        try:
            sliced = masked.converted(network, 0.5)
        except ValueError:
            continue
        assert masked.relative_error(network, sliced, (x,), 0.5) <= 1e-10, seed
        right += 1
        narrow += masked.is_narrow(sliced, 0.5)
    assert right >= 7
    assert narrow >= 5


def test_random_networks_of_usual_layers_convert():
    for seed in range(1010, 1030):
        network = masked.randomise(RandomNetwork(seed, odd=0))
        x = torch.randn(2, 3, 8, 8, dtype=torch.double)
        sliced = masked.converted(network, 0.7, example=x)
        assert masked.relative_error(network, sliced, (x,), 0.7) <= 1e-10, seed


CONCATENATE, NORM, SPLIT = "concatenates or splits", "a norm over channels", "nn.MultiheadAttention has no counterpart"
REFUSED = {
    **dict.fromkeys(("densenet121", "googlenet", "inception_v3", "squeezenet1_1", "shufflenet_v2_x0_5"), CONCATENATE),
    **dict.fromkeys(("convnext_tiny", "swin_t", "swin_v2_t", "maxvit_t"), NORM),
    "vit_b_16": SPLIT,
}
CONVERTED = {
    **dict.fromkeys(("alexnet", "vgg11_bn", "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"), 0.6),
    **dict.fromkeys(("mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0", "efficientnet_v2_s"), 0.6),
    **dict.fromkeys(("regnet_y_400mf", "regnet_x_400mf"), 0.6),
}


def without_weights(name):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("regnet"):  # its constructor computes with tensors
        return torchvision.models.get_model(name)
    with torch.device("meta"):
        return torchvision.models.get_model(name, **options)


@pytest.mark.parametrize("name", REFUSED)
def test_classifiers_that_are_refused(name):
    model = without_weights(name)
    before = repr(model)
    with pytest.raises(ValueError, match=REFUSED[name]):
        gk.convert(model)
    assert repr(model) == before


@pytest.mark.parametrize("name", CONVERTED)
def test_classifiers_that_convert(name):
    rows = gk.summary(gk.convert(without_weights(name), fuse_chains=False), (1.0, 0.5)).rows
    whole = [row.name for row in rows if row.whole]
    assert whole == [rows[-1].name], "all but the classifier is sliced"


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0", "regnet_x_400mf", "resnet18"])
def test_classifiers_are_right_at_any_width(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10)
    assert error_at(model, 0.6, torch.randn(2, 3, 40, 40, dtype=torch.double)) <= 1e-10


# ---- layers of other kinds


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x):
        return F.silu(super().forward(x))


class SamePadding(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Pointwise(nn.Conv2d):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 1)


class LayerScale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(*shape))

    def forward(self, x):
        return x * self.gamma


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.weight)


def pruned():
    return nn.utils.prune.l1_unstructured(nn.Conv2d(8, 8, 3), "weight", 0.5)


def marked(x):
    mask = torch.zeros(x.shape[1], dtype=x.dtype)
    mask[:4] = 1
    return x * mask[:, None, None]


def shifted(x):
    y = torch.zeros_like(x)
    y[:, :-1] = x[:, 1:]
    return y


def multiplied(x):
    return torch.mul(x, torch.arange(x.shape[1], dtype=x.dtype)[:, None, None], out=torch.empty_like(x))


def shuffle(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def centred(x):
    return x - x.mean(1, keepdim=True)


def with_hook(hook):
    def function(x):
        y = x * 1
        if y.requires_grad:
            y.register_hook(hook)
        return y

    return function


class Backward(torch.autograd.Function):
    """Twice its input, with a backward pass of its own that reads the output."""

    @staticmethod
    def forward(ctx, x, backward):
        y = x * 2
        ctx.save_for_backward(y)
        ctx.function = backward
        return y

    @staticmethod
    def backward(ctx, gradient):
        return ctx.function(*ctx.saved_tensors, gradient), None

    @classmethod
    def of(cls, backward):
        return lambda x: cls.apply(x, backward)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            NormAndActivation(8),
            r"NormAndActivation at '1': it is an nn.BatchNorm2d with code of its own \(forward\)",
        ),
        (SamePadding(8, 8, 3), r"got SamePadding at '1': it is an nn.Conv2d with code of its own \(forward\)"),
        (torchvision.ops.FrozenBatchNorm2d(8), r"a tensor of fixed size .*'1' \(FrozenBatchNorm2d\), misc.py:\d+\)"),
        (
            LayerScale(8, 1, 1),
            r"combines '1.gamma' \(by mul\) with the channels of '0' \('1' \(LayerScale\), ",
        ),
        (nn.PReLU(8), r"fixed size .* with the channels of '0' \('1' \(PReLU\)"),
        (nn.GroupNorm(2, 8), "has GroupNorm at '1': nn.GroupNorm has parameters"),
        (nn.ConvTranspose2d(8, 8, 2), "got ConvTranspose2d at '1': a transposed convolution has no counterpart"),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
            "at '1': its weight is parametrised; .*remove_",
        ),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), "at '1': its weight is parametrised"),
        (pruned(), "at '1': its parameters are not those of an nn.Conv2d .*pruning, which has a function"),
        (Gate(), "reads, in a convolution that is no nn.Conv2d layer, the channels of '0'"),
        (Apply(shuffle), r"rearranges, by a view or a reshape, the channels of '0' \('1' \(Apply\), test_convert.py"),
        (nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(2, 8, 1)), "by a pixel shuffle, the channels of"),
        (nn.ChannelShuffle(2), "shuffle"),
        (Apply(lambda x: x.roll(1, 1)), "computes a roll over"),
        (Apply(lambda x: x.flip(-3)), "computes a flip over"),
        (Apply(lambda x: x[:, torch.arange(7, -1, -1)]), "picks by index"),
        (Apply(lambda x: F.pad(x[:, 1:], (0, 0, 0, 0, 0, 1))), "takes a part of"),
        (Apply(lambda x: x.mean(1, keepdim=True) + x), "computes a mean over"),
        (Apply(lambda x: x.softmax(1)), "computes a softmax over"),
        (Apply(lambda x: F.cosine_similarity(x, x + 1, dim=1)[:, None] * x), "over the channels"),
        (Apply(lambda x: torch.einsum("nchw,nchv->nchw", x, x)), "the channels of '0'"),
        (Apply(lambda x: torch.stack(x.unbind(1), 1)), "concatenates or splits"),
        (Apply(marked), "a tensor of fixed size"),
        (Apply(shifted), "takes a part of"),
        (Apply(multiplied), "a tensor of fixed size"),
        (Apply(lambda x: x.transpose(1, 2).reshape(x.shape)), "rearranges, by a view or a reshape"),
        (
            Apply(lambda x: x.reshape(x.shape[0] * 2, -1, *x.shape[2:]).reshape_as(x)),
            "rearranges, by a view or a reshape",
        ),
        (Apply(lambda x: x * 2 if x.shape[1] > 5 else x), "compares 4 with 5, which turns out differently at another"),
        (Apply(lambda x: x * 2 if x.size(1) == 3 else x), "compares 4 with 3, .* 3 with 3, at '1'"),
        (Apply(lambda x: x * 2 if x.shape[-3] // 2 < 2 else x), "compares 2 with 2, .* 0 with 2"),
        (Apply(lambda x: x * 2 if x.size(dim=1) % 3 == 0 else x), "compares 1 with 0, .* 0 with 0"),
        (Apply(lambda x: x * 2 if x.numel() < 300000 else x), "compares 401408 with 300000, .* 100352 with"),
        (Apply(lambda x: x * 2 if x.shape[1] / 8 < 0.25 else x), r"compares 0.5 with 0.25, .* 0.125 with 0.25"),
        (Apply(lambda x: x * {8: 1, 3: 2}.get(x.shape[1], 1)), "compares 4 with 4, which"),
        (Apply(lambda x: x * {8: 1, 4: 1, 3: 2}.get(x.shape[1], 1)), "compares 4 with 4, which"),
        (Apply(lambda x: x * 2 if round(x.shape[1] / 4) < 1 else x), "compares 1 with 1, .* 0 with 1"),
        (Apply(lambda x: x * 2 if divmod(x.shape[1], 3)[1] == 2 else x), "compares 1 with 2, .* 2 with 2"),
        (Apply(lambda x: x * 2 if x.shape[1] & 1 else x), "compares 0 with 0, .* 1 with 0"),
        (Apply(lambda x: x * float(max(x.shape[1], 6))), "compares 6 with 4, .* 6 with 8|compares 4 with 6, "),
        (Apply(lambda x: centred(x) if torch.is_grad_enabled() else x), "computes a mean over"),
        (Apply(lambda x: x if torch.is_grad_enabled() else centred(x)), "computes a mean over"),
        (Apply(lambda x: centred(x) if x.requires_grad else x), "computes a mean over"),
        (Apply(lambda x: x if x.requires_grad else centred(x)), "computes a mean over"),
        (Apply(lambda x: centred(x) if torch.is_inference_mode_enabled() else x), "computes a mean over"),
        (Apply(with_hook(lambda gradient: centred(gradient))), r"computes a mean over the channels of '0' \(test_conv"),
        (Apply(Backward.of(lambda y, gradient: centred(gradient))), "computes a mean over"),
        (Apply(Backward.of(lambda y, gradient: gradient * y.softmax(1))), "computes a softmax over"),
        (Apply(lambda x: x * torch.tensor(float(x.shape[1]))), "computes with other values than at width 1"),
        (Apply(lambda x: x * torch.full((1,), x.shape[1])), "number that depends on the number of channels"),
        (Apply(lambda x: x * torch.ones(x.shape[1]).sum()), "number that depends on the number of channels"),
        (Apply(lambda x: x / x.shape[1]), "computes with a number that depends on the number of channels"),
        (Apply(lambda x: x * torch.linspace(0, 1, x.shape[1])[:, None, None]), "a tensor of fixed size"),
        (Apply(lambda x: F.unfold(x, 3).view(x.shape[0], x.shape[1], -1, 1)), "unfolds"),
    ],
)
def test_layers_that_are_refused_by_name(layer, message):
    model = classifier(layer)
    before, parameters = repr(model), list(model.parameters())
    with pytest.raises(ValueError, match=message):
        gk.convert(model)
    assert repr(model) == before
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "layer",
    [
        Pointwise(8, 8),
        LayerScale(1),
        LayerScale(1, 1, 8, 8),
        nn.PReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False).requires_grad_(False),
        nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect"),
        torchvision.ops.SqueezeExcitation(8, 3),
        torchvision.ops.Conv2dNormActivation(8, 8),
        torchvision.ops.DropBlock2d(0.5, 3),
        torchvision.ops.StochasticDepth(0.5, "row"),
        nn.Dropout2d(0.5),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        Apply(lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
        Apply(lambda x: x + torch.zeros(x.shape, dtype=x.dtype)),
        Apply(lambda x: torch.cat([x, x], 2)),
        Apply(lambda x: x.flatten(2).softmax(-1).view_as(x)),
        Apply(lambda x: x.view(*x.shape[:2], -1).view(x.shape) if x.size(1) >= 1 and x.shape == x.relu().shape else x),
        Apply(lambda x: x * 2 if x.shape[2] % 2 else x),
        Apply(with_hook(lambda gradient: gradient * 1)),
        Apply(Backward.of(lambda y, gradient: gradient * 2 * y.detach().exp() / y.detach().exp())),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_convert_are_right(layer):
    assert error_at(classifier(layer), 0.5, example=(2, 3, 8, 8)) <= 1e-10


def test_a_layer_that_is_called_twice_or_has_two_names():
    layer = nn.Conv2d(8, 8, 3, padding=1)
    model = classifier(layer, nn.BatchNorm2d(8), nn.ReLU(), layer)
    assert error_at(model, 0.4) <= 1e-10
    sliced = gk.convert(model)
    assert sliced[1] is sliced[4]
    assert isinstance(sliced[1], gk.FastSlimConv2d)


def test_tied_weights_stay_tied():
    model = classifier(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model[3].weight = model[1].weight
    assert error_at(model, 0.5) <= 1e-10
    gk.convert(model)
    assert model[3].weight is model[1].weight


def test_a_layer_that_is_held_outside_of_the_module_tree():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
            self.order = [self.a, self.b]

        def forward(self, x):
            for layer in self.order:
                x = layer(x).relu()
            return self.c(x)

    with pytest.raises(ValueError, match="calls 'a' by a reference that is no child of a module"):
        gk.convert(Listed())


def test_flags_buffers_dtypes_and_attributes_are_kept():
    model = classifier(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)).to(torch.bfloat16)
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model[3].stage = 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gk.convert(model)
    assert [module.training for module in model] == [True, False, *[True] * 5]
    assert [p.requires_grad for p in model[3].parameters()] == [False, True]
    assert model[3].stage == 2
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name


# ---- outputs


class Heads(nn.Module):
    """Two heads behind a branch that depends on values."""

    def __init__(self):
        super().__init__()
        self.body, self.kinds, self.boxes = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), nn.Linear(8, 4)
        self.other = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        z = (self.body(x) if x.sum() > 0 else self.other(x)).mean((2, 3))
        return {"kinds": self.kinds(z), "boxes": self.boxes(z)}


def test_a_model_that_asks_for_values_is_refused_with_the_place():
    with pytest.raises(ValueError, match=r"needs the value of a tensor .* \(Heads\), test_convert.py:\d+; keep="):
        gk.convert(Heads())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_model_that_asks_for_values_keeps_what_keep_names(sign):
    x = sign * torch.rand(2, 3, 8, 8, dtype=torch.double)
    assert error_at(Heads(), 0.5, x, keep=("kinds", "boxes")) <= 1e-10
    sliced = gk.convert(Heads(), keep=("kinds", "boxes"))
    assert [m.slim_out for m in (sliced.body, sliced.other, sliced.kinds, sliced.boxes)] == [True, True, False, False]


def test_keep_keeps_what_shares_channels_whole():
    def build():
        return classifier(
            nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1), channels=6
        )

    assert error_at(build(), 0.5, keep=("1",)) <= 1e-10
    rows = gk.summary(gk.convert(build(), keep=("1",)), (0.5,)).rows
    assert [row.channels[0][1] for row in rows if row.channels] == [4, 8, 8, 3, 5]
    assert [row.whole for row in rows][:2] == ["", "keep"]
    with pytest.raises(ValueError, match="keep must have names of the model's layers, got 'head', and"):
        gk.convert(build(), keep=("1", "head"))


def test_an_output_that_shares_channels_keeps_them_all_whole():
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            y = self.first(x)
            return y + self.last(self.inner(y).relu())

    assert error_at(Denoiser(), 0.5) <= 1e-10
    sliced = gk.convert(Denoiser())
    assert [m.slim_out for m in (sliced.first, sliced.inner, sliced.last)] == [False, True, False]


def test_layers_that_are_never_called_stay_what_they_are():
    model = classifier()
    model.spare = nn.Linear(4, 4)
    model.forward = lambda x: nn.Sequential.forward(model[:4], x)
    with pytest.raises(ValueError, match="without any that it calls as a child"):
        gk.convert(model)  # through a closure convert sees only the plain layers
    del model.forward
    model = nn.ModuleDict({"net": classifier(), "spare": nn.Linear(4, 4)})
    model.forward = types.MethodType(lambda self, x: self["net"](x), model)
    gk.convert(model)
    assert type(model["spare"]) is nn.Linear
    assert isinstance(model["net"][0], gk.FastSlimConv2d)


# ---- inputs


def test_a_flattened_image_has_the_pixels_of_width_1():
    model = gk.convert(nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.Flatten(), nn.Linear(16 * 8 * 8, 10)))
    with gk.use_width(model, 0.5):
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        for size in (24, 16, 64):  # 16 and 64 pixels are a divisor and a multiple of channels
            with pytest.raises(ValueError, match="must have 8 channels of 64 pixels"):
                model(torch.randn(2, 3, size, size))


def test_the_example_is_an_input_its_shape_or_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 3 * 5, 2)

        def forward(self, x, scale):
            return self.head(self.a(x).flatten(1)) * scale

    for example in ((torch.randn(1, 3, 5, 7), torch.ones(1)), (torch.randn(4, 3, 5, 7), 2.0)):
        assert gk.convert(Two(), example=example).a.slim_out
    with pytest.raises(ValueError, match=r"failed for an input of shape \(2, 3, 224, 224\) .*; example= takes"):
        gk.convert(Two())
    flat = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 3 * 5, 2))
    with pytest.raises(ValueError, match=r"expected an input with 120 features, .*; example= takes an input that fits"):
        gk.convert(flat)
    assert gk.convert(flat, example=(2, 3, 5, 7))[0].slim_out
    with pytest.raises(ValueError, match="example must be a tensor, a tuple of arguments or a shape, got str"):
        gk.convert(classifier(), example="x")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (lambda m: m.norm.running_mean.mean(), r"reads 'norm.running_mean' \(the model itself \(Reads\), test_conv"),
        (lambda m: m.conv.weight.square().sum(), "reads 'conv.weight'"),
        (lambda m: m.head.weight[0, 0], "reads 'head.weight'"),
        (lambda m: m.conv.bias.sum(), "reads 'conv.bias'"),
        (lambda m: m.head.bias.sum(), None),
        (lambda m: m.norm.num_batches_tracked, None),
        (lambda m: m.spare.weight.sum(), None),
    ],
)
def test_code_that_reads_the_parameters_of_sliced_layers(number, message):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)
            self.spare = nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.norm(self.conv(x)).mean((2, 3))) + number(self)

    if message is None:
        assert gk.convert(Reads()).conv.slim_out
        return
    with pytest.raises(ValueError, match=message):
        gk.convert(Reads())


def test_sizes_pass_for_plain_ones_and_are_so_after_conversion():
    seen, cached = [], {}

    def look(x):
        seen.append(x.shape)
        cached.setdefault(x.shape, len(cached))
        assert isinstance(x.shape, torch.Size)
        assert x.shape[1:].numel() == x[0].numel()
        ends = x.shape[:1], x.shape[1:]
        assert ends[0] + ends[1] == x.shape
        return x.reshape((2,) + x.shape[1:])  # noqa: RUF005, what torch.Size does

    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), Apply(look), nn.Conv2d(8, 16, 1), Apply(look)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )
    gk.convert(model, widths=(0.25, 0.5), example=(2, 3, 8, 8))
    assert {size[1] for size in seen} == {2, 4, 6, 8, 11, 16}
    assert seen[-1] != torch.Size((2, 3, 4, 5))
    assert all(size[1] * 2 > 1 and size[1] % 3 in (0, 1, 2) for size in (*seen, *cached))


def test_layers_that_are_told_apart_by_their_channels_in_every_usual_width():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
            self.c, self.head = nn.Conv2d(16, 32, 1), nn.Linear(32, 5)

        def forward(self, x):
            x = self.a(x)
            y = self.b(x)
            return self.head((y + (self.c(x) if x.shape[1] != y.shape[1] else x)).mean((2, 3)))

    assert gk.convert(Shortcut(), widths=(0.5, 0.9)).a.slim_out


def test_an_image_is_guessed_whatever_layer_comes_first():
    class Late(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.head, self.body, self.stem = nn.Linear(8, 2), nn.Conv2d(8, 8, 3), nn.Conv2d(channels, 8, 3)

        def forward(self, x):
            return self.head(self.body(self.stem(x)).mean((2, 3)))

    for channels in (1, 3, 4):
        assert gk.convert(Late(channels)).stem.slim_out


def test_every_width_asked_for_is_tried():
    def pooled(x):
        return x * 2 if int(x.shape[1]) == 3 else x

    gk.convert(classifier(Apply(pooled)))
    with pytest.raises(ValueError, match=r"at width 0\.375 computes"):
        gk.convert(classifier(Apply(pooled)), widths=(0.375, 1.0))


def test_nothing_is_drawn_computed_or_kept():
    model = classifier(nn.BatchNorm2d(8), nn.Dropout(0.5))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    gk.convert(model)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# ---- models that are converted, or in part


def test_converting_twice_says_so_or_adds_widths():
    model = gk.convert(torchvision.models.resnet18(), widths=(0.5, 1.0))
    with pytest.raises(ValueError, match=r"got a ResNet that is already converted; .* takes new widths="):
        gk.convert(model, widths=(0.5, 1.0))
    assert gk.convert(model, widths=(0.25,)).bn1.widths == (0.25, 0.5, 1.0)


def test_a_model_of_plain_and_adjustable_layers():
    model = classifier(gk.FastSlimConv2d(8, 12, 3, divisor=4), nn.BatchNorm2d(12), nn.ReLU(), channels=12)
    gk.convert(model)
    assert (model[1].divisor, model[1].slim_out, model[6].slim_out) == (4, True, False)
    with gk.use_width(model, 0.5):
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    model[6] = nn.Linear(12, 3)
    gk.convert(model)
    with gk.use_width(model, 0.5):
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU(), "needs a network with nn.Conv2d or nn.Linear layers, got ReLU"),
        (nn.Sequential(nn.LazyConv2d(4, 1)), "got '0', which has no parameters yet: run the model once"),
        (nn.DataParallel(nn.Conv2d(3, 4, 1)), "got the model itself, which wraps a model for several devices"),
        (torch.jit.script(nn.Conv2d(3, 4, 1)), "is compiled by torch.jit: convert the model, then script it"),
        (torch.compile(nn.Conv2d(3, 4, 1)), "is compiled by torch.compile: convert the model, then compile it"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 2)).to(torch.complex64),
            "got Conv2d at '0': its weight is of torch.c",
        ),
        (nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 4, 1)), "got '0', which is quantised"),
    ],
)
def test_models_that_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        gk.convert(model)


def test_groups_on_both_sides_are_as_many_whatever_the_divisor():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.Conv2d(32, 24, 1, groups=8), nn.Conv2d(24, 24, 1), nn.Conv2d(24, 2, 1)
    )
    sliced = gk.convert(model, divisor=8)
    assert (sliced[0].divisor, sliced[1].divisor) == (32, 24)
    for width in (0.2, 0.4, 0.6, 0.9):
        with gk.use_width(sliced, width):
            assert sliced(torch.randn(1, 3, 4, 4)).shape == (1, 2, 4, 4)


# ---- threads


def test_threads_convert_while_another_runs_a_model():
    running = torchvision.models.resnet18(num_classes=4).eval()
    x, errors, done = torch.randn(1, 3, 32, 32), [], threading.Event()
    expected = running(x)

    def run(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    def call():
        while not done.is_set():
            assert torch.equal(running(x), expected)

    before = nn.Module.__call__, nn.Module.__getattr__
    caller = threading.Thread(target=run, args=(call,))
    others = [
        threading.Thread(target=run, args=(lambda: gk.convert(torchvision.models.resnet18(num_classes=4)),))
        for _ in range(4)
    ]
    for thread in (caller, *others):
        thread.start()
    for thread in others:
        thread.join()
    done.set()
    caller.join()
    assert errors == []
    assert (nn.Module.__call__, nn.Module.__getattr__) == before


# ---- summary


def test_summary():
    model = gk.convert(classifier(nn.BatchNorm2d(8), LayerScale(1), nn.Conv2d(8, 8, 3, groups=4), channels=8))
    found = gk.summary(model, (1.0, 0.4))
    assert found.widths == (1.0, 0.4)
    assert [tuple(row) for row in found.rows] == [
        ("0", "FastSlimConv2d", ((3, 8), (3, 4)), True, ""),
        ("1", "SlimBatchNorm2d", ((8, 8), (4, 4)), True, ""),
        ("2", "LayerScale", (), False, "not of adjustable width"),
        ("3", "FastSlimConv2d", ((8, 8), (4, 4)), True, ""),
        ("6", "SlimLinear", ((8, 5), (4, 5)), False, "its output leaves the network"),
    ]
    assert "3 -> 8  3 -> 4" in str(found)
    with pytest.raises(ValueError, match="layers of adjustable width"):
        gk.summary(classifier())
