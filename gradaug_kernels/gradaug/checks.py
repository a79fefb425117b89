"""What a GradAug step does not take, each in one sentence: when it is made, and when it is called."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# ---- settings


def check_integer(name: str, value: Any) -> None:
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def check_one_of(name: str, value: Any, known: tuple) -> None:
    if value not in known:
        *others, last = map(repr, known)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def check_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {value!r}")


def callables(name: str, values: Iterable) -> tuple[Callable, ...]:
    """The values. Raises TypeError where they are not all callable."""
    found = tuple(values) if isinstance(values, Iterable) else (None,)
    if not all(map(callable, found)):
        raise TypeError(f"{name} must be a sequence of callables, got {values!r}")
    return found


def check_number_of_subnets(num_subnets: int) -> None:
    check_integer("num_subnets", num_subnets)
    if num_subnets < 0:
        raise ValueError(f"num_subnets must be at least 0, got {num_subnets}")


def check_images_of_subnets(
    resolutions: Sequence[int] | None, transforms: Sequence, distinct_transforms: bool, num_subnets: int
) -> None:
    """Raises ValueError where the sub-networks' images cannot be made."""
    if resolutions is not None:
        found = tuple(resolutions) if isinstance(resolutions, Sequence) else ()
        if not found or not all(isinstance(size, Integral) and size >= 1 for size in found):
            raise ValueError(f"resolutions must be positive numbers of pixels, got {resolutions}")
    if distinct_transforms and len(transforms) < num_subnets:
        raise ValueError(f"transforms must be at least {num_subnets} to be distinct, got {len(transforms)}")


def check_subnet_loss(subnet_loss: Callable | str, temperature: float) -> None:
    hard = not callable(subnet_loss)
    if hard and subnet_loss != "cross_entropy":
        raise ValueError(f"subnet_loss must be callable or 'cross_entropy', got {subnet_loss!r}")
    if not _is_number(temperature) or temperature <= 0 or (hard and temperature != 1):
        raise ValueError(
            f"temperature must be positive, finite, and 1 for subnet_loss 'cross_entropy', got {temperature!r}"
        )


def weight_of_each(subnet_weight: float | Sequence[float], num_subnets: int) -> tuple[float, ...]:
    """Raises ValueError where it is not that of each sub-network."""
    is_one = not isinstance(subnet_weight, Iterable)
    weights = (subnet_weight,) if is_one else tuple(subnet_weight)
    fits = is_one or len(weights) == num_subnets
    if not fits or not all(_is_number(weight) and weight >= 0 for weight in weights):
        raise ValueError(
            f"subnet_weight must be one or {num_subnets} finite numbers of at least 0, got {subnet_weight!r}"
        )
    return weights * num_subnets if is_one else weights


def check_sampler(sampler: Any) -> None:
    if not all(callable(getattr(sampler, name, None)) for name in ("bind", "draw", "select")):
        raise TypeError(f"sampler must have bind, draw and select, got {sampler!r}")


def check_model_and_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, num_subnets: int) -> None:
    """Raises TypeError or ValueError where a step cannot be taken with them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    if isinstance(model, nn.DataParallel):
        raise TypeError("model must be in DistributedDataParallel to use several devices, got a DataParallel")
    if not _steps_without_arguments(optimizer):
        raise TypeError(f"optimizer must step without a closure, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise TypeError("optimizer must take dense gradients, got SparseAdam")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(f"optimizer must not be differentiable, got {type(optimizer).__name__}(differentiable=True)")
    held = held_by(optimizer)
    if held.isdisjoint(model.parameters()):
        raise ValueError(f"optimizer must hold parameters of the model, got {len(held)} others")
    if num_subnets > 0 and getattr(model, "static_graph", False):
        raise ValueError("model must be in DistributedDataParallel without static_graph, got one with it")


def check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raises TypeError or ValueError where it cannot be stepped with the optimizer."""
    if scheduler is None:
        return
    if not _steps_without_arguments(scheduler):
        raise TypeError(f"scheduler must step without a metric, got {type(scheduler).__name__}")
    of = getattr(scheduler, "optimizer", optimizer)
    if of is not optimizer and of.param_groups is not optimizer.param_groups:
        raise ValueError(f"scheduler must be one of the optimizer given, got one of another {type(of).__name__}")


def held_by(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _steps_without_arguments(what: Any) -> bool:
    try:
        inspect.signature(type(what).step).bind(what)  # a scheduler wraps its optimizer's own attribute
    except (AttributeError, TypeError):
        return False
    return True


# ---- a call


def check_batch(images: Tensor, targets: Any, is_resized: bool) -> None:
    """Raises TypeError or ValueError for a batch that the networks cannot be trained on."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point (normalised), got {images.dtype}")
    if is_resized and images.shape[-1] != images.shape[-2]:
        raise ValueError(f"images must be square to be resized, got {images.shape[-2]} x {images.shape[-1]} pixels")
    for name, value in (("images", images), ("targets", targets)):
        if isinstance(value, Tensor) and value.is_inference():
            raise TypeError(f"{name} must be made outside of torch.inference_mode, got an inference tensor")


def check_draws(draws: Sequence, draw_type: type, num_subnets: int, num_transforms: int) -> None:
    """Raises TypeError or ValueError for draws that are not those of a step like this one."""
    if not isinstance(draws, Sequence) or not all(isinstance(draw, draw_type) for draw in draws):
        raise TypeError(f"draws must be {draw_type.__name__}s of an earlier step, got {draws!r}")
    if len(draws) != num_subnets:
        raise ValueError(f"draws must be {num_subnets}, one for each sub-network, got {len(draws)}")
    for transform in (draw.transform for draw in draws if draw.transform is not None):
        if transform not in range(num_transforms):
            raise ValueError(f"draws must name one of {num_transforms} transforms, got number {transform}")


def check_surroundings(distributed: Sequence[DistributedDataParallel]) -> None:
    """Raises RuntimeError where gradients are not made, or not exchanged."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise RuntimeError("a step must be taken with gradients enabled, got torch.no_grad or torch.inference_mode")
    if not all(module.require_backward_grad_sync for module in distributed):
        raise RuntimeError("a step must exchange its gradients, got one inside DistributedDataParallel.no_sync")


def check_trained(optimizer: torch.optim.Optimizer) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(f"optimizer must hold parameters that require gradients, got {len(parameters)} frozen ones")


def check_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, trained: set[nn.Parameter]) -> None:
    """Raises ValueError where the model has other parameters in the place of some of `trained`, which it had before.

    Those have no gradient; where all have one, the model, which takes a while, is not looked at.
    """
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    without = {parameter for parameter in held if parameter.grad is None and parameter.requires_grad} & trained
    lost = without.difference(model.parameters()) if without else without
    if lost and not {parameter for parameter in model.parameters() if parameter.requires_grad}.issubset(held):
        raise ValueError(
            f"optimizer must hold the model's parameters, got {len(lost)} that the model has no longer; make it after "
            "what replaces parameters, such as load_state_dict(assign=True)"
        )


def scalar(loss: Tensor, of: str) -> Tensor:
    """The loss. Raises TypeError or ValueError where there is no backward pass from it."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{of} must return a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{of} must return a scalar, got shape {tuple(loss.shape)}; reduce it over the batch")
    if not loss.requires_grad:
        raise ValueError(f"{of} must return a scalar with a gradient, got one without")
    return loss


@contextmanager
def left_alone(tensor: Tensor, by: str, what: str) -> Iterator[None]:
    """Raises ValueError where the with-block changes the tensor in place: later passes read it again."""
    version = tensor._version
    yield
    if tensor._version != version:
        raise ValueError(f"{by} must leave {what} as they are, got them changed in place")
