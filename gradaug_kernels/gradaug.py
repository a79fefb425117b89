"""GradAug: Yang, Zhu and Chen, "GradAug: A New Regularization Method for Deep Neural Networks", NeurIPS 2020.

Each training step runs the full network on a batch, and then a few sub-networks of random width on randomly
transformed copies of it, which learn to give the full network's answer. All gradients are summed:

    z_0 = N(x),  t = softmax(z_0),  L_0 = cross_entropy(z_0, y)
    w_1 = alpha,  w_2 ... w_n ~ Uniform(alpha, 1)
    L_i = KL(t || softmax(N_{w_i}(T_i(x))))
    step along the gradient of L_0 + L_1 + ... + L_n,  t held constant
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .accumulate import AccumulateIntoGrad
from .divergence import kl_divergence
from .sampler import RandomWidth, Sampler


class SubnetDraw(NamedTuple):
    """What was drawn for one sub-network of one step."""

    subnet: Any  # what the sampler drew; of the published one, a width
    resolution: int | None  # pixels, height and width; None is the batch's own
    transform: int | None  # index into GradAug's transforms
    seed: int  # of torch's generators while the transform runs

    @property
    def width(self) -> float:
        """The sub-network's width. Raises: TypeError where it is not one width for all layers."""
        if not isinstance(self.subnet, float | int):
            raise TypeError(f"the sub-network must be one of RandomWidth to have a width, got {self.subnet}")
        return self.subnet


class StepLosses(NamedTuple):
    """What one step computed: scalars and logits on the model's device, detached. Reading one waits for the device."""

    full: Tensor  # [] the full network's loss
    subnets: tuple[Tensor, ...]  # [] each: the sub-networks' losses before their weights, largest sub-network first
    logits: Tensor  # [N, classes] of the full network
    draws: tuple[SubnetDraw, ...]  # largest sub-network first


class GradAug:
    """The GradAug training step, as published by default.

    The sandwich rule with in-place distillation of slimmable networks (Yu and Huang, ICCV 2019) is this step with a
    small min_width and without resolutions and transforms: full, smallest and random widths, trained towards the full
    network's output. Convert the model with those widths that shall have private batch-norm statistics.

    Args:
        model: a classifier of adjustable width, images [N, C, H, W] to logits [N, classes]; see `convert`.
        optimizer: over the parameters of model.
        num_subnets: sub-networks per step, the one of min_width included; 0 is plain training.
        min_width: alpha in (0, 1], the smallest width, of the default sampler.
        sampler: draws the sub-networks: RandomLayerWidth(...), RandomChannels(...), RandomDepth(...); None is
            RandomWidth(min_width).
        resolutions: sizes in pixels, one drawn for each sub-network, to which the square batch is resized
            (bilinear, align_corners); the published settings list the full one too. None leaves the batch as it is.
        transforms: callables from a batch of images [N, C, H, W] to one, one drawn for each sub-network and applied
            before the resize. They may use torch's global generators.
        distinct_transforms: give the sub-networks of a step different transforms, of which there must be enough.
        criterion: the full network's loss of (logits, targets).
        subnet_loss: of (teacher probabilities [N, classes], logits), such as `alpha_divergence`; "cross_entropy" is
            `criterion` with the targets, as for the full network.
        temperature: T > 0 of the sub-networks' loss: T^2 subnet_loss(softmax(z_0 / T), z_i / T), after Hinton et al.
            2015 (arXiv 1503.02531), so that its gradient keeps its size. 1 as published.
        subnet_weight: factor of the sub-networks' losses, one for all or one each, largest sub-network first.
        reduction: "sum" adds the losses, as published; "mean" divides that by their number.
        scheduler: a learning-rate scheduler to step once per call.
        autocast_dtype: run the model in torch.autocast with this dtype; None does not.
        accumulate: let kernels add weight gradients straight into `weight.grad` (`AccumulateIntoGrad`). False leaves
            all gradients to autograd, as weights with hooks always are.
        seed: of the draws. One generator makes them all, so that a run can be repeated and resumed (`state_dict`).

    Raises:
        ValueError: for settings outside their range, or a model that the sampler cannot sample.

    Example:
        >>> step = GradAug(model, optimizer, num_subnets=3, min_width=0.9, resolutions=(224, 192, 160, 128))
        >>> for images, targets in loader:
        ...     losses = step(images, targets)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        num_subnets: int = 3,
        min_width: float = 0.8,
        sampler: Sampler | None = None,
        resolutions: Sequence[int] | None = None,
        transforms: Sequence[Callable[[Tensor], Tensor]] = (),
        distinct_transforms: bool = False,
        criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        subnet_loss: Callable[[Tensor, Tensor], Tensor] | str = kl_divergence,
        temperature: float = 1.0,
        subnet_weight: float | Sequence[float] = 1.0,
        reduction: str = "sum",
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        autocast_dtype: torch.dtype | None = None,
        accumulate: bool = True,
        seed: int = 0,
    ):
        if num_subnets < 0:
            raise ValueError(f"num_subnets must be at least 0, got {num_subnets}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        if resolutions is not None and (len(resolutions) == 0 or min(resolutions) < 1):
            raise ValueError(f"resolutions must be positive numbers of pixels, got {tuple(resolutions)}")
        if distinct_transforms and len(transforms) < num_subnets:
            raise ValueError(f"transforms must be at least {num_subnets} to be distinct, got {len(transforms)}")
        if not callable(subnet_loss) and subnet_loss != "cross_entropy":
            raise ValueError(f"subnet_loss must be callable or 'cross_entropy', got {subnet_loss!r}")
        if not temperature > 0 or (temperature != 1 and subnet_loss == "cross_entropy"):
            raise ValueError(f"temperature must be positive, and 1 for subnet_loss 'cross_entropy', got {temperature}")
        subnet_weights = (subnet_weight,) * num_subnets if isinstance(subnet_weight, float | int) else subnet_weight
        if len(subnet_weights) != num_subnets or min(subnet_weights, default=0) < 0:
            raise ValueError(f"subnet_weight must be one or {num_subnets} numbers of at least 0, got {subnet_weight}")
        self.model = model
        self.optimizer = optimizer
        self.num_subnets = num_subnets
        self.sampler = RandomWidth(min_width) if sampler is None else sampler
        self.resolutions = resolutions
        self.transforms = tuple(transforms)
        self.distinct_transforms = distinct_transforms
        self.criterion = criterion
        self.subnet_loss = subnet_loss
        self.temperature = temperature
        self.loss_weight = 1.0 if reduction == "sum" else 1.0 / (1 + num_subnets)
        self.subnet_weights = tuple(self.loss_weight * weight for weight in subnet_weights)
        self.scheduler = scheduler
        self.autocast_dtype = autocast_dtype
        self.accumulation = AccumulateIntoGrad(model, autocast_dtype) if accumulate else None
        self.generator = torch.Generator().manual_seed(seed)
        if num_subnets > 0:
            self.sampler.bind(model, num_subnets)

    def __call__(self, images: Tensor, targets: Tensor, draws: Sequence[SubnetDraw] | None = None) -> StepLosses:
        """One step: all backward passes, the optimizer's step and the scheduler's.

        Args:
            images: [N, C, H, W], floating point, on the model's device.
            targets: what `criterion` takes: class indices [N] or probabilities [N, classes].
            draws: those of an earlier step, to repeat it; None draws anew.
        """
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point (normalised), got {images.dtype}")
        if self.resolutions is not None and images.shape[-1] != images.shape[-2]:
            raise ValueError(f"images must be square to be resized, got {images.shape[-2]} x {images.shape[-1]} pixels")
        draws = tuple(self.draw() if draws is None else draws)
        self.optimizer.zero_grad(set_to_none=self.accumulation is None)
        if self.accumulation is not None:
            self.accumulation.begin_step()

        logits, full_loss = self._pass(None, images, lambda z: self.criterion(z, targets), self.loss_weight, not draws)
        teacher = F.softmax(self._in_full_precision(logits) / self.temperature, dim=1)

        def subnet_loss(z):
            if self.subnet_loss == "cross_entropy":
                return self.criterion(z, targets)
            return self.temperature**2 * self.subnet_loss(teacher, z / self.temperature)

        subnet_losses = []
        with self._full_network_afterwards():
            subnets = zip(draws, self._transformed(images, draws), self.subnet_weights, strict=True)
            for i, (draw, subnet_images, weight) in enumerate(subnets, 1):
                _, loss = self._pass(draw.subnet, subnet_images, subnet_loss, weight, i == len(draws))
                subnet_losses.append(loss)

        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return StepLosses(full_loss, tuple(subnet_losses), logits, draws)

    def draw(self) -> tuple[SubnetDraw, ...]:
        """The sub-networks of one step, largest first, each with a resolution, a transform and a seed."""
        if self.num_subnets == 0:
            return ()
        distinct = torch.randperm(len(self.transforms), generator=self.generator) if self.distinct_transforms else None
        return tuple(
            SubnetDraw(
                subnet,
                self._choice(self.resolutions),
                self._choice(range(len(self.transforms))) if distinct is None else int(distinct[i]),
                self._seed(),
            )
            for i, subnet in enumerate(self.sampler.draw(self.num_subnets, self.generator))
        )

    def state_dict(self) -> dict:
        """The state of the draws' generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Continue the draws where `state_dict` was taken."""
        self.generator.set_state(state["generator"])

    def _pass(self, subnet: Any, images: Tensor, loss_of: Callable[[Tensor], Tensor], weight: float, last: bool):
        """Forward and backward of one network, None being the full one; its logits and loss, detached.

        DistributedDataParallel exchanges gradients in the last pass of a step only, which must be autograd's then.
        """
        if self.num_subnets > 0:
            self.sampler.select(subnet)
        distributed = hasattr(self.model, "no_sync")
        with (
            self.model.no_sync() if distributed and not last else nullcontext(),
            nullcontext() if self.accumulation is None or (distributed and last) else self.accumulation,
        ):
            with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                logits = self.model(images)
            loss = loss_of(self._in_full_precision(logits))
            (loss * weight).backward()
        return logits.detach(), loss.detach()

    def _in_full_precision(self, logits: Tensor) -> Tensor:
        return logits if self.autocast_dtype is None else logits.float()

    @contextmanager
    def _full_network_afterwards(self):
        try:
            yield
        finally:
            if self.num_subnets > 0:
                self.sampler.select(None)

    def _transformed(self, images: Tensor, draws: Sequence[SubnetDraw]):
        """The sub-networks' images, each made when it is asked for; batches that are only resized are made once."""
        resized: dict[int | None, Tensor] = {None: images, images.shape[-1]: images}
        for draw in draws:
            if draw.transform is not None:
                with _seeded(draw.seed, images.device):
                    transformed = self.transforms[draw.transform](images)
                yield transformed if draw.resolution is None else _resize(transformed, draw.resolution)
                continue
            if draw.resolution not in resized:
                resized[draw.resolution] = _resize(images, draw.resolution)
            yield resized[draw.resolution]

    def _choice(self, options: Sequence | None):
        if not options:
            return None
        return options[int(torch.randint(len(options), (), generator=self.generator))]

    def _seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self.generator))


def _resize(images: Tensor, resolution: int) -> Tensor:
    return F.interpolate(images, (resolution, resolution), mode="bilinear", align_corners=True)


@contextmanager
def _seeded(seed: int, device: torch.device):
    """In the with-block torch's global generators start from `seed`; afterwards they are as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
