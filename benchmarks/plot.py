"""Draws the figures of README.md and docs/ from the rows of one folder: `python -m benchmarks.plot [FOLDER]`.

Writes step.png, layers.png, throughput.png and memory.png, each if there are rows for it: those of the committed rows
into docs/results, those of another folder beside its CSV files. Of rows that measure the same thing the last one
counts, beside eager in its own run, and of several devices the one that was measured last; what ours did behind a red
gate is not drawn.
"""

import argparse
import csv
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent.parent / "docs" / "results"
COLOURS = {"ours": "#c23b22", "recompute": "#e39b8f", "eager": "#9a9a9a", "compile": "#4b7bab", "eager8": "#d4b15f"}
OP_COLOURS = {
    "slim_conv2d": "#c23b22",
    "slim_batch_norm": "#4b7bab",
    "slim_linear": "#d4b15f",
    "slim_norm_conv2d": "#7a4b9a",
    "slim_conv2d_norm": "#3f8f5a",
    "slim_norm_max_pool2d": "#333333",
}

Rows = list[dict[str, str]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="draw the rows of a folder")
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    folder = parser.parse_args(arguments).folder
    for path in draw_all(folder, FIGURES if folder == RESULTS else folder):
        print(path)
    return 0


def draw_all(folder: Path, out: Path) -> list[Path]:
    """The figures that the rows in folder/*.csv allow, written to `out`; their paths."""
    rows = read_rows(folder)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, bench, draw in (
        ("step", "step", draw_step),
        ("memory", "memory", draw_memory),
        ("layers", ".total", draw_layers),
        ("throughput", "throughput", draw_throughput),
    ):
        chosen = [row for row in rows if row["bench"] == bench or (bench[0] == "." and row["bench"].endswith(bench))]
        if chosen:
            device = max(chosen, key=lambda row: row["date"])["device"]
            chosen = [row for row in chosen if row["device"] == device]
            written.append(out / f"{name}.png")
            draw(chosen).savefig(written[-1], dpi=150, bbox_inches="tight")
    return written


def read_rows(folder: Path) -> Rows:
    """The last row of each thing measured; of each, what eager had in the same run, as eager_<field>."""
    latest: dict[tuple, dict[str, str]] = {}
    eager: dict[tuple, Rows] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                key = tuple(row[name] for name in ("bench", "case", "provider", "dtype", "device", "threads", "width"))
                if row["provider"] == "eager":
                    eager.setdefault(_measured(row), []).append(row)
                latest[key] = row
    rows = [row | _beside(row, eager.get(_measured(row), [])) for row in latest.values()]
    return [row for row in rows if row["gate"] != "red"]


def _measured(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("bench", "case", "dtype", "width", "device", "threads", "commit"))


def _beside(row: dict[str, str], eager: Rows) -> dict[str, str]:
    """eager_<field> of the same run: the row written nearest in time, which may be in another second."""
    date = datetime.fromisoformat(row["date"])
    near = min(eager, key=lambda other: abs(datetime.fromisoformat(other["date"]) - date), default={})
    return {f"eager_{name}": value for name, value in near.items()}


def draw_step(rows: Rows) -> Figure:
    """Bars: how many times faster than plain eager a step is."""
    return _bars(rows, "median_ms", lambda eager, value: eager / value, "times faster than eager")


def draw_memory(rows: Rows) -> Figure:
    """Bars: the peak of a step as a share of plain eager's."""
    return _bars(rows, "peak_mb", lambda eager, value: value / eager, "peak memory of a step / eager's")


def _bars(rows: Rows, field: str, ratio: Callable[[float, float], float], label: str) -> Figure:
    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        case = f"{row['case'].split(' (')[0]}, {row['dtype']}"
        if f"eager_{field}" in row:
            cases.setdefault(case, {})[row["provider"]] = ratio(float(row[f"eager_{field}"]), float(row[field]))
    providers = [name for name in COLOURS if any(name in values for values in cases.values())]
    height = 0.8 / max(1, len(providers))
    axes = _axes(Figure(figsize=(7, 0.8 + 0.28 * len(cases) * len(providers))), rows)
    for i, provider in enumerate(providers):
        for j, values in enumerate(cases.values()):
            if provider in values:
                shown = values[provider]
                bar = axes.barh(j + i * height, shown, height, color=COLOURS[provider], label=provider)
                axes.bar_label(bar, [f"{shown:.2f}"], padding=3, fontsize=8)
    axes.set_yticks([j + height * (len(providers) - 1) / 2 for j in range(len(cases))], list(cases))
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8)
    return axes.figure


def draw_layers(rows: Rows) -> Figure:
    """Points: each layer's forward and backward against the best baseline, slowest first."""
    found = sorted(
        (float(row["x_best"]), row["bench"].split(".")[0])
        for row in rows
        if row["provider"] == "ours" and row["x_best"]
    )
    axes = _axes(Figure(figsize=(7, 3.5)), rows)
    for op, colour in OP_COLOURS.items():
        points = [(rank, ratio) for rank, (ratio, of) in enumerate(found) if of == op]
        if points:
            axes.scatter(*zip(*points, strict=True), s=9, color=colour, label=op)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("layers, sorted")
    axes.set_ylabel("times faster than the best baseline")
    axes.legend(fontsize=8)
    return axes.figure


def draw_throughput(rows: Rows) -> Figure:
    """Curves against the width: images per second, arithmetic and peak memory of sub-networks."""
    panels = (("rate", "images / s"), ("gflop", "GFLOP / image"), ("peak_mb", "peak memory, MB"))
    curves = sorted({(row["case"], row["dtype"], row["provider"]) for row in rows})
    networks = sorted({(case, dtype) for case, dtype, _ in curves})
    figure = Figure(figsize=(11, 3.3), layout="constrained")
    figure.suptitle(_machine(rows), fontsize=8)
    for axes, (field, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for case, dtype, provider in curves:
            points = sorted(
                (float(row["width"]), float(row[field]))
                for row in rows
                if (row["case"], row["dtype"], row["provider"]) == (case, dtype, provider) and row[field]
            )
            if points and (field != "gflop" or provider == "ours"):
                line = "-" if provider == "ours" else "--"
                colour = f"C{networks.index((case, dtype))}"
                label = f"{case} {dtype} {provider}"
                axes.plot(*zip(*points, strict=True), line, marker="o", markersize=3, color=colour, label=label)
        axes.set_xlabel("width")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        _bare(axes)
    figure.axes[0].legend(fontsize=6)
    return figure


def _axes(figure: Figure, rows: Rows) -> Axes:
    axes = figure.subplots()
    axes.set_title(_machine(rows), fontsize=8)
    _bare(axes)
    return axes


def _machine(rows: Rows) -> str:
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}, {commits}"


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    raise SystemExit(main())
