"""The record that every benchmark writes, its files, and the table in the terminal."""

import csv
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm import tqdm

from gradaug_kernels._library import backends

from .providers import OURS


@dataclass
class Row:
    """One measurement: what was measured, where and with what, and the figures. None: not measured."""

    bench: str
    case: str
    provider: str
    backend: str
    dtype: str
    layout: str
    device: str
    threads: int
    torch: str
    triton: str
    commit: str
    date: str
    repeats: int
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    first_s: float | None = None  # the first call, with whatever it compiles
    peak_mb: float | None = None  # MB = 1e6 bytes, above what was held before
    resident_mb: float | None = None  # the same of the whole process
    rate: float | None = None
    unit: str | None = None  # of rate: GFLOP/s, GB/s or images/s
    gate: str | None = None  # green or red, for ours
    x_eager: float | None = None  # times faster than plain eager, for ours behind a green gate
    x_best: float | None = None  # the same against the best baseline of the run
    width: float | None = None
    gflop: float | None = None  # forward, one image
    params: int | None = None


FIELDS = tuple(field.name for field in fields(Row))


def make_row(bench: str, case: str, provider: str, dtype: str, device: torch.device, repeats: int, **figures) -> Row:
    """A row with everything about the machine and the versions filled in."""
    backend = _our_backends(bench, device) if provider in OURS else {"compile": "inductor"}.get(provider, "aten")
    return Row(
        bench,
        case,
        provider,
        backend,
        dtype,
        "channels_last",
        device_name(device),
        torch.get_num_threads(),
        torch.__version__,
        _version("triton"),
        commit(),
        datetime.now(UTC).isoformat(timespec="seconds"),
        repeats,
        **figures,
    )


def _our_backends(bench: str, device: torch.device) -> str:
    """The backends of one operator, or of all of them for a whole network: "cpp" or "cpp+reference"."""
    op = bench.split(".")[0]
    served = {name: on[device.type] for name, on in backends().items()}
    of_op = {backend for name, backend in served.items() if name.startswith(op)}
    return "+".join(sorted(of_op or set(served.values())))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []  # of the first processor
    found = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines)}
    name = found.get("model name", platform.machine())
    # A virtual machine may hide which of a family it is.
    generation = f" (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else ""
    return f"{name}{generation} {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def commit() -> str:
    """The commit of this folder, with -dirty where tracked files but results were changed; empty outside of git."""
    try:
        found = _git("describe", "--always", "--exclude=*")
        changed = _git("diff", "--name-only", "HEAD", "--", ":/", ":(exclude)results")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{found}-dirty" if changed else found


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def write_json(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def append_csv(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


class Table:
    """Prints lines of columns above a progress bar: the first column as wide as asked, the others of 10."""

    def __init__(self, first: str, *columns: str, width: int = 52):
        self.width = width
        self.line(first, *columns)

    def line(self, first: str, *cells: object) -> None:
        tqdm.write(f"{first:<{self.width}}" + "".join(f"{_text(cell):>10}" for cell in cells))


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def speedup_cells(row: Row) -> list[str]:
    """The speed-ups of ours for the table; nothing for a baseline, and no speed-up behind a red gate."""
    if row.provider not in OURS:
        return ["", ""]
    if row.gate != "green":
        return ["RED GATE", ""]
    return ["-" if ratio is None else f"{ratio:.2f}x" for ratio in (row.x_eager, row.x_best)]
