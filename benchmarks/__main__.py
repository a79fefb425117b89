"""Benchmarks from the command line: `python -m benchmarks layers|step|throughput|memory`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .bench_memory import run_memory
from .bench_step import run_step
from .bench_throughput import run_throughput
from .cases import network
from .layers import run_layers
from .options import add_options
from .rows import Row, append_csv, write_json

COMMON = ("model", "batch", "size", "dtype", "providers", "threads", "json", "csv")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 where the gate of a case was red."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if "recompute" in options.providers and options.run not in (step, memory):
        parser.error("recompute is a provider of whole steps: step or memory")
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = options.run(options, device)
    if options.json:
        write_json(rows, Path(options.json))
    if options.csv:
        append_csv(rows, Path(options.csv))
    return 1 if any(row.gate == "red" for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="layers|step|throughput|memory")
    for run, extra, text in (
        (layers, ("widths", "repeats"), "the distinct layers of networks, forward and backward"),
        (step, ("repeats",), "one GradAug step"),
        (throughput, ("widths", "repeats"), "images per second and latency of sub-networks in evaluation"),
        (memory, (), "the peak memory of one GradAug step"),
    ):
        command = commands.add_parser(
            run.__name__, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.set_defaults(run=run)
        add_options(command.add_argument, (*COMMON, *extra))
        if run is step:
            command.add_argument("--new-width", action="store_true", help="time the first steps at new widths too")
    return parser


def layers(o: argparse.Namespace, device: torch.device) -> list[Row]:
    return run_layers(o.model, o.widths, o.batch, o.size, o.dtype, o.providers, o.repeats, device)


def step(o: argparse.Namespace, device: torch.device) -> list[Row]:
    rows = []
    for name in o.model:
        rows += run_step(network(name, o.batch, o.size), o.dtype, o.providers, o.repeats, device, o.new_width)
    return rows


def throughput(o: argparse.Namespace, device: torch.device) -> list[Row]:
    rows = []
    for name in o.model:
        rows += run_throughput(network(name, o.batch, o.size), o.widths, o.dtype, o.providers, o.repeats, device)
    return rows


def memory(o: argparse.Namespace, device: torch.device) -> list[Row]:
    return [row for name in o.model for row in run_memory(network(name, o.batch, o.size), o.dtype, o.providers, device)]


if __name__ == "__main__":
    sys.exit(main())
