"""From a configuration to the network, the optimizer and the training step."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import data, models
from ..data import ImageData
from ..gradaug.sampler import RandomChannels
from ..gradaug.step import GradAug
from ..slim.calibrate import calibrate
from ..slim.convert import convert
from ..slim.width import check_width
from .choices import SAMPLERS, SUBNET_LOSSES
from .config import Config
from .transforms import named_transform


def load_images(config: Config) -> tuple[ImageData, str]:
    """The data set of [data], and which images its `test` are: "test" or "held-out"."""
    images = data.load(config.data.name, config.data.root or None, **config.data.options)
    evaluated_on = "test"
    if config.data.holdout:
        images, evaluated_on = images.hold_out(config.data.holdout, config.train.seed), "held-out"
    return images.part(config.data.fraction, config.data.per_class, config.data.part_seed), evaluated_on


def train_loader(config: Config, images: ImageData, device: torch.device, augment: bool = True) -> Iterable:
    """Batches of the training images in the order of train.seed."""
    return images.train.loader(
        config.train.batch_size,
        train=True,
        augment=augment,
        seed=config.train.seed,
        device=device,
        workers=config.data.workers,
    )


def test_loader(config: Config, images: ImageData, device: torch.device) -> Iterable:
    """Batches of the images to evaluate, in their stored order."""
    return images.test.loader(config.evaluate.batch_size, device=device, workers=config.data.workers)


def calibrate_widths(
    config: Config, model: nn.Module, widths: Sequence[float], images: ImageData, device: torch.device
) -> None:
    """Give widths the statistics of unaugmented training images, of as many batches as [evaluate] says."""
    loader = train_loader(config, images, device, augment=False)
    calibrate(model, widths, loader, config.evaluate.calibration_batches or None)


def build_network(config: Config, num_classes: int, channels: int) -> nn.Module:
    """The network of [model] with the layers of [regularize], of adjustable width.

    It has private statistics for the widths for which training updates them.
    """
    model = models.build_model(config.model.name, num_classes, channels, **config.model.options)
    chosen = config.regularize
    if chosen.dropout > 0 or chosen.drop_block > 0 or chosen.stochastic_depth > 0:
        from ..models.regularize import regularise  # with torchvision, which other runs can do without

        names = ("dropout", "drop_block", "drop_block_size", "stochastic_depth")
        regularise(model, **{name: getattr(chosen, name) for name in names})
    return convert(model, private_widths(config), config.gradaug.divisor)


def private_widths(config: Config) -> tuple[float, ...]:
    """The widths whose batch-norm statistics are updated in training, width 1 included."""
    gradaug = config.gradaug
    if not gradaug.private_statistics or gradaug.num_subnets == 0:
        return (1.0,)
    return (*sorted({check_width(width) for width in (gradaug.min_width, *gradaug.widths)} - {1.0}), 1.0)


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """SGD as [optimizer] says."""
    return torch.optim.SGD(
        model.parameters(),
        lr=config.optimizer.lr,
        momentum=config.optimizer.momentum,
        nesterov=config.optimizer.nesterov,
        weight_decay=config.optimizer.weight_decay,
    )


def build_step(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, images: ImageData, **options: Any
) -> GradAug:
    """The step of [gradaug]. options: further arguments of GradAug, such as scheduler and autocast_dtype."""
    gradaug = config.gradaug
    weights = gradaug.subnet_weight
    return GradAug(
        model,
        optimizer,
        num_subnets=gradaug.num_subnets,
        sampler=_sampler(gradaug),
        resolutions=gradaug.resolutions or None,
        transforms=[
            named_transform(name, images.size, images.train.mean, images.train.std) for name in gradaug.transforms
        ],
        criterion=functools.partial(F.cross_entropy, label_smoothing=config.regularize.label_smoothing),
        distinct_transforms=gradaug.distinct_transforms,
        subnet_loss=SUBNET_LOSSES[gradaug.subnet_loss].function,
        temperature=gradaug.temperature,
        subnet_weight=weights[0] if len(weights) == 1 else weights,
        reduction=gradaug.reduction,
        seed=config.train.seed,
        **options,
    )


def _sampler(gradaug):
    sampler = SAMPLERS[gradaug.sampler](gradaug)
    return RandomChannels(sampler) if gradaug.channels == "random" else sampler
