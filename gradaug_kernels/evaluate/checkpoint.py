"""`gradaug eval CHECKPOINT`: measures the network of a training run and writes tables and figures."""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..data import ImageData
from ..data.image_tensors import mix_seed
from ..recipes.build import build_network, calibrate_widths, load_images, test_loader
from ..recipes.config import Config, from_tables, to_tables
from ..recipes.device import find_device
from ..slim.width import set_width, use_width
from ..train.folder import claim_folder, complete_file, read_checkpoint, read_json, stored_config
from ..train.state import load_weights
from . import measure, report
from .corruptions import CONSTANTS

PARTS = ("widths", "corruptions", "attacks", "calibration")
EPSILONS = (1, 2, 4, 8, 16)  # of 255
FILES = ("evaluation.json", *(f"{part}.{kind}" for part in PARTS for kind in ("csv", "png")))


def load_checkpoint(path: Path, settings: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The configuration, with `settings` {"section.key": value} in place of its own, and the content."""
    checkpoint = read_checkpoint(path)
    tables = to_tables(stored_config(path, checkpoint))
    for key, value in settings.items():
        section, _, name = key.partition(".")
        tables[section][name] = value
    return from_tables(checkpoint["preset"], tables), checkpoint


def evaluate_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    parts: Sequence[str] = PARTS,
    images: int = 0,
    constants: str = "auto",
    epsilons: Sequence[float] = EPSILONS,
    pgd_steps: int = 10,
    widths: Sequence[float] = (),
    relative_to: str = "",
    seed: int = 0,
    data: str = "",
    device: str = "auto",
    workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure the network of a checkpoint on its data set's test images (or held-out ones, as its run was).

    The averaged weights are taken where the run kept some. parts: of PARTS. images: so many of them, chosen by `seed`;
    0 takes all. constants: of the corruptions, "imagenet", "cifar", or "auto": those meant for the images' size.
    epsilons: of 255. widths: in place of the run's own [evaluate] widths. relative_to: "alexnet", or an evaluation.json
    whose corruption errors these are divided by. data, device: in place of the run's.

    Returns: what evaluation.json holds. `out` gets a CSV file and a figure for each part besides.
    Raises: FileExistsError when `out` holds an evaluation and `overwrite` is not set; ValueError for settings outside
    their range.
    """
    out = Path(out)
    _check_choices(parts, constants)
    _check_numbers(images, pgd_steps, epsilons, seed)
    if (out / "evaluation.json").exists() and not overwrite:
        raise FileExistsError(f"output folder must hold no evaluation, got {out}; --overwrite replaces it")
    reference = _reference(relative_to)

    config, checkpoint = load_checkpoint(Path(path), _settings(device, workers, data, widths))
    tested = _load(path, config, checkpoint, images, seed)
    model, loader, test = tested.model, tested.loader, tested.data.test

    with claim_folder(out, FILES):
        set_width(model, 1.0)
        clean = measure.top1(model, loader)
        found: dict[str, Any] = {
            "checkpoint": str(path),
            "preset": config.preset,
            "epoch": checkpoint["epoch"],
            "evaluated_on": tested.evaluated_on,
            "images": len(test),
            "seed": seed,
            "top1": clean,
        }
        title = f"{config.preset}: {config.model.name}, {len(test):,} {tested.evaluated_on} images"
        if "widths" in parts:
            found["widths"] = measure.accuracy_by_width(model, config.evaluate.widths, loader, tested.calibrate)
            report.write_widths(out, found["widths"], title)
        if "calibration" in parts:
            error, bins = measure.calibration(model, loader)
            found["calibration"] = {"error": error, "bins": [row._asdict() for row in bins]}
            report.write_calibration(out, error, bins, title)
        if "attacks" in parts:
            sizes = [epsilon / 255 for epsilon in epsilons]
            found["attacks"] = measure.attack_accuracy(model, loader, test.mean, test.std, sizes, pgd_steps, seed)
            report.write_attacks(out, found["attacks"], clean, title)
        if "corruptions" in parts:
            found["corruptions"] = _corruptions(tested, constants, relative_to, reference, seed)
            report.write_corruptions(out, found["corruptions"], 100 - clean, title)
        with complete_file(out / "evaluation.json") as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _check_choices(parts, constants):
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ValueError(f"parts must be of {', '.join(PARTS)}, got {', '.join(unknown) or 'none'}")
    if constants not in ("auto", *CONSTANTS):
        raise ValueError(f"constants must be one of auto, {', '.join(CONSTANTS)}, got {constants}")


def _check_numbers(images, pgd_steps, epsilons, seed):
    if images < 0 or pgd_steps < 1 or not all(0 < epsilon <= 255 for epsilon in epsilons):
        raise ValueError(
            f"images must be at least 0, PGD steps at least 1 and epsilons positive, up to 255, "
            f"got {images}, {pgd_steps} and {list(epsilons)}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")


def _settings(device, workers, data, widths):
    """{"section.key": value} in place of the run's."""
    settings = {"train.device": device, "data.workers": workers}
    settings |= {"data.root": data} if data else {}
    return settings | ({"evaluate.widths": list(widths)} if widths else {})


class _Tested(NamedTuple):
    """The network that is measured, and the images on which it is."""

    config: Config
    model: nn.Module
    data: ImageData  # whose `test` are the images that were chosen
    evaluated_on: str  # which images those are: "test" or "held-out"
    loader: Iterable
    device: torch.device

    def calibrate(self, widths: Sequence[float]) -> None:
        calibrate_widths(self.config, self.model, widths, self.data, self.device)


def _load(path, config, checkpoint, images, seed):
    device = find_device(config.train.device)
    data, evaluated_on = load_images(config)
    if images:
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(mix_seed(seed)))
        data = dataclasses.replace(data, test=data.test.subset(order[:images].sort().values))
    model = build_network(config, len(data.classes), data.channels)
    weights = "average" if "average" in checkpoint else "model"
    try:
        load_weights(weights, model, checkpoint[weights])
    except ValueError as error:
        raise ValueError(f"{path} must hold the weights of its configuration: {error}") from None
    with use_width(model, min(config.evaluate.widths)):
        pass  # a width that leaves a layer without channels is refused before anything is measured
    model.to(device, memory_format=torch.channels_last)
    return _Tested(config, model, data, evaluated_on, test_loader(config, data, device), device)


def _corruptions(tested, constants, relative_to, reference, seed):
    """What evaluation.json holds of them."""
    chosen = constants if constants != "auto" else "cifar" if tested.data.size < 64 else "imagenet"
    errors = measure.corruption_errors(
        tested.model,
        tested.data.test,
        constants=chosen,
        batch_size=tested.config.evaluate.batch_size,
        seed=seed,
        workers=tested.config.data.workers,
        progress=lambda name: print(f"  {name}", flush=True),
    )
    return {
        "constants": chosen,
        "errors": errors,
        "mean_corruption_error": measure.mean_corruption_error(errors),
        "relative_to": relative_to or None,
        "relative_mean_corruption_error": reference and measure.mean_corruption_error(errors, reference),
    }


def _reference(relative_to):
    """{corruption: mean error} of the network to compare with; None for none."""
    if not relative_to:
        return None
    if relative_to == "alexnet":
        return measure.ALEXNET_ERRORS
    errors = read_json(Path(relative_to), ["corruptions"])["corruptions"]
    errors = errors.get("errors") if isinstance(errors, dict) else None
    try:
        means = {name: statistics.mean(errors[name]) for name in measure.COMMON}
        usable = all(0 < mean <= 100 for mean in means.values())
    except (KeyError, TypeError, AttributeError, statistics.StatisticsError):
        usable = False
    if not usable:
        raise ValueError(
            f"--relative-to must be alexnet or an evaluation.json with the errors of all corruptions, got {relative_to}"
        )
    return means
