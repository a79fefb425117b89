"""What a run leaves for people: metrics.csv, curves.png, and the table in the terminal."""

import csv
from pathlib import Path
from typing import Any

from .._names import printable
from .folder import complete_file

Row = dict[str, int | float]  # one epoch's figures by column name, the same columns in every row


def columns(num_subnets: int) -> list[str]:
    """The keys of a row."""
    losses = ["loss_full", *(f"loss_subnet_{number + 1}" for number in range(num_subnets))]
    times = ["seconds", "cpu_seconds", "images_per_second"]
    return ["epoch", "lr", *losses, "train_top1", *times, "eval_loss", "eval_top1", "eval_top5"]


def write_metrics(path: Path, history: list[Row]) -> None:
    """One line per epoch; losses are means over the epoch's iterations, accuracies in percent.

    loss_subnet_1 is of the widest sub-network of each step, the last one of that of minimum width.
    """
    with complete_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def write_curves(
    path: Path, history: list[Row], widths: dict[str, float], evaluated_on: str, title: str, subnet_loss: str
) -> None:
    """Draw losses and accuracies over the epochs, and accuracy over width when there is more than one width.

    widths, evaluated_on: as in summary.json; subnet_loss: what the sub-networks' loss is called.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = 3 if len(widths) > 1 else 2
    figure = Figure(figsize=(4.6 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels)
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(history) < 30 else None

    def draw(axis, column, **style):
        axis.plot(epochs, [row[column] for row in history], marker=marker, markersize=3, **style)

    loss, accuracy = axes[:2]
    blue, orange = "#1f5fa8", "#d9822b"
    draw(loss, "loss_full", color=blue, label="full network, training")
    draw(loss, "eval_loss", color=blue, linestyle="--", label=f"full network, {evaluated_on}")
    loss.set(title="Loss", xlabel="epoch", ylabel="cross entropy", yscale="log")
    subnets = [column for column in history[0] if column.startswith("loss_subnet_")]
    for number, column in enumerate(subnets, 1):
        last = number == len(subnets)
        label = "smallest sub-network" if last else "other sub-networks" if number == 1 else None
        draw(loss, column, color="#2e8b57" if last else "#9fd19f", label=label)
    if subnets:
        loss.set_ylabel(f"cross entropy (sub-networks: {subnet_loss})")
    draw(accuracy, "train_top1", color=orange, label="training images, augmented")
    draw(accuracy, "eval_top1", color=blue, label=f"{evaluated_on} images, {history[-1]['eval_top1']:.2f} % at the end")
    accuracy.set(title="Accuracy of the full network", xlabel="epoch", ylabel="top-1 accuracy (%)")
    if panels == 3:
        values = sorted((float(width), top1) for width, top1 in widths.items())
        axes[2].plot(*zip(*values, strict=True), color=blue, marker="o")
        for width, top1 in values:
            axes[2].annotate(f"{top1:.1f}", (width, top1), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        axes[2].set(title="Accuracy after calibration", xlabel="width", ylabel="top-1 accuracy (%)")
        low, high = min(widths.values()), max(widths.values())
        margin = max(0.2 * (high - low), 1.0)  # differences below a percent should not look large
        axes[2].set_ylim(low - margin, high + margin)
        axes[2].margins(x=0.08)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[:2]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize=11)
    with complete_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def epoch_line(row: Row, epochs: int, evaluated_on: str, remaining: float) -> str:
    """One epoch in one line of the terminal. remaining: seconds."""
    subnets = [f"{value:.3f}" for column, value in row.items() if column.startswith("loss_subnet_")]
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['loss_full']:.3f}"
        + (f"  sub-nets {' '.join(subnets)}" if subnets else "")
        + f"  train {row['train_top1']:.2f} %  {evaluated_on} {row['eval_top1']:.2f} %"
        + f"  {row['images_per_second']:.0f} images/s  {remaining:.0f} s left"
    )


def closing_table(summary: dict[str, Any], out: Path) -> str:
    """The summary as the terminal shows it."""
    rows = [
        ("preset", summary["preset"]),
        ("parameters", f"{summary['parameters']:,}"),
        ("epochs", str(summary["epochs"])),
        (f"top-1, {summary['evaluated_on']} images", f"{summary['top1']:.2f} %"),
        *((f"  width {width}", f"{top1:.2f} %") for width, top1 in summary["widths"].items()),
        ("images per second", f"{summary['images_per_second']:.0f}"),
        ("seconds", f"{summary['seconds']:.1f}"),
        ("output", str(out)),
    ]
    return table(rows)


def table(rows: list[tuple[str, str]]) -> str:
    """Rows (name, value) between rules."""
    rows = [(name, printable(value)) for name, value in rows]
    width = max(len(name) for name, _ in rows)
    rule = "-" * (width + 2 + max(len(value) for _, value in rows))
    return "\n".join([rule, *(f"{name:<{width}}  {value}" for name, value in rows), rule])
