"""Additions to the optimizer's step: an exponential moving average of the weights, and noise on the gradients."""

import copy
from collections.abc import Callable

import torch
from torch import nn


class WeightAverage:
    """A copy of a model whose state is the exponential moving average of the model's.

    Update n, counted from 1, keeps min(decay, (1 + n) / (10 + n)) of the average, so that the first weights are soon
    forgotten. Batch norm's running statistics are averaged like weights, counters are copied.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model`, after a step of its optimizer."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, values = self.model.state_dict(), model.state_dict()
        values = {name: values[name] for name in averages}  # calibration may have given the model more
        floating = [name for name, value in values.items() if value.is_floating_point()]
        torch._foreach_lerp_([averages[name] for name in floating], [values[name] for name in floating], 1 - decay)
        for name in values.keys() - set(floating):
            averages[name].copy_(values[name])


def add_gradient_noise(optimizer: torch.optim.Optimizer, eta: float, iteration: Callable[[], int]) -> None:
    """Add Normal(0, eta / (1 + t)^0.55) to all gradients before each step t of `optimizer`, counted from 0.

    Neelakantan et al. 2015 (arXiv 1511.06807). iteration: returns t. Draws from torch's global generators.
    """

    def add(optimizer, args, kwargs):
        deviation = (eta / (1 + iteration()) ** 0.55) ** 0.5
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(torch.randn_like(parameter.grad), alpha=deviation)

    optimizer.register_step_pre_hook(add)
