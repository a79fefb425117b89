"""fuse: which chains are found, that they compute the same, and that modules stay what they were."""

import copy
import io

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import gradaug_kernels as gk


def chain_counts(model):
    chains = list(gk.fused_chains(model).values())
    return {chain: chains.count(chain) for chain in set(chains)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", {"batch_norm + relu": 9, "batch_norm + add + relu": 8, "batch_norm": 3}),
        ("resnet50", {"batch_norm + relu": 33, "batch_norm + add + relu": 16, "batch_norm": 4}),
        ("mobilenet_v2", {"batch_norm": 52}),  # ReLU6, and adds outside of the module that has the batch norm
    ],
)
def test_chains_of_torchvision_models(name, expected):
    assert chain_counts(gk.convert(torchvision.models.get_model(name))) == expected


def test_fused_equals_unfused():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).double()
    fused, plain = gk.convert(copy.deepcopy(model)), gk.convert(copy.deepcopy(model), fuse_chains=False)
    assert chain_counts(plain) == {"batch_norm": 20}
    x = torch.randn(2, 3, 32, 32, dtype=torch.double)
    for width in (1.0, 0.8):
        for m in (fused, plain):
            m.zero_grad()
            with gk.use_width(m, width):
                m(x).square().sum().backward()
        for (name, p), q in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
            torch.testing.assert_close(q[1].grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)
    for (name, value), other in zip(plain.state_dict().items(), fused.state_dict().items(), strict=True):
        torch.testing.assert_close(other[1], value, rtol=1e-9, atol=1e-12, msg=name)


def test_modules_keep_their_class_and_survive_copies_and_pickles():
    model = gk.convert(torchvision.models.resnet18(num_classes=10)).eval()
    assert isinstance(model, torchvision.models.ResNet)
    assert isinstance(model.layer1[0], torchvision.models.resnet.BasicBlock)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(1, 3, 32, 32)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert chain_counts(other) == chain_counts(model)
        assert torch.equal(other(x), model(x))
        other.layer1[0].bn1.weight.data.zero_()
        assert not torch.equal(other(x), model(x)), "a copy runs its own layers"


def test_a_slice_of_a_fused_sequential():
    model = gk.fuse(nn.Sequential(gk.FastSlimConv2d(3, 4, 1), gk.SlimBatchNorm2d(4), nn.ReLU()))
    assert gk.fused_chains(model) == {"1": "batch_norm + relu"}
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model[:2](x), model[1](model[0](x)))
    assert torch.equal(model(x), model[:2](x).relu())


class Block(nn.Module):
    """One batch norm, followed by what a test passes."""

    def __init__(self, tail):
        super().__init__()
        self.norm, self.relu, self.tail = gk.SlimBatchNorm2d(4), nn.ReLU(inplace=True), tail

    def forward(self, x):
        return self.tail(self, self.norm(x), x)


TAILS = {
    "relu module": (lambda m, y, x: m.relu(y), "batch_norm + relu"),
    "relu function": (lambda m, y, x: F.relu(y, inplace=True), "batch_norm + relu"),
    "relu method": (lambda m, y, x: y.relu_(), "batch_norm + relu"),
    "add": (lambda m, y, x: x + y, "batch_norm + add"),
    "add, relu": (lambda m, y, x: torch.relu(torch.add(y, x)), "batch_norm + add + relu"),
    "add a number": (lambda m, y, x: y + 1.0, "batch_norm"),
    "twice itself": (lambda m, y, x: (y + y).relu(), "batch_norm"),
    "scaled add": (lambda m, y, x: torch.add(y, x, alpha=2), "batch_norm"),
    "broadcast add": (lambda m, y, x: (y + x.mean((2, 3), keepdim=True)).relu(), "batch_norm + add + relu"),
    "used twice": (lambda m, y, x: y.relu() * y, "batch_norm"),
    "training only": (lambda m, y, x: y.relu() if m.training else y, "batch_norm"),
    "data-dependent": (lambda m, y, x: y.relu() if y.sum() > 0 else y, "batch_norm"),
}


@pytest.mark.parametrize(("tail", "chain"), TAILS.values(), ids=TAILS.keys())
def test_what_follows_a_batch_norm(tail, chain):
    plain = Block(tail)
    fused = gk.fuse(Block(tail))
    assert gk.fused_chains(fused) == {"norm": chain}
    x = torch.randn(3, 4, 5, 5)
    for mode in (True, False):
        torch.testing.assert_close(fused.train(mode)(x), plain.train(mode)(x))
