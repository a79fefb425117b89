"""What [gradaug] chooses by name: samplers and losses of the sub-networks."""

from collections.abc import Callable
from typing import NamedTuple

from ..gradaug.divergence import alpha_divergence, kl_divergence
from ..gradaug.sampler import RandomDepth, RandomLayerWidth, RandomWidth

SAMPLERS = {  # name -> the sampler that a section [gradaug] describes
    "width": lambda gradaug: RandomWidth(gradaug.min_width, gradaug.widths),
    "layer_width": lambda gradaug: RandomLayerWidth(gradaug.min_width),
    "depth": lambda gradaug: RandomDepth(gradaug.min_survival),
}


class SubnetLoss(NamedTuple):
    function: Callable | str  # as GradAug takes it
    title: str  # in figures


SUBNET_LOSSES = {
    "kl": SubnetLoss(kl_divergence, "KL divergence"),
    "alpha_divergence": SubnetLoss(alpha_divergence, "alpha-divergence"),
    "cross_entropy": SubnetLoss("cross_entropy", "cross entropy"),
}
