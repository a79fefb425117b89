"""GradAug: Yang, Zhu and Chen, "GradAug: A New Regularization Method for Deep Neural Networks", NeurIPS 2020.

Each training step runs the full network on a batch, and then a few sub-networks of random width on randomly
transformed copies of it, which learn to give the full network's answer. All gradients are summed:

    z_0 = N(x),  L_0 = cross_entropy(z_0, y),  t = softmax(z_0)
    w_1 >= ... >= w_n = alpha,  the others ~ Uniform(alpha, 1)
    x_i = T_i(x),  z_i = N_{w_i}(x_i),  L_i = KL(t || softmax(z_i))
    step along the gradient of L_0 + L_1 + ... + L_n,  t held constant
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ..slim.layers import SlimBatchNorm2d
from . import checks
from .accumulate import AccumulateIntoGrad
from .divergence import kl_divergence
from .finite import WholeStep
from .sampler import FullNetwork, RandomWidth, Sampler

_GENERATORS = threading.RLock()  # torch's global ones, while a transform draws from them


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
    logits: Tensor  # [N, classes, ...] of the full network
    draws: tuple[SubnetDraw, ...]  # largest sub-network first
    skipped: Tensor  # [] bool: a loss or gradient was not finite, and nothing was changed


class GradAug:
    """The GradAug training step, as published by default.

    The sandwich rule with in-place distillation of slimmable networks (Yu and Huang, ICCV 2019) is this step with a
    small min_width and without resolutions and transforms: full, smallest and random widths, trained towards the full
    network's output. Convert the model with those widths that shall have private batch-norm statistics.

    A step is taken as a whole or not at all. After an exception, and after a step whose loss or gradient is not finite,
    parameters, the optimizer's state and running statistics are those from before it, and the model is the full
    network.

    Args:
        model: a classifier of adjustable width, images [N, C, H, W] to logits [N, classes], or [N, classes, ...] with a
            place for each pixel; see `convert`. It may be in DistributedDataParallel. Hooks on parameters fire in every
            pass, as their weights are left to autograd.
        optimizer: over parameters of model; its step needs no closure.
        num_subnets: sub-networks per step, the one of min_width included; 0 is plain training.
        min_width: alpha in (0, 1], the smallest width, of the default sampler.
        sampler: draws the sub-networks: RandomLayerWidth(...), RandomChannels(...), RandomDepth(...); None is
            RandomWidth(min_width).
        resolutions: sizes in pixels, one drawn for each sub-network, to which the square batch is resized
            (bilinear, align_corners); the published settings list the full one too. None leaves the batch as it is.
        transforms: callables from a batch of images [N, C, H, W] to one, one drawn for each sub-network and applied
            before the resize. They may use torch's global generators, for which steps in several threads wait for each
            other; what other threads draw from them meanwhile is not as it would be alone.
        distinct_transforms: give the sub-networks of a step different transforms, of which there must be enough.
        criterion: the full network's loss of (logits, targets), a scalar.
        subnet_loss: of (teacher probabilities [N, classes, ...], logits), a scalar such as `alpha_divergence`, which is
            the mean over images and their places, as is F.cross_entropy's; "cross_entropy" is `criterion` with the
            targets, as for the full network.
        temperature: T > 0 of the sub-networks' loss: T^2 subnet_loss(softmax(z_0 / T), z_i / T), after Hinton et al.
            2015 (arXiv 1503.02531), so that its gradient keeps its size. 1 as published.
        subnet_weight: factor of the sub-networks' losses, one for all or one each, largest sub-network first.
        reduction: "sum" adds the losses, as published; "mean" divides that by their number.
        scheduler: a learning-rate scheduler of optimizer to step, without a metric, once per call: of calls that skip
            their step too, as schedules count iterations.
        autocast_dtype: run the model in torch.autocast with this dtype; None does not.
        accumulate: let kernels add weight gradients straight into `weight.grad` (`AccumulateIntoGrad`). False leaves
            all gradients to autograd, as weights with hooks always are. Both train the same network.
        on_nonfinite: "skip" leaves out a step whose loss or gradient is not finite, in all processes, and counts it in
            `skipped`; "raise" raises FloatingPointError, which says where. On CUDA the host waits for the device once
            a step to know, unless it is "skip" and the optimizer is fused (torch.optim.SGD(..., fused=True)).
        frozen_norm: what batch norms in evaluation mode (`norm.eval()`, while the rest is trained) normalise with in
            sub-networks whose width has no statistics of its own: "batch" takes the batch's, as those in training do;
            "full" the full network's frozen ones, of the channels that there are. They are never updated.
        seed: of the draws. One generator makes them all, so that a run can be repeated and resumed (`state_dict`).

    Raises:
        ValueError: for settings outside their range, a model that the sampler cannot sample, an optimizer of other
            parameters or a scheduler of another optimizer.
        TypeError: for settings of another kind, an optimizer or a scheduler whose step needs arguments, or a
            torch.nn.DataParallel.

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
        on_nonfinite: str = "skip",
        frozen_norm: str = "batch",
        seed: int = 0,
    ):
        checks.check_number_of_subnets(num_subnets)
        checks.check_one_of("reduction", reduction, ("sum", "mean"))
        transforms = checks.callables("transforms", transforms)
        checks.check_images_of_subnets(resolutions, transforms, distinct_transforms, num_subnets)
        checks.check_callable("criterion", criterion)
        checks.check_subnet_loss(subnet_loss, temperature)
        weights = checks.weight_of_each(subnet_weight, num_subnets)
        checks.check_one_of("autocast_dtype", autocast_dtype, (None, torch.bfloat16, torch.float16))
        checks.check_one_of("on_nonfinite", on_nonfinite, ("skip", "raise"))
        checks.check_one_of("frozen_norm", frozen_norm, ("batch", "full"))
        checks.check_integer("seed", seed)
        checks.check_model_and_optimizer(model, optimizer, num_subnets)
        checks.check_scheduler(scheduler, optimizer)
        sampler = RandomWidth(min_width) if sampler is None else sampler
        checks.check_sampler(sampler)
        self.model = model
        self.optimizer = optimizer
        self.num_subnets = num_subnets
        self.sampler = sampler if num_subnets > 0 else FullNetwork()
        self.resolutions = resolutions
        self.transforms = transforms
        self.distinct_transforms = distinct_transforms
        self.criterion = criterion
        self.subnet_loss = subnet_loss
        self.temperature = temperature
        self.loss_weight = 1.0 if reduction == "sum" else 1.0 / (1 + num_subnets)
        self.subnet_weights = tuple(self.loss_weight * weight for weight in weights)
        self.scheduler = scheduler
        self.autocast_dtype = autocast_dtype
        self.accumulation = AccumulateIntoGrad(model, autocast_dtype) if accumulate else None
        self.frozen_norm = frozen_norm
        self.whole_step = WholeStep(model, optimizer, raises=on_nonfinite == "raise")
        self.generator = torch.Generator().manual_seed(seed)
        self.distributed = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        self.trained = checks.held_by(optimizer) & set(model.parameters())
        self.sampler.bind(model, num_subnets)

    def __call__(self, images: Tensor, targets: Tensor, draws: Sequence[SubnetDraw] | None = None) -> StepLosses:
        """One step: all backward passes, the optimizer's step and the scheduler's.

        Args:
            images: [N, C, H, W], floating point, on the model's device.
            targets: what `criterion` takes: class indices [N, ...] or probabilities [N, classes, ...].
            draws: those of an earlier step, to repeat it; None draws anew.

        Raises:
            TypeError: for images that are not floating point, a model or a loss that returns no tensor, or other draws.
            ValueError: for images that are not square where they are to be resized, a loss that is no scalar, a model,
                transform or loss that writes into what later passes read, or parameters that the optimizer does not
                hold, as after load_state_dict(assign=True).
            RuntimeError: inside torch.no_grad, torch.inference_mode or DistributedDataParallel.no_sync.
            FloatingPointError: if on_nonfinite is "raise".
        """
        checks.check_batch(images, targets, is_resized=self.resolutions is not None)
        checks.check_surroundings(self.distributed)
        checks.check_trained(self.optimizer)
        if draws is not None:
            checks.check_draws(draws, SubnetDraw, self.num_subnets, len(self.transforms))
        x, y = images, targets
        draws = tuple(self.draw() if draws is None else draws)
        losses = {}

        with self._passes():
            with self._network(None, last=not draws) as N:
                z_0 = N(x)
                t, logits = self._teacher(z_0.detach()), z_0.detach().clone()  # a criterion may write into z_0
                L_0 = self._full_loss(z_0, y)
                (self.loss_weight * L_0).backward()
            losses["loss of the full network"] = L_0.detach()

            subnets = zip(draws, self._transformed(x, draws), self.subnet_weights, strict=True)
            for i, (draw, x_i, weight) in enumerate(subnets, 1):
                with self._network(draw.subnet, last=i == len(draws)) as N_wi:
                    z_i = N_wi(x_i)
                    L_i = self._subnet_loss(z_i, t, y)
                    (weight * L_i).backward()
                losses[f"loss of sub-network {i}"] = L_i.detach()

        skipped = self.whole_step.take(losses)
        if self.scheduler is not None:
            self.scheduler.step()
        full_loss, *subnet_losses = losses.values()
        return StepLosses(full_loss, tuple(subnet_losses), logits, draws, skipped)

    @property
    def skipped(self) -> int:
        """The steps that were left out so far. Waits for the device."""
        return int(self.whole_step.skipped)

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

    def _logits(self, images: Tensor) -> Tensor:
        """Those of the network as it is."""
        autocast = torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)
        with autocast, checks.left_alone(images, "model", "its images"):
            logits = self.model(images)
        if not isinstance(logits, Tensor):
            raise TypeError(f"model must return logits [N, classes, ...] as a tensor, got {type(logits).__name__}")
        return logits

    def _full_loss(self, z: Tensor, y: Tensor) -> Tensor:
        shared = self.subnet_loss == "cross_entropy" and isinstance(y, Tensor)
        with checks.left_alone(y, "criterion", "its targets") if shared else nullcontext():
            loss = self.criterion(self._in_full_precision(z), y)
        return checks.scalar(loss, "criterion")

    def _teacher(self, z: Tensor) -> Tensor:
        return F.softmax(self._in_full_precision(z) / self.temperature, dim=1)

    def _subnet_loss(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.subnet_loss == "cross_entropy":
            return self._full_loss(z, y)
        with checks.left_alone(t, "subnet_loss", "the teacher's probabilities"):
            loss = self.subnet_loss(t, self._in_full_precision(z) / self.temperature)
        return self.temperature**2 * checks.scalar(loss, "subnet_loss")

    def _in_full_precision(self, logits: Tensor) -> Tensor:
        return logits if self.autocast_dtype is None else logits.float()

    @contextmanager
    def _passes(self):
        """For all passes of a step; makes gradients. Whatever happens, the model is the full network afterwards."""
        self.whole_step.begin()
        self.optimizer.zero_grad()
        if self.accumulation is not None:
            self.accumulation.begin_step()
        norms = [module for module in self.model.modules() if isinstance(module, SlimBatchNorm2d)]
        try:
            for norm in norms:
                norm._substitute = self.frozen_norm
            yield
            checks.check_gradients(self.model, self.optimizer, self.trained)
        except BaseException:
            self.whole_step.abandon()
            raise
        finally:
            for norm in norms:
                norm._substitute = None
            self.sampler.select(None)
        if self.accumulation is not None:
            self.accumulation.end_step()

    @contextmanager
    def _network(self, subnet: Any, last: bool):
        """For the forward and backward pass of one network, None being the full one. Yields: images -> its logits.

        DistributedDataParallel exchanges gradients in the last pass of a step only, which must be autograd's then.
        """
        self.sampler.select(subnet)
        distributed, accumulation = hasattr(self.model, "no_sync"), self.accumulation
        if accumulation is not None and distributed and last:
            accumulation.end_step()
            accumulation = None
        with self.model.no_sync() if distributed and not last else nullcontext(), accumulation or nullcontext():
            yield self._logits

    def _transformed(self, images: Tensor, draws: Sequence[SubnetDraw]):
        """The sub-networks' images, each made when it is asked for; batches that are only resized are made once."""
        resized: dict[int | None, Tensor] = {None: images, images.shape[-1]: images}
        for draw in draws:
            if draw.transform is not None:
                with _seeded(draw.seed, images.device), checks.left_alone(images, "transforms", "the batch's images"):
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
    """In the with-block torch's global generators start from `seed`; afterwards they are as before.

    Steps in other threads wait; whatever else draws from these generators meanwhile interferes.
    """
    with _GENERATORS, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
