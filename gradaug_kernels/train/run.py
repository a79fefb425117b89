"""One training run from top to bottom: configuration, data, network, loop, report."""

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

import gradaug_kernels as gk

from .._names import printable
from ..data.image_tensors import mix_seed
from ..recipes.build import build_network, build_optimizer, build_step, load_images, private_widths
from ..recipes.config import Config, to_tables
from ..recipes.device import find_device
from ..slim.calibrate import calibrate
from ..slim.width import check_width, use_width
from .augment import BatchAugmentation
from .average import WeightAverage, add_gradient_noise
from .folder import CHECKPOINT, FILES, claim_folder, complete_file, open_folder, write_checkpoint
from .report import closing_table, columns, epoch_line, write_curves, write_metrics
from .state import load_progress, load_weights

SUBNET_LOSS_TITLES = {"kl": "KL divergence", "alpha_divergence": "alpha-divergence", "cross_entropy": "cross entropy"}
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
    device = find_device(config.train.device)
    seed, epochs = config.train.seed, config.train.epochs

    # Data
    images, evaluated_on = load_images(config)
    at_loader = {"device": device, "workers": config.data.workers}
    train_loader = images.train.loader(config.train.batch_size, train=True, seed=seed, **at_loader)
    test_loader = images.test.loader(config.evaluate.batch_size, **at_loader)

    # Network
    torch.manual_seed(seed)
    model = build_network(config, len(images.classes), images.channels)
    with use_width(model, min(config.gradaug.min_width, *config.evaluate.widths)):
        pass  # a width that leaves a layer without channels is refused before anything is written
    model.to(device, memory_format=torch.channels_last if config.train.channels_last else torch.contiguous_format)
    optimizer = build_optimizer(config, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(config, len(train_loader)))
    autocast_dtype = torch.bfloat16 if config.train.precision == "bf16" else None
    step = build_step(config, model, optimizer, images, scheduler=scheduler, autocast_dtype=autocast_dtype)

    regularize = config.regularize
    augmentation = BatchAugmentation(regularize, len(images.classes))
    if regularize.gradient_noise > 0:
        add_gradient_noise(optimizer, regularize.gradient_noise, lambda: scheduler.last_epoch)
    average = WeightAverage(model, regularize.average_decay) if regularize.average_decay > 0 else None
    evaluated = model if average is None else average.model

    with claim_folder(out, FILES, create=not resume):
        # Where an earlier run stopped
        history, seconds_before = [], 0.0
        checkpoint = open_folder(out, config, resume, overwrite)
        if checkpoint is not None:
            try:
                load_weights("model", model, checkpoint["model"])
                if average is not None:
                    load_weights("average", average.model, checkpoint.get("average", {}))
                iterations = len(train_loader)
                load_progress(checkpoint, optimizer, scheduler, step, iterations, columns(config.gradaug.num_subnets))
            except ValueError as error:
                raise ValueError(f"{out / CHECKPOINT} must be a checkpoint of this run: {error}") from None
            history, seconds_before = checkpoint["history"], checkpoint["seconds"]
            if average is not None:
                average.updates = len(history) * len(train_loader)

        def save():
            write_checkpoint(
                out / CHECKPOINT,
                preset=config.preset,
                config=to_tables(config),
                epoch=len(history),
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                scheduler=scheduler.state_dict(),
                gradaug=step.state_dict(),
                history=history,
                seconds=seconds_before + time.perf_counter() - start,
                **({} if average is None else {"average": average.model.state_dict()}),
            )

        if checkpoint is None:
            save()
        counts = f"{len(images.train):,} training and {len(images.test):,} {evaluated_on} images"
        print(f"{config.preset}: {counts}, {printable(images.origin)}")

        # Loop
        for epoch in range(len(history), epochs):
            try:
                row = _train_epoch(step, model, average, augmentation, train_loader, epoch, epochs, config, device)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; {out / CHECKPOINT} keeps the state after epoch {epoch}") from None
            loss, top1, top5 = evaluate(evaluated, test_loader, autocast_dtype)
            history.append(row | {"eval_loss": loss, "eval_top1": top1, "eval_top5": top5})
            save()
            write_metrics(out / "metrics.csv", history)
            per_epoch = sum(row["seconds"] for row in history) / len(history)
            print(epoch_line(history[-1], epochs, evaluated_on, per_epoch * (epochs - epoch - 1)))

        # Report
        last = history[-1]
        widths = _evaluate_widths(evaluated, images, test_loader, config, at_loader, last["eval_top1"], autocast_dtype)
        save()  # with the widths' statistics
        summary = {
            "preset": config.preset,
            "top1": last["eval_top1"],
            "top5": last["eval_top5"],
            "evaluated_on": evaluated_on,
            "widths": widths,
            "seconds": seconds_before + time.perf_counter() - start,
            "seed": seed,
            "images_per_second": epochs
            * len(train_loader)
            * config.train.batch_size
            / sum(r["seconds"] for r in history),
            "epochs": epochs,
            "parameters": sum(p.numel() for p in model.parameters()),
            "data": images.origin,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
            "versions": {
                "gradaug_kernels": gk.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        write_metrics(out / "metrics.csv", history)
        title = f"{config.preset}: {config.model.name}, {summary['parameters']:,} parameters, seed {seed}"
        write_curves(
            out / "curves.png", history, widths, evaluated_on, title, SUBNET_LOSS_TITLES[config.gradaug.subnet_loss]
        )
        with complete_file(out / "summary.json") as path:
            path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(closing_table(summary, out))
    return summary


def _train_epoch(step, model, average, augmentation, loader, epoch, epochs, config, device):
    """One epoch. Returns: its row of metrics.csv, without the evaluation."""
    started, cpu_started = time.perf_counter(), time.process_time()
    model.train()
    loader.set_epoch(epoch)
    torch.manual_seed(mix_seed(config.train.seed, epoch))  # dropout and the like, so that a resumed epoch repeats them
    names = ["loss_full", *(f"loss_subnet_{number + 1}" for number in range(config.gradaug.num_subnets))]
    totals = torch.zeros(len(names), device=device)
    correct = torch.zeros((), device=device)
    lr = step.optimizer.param_groups[0]["lr"]
    bar = tqdm(loader, desc=f"epoch {epoch + 1}/{epochs}", unit="batch", leave=False, dynamic_ncols=True, disable=None)
    for iteration, (images, targets) in enumerate(bar, 1):
        losses = step(*augmentation(images, targets))
        if average is not None:
            average.update(model)
        totals += torch.stack([losses.full, *losses.subnets]).detach()
        correct += (losses.logits.argmax(1) == targets).sum()
        if iteration % CHECK_EVERY == 0 or iteration == len(loader):
            means = (totals / iteration).tolist()
            for name, mean in zip(names, means, strict=True):
                if not math.isfinite(mean):
                    raise FloatingPointError(f"loss must be finite, got {mean} as {name} in epoch {epoch + 1}")
            if step.skipped:
                count = f"{step.skipped} of {iteration} steps without in epoch {epoch + 1}"
                raise FloatingPointError(f"loss, gradient and statistics must be finite, got {count}")
            bar.set_postfix(loss=f"{means[0]:.3f}", refresh=False)
    # A loss is of the weights before its step: those after the last one, which the checkpoint keeps, have shown none.
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise FloatingPointError(f"weights must be finite, got NaN or infinity at the end of epoch {epoch + 1}")
    seconds = time.perf_counter() - started
    count = len(loader) * config.train.batch_size
    return {
        "epoch": epoch + 1,
        "lr": lr,
        **dict(zip(names, means, strict=True)),
        "train_top1": 100 * correct.item() / count,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu_started,
        "images_per_second": count / seconds,
    }


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


def _evaluate_widths(model, images, test_loader, config, at_loader, full_top1, autocast_dtype):
    """{"0.8": top-1 in percent, ...} of the configured widths, with statistics of unaugmented training images.

    The full network, and widths with private statistics, keep those of their training.
    """
    narrow = sorted({check_width(width) for width in config.evaluate.widths} - {1.0})
    without = [width for width in narrow if width not in private_widths(config)]
    widths = {}
    if without:
        loader = images.train.loader(
            config.train.batch_size, train=True, augment=False, seed=config.train.seed, **at_loader
        )
        calibrate(model, without, loader, config.evaluate.calibration_batches or None)
    for width in narrow:
        with use_width(model, width):
            widths[str(width)] = evaluate(model, test_loader, autocast_dtype)[1]
    return widths | {"1.0": full_top1}


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
