"""Private batch-norm statistics in a state_dict, and whether they are those of the present weights."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode


class Origin(NamedTuple):
    """A batch norm when the statistics of one of its widths were made or loaded."""

    weight: Tensor
    num_batches: Tensor  # of width 1: counts on when the network is trained
    own_num_batches: Tensor  # of that width, and its running mean
    own_mean: Tensor

    @torch.inference_mode(False)
    @torch.no_grad()
    def kept(self) -> "Origin":
        """A copy, to be compared with later."""
        return Origin(*(tensor.clone() for tensor in self))

    def precedes_training(self, now: "Origin") -> bool:
        """Whether, with the statistics of the width as they were, the norm was trained and its weight is another."""
        return (
            _same(self.own_num_batches, now.own_num_batches)
            and _same(self.own_mean, now.own_mean)
            and not _same(self.num_batches, now.num_batches)
            and self.weight.shape == now.weight.shape
            and not _same(self.weight, now.weight)
        )


def statistics_fault(state_dict: Mapping[str, Any], keys: Sequence[str], sizes: Sequence[torch.Size]) -> str | None:
    """What is wrong with the statistics of a width in a state_dict, of which it has some; None where nothing is.

    keys, sizes: of the running mean, the running variance and the number of batches.
    """
    for key, size in zip(keys, sizes, strict=True):
        if key not in state_dict:
            return f"statistics of a width must be {', '.join(keys)}, got no {key}"
        value = state_dict[key]
        if not isinstance(value, Tensor):
            return f"{key} must be a tensor, got {type(value).__name__}"
        if value.shape != size:
            return f"size mismatch for {key}: the shape in current model is {size}, got {value.shape}"
    return negative_variance(state_dict, keys[1])


def negative_variance(state_dict: Mapping[str, Any], key: str) -> str | None:
    """What is wrong with the variances of that key; None where nothing is, or where they are not there."""
    value = state_dict.get(key)
    if has_values(value) and (value < 0).any():
        return f"{key} must not be negative, got {value.min():g}"
    return None


def written_channels(state_dict: Mapping[str, Any], keys: Sequence[str], full_key: str) -> int | None:
    """The number of channels that the statistics of those keys are of: the others have what empty statistics have.

    full_key: of the running mean of width 1. None where nothing was written, and for copies of the statistics of width
    1, which are of all channels on purpose.
    """
    mean, var, num_batches = tensors = [state_dict[key] for key in keys]
    full = state_dict.get(full_key)
    if not all(map(has_values, tensors)) or not num_batches > 0 or (isinstance(full, Tensor) and _same(mean, full)):
        return None
    written = ((mean != 0) | (var != 1)).nonzero()
    return 1 + int(written.max()) if len(written) else None


def has_values(tensor: Any) -> bool:
    """Whether it is a tensor whose elements can be asked for, as those of meta and fake tensors can not."""
    return type(tensor) in (Tensor, nn.Buffer, nn.Parameter) and not tensor.is_meta and detect_fake_mode() is None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, or cannot be compared."""
    if not (has_values(a) and has_values(b)) or a.device != b.device or a.dtype != b.dtype:
        return True
    return torch.equal(a, b)
