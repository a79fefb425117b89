"""One training run from top to bottom: configuration, data, network, loop, report."""

import json
import math
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import gradaug_kernels as gk

from .._names import printable
from ..data import ImageData
from ..data.image_tensors import mix_seed
from ..recipes.build import (
    build_network,
    build_optimizer,
    build_step,
    calibrate_widths,
    load_images,
    private_widths,
    test_loader,
    train_loader,
)
from ..recipes.choices import SUBNET_LOSSES
from ..recipes.config import Config, to_tables
from ..recipes.device import find_device
from ..slim.width import check_width, use_width
from .augment import BatchAugmentation
from .average import WeightAverage, add_gradient_noise
from .folder import CHECKPOINT, FILES, claim_folder, complete_file, open_folder, write_checkpoint
from .report import closing_table, columns, epoch_line, write_curves, write_metrics
from .state import load_progress, load_weights

CHECK_EVERY = 20  # iterations between looks at the loss: each look waits for the device


def train(config: Config, out: str | Path, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train as `config` says and leave config.toml, metrics.csv, curves.png, checkpoint.pt and summary.json in `out`.

    The network of the last epoch is reported; no epoch is chosen by its accuracy. A run that was stopped goes on with
    `resume` from its last complete epoch and ends with the weights that it would have had without the stop.

    Returns: the content of summary.json, accuracies in percent.
    Raises: FileExistsError when `out` is not empty and neither `resume` nor `overwrite` is set; BlockingIOError when
    another process works in it; ValueError when what it holds is damaged or of other settings; FloatingPointError when
    a loss or a weight is not finite. The checkpoint of the last complete epoch stays.
    """
    start = time.perf_counter()
    out = Path(out)
    images = _open_images(config)
    run = _build(config, images)

    with claim_folder(out, FILES, create=not resume):
        history, seconds_before = [], 0.0
        checkpoint = open_folder(out, config, resume, overwrite)
        if checkpoint is not None:
            _go_on_from(checkpoint, out / CHECKPOINT, config, images, run)
            history, seconds_before = checkpoint["history"], checkpoint["seconds"]

        def save():
            write_checkpoint(
                out / CHECKPOINT,
                preset=config.preset,
                config=to_tables(config),
                epoch=len(history),
                history=history,
                seconds=seconds_before + time.perf_counter() - start,
                **run.state(),
            )

        if checkpoint is None:
            save()
        counts = f"{len(images.data.train):,} training and {len(images.data.test):,} {images.evaluated_on} images"
        print(f"{config.preset}: {counts}, {printable(images.data.origin)}")

        epochs = config.train.epochs
        for epoch in range(len(history), epochs):
            try:
                row = _train_epoch(config, images, run, epoch)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; {out / CHECKPOINT} keeps the state after epoch {epoch}") from None
            loss, top1, top5 = evaluate(run.evaluated, images.test_loader, run.step.autocast_dtype)
            history.append(row | {"eval_loss": loss, "eval_top1": top1, "eval_top5": top5})
            save()
            write_metrics(out / "metrics.csv", history)
            per_epoch = sum(row["seconds"] for row in history) / len(history)
            print(epoch_line(history[-1], epochs, images.evaluated_on, per_epoch * (epochs - epoch - 1)))

        widths = _evaluate_widths(config, images, run, history[-1]["eval_top1"])
        save()  # with the widths' statistics
        seconds = seconds_before + time.perf_counter() - start
        summary = _summary(config, images, run, history, widths, seconds)
        _write_report(out, config, history, summary)
    print(closing_table(summary, out))
    return summary


class _Images(NamedTuple):
    """What a run reads."""

    data: ImageData
    evaluated_on: str  # which images `data.test` are: "test" or "held-out"
    train_loader: Iterable
    test_loader: Iterable
    device: torch.device  # where the loaders put them


class _Run(NamedTuple):
    """What a run changes."""

    model: nn.Module
    average: WeightAverage | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    step: gk.GradAug
    augmentation: BatchAugmentation

    @property
    def evaluated(self) -> nn.Module:
        return self.model if self.average is None else self.average.model

    def state(self) -> dict[str, Any]:
        """What of it a checkpoint holds."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "gradaug": self.step.state_dict(),
        }
        return state if self.average is None else state | {"average": self.average.model.state_dict()}


def _open_images(config):
    device = find_device(config.train.device)
    data, evaluated_on = load_images(config)
    loaders = train_loader(config, data, device), test_loader(config, data, device)
    return _Images(data, evaluated_on, *loaders, device)


def _build(config, images):
    """The run at its start."""
    torch.manual_seed(config.train.seed)
    model = build_network(config, len(images.data.classes), images.data.channels)
    with use_width(model, min(config.gradaug.min_width, *config.evaluate.widths)):
        pass  # a width that leaves a layer without channels is refused before anything is written
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    model.to(images.device, memory_format=memory_format)
    optimizer = build_optimizer(config, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(config, len(images.train_loader)))
    autocast_dtype = torch.bfloat16 if config.train.precision == "bf16" else None
    step = build_step(config, model, optimizer, images.data, scheduler=scheduler, autocast_dtype=autocast_dtype)
    augmentation = BatchAugmentation(config.regularize, len(images.data.classes))
    if config.regularize.gradient_noise > 0:
        add_gradient_noise(optimizer, config.regularize.gradient_noise, lambda: scheduler.last_epoch)
    decay = config.regularize.average_decay
    average = WeightAverage(model, decay) if decay > 0 else None
    return _Run(model, average, optimizer, scheduler, step, augmentation)


def _go_on_from(checkpoint, path, config, images, run):
    """Make the run that of the checkpoint, which was read from `path`."""
    iterations = len(images.train_loader)
    try:
        load_weights("model", run.model, checkpoint["model"])
        if run.average is not None:
            load_weights("average", run.average.model, checkpoint.get("average", {}))
        in_history = columns(config.gradaug.num_subnets)
        load_progress(checkpoint, run.optimizer, run.scheduler, run.step, iterations, in_history)
    except ValueError as error:
        raise ValueError(f"{path} must be a checkpoint of this run: {error}") from None
    if run.average is not None:
        run.average.updates = len(checkpoint["history"]) * iterations


def _train_epoch(config, images, run, epoch):
    """One epoch, counted from 0. Returns: its row of metrics.csv, without the evaluation."""
    started, cpu_started = time.perf_counter(), time.process_time()
    run.model.train()
    images.train_loader.set_epoch(epoch)
    torch.manual_seed(mix_seed(config.train.seed, epoch))  # dropout and the like, so that a resumed epoch repeats them
    lr = run.optimizer.param_groups[0]["lr"]
    losses, correct = _train_batches(config, images, run, epoch)
    # A loss is of the weights before its step: those after the last one, which the checkpoint keeps, have shown none.
    if not all(value.isfinite().all() for value in run.model.state_dict().values()):
        raise FloatingPointError(f"weights must be finite, got NaN or infinity at the end of epoch {epoch + 1}")
    seconds = time.perf_counter() - started
    count = len(images.train_loader) * config.train.batch_size
    return {
        "epoch": epoch + 1,
        "lr": lr,
        **losses,
        "train_top1": 100 * correct / count,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu_started,
        "images_per_second": count / seconds,
    }


def _train_batches(config, images, run, epoch):
    """Returns: {column: mean loss}, and how many images the full network recognised."""
    loader, title = images.train_loader, f"epoch {epoch + 1}/{config.train.epochs}"
    names = ["loss_full", *(f"loss_subnet_{number + 1}" for number in range(config.gradaug.num_subnets))]
    totals = torch.zeros(len(names), device=images.device)
    correct = torch.zeros((), device=images.device)
    bar = tqdm(loader, desc=title, unit="batch", leave=False, dynamic_ncols=True, disable=None)
    for iteration, (x, y) in enumerate(bar, 1):
        losses = run.step(*run.augmentation(x, y))
        if run.average is not None:
            run.average.update(run.model)
        totals += torch.stack([losses.full, *losses.subnets]).detach()
        correct += (losses.logits.argmax(1) == y).sum()
        if iteration % CHECK_EVERY == 0 or iteration == len(loader):
            means = dict(zip(names, (totals / iteration).tolist(), strict=True))
            _refuse_non_finite(means, run.step.skipped, iteration, epoch)
            bar.set_postfix(loss=f"{means['loss_full']:.3f}", refresh=False)
    return means, correct.item()


def _refuse_non_finite(means, skipped, iteration, epoch):
    for name, mean in means.items():
        if not math.isfinite(mean):
            raise FloatingPointError(f"loss must be finite, got {mean} as {name} in epoch {epoch + 1}")
    if skipped:
        count = f"{skipped} of {iteration} steps without in epoch {epoch + 1}"
        raise FloatingPointError(f"loss, gradient and statistics must be finite, got {count}")


@torch.no_grad()
def evaluate(model, loader, autocast_dtype=None) -> tuple[float, float, float]:
    """Mean cross entropy, top-1 and top-5 accuracy (percent) of the model at its current width over a loader."""
    model.eval()
    loss, top1, top5, count = 0.0, 0, 0, 0
    for images, targets in loader:
        with torch.autocast(images.device.type, autocast_dtype, enabled=autocast_dtype is not None):
            logits = model(images)  # [B, classes]
        logits = logits.float()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # [B, 5]
        top1 += best[:, 0].sum().item()
        top5 += best.sum().item()
        count += len(targets)
    return loss / count, 100 * top1 / count, 100 * top5 / count


def _evaluate_widths(config, images, run, full_top1):
    """{"0.8": top-1 in percent, ...} of the configured widths, with statistics of unaugmented training images.

    The full network, and widths with private statistics, keep those of their training.
    """
    narrow = sorted({check_width(width) for width in config.evaluate.widths} - {1.0})
    without = [width for width in narrow if width not in private_widths(config)]
    if without:
        calibrate_widths(config, run.evaluated, without, images.data, images.device)
    widths = {}
    for width in narrow:
        with use_width(run.evaluated, width):
            widths[str(width)] = evaluate(run.evaluated, images.test_loader, run.step.autocast_dtype)[1]
    return widths | {"1.0": full_top1}


def _summary(config, images, run, history, widths, seconds):
    """What summary.json holds."""
    trained = config.train.epochs * len(images.train_loader) * config.train.batch_size
    device = images.device
    return {
        "preset": config.preset,
        "top1": history[-1]["eval_top1"],
        "top5": history[-1]["eval_top5"],
        "evaluated_on": images.evaluated_on,
        "widths": widths,
        "seconds": seconds,
        "seed": config.train.seed,
        "images_per_second": trained / sum(row["seconds"] for row in history),
        "epochs": config.train.epochs,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "data": images.data.origin,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "gradaug_kernels": gk.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _write_report(out, config, history, summary):
    write_metrics(out / "metrics.csv", history)
    title = f"{config.preset}: {config.model.name}, {summary['parameters']:,} parameters, seed {summary['seed']}"
    subnet_loss = SUBNET_LOSSES[config.gradaug.subnet_loss].title
    write_curves(out / "curves.png", history, summary["widths"], summary["evaluated_on"], title, subnet_loss)
    with complete_file(out / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _schedule(config, iterations_per_epoch):
    """The learning rate's factor at each iteration, counted from 0."""
    schedule, total = config.schedule, config.train.epochs * iterations_per_epoch
    warmup = schedule.warmup_epochs * iterations_per_epoch

    def factor(iteration):
        if iteration < warmup:
            return (iteration + 1) / warmup
        if schedule.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * iteration / total))
        passed = sum(iteration >= milestone * iterations_per_epoch for milestone in schedule.milestones)
        return schedule.gamma**passed

    return factor
