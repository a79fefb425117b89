"""What a checkpoint must hold to go on with a run: checked against the run's own objects before it is loaded."""

import math
from typing import Any

import torch
from torch import nn

# What each part of a checkpoint is; "average" is there only in runs that keep one.
CONTENT = {
    "preset": str,
    "config": dict,
    "epoch": int,
    "model": dict,
    "optimizer": dict,
    "scheduler": dict,
    "gradaug": dict,
    "history": list,
    "seconds": float,
}
# Of the optimizer's and scheduler's states, whose other keys depend on the version of PyTorch and repeat the settings.
GROUP_KEYS = ("params", "lr", "initial_lr")
SCHEDULER_KEYS = ("last_epoch", "base_lrs", "_last_lr", "_step_count")


def check_content(checkpoint: dict[str, Any]) -> None:
    """Raises: ValueError where a part is missing or of another type."""
    for name, kind in CONTENT.items():
        if not isinstance(checkpoint.get(name), kind) or isinstance(checkpoint.get(name), bool):
            raise ValueError(f"{name} must be of type {kind.__name__}, got {_what(checkpoint, name)}")
    if not isinstance(checkpoint.get("average", {}), dict):
        raise ValueError(f"average must be of type dict, got {_what(checkpoint, 'average')}")


def check_like(name: str, found: Any, expected: Any) -> None:
    """Raises: ValueError where `found` has other keys, types, dtypes or shapes than `expected`, or is not finite."""
    if isinstance(expected, torch.Tensor):
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        if got != (wanted := f"{expected.dtype} {list(expected.shape)}") or found.layout != torch.strided:
            raise ValueError(f"{name} must be {wanted}, got {got}")
        if found.is_floating_point() and not found.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        return
    if not (isinstance(found, dict) if isinstance(expected, dict) else type(found) is type(expected)):
        raise ValueError(f"{name} must be of type {type(expected).__name__}, got {type(found).__name__}")
    if isinstance(expected, dict):
        for key in (*expected, *found):
            if key not in found or key not in expected:
                got = "no" if key in expected else "also"
                raise ValueError(f"{name} must have the keys of this run, got {got} {key}")
        for key, value in expected.items():
            check_like(f"{name}.{key}", found[key], value)
    elif isinstance(expected, list):
        if len(found) != len(expected):
            raise ValueError(f"{name} must have {len(expected)} entries, got {len(found)}")
        for index, value in enumerate(expected):
            check_like(f"{name}[{index}]", found[index], value)
    elif isinstance(expected, float) and not math.isfinite(found):
        raise ValueError(f"{name} must be finite, got {found}")


def load_weights(name: str, model: nn.Module, found: dict[str, Any]) -> None:
    """`model.load_state_dict`, with ValueError where `found` is not of such a network, or not finite.

    Statistics of widths that only `found` has are added, as batch norm does.
    """
    expected = model.state_dict()
    for key in expected:
        if key not in found:
            raise ValueError(f"{name} must be of the network that the configuration describes, got no {key}")
    for key, value in found.items():
        if not isinstance(key, str):
            raise ValueError(f"{name} must be of the network that the configuration describes, got also {key!r}")
        if key not in expected and not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}.{key} must be a tensor, got {type(value).__name__}")
        check_like(f"{name}.{key}", value, expected.get(key, value))
    try:
        unexpected = model.load_state_dict(found, strict=False).unexpected_keys
    except (RuntimeError, ValueError) as error:
        _, *faults = str(error).split("\n\t")  # torch's heading is a line of its own
        fault = faults[0] if faults else error
        raise ValueError(f"{name} must be of the network that the configuration describes, got: {fault}") from None
    if unexpected:
        raise ValueError(f"{name} must be of the network that the configuration describes, got also {unexpected[0]}")


def load_progress(checkpoint: dict[str, Any], optimizer, scheduler, step, iterations: int, columns: list[str]) -> None:
    """Load what a checkpoint holds beside the weights, once all of it is known to fit.

    iterations: of an epoch; columns: of a row of the history. Raises: ValueError where a part does not fit.
    """
    epoch, history = checkpoint["epoch"], checkpoint["history"]
    if epoch != len(history):
        raise ValueError(f"history must have {epoch} rows, one per epoch, got {len(history)}")
    for number, row in enumerate(history, 1):
        if type(row) is not dict or list(row) != columns or row["epoch"] != number:
            raise ValueError(f"row {number} of the history must have the columns {', '.join(columns)}, got {row}")
        if any(type(value) not in (int, float) for value in row.values()) or not row["seconds"] > 0:
            raise ValueError(f"row {number} of the history must hold numbers, got {row}")

    fresh = optimizer.state_dict()
    found = _known("optimizer", checkpoint["optimizer"], fresh)
    groups = [_known("a group", group, fresh["param_groups"][0], GROUP_KEYS) for group in found["param_groups"]]
    check_like("optimizer.param_groups", groups, fresh["param_groups"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, value in found["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError(f"the optimizer's state must be of {len(parameters)} parameters, got one of {index}")
        momentum = None if value == {"momentum_buffer": None} else parameters[index].detach()
        check_like(f"the optimizer's state {index}", value, {"momentum_buffer": momentum})

    fresh = scheduler.state_dict()
    schedule = _known("the scheduler's state", checkpoint["scheduler"], fresh, SCHEDULER_KEYS)
    check_like("the scheduler's state", schedule, fresh)
    if schedule["last_epoch"] != epoch * iterations:
        raise ValueError(
            f"{epoch} epochs must be {epoch * iterations} iterations with these images, got {schedule['last_epoch']}"
        )
    check_like("gradaug", checkpoint["gradaug"], step.state_dict())
    try:
        step.load_state_dict(checkpoint["gradaug"])
    except RuntimeError as error:
        raise ValueError(f"gradaug must be a state of its generator, got: {error}") from None

    optimizer.load_state_dict({"state": found["state"], "param_groups": groups})
    scheduler.load_state_dict(schedule)


def _known(name, found, fresh, required=None):
    """`fresh` with what `found` has of its keys, `required` (all of them by default) among them."""
    for key in fresh if required is None else required:
        if not isinstance(found, dict) or not isinstance(found.get(key), type(fresh[key])):
            raise ValueError(f"{name} must have {key}, of type {type(fresh[key]).__name__}")
    return {key: found.get(key, value) for key, value in fresh.items()}


def _what(table, name):
    return f"{type(table[name]).__name__}" if name in table else "none"
