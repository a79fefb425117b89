"""Sub-networks after training: their batch-norm statistics."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .layers import SlimBatchNorm2d
from .width import check_width, use_width


@torch.no_grad()
def calibrate(model: nn.Module, widths: Sequence[float], loader: Iterable, num_batches: int | None = None) -> None:
    """Fill the private batch-norm statistics of `widths`, so that these sub-networks can be evaluated.

    The statistics are the cumulative average of those of the batches, as for slimmable networks (Yu and Huang, ICCV
    2019, section 3.3); what a width had before is forgotten. Only batch norm runs in training mode, and no gradient is
    taken. Width 1 is calibrated, and its trained statistics replaced, only where it is listed.

    Args:
        model: a model with SlimBatchNorm2d layers.
        widths: widths in (0, 1], taken to six decimals; ones that the layers do not list are added, their statistics
            in state_dict but not in `buffers()`.
        loader: yields batches of images [N, C, H, W], or tuples that start with them; iterated once per width.
        num_batches: batches per width; None takes all.

    Raises:
        ValueError: for a width outside (0, 1], num_batches below 1, or a loader without a batch.
    """
    widths = [check_width(width) for width in widths]
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, got {num_batches}")
    norms = [m for m in model.modules() if isinstance(m, SlimBatchNorm2d) and m.track_running_stats]
    device = next(model.parameters()).device
    training = {module: module.training for module in model.modules()}
    momentum = {norm: norm.momentum for norm in norms}
    model.eval()
    try:
        for norm in norms:
            norm.train()
            norm.momentum = None
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
    finally:
        for norm in norms:
            norm.momentum = momentum[norm]
        for module, mode in training.items():
            module.training = mode
