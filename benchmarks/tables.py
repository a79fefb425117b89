"""Writes the figures of README.md and docs/results.md from the rows of one folder: `python -m benchmarks.tables`.

    python -m benchmarks.tables            writes both
    python -m benchmarks.tables --check    writes nothing, and fails where they are not what the rows say

No figure is typed by hand. Of rows that measure the same thing the last one counts, beside eager in its own run, as in
`benchmarks.plot`, which draws the pictures from the same rows.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from .plot import RESULTS, Rows, read_rows

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: python -m benchmarks.tables -->", "<!-- /results -->"
NETWORKS = {  # case in the rows -> what a reader calls it, and the options of `python -m benchmarks`
    "resnet50 b8 224px": ("ResNet-50", "--model resnet50 --batch 8 --size 224"),
    "mobilenet_v3_large b16 224px": ("MobileNetV3-large", "--model mobilenet_v3_large --batch 16 --size 224"),
    "wrn-28-10 b32 32px": ("WRN-28-10", "--model wrn-28-10 --batch 32 --size 32"),
}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
PROVIDERS = {
    "ours": "this package",
    "recompute": "with `recompute=True`",
    "eager": "tuned eager",
    "compile": "torch.compile",
}
SLOW = 0.95  # a layer under this is named


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file is out of date")
    options = parser.parse_args(arguments)
    rows = read_rows(options.folder)
    readme, page = ROOT / "README.md", ROOT / "docs" / "results.md"
    wanted = {readme: between_markers(readme.read_text(), readme_table(rows)), page: results_page(rows)}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date' if options.check else 'written'}")
        if not options.check:
            path.write_text(wanted[path])
    return 1 if stale and options.check else 0


def between_markers(text: str, block: str) -> str:
    """`text` with what stands between the two markers replaced.

    Raises:
        ValueError: for a text without the two markers.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must have the markers {BEGIN} and {END}, got a text without them")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


# ---- README.md


def readme_table(rows: Rows) -> str:
    """One GradAug step of each network and dtype on the device that was measured last."""
    steps = of_last_device([row for row in rows if row["bench"] == "step"])
    table = [["one GradAug step", "bfloat16", "eager", "times", "float32", "eager", "times"]]
    for (case, provider), found in by(steps, lambda row: (network_of(row), row["provider"])):
        if provider not in ("ours", "recompute"):
            continue
        cells = []
        for dtype in DTYPES:
            row = next((row for row in found if row["dtype"] == dtype), None)
            cells += (
                ["–", "–", "–"] if row is None else [seconds(row), seconds(row, "eager_"), f"**{ratio(row):.2f}x**"]
            )
        name = NETWORKS[case][0] + (", `recompute=True`" if provider == "recompute" else "")
        table.append([name, *cells])
    return markdown(table) + f"\n\n{where(steps)}; medians, interleaved."


# ---- docs/results.md


def results_page(rows: Rows) -> str:
    sections = [
        "# Results",
        "Written by `python -m benchmarks.tables` from the rows in `benchmarks/results/`; no figure here is typed by "
        "hand. Eager is plain PyTorch tuned as well as we can: channels_last, autocast, sliced weights. Providers are "
        "interleaved in one process, after a check that ours computes the same; a time is the median, in brackets "
        "the 20th and 80th percentile. No GPU has been measured yet: `benchmarks/gpu_suite.sh` is the run on a card.",
        *step_sections(rows),
        *memory_sections(rows),
        *layer_sections(rows),
        *throughput_sections(rows),
    ]
    return "\n\n".join(sections) + "\n"


def step_sections(rows: Rows) -> Iterator[str]:
    yield "## One GradAug step"
    yield (
        "Full network and three sub-networks, forward, backward and optimizer. `python -m benchmarks step --repeats 7 "
        "--new-width` with the options of the network, and `--dtype bf16` or `fp32`. The C library keeps what is "
        "freed, for both, as `gradaug train` has it; a loop of your own gets the same from "
        "`GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=-1`."
    )
    for device, of_device in devices([row for row in rows if row["bench"] == "step"]):
        new = {key(row): row for row in rows if row["bench"] == "step.new_width" and row["device"] == device}
        table = [["network, options", "dtype", "", "seconds", "times eager's speed", "a new width, in steps"]]
        for row in of_device:
            if row["provider"] != "eager":
                first = new.get(key(row))
                table.append(
                    [
                        f"{NETWORKS[network_of(row)][0]}, `{NETWORKS[network_of(row)][1]}`",
                        row["dtype"],
                        PROVIDERS[row["provider"]],
                        f"{spread(row)}, eager {spread(row, 'eager_')}",
                        f"{ratio(row):.2f}",
                        "" if first is None else f"{float(first['median_ms']) / float(row['median_ms']):.2f}",
                    ]
                )
        yield f"### {where(of_device)}\n\n{markdown(table)}"
    yield "![times faster than eager](results/step.png)"


def memory_sections(rows: Rows) -> Iterator[str]:
    yield "## Peak memory of a step"
    yield (
        "Above weights, gradients and optimizer: tensors, and in brackets the whole process, as a share of eager's. "
        "`python -m benchmarks memory --providers ours,recompute,eager` with the options of the network."
    )
    for _, of_device in devices([row for row in rows if row["bench"] == "memory"]):
        table = [["network", "dtype", "", "MB", "share of eager's"]]
        for row in of_device:
            if row["provider"] == "eager":
                continue
            shares = [float(row[name]) / float(row[f"eager_{name}"]) for name in ("peak_mb", "resident_mb")]
            table.append(
                [
                    NETWORKS[network_of(row)][0],
                    row["dtype"],
                    PROVIDERS[row["provider"]],
                    f"{float(row['peak_mb']):.0f}, eager {float(row['eager_peak_mb']):.0f}",
                    f"{shares[0]:.2f} ({shares[1]:.2f})",
                ]
            )
        yield f"### {where(of_device)}\n\n{markdown(table)}"
    yield "![peak memory of a step](results/memory.png)"


def layer_sections(rows: Rows) -> Iterator[str]:
    yield "## Each layer"
    yield (
        "The distinct layers of the three networks at widths 1 and 0.9, forward and backward together, and pairs of "
        "layers that one operator computes, beside eager's two: `python -m benchmarks layers --widths 1.0,0.9 "
        "--repeats 9` with the options of the network. Speed as a multiple of eager's. `slim_conv2d_norm` is what "
        "`recompute=True` runs: it computes the convolution twice to keep half of the memory, and may lose time."
    )
    for _, of_device in devices([row for row in rows if row["bench"].endswith(".total")]):
        ours = [row for row in of_device if row["provider"] == "ours" and row["x_best"]]
        table = [["operator", "layers", "geometric mean", "slowest", "under 1x", f"under {SLOW}x"]]
        for op, of_op in [("all", ours), *by(ours, lambda row: row["bench"].split(".")[0])]:
            speeds = [float(row["x_best"]) for row in of_op]
            mean = math.exp(sum(map(math.log, speeds)) / len(speeds))
            counts = [sum(speed < limit for speed in speeds) for limit in (1, SLOW)]
            name = op if op == "all" else f"`{op}`"
            table.append([name, str(len(speeds)), f"{mean:.2f}x", f"{min(speeds):.2f}x", *map(str, counts)])
        yield f"### {where(of_device)}\n\n{markdown(table)}"
        slow = sorted((float(row["x_best"]), row) for row in ours if float(row["x_best"]) < SLOW)
        listed = [["layer", "operator", "dtype", "speed"]]
        for speed, row in slow:
            op = row["bench"].split(".")[0]
            listed.append([row["case"].replace("|", "then"), f"`{op}`", row["dtype"], f"{speed:.3f}x"])
        yield f"Under {SLOW}x:\n\n{markdown(listed)}" if slow else f"None is under {SLOW}x."
    yield "![each layer against eager](results/layers.png)"


def throughput_sections(rows: Rows) -> Iterator[str]:
    yield "## Sub-networks in evaluation"
    yield (
        "Images per second of each width in evaluation, beside a dense network of that width without any slicing: "
        "`python -m benchmarks throughput --model resnet50,mobilenet_v3_large --batch 8 --size 224 --dtype bf16 "
        "--widths 1.0,0.9,0.8,0.7,0.6,0.5 --repeats 7`."
    )
    for _, of_device in devices([row for row in rows if row["bench"] == "throughput"]):
        table = [["network", "width", "GFLOP an image", "million parameters", "images/s", "dense"]]
        for row in sorted(of_device, key=lambda row: (row["case"], -float(row["width"]))):
            if row["provider"] == "ours":
                table.append(
                    [
                        row["case"].split(" ")[0],
                        f"{float(row['width']):g}",
                        f"{float(row['gflop']):.2f}",
                        f"{int(row['params']) / 1e6:.1f}",
                        f"{float(row['rate']):.0f}",
                        f"{float(row['eager_rate']):.0f}",
                    ]
                )
        yield f"### {where(of_device)}\n\n{markdown(table)}"
    yield "![images per second, arithmetic and memory of each width](results/throughput.png)"


# ---- rows and cells


def devices(rows: Rows) -> Iterator[tuple[str, Rows]]:
    """The rows of each device, the one that was measured last first."""
    found = list(by(rows, lambda row: row["device"]))
    yield from sorted(found, key=lambda item: max(row["date"] for row in item[1]), reverse=True)


def of_last_device(rows: Rows) -> Rows:
    return next(devices(rows))[1]


def by(rows: Iterable[dict], group: Callable) -> Iterator[tuple]:
    groups: dict = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    yield from groups.items()


def key(row: dict[str, str]) -> tuple[str, ...]:
    return row["case"], row["dtype"], row["provider"]


def network_of(row: dict[str, str]) -> str:
    return row["case"].split(" (")[0]


def ratio(row: dict[str, str]) -> float:
    """Times eager's speed in the same run."""
    return float(row["eager_median_ms"]) / float(row["median_ms"])


def seconds(row: dict[str, str], of: str = "") -> str:
    return f"{float(row[f'{of}median_ms']) / 1000:.2f} s"


def spread(row: dict[str, str], of: str = "") -> str:
    median, p20, p80 = (float(row[f"{of}{name}_ms"]) / 1000 for name in ("median", "p20", "p80"))
    return f"{median:.2f} ({p20:.2f} to {p80:.2f})"


def where(rows: Rows) -> str:
    """The device, versions, dates and commits of some rows."""
    dates = sorted({row["date"][:10] for row in rows})
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    row = rows[-1]
    return f"{row['device']}, {row['threads']} threads, torch {row['torch']}, {span}, commits {commits}"


def markdown(table: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(cells) + " |" for cells in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *body])


if __name__ == "__main__":
    raise SystemExit(main())
