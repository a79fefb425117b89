"""Sub-networks after training: their batch-norm statistics."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .layers import SlimBatchNorm2d
from .width import check_width, use_width, whole_number


@torch.no_grad()
def calibrate(model: nn.Module, widths: Sequence[float], loader: Iterable, num_batches: int | None = None) -> None:
    """Fill the private batch-norm statistics of `widths`, so that these sub-networks can be evaluated.

    The statistics are the cumulative average of those of the batches, as for slimmable networks (Yu and Huang, ICCV
    2019, section 3.3); what a width had before is forgotten, unless there is an exception: then nothing is changed.
    Only batch norm runs in training mode, and no gradient is taken. Width 1 is calibrated, and its trained statistics
    replaced, only where it is listed.

    The statistics are of the weights of now: calibrate after training and after averaging weights. Evaluation of a
    width refuses statistics that are older, from `model.eval()` on, where a batch norm can tell: its own weight is
    another, and it has counted batches of width 1 in training since. It can not where it has no weight, where that or
    the norm itself is frozen, and where the width's own statistics are updated in training. Statistics that are loaded
    count as those of the weights that they are loaded with.

    Args:
        model: a model with SlimBatchNorm2d layers.
        widths: widths in (0, 1], taken to six decimals; ones that the layers do not list are added, their statistics
            in state_dict but not in `buffers()`.
        loader: yields batches of images [N, C, H, W], or tuples that start with them; iterated once per width.
        num_batches: batches per width; None takes all.

    Raises:
        ValueError: for a width outside (0, 1], num_batches that is no whole number or below 1, or a loader without a
            batch.
    """
    widths = [check_width(width) for width in widths]
    if num_batches is not None and whole_number("num_batches", num_batches) < 1:
        raise ValueError(f"num_batches must be at least 1, got {num_batches}")
    norms = [m for m in model.modules() if isinstance(m, SlimBatchNorm2d) and m.track_running_stats]
    device = next(model.parameters()).device
    with _norms_in_training(model, norms), _kept_statistics(norms):
        for width in widths:
            for norm in norms:
                norm._add_width(width, as_buffers=False)
                norm.reset_width_stats(width)
            with use_width(model, width):
                seen = 0
                for batch in loader:
                    images = batch[0] if isinstance(batch, tuple | list) else batch
                    model(images.to(device, non_blocking=True))
                    seen += 1
                    if seen == num_batches:
                        break
            if seen == 0:
                raise ValueError("loader must yield at least one batch per width, got none")
        for norm in norms:
            for width in widths:
                norm._note_origin(width)


@contextmanager
def _norms_in_training(model: nn.Module, norms: Sequence[SlimBatchNorm2d]) -> Iterator[None]:
    """The norms average over the batches of training mode, all else is in evaluation mode."""
    training = {module: module.training for module in model.modules()}
    momentum = {norm: norm.momentum for norm in norms}
    model.eval()
    try:
        for norm in norms:
            norm.train()
            norm.momentum = None
        yield
    finally:
        for norm in norms:
            norm.momentum = momentum[norm]
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _kept_statistics(norms: Sequence[SlimBatchNorm2d]) -> Iterator[None]:
    """Statistics are those from before after an exception, Ctrl-C included."""
    kept = [norm._keep_statistics() for norm in norms]
    try:
        yield
    except BaseException:
        for norm, before in zip(norms, kept, strict=True):
            norm._restore_statistics(before)
        raise
