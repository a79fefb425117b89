"""`gradaug compare`: several methods, several seeds, at equal epochs and at equal compute; one table and one figure.

A comparison is a TOML file:

    [compare]
    preset = "quickstart"      # what all methods start from
    seeds = [0, 1, 2]
    [settings]                 # what all methods change in it
    train.epochs = 60
    [methods.plain]            # what one method changes
    gradaug.num_subnets = 0
    [methods.gradaug]

At equal epochs each method trains for the preset's epochs. At equal compute it trains for as many as take the
multiply-adds of the costliest method at equal epochs, which are counted, not timed. The seconds in the table are those
of training: of processor time on a CPU, which other work on the machine does not change, and of the clock on a GPU.
"""

import contextlib
import csv
import dataclasses
from pathlib import Path
from typing import Any

import torch

import gradaug_kernels as gk

from .._names import nearest
from ..evaluate.checkpoint import evaluate_checkpoint
from ..recipes.build import load_images
from ..recipes.config import Config, difference, load_config, plain_name, read_toml
from ..recipes.device import find_device
from ..train.folder import CHECKPOINT, FREE_ON_RESUME, claim_folder, read_json
from ..train.run import train
from .cost import step_cost
from .report import (
    BUDGETS,
    summarise,
    write_figure,
    write_markdown,
    write_robustness,
    write_robustness_figure,
    write_rows,
)

COMPARISONS = Path(__file__).parent / "comparisons"
FILES = ("runs.csv", "table.csv", "table.md", "figure.png", "log.txt")
ROBUSTNESS_FILES = ("robustness.csv", "robustness.png")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """name: of the file; methods: {name: {"section.key": value}}, of which `settings` are the common ones."""

    name: str
    preset: str
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    methods: dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One training run, and the budgets that it is part of."""

    method: str
    epochs: int
    seed: int
    budgets: tuple[str, ...]
    cost: float  # of a step, in plain steps of the same network
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.method, f"{self.epochs}-epochs", f"seed-{self.seed}")


def comparison_names() -> list[str]:
    """The names of the comparisons in this package."""
    return sorted(path.stem for path in COMPARISONS.glob("*.toml"))


def load_comparison(name: str) -> Comparison:
    """The comparison of that name, or of a TOML file.

    Raises: ValueError for an unknown name or key, or a file without methods; FileNotFoundError for a missing file.
    """
    path = Path(name) if name.endswith(".toml") else COMPARISONS / f"{name}.toml"
    if not name.endswith(".toml") and name not in comparison_names():
        raise ValueError(nearest("comparison", name, comparison_names()))
    if not path.is_file():
        raise FileNotFoundError(f"comparison must be a name or an existing TOML file, got {name}")
    tables = read_toml(path)
    for key, table in tables.items():
        if key not in ("compare", "settings", "methods"):
            raise ValueError(nearest("section", key, ("compare", "settings", "methods")))
        if not isinstance(table, dict):
            raise ValueError(f"{path} must hold keys in sections, got {key} outside of one")
    head = tables.get("compare", {})
    for key in head:
        if key not in ("preset", "seeds"):
            raise ValueError(nearest("key", f"compare.{key}", ("compare.preset", "compare.seeds")))
    if not tables.get("methods"):
        raise ValueError(f"{path} must have sections [methods.NAME], got none")
    for method, table in tables["methods"].items():
        if not isinstance(table, dict):
            raise ValueError(f"{path} must have sections [methods.NAME], got {plain_name('a method', method)} as a key")
    preset, seeds = head.get("preset", "quickstart"), head.get("seeds", [0, 1, 2])
    if not isinstance(preset, str) or not isinstance(seeds, list):
        raise ValueError(f"compare.preset must be a name and compare.seeds a list, got {preset} and {seeds}")
    return Comparison(
        name=plain_name("comparison", path.stem),
        preset=preset,
        seeds=tuple(seeds),
        settings=_flat(tables.get("settings", {})),
        methods={plain_name("a method", method): _flat(table) for method, table in tables["methods"].items()},
    )


def compare(comparison: Comparison, out: str | Path, command: str, robustness: int = 0) -> list[dict[str, Any]]:
    """Train what is missing in `out`, and write runs.csv, table.csv, table.md and figure.png there.

    A finished run is not repeated and a stopped one goes on after its last complete epoch, so that a comparison may be
    interrupted and started again. command: what the table says that it was made by. robustness: so many test images are
    corrupted and attacked, for the networks of the equal epochs; robustness.csv and robustness.png are written besides.

    Returns: the rows of runs.csv. Raises: ValueError where `out` holds a run of other settings; BlockingIOError where
    another process works in `out`.
    """
    out = Path(out)
    plans = plan(comparison)
    with claim_folder(out, (*FILES, *ROBUSTNESS_FILES)):
        return _compare(comparison, plans, out, command, robustness)


def _compare(comparison, plans, out, command, robustness):
    rows = []
    for number, planned in enumerate(plans, 1):
        folder = out / "runs" / planned.folder
        label = f"[{number}/{len(plans)}] {planned.method}, {planned.epochs} epochs, seed {planned.seed}"
        summary = _finished(folder, planned.config)
        if summary is None:
            print(f"{label} ...", flush=True)
            resume = (folder / CHECKPOINT).is_file()
            with open(out / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
                summary = train(planned.config, folder, resume=resume, overwrite=not resume)
        seconds = _seconds(folder, planned.config)
        print(f"{label}: {summary['top1']:.2f} %, {seconds:.0f} s", flush=True)
        rows += [
            {
                "method": planned.method,
                "budget": budget,
                "epochs": planned.epochs,
                "seed": planned.seed,
                "step_cost": round(planned.cost, 4),
                "top1": summary["top1"],
                "top5": summary["top5"],
                "seconds": seconds,
            }
            for budget in planned.budgets
        ]
        write_rows(out / "runs.csv", rows)
    rows.sort(key=lambda row: BUDGETS.index(row["budget"]))
    table = summarise(rows)
    write_rows(out / "runs.csv", rows)
    write_rows(out / "table.csv", table)
    setting = _setting(plans[0].config, summary)
    write_markdown(out / "table.md", table, comparison.name, command, setting)
    write_figure(out / "figure.png", rows, f"{comparison.name}: {setting}")
    if robustness:
        measured = [_robustness(p, out / "runs" / p.folder, robustness) for p in plans if "epochs" in p.budgets]
        write_rows(out / "robustness.csv", measured)
        write_robustness(out / "table.md", measured)
        write_robustness_figure(out / "robustness.png", measured, f"{comparison.name}: {setting}")
    return rows


def _robustness(planned: Plan, folder: Path, images: int) -> dict[str, Any]:
    """A row of robustness.csv; the evaluation that a run's folder holds is not repeated."""
    path = folder / "evaluation" / "evaluation.json"
    found = read_json(path, ["images", "top1"]) if path.is_file() else {}
    if found.get("images") != images or not {"corruptions", "attacks"} <= found.keys():
        print(f"{planned.method}, seed {planned.seed}: corruptions and attacks ...", flush=True)
        with contextlib.redirect_stdout(None):
            found = evaluate_checkpoint(
                folder / CHECKPOINT,
                path.parent,
                parts=("corruptions", "attacks"),
                images=images,
                device=planned.config.train.device,
                overwrite=True,
            )
    row = {
        "method": planned.method,
        "epochs": planned.epochs,
        "seed": planned.seed,
        "images": images,
        "top1": found["top1"],
        "mean_corruption_error": found["corruptions"]["mean_corruption_error"],
    }
    attacks = found["attacks"].items()
    return row | {f"{attack}_{epsilon}": top1 for attack, values in attacks for epsilon, top1 in values.items()}


def plan(comparison: Comparison) -> list[Plan]:
    """The runs of a comparison, the same for the same file: by seed, then method, then budget."""
    configs = {
        method: load_config(comparison.preset, comparison.settings | settings)
        for method, settings in comparison.methods.items()
    }
    seeds = comparison.seeds
    if not seeds or any(type(seed) is not int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different integers, at least one, got {list(seeds)}")
    costs, relative = {}, {}
    for method, config in configs.items():
        images, _ = load_images(config)
        full, costs[method] = step_cost(config, images)
        per_epoch = len(images.train) // config.train.batch_size * config.train.batch_size
        relative[method] = costs[method] / full
        costs[method] *= per_epoch
    budget = max(costs[method] * config.train.epochs for method, config in configs.items())
    plans = []
    for seed in seeds:
        for method, config in configs.items():
            equal_compute = max(1, round(budget / costs[method]))
            by_epochs = {}
            for name, epochs in zip(BUDGETS, (config.train.epochs, equal_compute), strict=True):
                by_epochs.setdefault(epochs, []).append(name)
            for epochs, budgets in by_epochs.items():
                longer = _with_epochs(comparison, method, config, epochs, seed)
                plans.append(Plan(method, epochs, seed, tuple(budgets), relative[method], longer))
    return plans


def _with_epochs(comparison, method, config, epochs, seed):
    """The configuration for another number of epochs, its schedule stretched with it."""
    stretched = [round(milestone * epochs / config.train.epochs) for milestone in config.schedule.milestones]
    changed = {"train.epochs": epochs, "train.seed": seed, "schedule.milestones": stretched}
    return load_config(comparison.preset, comparison.settings | comparison.methods[method] | changed)


def _finished(folder, config):
    """summary.json of a finished run of this configuration; None where there is none yet."""
    if not (folder / "config.toml").is_file():
        return None
    key = difference(config, load_config(str(folder / "config.toml")), FREE_ON_RESUME)
    if key is not None:
        raise ValueError(f"{folder} must be a run of this comparison, got one of another {key}; take another --out")
    path = folder / "summary.json"
    return read_json(path, ["top1", "top5", "data", "device", "threads"]) if path.is_file() else None


def _seconds(folder, config):
    column = "cpu_seconds" if find_device(config.train.device).type == "cpu" else "seconds"
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        try:
            return sum(float(row[column]) for row in csv.DictReader(file))
        except (KeyError, TypeError, ValueError, csv.Error):
            raise ValueError(f"{file.name} must have numbers in the column {column}, got others") from None


def _setting(config, summary):
    return (
        f"{config.model.name} on {config.data.name} ({summary['data']}), batches of {config.train.batch_size}; "
        f"{summary['device']}, {summary['threads']} threads; "
        f"torch {torch.__version__}, gradaug_kernels {gk.__version__}"
    )


def _flat(table, prefix=""):
    """{"section.key": value} of nested tables."""
    flat = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
