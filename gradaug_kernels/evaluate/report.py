"""Tables (CSV) and figures (PNG) of an evaluation, one each for each part."""

import csv
from pathlib import Path
from typing import Any

from ..train.folder import complete_file
from .corruptions import COMMON, SEVERITIES

BLUE, ORANGE, GREEN = "#1f5fa8", "#d9822b", "#2e8b57"


def write_table(path: Path, header: list[str], rows: list[list]) -> None:
    """A CSV file, with six digits of each number: 12.7 instead of 12.700000000000003."""
    with complete_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)


def write_widths(out: Path, widths: dict[str, float], title: str) -> None:
    write_table(out / "widths.csv", ["width", "top1"], [[width, value] for width, value in widths.items()])
    figure, axis = _figure(title)
    axis.plot([float(width) for width in widths], list(widths.values()), color=BLUE, marker="o")
    low, high = min(widths.values()), max(widths.values())
    margin = max(0.2 * (high - low), 1.0)  # differences below a percent should not look large
    axis.set(xlabel="width", ylabel="top-1 accuracy (%)", ylim=(low - margin, high + margin))
    _save(figure, out / "widths.png")


def write_corruptions(out: Path, corruptions: dict[str, Any], clean: float, title: str) -> None:
    """clean: the error without a corruption, in percent."""
    errors = corruptions["errors"]
    header = ["corruption", *(f"error_severity_{severity}" for severity in SEVERITIES), "mean_error"]
    rows = [[name, *values, sum(values) / len(values)] for name, values in errors.items()]
    write_table(out / "corruptions.csv", header, rows)
    figure, axis = _figure(title, width=max(4.6, 0.5 * len(errors) + 2))
    colours = ("#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08519c")
    for index, (severity, colour) in enumerate(zip(SEVERITIES, colours, strict=True)):
        places = [place + 0.16 * (index - 2) for place in range(len(errors))]
        heights = [values[index] for values in errors.values()]
        axis.bar(places, heights, 0.16, color=colour, label=f"severity {severity}")
    axis.axhline(clean, color=ORANGE, linewidth=1, linestyle="--", label="no corruption")
    labels = [name.replace("_", " ") + ("" if name in COMMON else " *") for name in errors]
    axis.set_xticks(range(len(errors)), labels, rotation=60, ha="right", fontsize=8)
    starred = "; * not in the mean" if any(name not in COMMON for name in errors) else ""
    axis.set(ylabel="top-1 error (%)", xlabel=f"{corruptions['constants']} constants{starred}")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.margins(x=0.01)
    _save(figure, out / "corruptions.png")


def write_attacks(out: Path, attacks: dict[str, dict[str, float]], clean: float, title: str) -> None:
    """clean: the accuracy without an attack, in percent."""
    rows = [["none", 0, clean]]
    rows += [[name, epsilon, value] for name, values in attacks.items() for epsilon, value in values.items()]
    write_table(out / "attacks.csv", ["attack", "epsilon_255", "top1"], rows)
    figure, axis = _figure(title)
    for (name, values), colour in zip(attacks.items(), (BLUE, ORANGE), strict=True):
        axis.plot([0, *map(float, values)], [clean, *values.values()], color=colour, marker="o", label=name.upper())
    axis.set(xlabel="epsilon (of 255)", ylabel="top-1 accuracy (%)")
    axis.set_ylim(bottom=0)
    _save(figure, out / "attacks.png")


def write_calibration(out: Path, error: float, bins: list, title: str) -> None:
    header = ["confidence_above", "confidence_up_to", "images", "accuracy", "mean_confidence"]
    write_table(out / "calibration.csv", header, [list(row) for row in bins])
    figure, axis = _figure(f"{title}\nexpected calibration error {100 * error:.2f} %")
    width = bins[0].high - bins[0].low
    filled = [row for row in bins if row.count]
    centres = [(row.low + row.high) / 2 for row in filled]
    axis.bar(centres, [row.accuracy for row in filled], 0.95 * width, color=BLUE, label="accuracy")
    axis.plot(centres, [row.confidence for row in filled], "_", color=ORANGE, markersize=14, label="mean confidence")
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    axis.set(xlabel="confidence", ylabel="part of the images", xlim=(0, 1), ylim=(0, 1))
    _save(figure, out / "calibration.png")


def _figure(title, width=4.6):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _save(figure, path):
    axis = figure.axes[0]
    if axis.get_legend() is None and axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)
    with complete_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
