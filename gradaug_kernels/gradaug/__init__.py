"""The method: the training step, what it draws, and how gradients gather."""

from .step import GradAug, StepLosses, SubnetDraw

__all__ = ["GradAug", "StepLosses", "SubnetDraw"]
