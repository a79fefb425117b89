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
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .accumulate import AccumulateIntoGrad
from .width import check_width, set_width


class SubnetDraw(NamedTuple):
    """What was drawn for one sub-network of one step."""

    width: float
    resolution: int | None  # pixels, height and width; None is the batch's own
    transform: int | None  # index into GradAug's transforms
    seed: int  # of torch's generators while the transform runs


class StepLosses(NamedTuple):
    """What one step computed: scalars and logits on the model's device, detached. Reading one waits for the device."""

    full: Tensor  # [] the full network's loss
    subnets: tuple[Tensor, ...]  # [] each: the sub-networks' losses, widest first
    logits: Tensor  # [N, classes] of the full network
    draws: tuple[SubnetDraw, ...]  # widest first


class GradAug:
    """The GradAug training step, as published by default.

    Args:
        model: a classifier of adjustable width, images [N, C, H, W] to logits [N, classes]; see `convert`.
        optimizer: over the parameters of model.
        num_subnets: sub-networks per step, the one of min_width included; 0 is plain training.
        min_width: alpha in (0, 1], the smallest width.
        resolutions: sizes in pixels, one drawn for each sub-network, to which the square batch is resized
            (bilinear, align_corners); the published settings list the full one too. None leaves the batch as it is.
        transforms: callables from a batch of images [N, C, H, W] to one, one drawn for each sub-network and applied
            before the resize. They may use torch's global generators.
        criterion: the full network's loss of (logits, targets).
        reduction: "sum" adds the losses, as published; "mean" divides that by their number.
        scheduler: a learning-rate scheduler to step once per call.
        autocast_dtype: run the model in torch.autocast with this dtype; None does not.
        accumulate: let kernels add weight gradients straight into `weight.grad` (`AccumulateIntoGrad`). False leaves
            all gradients to autograd, as weights with hooks always are.
        seed: of the draws. One generator makes them all, so that a run can be repeated and resumed (`state_dict`).

    Raises:
        ValueError: for settings outside their range.

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
        resolutions: Sequence[int] | None = None,
        transforms: Sequence[Callable[[Tensor], Tensor]] = (),
        criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
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
        self.model = model
        self.optimizer = optimizer
        self.num_subnets = num_subnets
        self.min_width = check_width(min_width)
        self.resolutions = resolutions
        self.transforms = tuple(transforms)
        self.criterion = criterion
        self.loss_weight = 1.0 if reduction == "sum" else 1.0 / (1 + num_subnets)
        self.scheduler = scheduler
        self.autocast_dtype = autocast_dtype
        self.accumulation = AccumulateIntoGrad(model, autocast_dtype) if accumulate else None
        self.generator = torch.Generator().manual_seed(seed)
        if num_subnets > 0:
            set_width(model, 1.0)  # a model without adjustable layers is refused here, not in the first step

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

        logits, full_loss = self._pass(images, 1.0, lambda z: self.criterion(z, targets), last=not draws)
        teacher = F.softmax(logits, dim=1)

        subnet_losses = []
        for i, (draw, subnet_images) in enumerate(zip(draws, self._transformed(images, draws), strict=True)):
            _, loss = self._pass(
                subnet_images, draw.width, lambda z: kl_divergence(teacher, z), last=i == len(draws) - 1
            )
            subnet_losses.append(loss)
        if draws:
            set_width(self.model, 1.0)

        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return StepLosses(full_loss, tuple(subnet_losses), logits, draws)

    def draw(self) -> tuple[SubnetDraw, ...]:
        """The sub-networks of one step, widest first: min_width and num_subnets - 1 uniform draws above it."""
        if self.num_subnets == 0:
            return ()
        uniform = torch.rand(self.num_subnets - 1, generator=self.generator, dtype=torch.float64)
        widths = [self.min_width, *(self.min_width + (1 - self.min_width) * uniform).tolist()]
        return tuple(
            SubnetDraw(width, self._choice(self.resolutions), self._choice(range(len(self.transforms))), self._seed())
            for width in sorted(widths, reverse=True)
        )

    def state_dict(self) -> dict:
        """The state of the draws' generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Continue the draws where `state_dict` was taken."""
        self.generator.set_state(state["generator"])

    def _pass(self, images: Tensor, width: float, loss_of: Callable[[Tensor], Tensor], last: bool):
        """Forward and backward of one network; its logits and loss, detached.

        DistributedDataParallel exchanges gradients in the last pass of a step only, which must be autograd's then.
        """
        if self.num_subnets > 0:
            set_width(self.model, width)
        distributed = hasattr(self.model, "no_sync")
        with (
            self.model.no_sync() if distributed and not last else nullcontext(),
            nullcontext() if self.accumulation is None or (distributed and last) else self.accumulation,
        ):
            with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                logits = self.model(images)
            loss = loss_of(logits.float() if self.autocast_dtype is not None else logits)
            (loss * self.loss_weight).backward()
        return logits.detach(), loss.detach()

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


def kl_divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """KL(teacher || softmax(logits)), summed over classes, averaged over the batch.

    Args:
        teacher: [N, classes], probabilities, held constant.
        logits: [N, classes].
    """
    return F.kl_div(F.log_softmax(logits, dim=1), teacher, reduction="batchmean")


def _resize(images: Tensor, resolution: int) -> Tensor:
    return F.interpolate(images, (resolution, resolution), mode="bilinear", align_corners=True)


@contextmanager
def _seeded(seed: int, device: torch.device):
    """In the with-block torch's global generators start from `seed`; afterwards they are as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
