"""torch.compile of converted models: one graph for the full network, one for all sub-networks, no breaks."""

import pytest
import torch
from torch import nn

import gradaug_kernels as gk


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def model(recompute=False):
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    grouped = [nn.Conv2d(16, 16, 3, groups=16, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 1)]
    last = [nn.BatchNorm2d(24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)]
    return gk.convert(nn.Sequential(*stem, *grouped, *last), recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_all_widths_share_one_recompilation(recompute):
    m = model(recompute)
    inner = "batch_norm + relu + convolution"
    last = "recomputed convolution + batch_norm" if recompute else "batch_norm"
    assert gk.fused_chains(m) == {"1": inner, "4": inner, "7": last}
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    for width in (1.0, 0.93, 0.81, 0.7, 0.55, 0.6, 1.0):
        x = torch.randn(2, 3, 8, 8)
        results = []
        for network in (compiled, m):
            m.zero_grad()
            with gk.use_width(m, width):
                network(x).square().sum().backward()
            results.append([p.grad for p in m.parameters()])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_step_equals_eager_step(recompute):
    images, targets = torch.randn(4, 3, 12, 12), torch.arange(4)
    losses = []
    for compiled in (False, True):
        m = model(recompute)
        network = torch.compile(m, backend="aot_eager", fullgraph=True) if compiled else m
        step = gk.GradAug(network, torch.optim.SGD(m.parameters(), 0.1), resolutions=(12, 10))
        losses.append([torch.stack((r.full, *r.subnets)) for r in (step(images, targets) for _ in range(3))])
    torch.testing.assert_close(torch.stack(losses[1]), torch.stack(losses[0]), rtol=1e-4, atol=1e-5)


class EveryLayer(nn.Module):
    """Convolutions that the norm after, or before, is fused with, and one alone; linear layers of either kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU()]
        last = [nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)]
        self.features = nn.Sequential(*layers, *last, nn.Flatten())
        self.hidden, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.hidden(self.features(x)).relu())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("part", ["model", "features", "head"])
def test_compiled_code_adds_to_the_gradients_of_every_step(part, backend, recompute):
    images, targets = torch.randn(4, 3, 12, 12), torch.arange(4)
    models = [gk.convert(EveryLayer(), recompute=recompute) for _ in range(2)]
    steps = []
    for m, accumulate in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
        network = m
        if accumulate and part == "model":
            network = torch.compile(m, backend=backend)
        elif accumulate:
            getattr(m, part).compile(backend=backend)
        steps.append(gk.GradAug(network, optimizer, num_subnets=2, min_width=0.5, accumulate=accumulate))
    for _ in range(3):
        for step in steps:
            step(images, targets)
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert p.grad is not None, name
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def test_private_widths_make_a_graph_each():
    """And one for all others together: torch._dynamo.config.recompile_limit must be as many."""
    widths = [round(0.5 + 0.05 * i, 2) for i in range(11)]
    m = gk.convert(nn.Sequential(nn.Conv2d(3, 20, 1), nn.BatchNorm2d(20), nn.ReLU()), widths=widths)
    compiled = torch.compile(m, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=len(widths) + 1):
        for width in (*widths, 0.53, 0.71, *widths):
            with gk.use_width(m, width):
                compiled(torch.randn(2, 3, 8, 8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(widths) + 1
    assert m[1].num_batches_tracked_0_5 == m[1].num_batches_tracked == 2
