"""Evaluation of trained networks: sub-networks, common corruptions, adversarial images, calibration."""

from .attacks import fgsm, pgd
from .calibration import expected_calibration_error
from .checkpoint import evaluate_checkpoint
from .corruptions import corrupt

__all__ = ["corrupt", "evaluate_checkpoint", "expected_calibration_error", "fgsm", "pgd"]
