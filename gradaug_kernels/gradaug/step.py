"""GradAug: Yang, Zhu and Chen, "GradAug: A New Regularization Method for Deep Neural Networks", NeurIPS 2020.

Each training step runs the full network on a batch, and then a few sub-networks of random width on randomly
transformed copies of it, which learn to give the full network's answer. All gradients are summed:

    z_0 = N(x),  L_0 = cross_entropy(z_0, y),  t = softmax(z_0)
    w_1 >= ... >= w_n = alpha,  the others ~ Uniform(alpha, 1)
    x_i = T_i(x),  z_i = N_{w_i}(x_i),  L_i = KL(t || softmax(z_i))
    step along the gradient of L_0 + L_1 + ... + L_n,  t held constant
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..slim.layers import SlimBatchNorm2d
from .accumulate import AccumulateIntoGrad
from .divergence import kl_divergence
from .finite import WholeStep
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
            before the resize. They may use torch's global generators.
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
        TypeError: for an optimizer or a scheduler whose step needs arguments, or a torch.nn.DataParallel.

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
        if num_subnets < 0:
            raise ValueError(f"num_subnets must be at least 0, got {num_subnets}")
        _check_one_of("reduction", reduction, ("sum", "mean"))
        _check_images(resolutions, transforms, distinct_transforms, num_subnets)
        _check_subnet_loss(subnet_loss, temperature)
        weights = (subnet_weight,) * num_subnets if isinstance(subnet_weight, float | int) else subnet_weight
        if len(weights) != num_subnets or min(weights, default=0) < 0:
            raise ValueError(f"subnet_weight must be one or {num_subnets} numbers of at least 0, got {subnet_weight}")
        _check_one_of("on_nonfinite", on_nonfinite, ("skip", "raise"))
        _check_one_of("frozen_norm", frozen_norm, ("batch", "full"))
        _check_model_and_optimizer(model, optimizer)
        if num_subnets > 0 and getattr(model, "static_graph", False):
            raise ValueError("model must be in DistributedDataParallel without static_graph, got one with it")
        _check_scheduler(scheduler, optimizer)
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
        self.subnet_weights = tuple(self.loss_weight * weight for weight in weights)
        self.scheduler = scheduler
        self.autocast_dtype = autocast_dtype
        self.accumulation = AccumulateIntoGrad(model, autocast_dtype) if accumulate else None
        self.frozen_norm = frozen_norm
        self.whole_step = WholeStep(model, optimizer, raises=on_nonfinite == "raise")
        self.generator = torch.Generator().manual_seed(seed)
        if num_subnets > 0:
            self.sampler.bind(model, num_subnets)

    def __call__(self, images: Tensor, targets: Tensor, draws: Sequence[SubnetDraw] | None = None) -> StepLosses:
        """One step: all backward passes, the optimizer's step and the scheduler's.

        Args:
            images: [N, C, H, W], floating point, on the model's device.
            targets: what `criterion` takes: class indices [N, ...] or probabilities [N, classes, ...].
            draws: those of an earlier step, to repeat it; None draws anew.

        Raises:
            TypeError: for images that are not floating point, or a model that returns no tensor.
            ValueError: for images that are not square where they are to be resized.
            FloatingPointError: if on_nonfinite is "raise".
        """
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point (normalised), got {images.dtype}")
        if self.resolutions is not None and images.shape[-1] != images.shape[-2]:
            raise ValueError(f"images must be square to be resized, got {images.shape[-2]} x {images.shape[-1]} pixels")
        x, y = images, targets
        draws = tuple(self.draw() if draws is None else draws)
        losses = {}

        with self._passes():
            with self._network(None, last=not draws) as N:
                z_0 = N(x)
                L_0 = self._full_loss(z_0, y)
                (self.loss_weight * L_0).backward()
            losses["loss of the full network"] = L_0.detach()
            t = self._teacher(z_0.detach())

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
        return StepLosses(full_loss, tuple(subnet_losses), z_0.detach(), draws, skipped)

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
        with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            logits = self.model(images)
        if not isinstance(logits, Tensor):
            raise TypeError(f"model must return logits [N, classes, ...] as a tensor, got {type(logits).__name__}")
        return logits

    def _full_loss(self, z: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self._in_full_precision(z), y)

    def _teacher(self, z: Tensor) -> Tensor:
        return F.softmax(self._in_full_precision(z) / self.temperature, dim=1)

    def _subnet_loss(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.subnet_loss == "cross_entropy":
            return self._full_loss(z, y)
        return self.temperature**2 * self.subnet_loss(t, self._in_full_precision(z) / self.temperature)

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
        except BaseException:
            self.whole_step.abandon()
            raise
        finally:
            for norm in norms:
                norm._substitute = None
            if self.num_subnets > 0:
                self.sampler.select(None)
        if self.accumulation is not None:
            self.accumulation.end_step()

    @contextmanager
    def _network(self, subnet: Any, last: bool):
        """For the forward and backward pass of one network, None being the full one. Yields: images -> its logits.

        DistributedDataParallel exchanges gradients in the last pass of a step only, which must be autograd's then.
        """
        if self.num_subnets > 0:
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


def _check_one_of(name: str, value: Any, known: tuple[str, str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, got {value!r}")


def _check_images(
    resolutions: Sequence[int] | None, transforms: Sequence, distinct_transforms: bool, num_subnets: int
) -> None:
    """Raises ValueError where the sub-networks' images cannot be made."""
    if resolutions is not None and (len(resolutions) == 0 or min(resolutions) < 1):
        raise ValueError(f"resolutions must be positive numbers of pixels, got {tuple(resolutions)}")
    if distinct_transforms and len(transforms) < num_subnets:
        raise ValueError(f"transforms must be at least {num_subnets} to be distinct, got {len(transforms)}")


def _check_subnet_loss(subnet_loss: Callable | str, temperature: float) -> None:
    if not callable(subnet_loss) and subnet_loss != "cross_entropy":
        raise ValueError(f"subnet_loss must be callable or 'cross_entropy', got {subnet_loss!r}")
    if not temperature > 0 or (temperature != 1 and subnet_loss == "cross_entropy"):
        raise ValueError(f"temperature must be positive, and 1 for subnet_loss 'cross_entropy', got {temperature}")


def _check_model_and_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises TypeError or ValueError where a step cannot be taken with them."""
    if isinstance(model, nn.DataParallel):
        raise TypeError("model must be in DistributedDataParallel to use several devices, got a DataParallel")
    if not _steps_without_arguments(optimizer):
        raise TypeError(f"optimizer must step without a closure, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise TypeError("optimizer must take dense gradients, got SparseAdam")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(f"optimizer must not be differentiable, got {type(optimizer).__name__}(differentiable=True)")
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if held.isdisjoint(model.parameters()):
        raise ValueError(f"optimizer must hold parameters of the model, got {len(held)} others")


def _check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raises TypeError or ValueError where it cannot be stepped with the optimizer."""
    if scheduler is None:
        return
    if not _steps_without_arguments(scheduler):
        raise TypeError(f"scheduler must step without a metric, got {type(scheduler).__name__}")
    of = getattr(scheduler, "optimizer", optimizer)
    if of is not optimizer and of.param_groups is not optimizer.param_groups:
        raise ValueError(f"scheduler must be one of the optimizer given, got one of another {type(of).__name__}")


def _steps_without_arguments(what: Any) -> bool:
    try:
        inspect.signature(type(what).step).bind(what)  # a scheduler wraps its optimizer's own attribute
    except TypeError:
        return False
    return True
