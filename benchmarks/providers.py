"""Who runs a GradAug step: ours, and the strongest that a user of stock PyTorch could have.

ours      gradaug_kernels.convert and GradAug
recompute the same with convert(recompute=True), which keeps less and computes some convolutions twice
eager     plain PyTorch (eager.py): channels_last, autocast, a large cuDNN plan cache and no benchmark mode
compile   torch.compile of eager's model, with as many graphs as there are widths
eager8    eager with channels rounded to multiples of 8
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

import gradaug_kernels as gk

from .cases import DTYPES, Network
from .eager import eager_slimmable, eager_step

PROVIDERS = ("ours", "recompute", "eager", "compile", "eager8")
OURS = ("ours", "recompute")
GRAPHS = 64  # torch.compile falls back to eager beyond its limit of graphs, by default 8


def autocast_dtype(dtype: str) -> torch.dtype | None:
    return None if dtype == "fp32" else DTYPES[dtype]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)


class StepRun:
    """One provider's model and optimizer on a fixed batch; calling it runs one step and returns the losses."""

    def __init__(self, provider: str, net: Network, dtype: str, device: torch.device):
        self.net = net
        self.images, self.targets = net.images_and_targets(device)
        self.autocast_dtype = autocast_dtype(dtype)
        model = net.build(device)
        if provider in OURS:
            model = gk.convert(model, recompute=provider == "recompute")
            self.model = model.to(memory_format=torch.channels_last)
        else:
            self.model = eager_slimmable(model, 8 if provider == "eager8" else 1).to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model)
        if provider == "compile":
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = GRAPHS
            self.model.compile()
        self.copies_of_weights: Callable[[], Sequence[Tensor]] = tuple  # those that stay from one step to the next
        self._step = self._ours() if provider in OURS else self._eager

    def __call__(self, subnets: Sequence[tuple[float, int]] | None = None) -> list[Tensor]:
        """subnets: [(width, pixels)], those of the network's case by default."""
        return self._step(self.net.subnets if subnets is None else subnets)

    def _ours(self) -> Callable:
        step = gk.GradAug(
            self.model,
            self.optimizer,
            num_subnets=len(self.net.subnets),
            min_width=min(width for width, _ in self.net.subnets),
            resolutions=sorted({pixels for _, pixels in self.net.subnets}),
            autocast_dtype=self.autocast_dtype,
        )
        self.copies_of_weights = lambda: step.accumulation.copies

        def run(subnets):
            draws = [gk.SubnetDraw(width, pixels, None, 0) for width, pixels in subnets]
            losses = step(self.images, self.targets, draws)
            return [losses.full, *losses.subnets]

        return run

    def _eager(self, subnets):
        return eager_step(self.model, self.optimizer, self.images, self.targets, subnets, self.autocast_dtype)


def step_results(losses: Sequence[Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What the gate compares after a model's first step, in float64.

    The classifier's gradient depends on forward passes alone, so that it is sharp where rounding blurs the others.
    """
    gradients = [p.grad.flatten().double() for p in model.parameters()]
    return {
        "losses": torch.stack(list(losses)),
        "gradients": torch.cat(gradients),
        "classifier gradient": torch.cat(gradients[-2:]),
    }


@lru_cache(maxsize=1)
def reference_results(net: Network, device: torch.device) -> dict[str, Tensor]:
    """The same of plain PyTorch in float64."""
    model = eager_slimmable(net.build(device)).double()
    images, targets = net.images_and_targets(device)
    losses = eager_step(model, torch.optim.SGD(model.parameters(), 0.01), images.double(), targets, net.subnets)
    return step_results(losses, model)
