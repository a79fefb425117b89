"""Activation checkpointing and saved-tensor hooks: the gradients are those without."""

import functools
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import gradaug_kernels as gk

NHWC = torch.channels_last


def mobilenet_block():
    return torchvision.models.mobilenetv2.InvertedResidual(16, 16, 1, 6)


def bottleneck():
    down = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))
    return torchvision.models.resnet.Bottleneck(16, 8, downsample=down)


def basic_block():
    return torchvision.models.resnet.BasicBlock(16, 16)


def ends_in_linear():
    return nn.Sequential(
        nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(1), nn.Linear(8, 5)
    )


BLOCKS = {
    "mobilenet": lambda: gk.convert(mobilenet_block()),
    "mobilenet, recompute": lambda: gk.convert(mobilenet_block(), recompute=True),
    "bottleneck": lambda: gk.convert(bottleneck()),
    "bottleneck, recompute": lambda: gk.convert(bottleneck(), recompute=True),
    "bottleneck, unfused": lambda: gk.convert(bottleneck(), fuse_chains=False),
    "basic": lambda: gk.convert(basic_block()),
    "convolution, norm and classifier": lambda: gk.convert(ends_in_linear()),
    "a convolution": lambda: gk.FastSlimConv2d(16, 8, 3),
    "a linear layer": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), gk.SlimLinear(16, 3)),
    "a batch norm": lambda: gk.SlimBatchNorm2d(16),
}


@pytest.fixture(params=BLOCKS)
def block(request):
    torch.manual_seed(0)
    return BLOCKS[request.param]()


@pytest.fixture(params=["C++", "Python"])
def formulas(request, monkeypatch):
    """Which autograd formulas record the graph."""
    if request.param == "Python":
        for name in ("slim_conv2d", "slim_linear", "slim_batch_norm", "slim_norm_conv2d"):
            module = sys.modules[f"gradaug_kernels.ops.{name}"]
            for attribute in ("_apply", "_apply_into_buffer"):
                if hasattr(module, attribute):
                    monkeypatch.setattr(module, attribute, getattr(module, attribute).in_python)


def gradients(block, run, dtype=None):
    """y and the gradients of a batch and of all parameters."""
    block.zero_grad()
    x = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(1)).to(memory_format=NHWC).requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = run(block, x)
        loss = y.float().square().sum()
    loss.backward()
    return [y, x.grad, *(p.grad for p in block.parameters())]


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def plain(block, x):
    return block(x)


def select_convolutions(ctx, op, *args, **kwargs):
    kept = op in (torch.ops.gradaug.slim_conv2d.default, torch.ops.gradaug.slim_norm_conv2d.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def save_on_cpu(block, x):
    with torch.autograd.graph.save_on_cpu():
        return block(x)


def hooked(block, x):
    """Saved as NumPy would: the tensors that come back are others."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.detach().clone(), t.stride()), lambda p: p[0].clone()):
        return block(x)


selective = functools.partial(create_selective_checkpoint_contexts, select_convolutions)
WAYS = {
    "non-reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "selective": lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=selective),
    "nested": lambda block, x: checkpoint(lambda x: checkpoint(block, x, use_reentrant=False), x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "saved on the CPU": save_on_cpu,
    "saved by hooks": hooked,
}


@pytest.mark.parametrize(("way", "dtype"), [*((way, None) for way in WAYS), ("non-reentrant", torch.bfloat16)])
@pytest.mark.usefixtures("formulas")
def test_gradients_are_those_without(block, way, dtype):
    assert_equal(gradients(block, WAYS[way], dtype), gradients(block, plain, dtype))


@pytest.mark.parametrize("early_stop", [True, False])
def test_the_recomputation_stops_early_or_runs_to_the_end(block, early_stop):
    calls = []

    def run(block, x):
        return checkpoint(lambda x: counted(block(x)), x, use_reentrant=False)

    def counted(y):
        calls.append(1)
        return y

    with set_checkpoint_early_stop(early_stop):
        found = gradients(block, run)
    assert_equal(found, gradients(block, plain))
    assert early_stop or len(calls) == 2


def test_a_model_in_segments():
    model = gk.convert(nn.Sequential(*(basic_block() for _ in range(4))))
    run = lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=False)  # noqa: E731
    assert_equal(gradients(model, run), gradients(model, plain))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("way", ["non-reentrant", "selective", "reentrant"])
@pytest.mark.parametrize("name", ["mobilenet", "bottleneck, recompute", "a convolution", "a linear layer"])
@pytest.mark.usefixtures("formulas")
def test_accumulation_counts_a_gradient_once(name, way, dtype):
    """What is computed again in the backward pass uses the same weights and buffers, and adds nothing by itself."""
    torch.manual_seed(0)
    block = BLOCKS[name]()
    accumulation = gk.AccumulateIntoGrad(block, dtype)
    found = []
    for run in (plain, WAYS[way]):
        for p in block.parameters():
            p.grad = torch.zeros_like(p)
        accumulation.begin_step()
        for width in (1.0, 0.5) if isinstance(block, gk.FastSlimConv2d) else (1.0, 1.0):
            x = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(1)).to(memory_format=NHWC)
            x.requires_grad_()
            with gk.use_width(block, width), accumulation:
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    y = run(block, x)
                y.float().square().sum().backward()
        found.append([x.grad, *(p.grad for p in block.parameters())])
    assert_equal(*found)


def test_a_backward_pass_outside_of_the_accumulation_is_refused():
    """The copies of the weights are then not those of the forward pass, which checkpoint notices."""
    layer = gk.FastSlimConv2d(16, 8, 3)
    accumulation = gk.AccumulateIntoGrad(layer, torch.bfloat16)
    accumulation.begin_step()
    with accumulation, torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(layer, torch.randn(2, 16, 5, 5), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"[Rr]ecomputed"):
        y.float().sum().backward()
