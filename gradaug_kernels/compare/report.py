"""What a comparison leaves for people: the table as CSV and Markdown, and the figure."""

import csv
import statistics
from pathlib import Path
from typing import Any

from ..train.folder import complete_file

BUDGETS = ("epochs", "compute")  # what is equal for all methods
Rows = list[dict[str, Any]]


def summarise(rows: Rows) -> Rows:
    """One row per budget and method, in the order of `rows`: mean and standard deviation over the seeds.

    The deviation is that of a sample (n - 1); 0 for one seed. rows: as in runs.csv.
    """
    table = []
    for (budget, method), group in _grouped(rows, "budget", "method").items():
        (top1, deviation), (top5, _), (seconds, _) = (_spread(group, key) for key in ("top1", "top5", "seconds"))
        table.append(
            {
                "budget": budget,
                "method": method,
                "step_cost": group[0]["step_cost"],
                "epochs": group[0]["epochs"],
                "seeds": len(group),
                "top1_mean": round(top1, 3),
                "top1_std": round(deviation, 3),
                "top5_mean": round(top5, 3),
                "seconds_mean": round(seconds, 1),
            }
        )
    return table


def write_rows(path: Path, rows: Rows) -> None:
    """A CSV file of rows with the same keys."""
    with complete_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(path: Path, table: Rows, name: str, command: str, setting: str) -> None:
    """The table for people, under the command that makes it."""
    lines = [f"## {name}", "", f"    {command}", "", f"{setting}.", ""]
    for budget in BUDGETS:
        rows = [row for row in table if row["budget"] == budget]
        if not rows:
            continue
        lines += [
            f"At equal {budget}:",
            "",
            "| method | multiply-adds of a step (plain: 1) | epochs | seeds | top-1 (%), mean ± std | seconds |",
            "|---|---|---|---|---|---|",
            *(
                f"| {row['method']} | {row['step_cost']:.2f} | {row['epochs']} | {row['seeds']} "
                f"| {row['top1_mean']:.2f} ± {row['top1_std']:.2f} | {row['seconds_mean']:.0f} |"
                for row in rows
            ),
            "",
        ]
    with complete_file(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def write_figure(path: Path, rows: Rows, title: str) -> None:
    """Each run as a point, mean and standard deviation as a bar, and the seconds of training; a panel per budget."""
    table = summarise(rows)
    budgets = [budget for budget in BUDGETS if any(row["budget"] == budget for row in table)]
    methods = list(dict.fromkeys(row["method"] for row in table))
    figure = _figure(5.2 * len(budgets), 1.6 + 0.42 * len(methods))
    axes = figure.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)[0]
    places = {method: len(methods) - 1 - index for index, method in enumerate(methods)}
    for axis, budget in zip(axes, budgets, strict=True):
        for row in (row for row in table if row["budget"] == budget):
            place = places[row["method"]]
            axis.errorbar(
                row["top1_mean"], place, xerr=row["top1_std"], fmt="o", color="#1f5fa8", capsize=3, markersize=5
            )
            text = f"{row['epochs']} epochs, {row['seconds_mean']:.0f} s"
            axis.annotate(text, (row["top1_mean"], place), (0, 7), textcoords="offset points", ha="center", fontsize=7)
        runs = [(row["top1"], places[row["method"]]) for row in rows if row["budget"] == budget]
        axis.plot(*zip(*runs, strict=True), "|", color="#d9822b", markersize=9)
        axis.set_title(f"equal {budget}", fontsize=10)
        axis.set_xlabel("top-1 accuracy (%)")
        axis.set_yticks(list(places.values()), list(places))
        axis.set_ylim(-0.6, len(methods) - 0.2)
    _save(figure, path, title)


def write_robustness(path: Path, rows: Rows) -> None:
    """Adds to the table for people what corruptions and attacks leave of the accuracy. rows: as in robustness.csv."""
    shown = {
        "top1": "top-1 (%)",
        "mean_corruption_error": "mean corruption error (%)",
        "fgsm_1": "FGSM 1/255",
        "fgsm_4": "FGSM 4/255",
        "pgd_4": "PGD 4/255",
    }
    lines = [
        f"Corruptions and attacks, networks of the equal epochs, {rows[0]['images']} test images, mean ± std:",
        "",
        f"| method | seeds | {' | '.join(shown.values())} |",
        "|---|---|" + "---|" * len(shown),
    ]
    for (method,), group in _grouped(rows, "method").items():
        cells = (f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in (_spread(group, key) for key in shown))
        lines.append(f"| {method} | {len(group)} | {' | '.join(cells)} |")
    text = path.read_text(encoding="utf-8")
    with complete_file(path) as temporary:
        temporary.write_text("\n".join([text, *lines, ""]), encoding="utf-8")


def write_robustness_figure(path: Path, rows: Rows, title: str) -> None:
    """The mean corruption error of each method, and its accuracy under FGSM against epsilon; means over the seeds."""
    from matplotlib import colormaps

    groups = _grouped(rows, "method")
    figure = _figure(10.4, 1.8 + 0.36 * len(groups))
    errors, curves = figure.subplots(1, 2)
    epsilons = [key for key in rows[0] if key.startswith("fgsm_")]
    for place, ((method,), group) in enumerate(groups.items()):
        colour = colormaps["tab10"](place % 10)
        mean, deviation = _spread(group, "mean_corruption_error")
        errors.errorbar(mean, -place, xerr=deviation, fmt="o", color=colour, capsize=3, markersize=5)
        values = [_spread(group, key)[0] for key in ("top1", *epsilons)]
        curves.plot(
            [0, *(float(key.removeprefix("fgsm_")) for key in epsilons)],
            values,
            "o-",
            color=colour,
            label=method,
            markersize=3,
        )
    errors.set_yticks([-place for place in range(len(groups))], [method for (method,) in groups])
    errors.set_xlabel("mean corruption error (%)")
    curves.set_xlabel("FGSM epsilon (1/255)")
    curves.set_ylabel("top-1 accuracy (%)")
    curves.legend(frameon=False, fontsize=7)
    _save(figure, path, title)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: Path, title: str) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=8, wrap=True)
    with complete_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _grouped(rows: Rows, *keys: str) -> dict[tuple, Rows]:
    """The rows that agree in the keys, in order."""
    groups: dict[tuple, Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _spread(rows: Rows, key: str) -> tuple[float, float]:
    """Mean and standard deviation of a sample (n - 1); 0 for one row."""
    values = [row[key] for row in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
