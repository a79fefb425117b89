"""What `gradaug eval` measures of a network: plain numbers, percentages of images."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..slim.layers import SlimBatchNorm2d
from ..slim.width import check_width, use_width
from .attacks import OnPixels, fgsm, pgd
from .calibration import CalibrationBin, expected_calibration_error
from .corruptions import COMMON, EXTRA, SEVERITIES, corrupt

# Top-1 errors of AlexNet on ImageNet-C, means over the severities, by which the benchmark divides (its README).
ALEXNET_ERRORS = dict(
    zip(
        COMMON,
        (
            *(88.6428, 89.4468, 92.2640, 81.9880, 82.6268, 78.5948, 79.8360),
            *(86.6816, 82.6572, 81.9324, 56.4592, 85.3204, 64.6056, 71.7840, 60.6500),
        ),
        strict=True,
    )
)


@torch.no_grad()
def top1(model: nn.Module, loader: Iterable) -> float:
    """Percentage of images whose largest logit is the target's. loader: yields (images, targets)."""
    model.eval()
    device = next(model.parameters()).device
    correct = total = 0
    for images, targets in loader:
        correct += (model(images.to(device)).argmax(1) == targets.to(device)).sum().item()
        total += len(targets)
    return 100 * correct / total


def accuracy_by_width(
    model: nn.Module, widths: Sequence[float], test_loader: Iterable, calibrate: Callable[[list[float]], None]
) -> dict[str, float]:
    """{width: top-1}. calibrate: called with the widths that have no statistics yet."""
    widths = [check_width(width) for width in widths]
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, SlimBatchNorm2d)]
    known = set.intersection(*({w for w in n.widths if n.is_calibrated(w)} for n in norms)) if norms else set(widths)
    missing = sorted({width for width in widths if width not in known})
    if missing:
        calibrate(missing)
    result = {}
    for width in sorted(set(widths)):
        with use_width(model, width):
            result[f"{width:g}"] = top1(model, test_loader)
    return result


class CorruptedImages(Dataset):
    """The items of a data set with one corruption; item i depends on (seed, i, corruption, severity) alone.

    images: items (image [C, H, W], normalised by mean and std; target).
    """

    def __init__(self, images: Dataset, name: str, severity: int, constants: str, seed: int):
        self.images, self.name, self.severity, self.constants, self.seed = images, name, severity, constants, seed

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, target = self.images[index]
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.images.mean, self.images.std))
        pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)  # what normalisation was given
        key = [self.seed, index, (*COMMON, *EXTRA).index(self.name), self.severity]
        rng = np.random.RandomState(key)
        corrupted = corrupt(pixels.permute(1, 2, 0).numpy(), self.name, self.severity, rng, self.constants)
        return (torch.from_numpy(corrupted).permute(2, 0, 1) / 255 - mean) / std, target


def corruption_errors(
    model: nn.Module,
    images: Dataset,
    *,
    constants: str,
    batch_size: int,
    seed: int = 0,
    workers: int = 0,
    names: Sequence[str] = (*COMMON, *EXTRA),
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """{corruption: [top-1 error at severity 1 to 5]}."""
    errors = {}
    for name in names:
        progress(name)
        errors[name] = []
        for severity in SEVERITIES:
            corrupted = CorruptedImages(images, name, severity, constants, seed)
            errors[name].append(100 - top1(model, DataLoader(corrupted, batch_size, num_workers=workers)))
    return errors


def mean_corruption_error(errors: dict[str, list[float]], reference: dict[str, float] | None = None) -> float | None:
    """The mean over the 15 common corruptions of the mean error over severities, in percent.

    reference: mean errors of another network, by which each corruption's is divided first (times 100), as the
    benchmark divides by ALEXNET_ERRORS; None does not. Returns: None where a common corruption was not measured.
    """
    if not set(COMMON) <= errors.keys():
        return None
    means = {name: sum(errors[name]) / len(errors[name]) for name in COMMON}
    return sum(means[name] if reference is None else 100 * means[name] / reference[name] for name in COMMON) / 15


def attack_accuracy(
    model: nn.Module,
    loader: Iterable,
    mean: Sequence[float],
    std: Sequence[float],
    epsilons: Sequence[float],
    steps: int = 10,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """{"fgsm": {epsilon * 255: top-1}, "pgd": ...}; PGD starts at random and takes `steps` steps of epsilon / 4.

    loader: yields (images normalised by mean and std, targets); epsilons: of pixel values in [0, 1].
    """
    model.eval()
    device = next(model.parameters()).device
    network = OnPixels(model, mean, std).to(device)
    correct = {name: dict.fromkeys(epsilons, 0) for name in ("fgsm", "pgd")}
    total, generator = 0, torch.Generator().manual_seed(seed)
    for images, targets in loader:
        targets = targets.to(device)
        pixels = (images.to(device) * network.std + network.mean).clamp(0, 1)
        total += len(targets)
        for epsilon in epsilons:
            attacked = {
                "fgsm": fgsm(network, pixels, targets, epsilon),
                "pgd": pgd(network, pixels, targets, epsilon, epsilon / 4, steps, generator),
            }
            for name, attack in attacked.items():
                with torch.no_grad():
                    correct[name][epsilon] += (network(attack).argmax(1) == targets).sum().item()
    return {
        name: {f"{255 * epsilon:g}": 100 * count / total for epsilon, count in counts.items()}
        for name, counts in correct.items()
    }


@torch.no_grad()
def calibration(model: nn.Module, loader: Iterable, bins: int = 15) -> tuple[float, list[CalibrationBin]]:
    """Expected calibration error, in [0, 1], and its bins."""
    model.eval()
    device = next(model.parameters()).device
    confidences: list[Tensor] = []
    corrects: list[Tensor] = []
    for images, targets in loader:
        confidence, predicted = model(images.to(device)).float().softmax(1).max(1)
        confidences.append(confidence.cpu())
        corrects.append(predicted.cpu() == targets.cpu())
    return expected_calibration_error(torch.cat(confidences), torch.cat(corrects), bins)


def summary(parts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows (name, value) for the terminal, of what `evaluate_checkpoint` returns."""
    rows = []
    for width, value in parts.get("widths", {}).items():
        rows.append((f"top-1, width {width}", f"{value:.2f} %"))
    if "corruptions" in parts:
        found = parts["corruptions"]
        if found["mean_corruption_error"] is not None:
            rows.append((f"mean corruption error ({found['constants']})", f"{found['mean_corruption_error']:.2f} %"))
        if found["relative_mean_corruption_error"] is not None:
            relative = f"  relative to {found['relative_to']}"
            rows.append((relative, f"{found['relative_mean_corruption_error']:.2f} %"))
        for name, errors in found["errors"].items():
            rows.append((f"  {name}", " ".join(f"{error:.1f}" for error in errors) + " %"))
    for name, accuracies in parts.get("attacks", {}).items():
        for epsilon, value in accuracies.items():
            rows.append((f"top-1, {name.upper()} {epsilon}/255", f"{value:.2f} %"))
    if "calibration" in parts:
        rows.append(("expected calibration error", f"{100 * parts['calibration']['error']:.2f} %"))
    return rows
