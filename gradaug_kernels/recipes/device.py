"""The device of a run."""

import torch


def find_device(name: str) -> torch.device:
    """The device of train.device. Raises: ValueError for one that is unknown or not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'train.device must be "auto", "cpu" or "cuda", got "{name}"') from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'train.device must be "auto", "cpu" or "cuda", got "{name}"')
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'train.device must be "cpu" on a machine without a usable GPU, got "{name}"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f'train.device must be one of {torch.cuda.device_count()} GPUs, counted from 0, got "{name}"')
    return device
