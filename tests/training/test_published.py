"""One GradAug step of each published setting, two images on the CPU."""

import pytest
import torch

import gradaug_kernels as gk
from gradaug_kernels.data import ImageData, ImageTensors
from gradaug_kernels.recipes.build import build_network, build_optimizer, build_step
from gradaug_kernels.train import load_config


@pytest.mark.parametrize(
    ("preset", "sampler"),
    [
        ("imagenet-resnet50", gk.RandomWidth),
        ("cifar100-wrn-28-10", gk.RandomWidth),
        ("cifar100-pyramidnet-200", gk.RandomWidth),
        ("cifar10-resnet110", gk.RandomDepth),
        ("cifar100-resnet110", gk.RandomDepth),
    ],
)
def test_one_step(preset, sampler):
    """The network of the preset, its sub-networks and its optimizer; its resolutions at half their size."""
    config = load_config(preset)
    halved = [size // 2 for size in config.gradaug.resolutions]
    config = load_config(preset, {"gradaug.resolutions": halved})
    size = halved[0]
    pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    split = ImageTensors(pixels, torch.tensor([3, 7]), (0.5,) * 3, (0.25,) * 3)
    images = ImageData("random", "drawn", tuple("0123456789"), 3, size, split, split)
    torch.manual_seed(0)
    model = build_network(config, 10, 3)
    step = build_step(config, model, build_optimizer(config, model), images)
    assert type(step.sampler) is sampler
    before = model.fc.weight.detach().clone()
    losses = step(torch.randn(2, 3, size, size), split.targets)
    assert len(losses.subnets) == 3
    assert all(loss.isfinite() for loss in (losses.full, *losses.subnets))
    assert not torch.equal(model.fc.weight, before)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
