"""The arithmetic of a training step, counted: what "equal compute" means in `gradaug compare`."""

import torch
from torch import nn

from ..data import ImageData
from ..recipes.build import build_network, build_optimizer, build_step
from ..recipes.config import Config


def multiply_adds(model: nn.Module, images: torch.Tensor) -> int:
    """Multiply-adds of the convolutions and linear layers in a forward pass, per image.

    model: as its width is set, in training mode. images: [N, C, H, W], N at least 2.
    """
    counted = []

    def count(layer, arguments, output):
        inputs = arguments[0].shape[1]  # channels or features
        if isinstance(layer, nn.Linear):
            per_output = inputs
        elif layer.groups > 1:
            per_output = layer.weight[0].numel()  # a sub-network drops whole groups
        else:
            per_output = inputs * layer.kernel_size[0] * layer.kernel_size[1]
        counted.append(output.numel() * per_output)

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return sum(counted) // len(images)


def step_cost(config: Config, images: ImageData, draws: int = 32) -> tuple[float, float]:
    """Multiply-adds per image, forward, of the plain step and of the configured step; backward is twice that for both.

    The second is the mean over `draws` draws of the sub-networks and resolutions, from the configuration's seed.
    """
    model = build_network(config, len(images.classes), images.channels)
    step = build_step(config, model, build_optimizer(config, model), images)
    batch = {}

    def cost(resolution):
        size = resolution or images.size
        if size not in batch:
            batch[size] = torch.zeros(2, images.channels, size, size)
        return multiply_adds(model, batch[size])

    full = cost(None)
    subnets = 0
    for _ in range(draws if step.num_subnets else 0):
        for draw in step.draw():
            step.sampler.select(draw.subnet)
            subnets += cost(draw.resolution)
        step.sampler.select(None)
    return float(full), full + subnets / draws
