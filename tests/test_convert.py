"""convert: torchvision's models at width 1 are what they were, and run at any width."""

import copy

import pytest
import torch
import torchvision
from torch import nn

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


def test_a_model_that_cannot_be_traced():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(self.a(x)) if x.sum() > 0 else self.b(self.a(-x))

    model = gk.convert(Branching())
    assert (model.a.slim_out, model.b.slim_out) == (True, False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU(), "needs a network with nn.Conv2d or nn.Linear layers, got ReLU"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), "got GroupNorm at '1'"),
    ],
)
def test_networks_that_cannot_be_sliced(model, message):
    with pytest.raises(ValueError, match=message):
        gk.convert(model)


def test_concatenation_is_refused():
    with pytest.raises(ValueError, match="concatenates or splits"):
        gk.convert(torchvision.models.densenet121())
