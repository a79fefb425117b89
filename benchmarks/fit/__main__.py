"""`python -m benchmarks.fit [NAME]`: see the package's docstring."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean

import torch
from tqdm import tqdm

from ..gate import Gate
from ..options import OPTIONS
from ..rows import Row, Table, append_csv, commit, device_name, make_row, write_json
from ..timing import Quantiles, quantiles
from . import __doc__ as about
from .constants import CONSTANTS, WORKLOADS, Call, Constant, Number
from .sources import CPU, chosen, find, number
from .variants import ROOT, Variants, Worker

DEVICE = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)  # which the rows say
    try:
        if options.name is None:
            list_constants()
            return 0
        constant = chosen(options.name)
        result = measure(constant, options)
    except (ValueError, LookupError, RuntimeError) as error:
        print(error.args[0], file=sys.stderr)
        return 2
    print_result(constant, result)
    rows = rows_of(constant, result, options.repeats)
    if options.json:
        write_json(rows, options.json)
    if options.csv:
        append_csv(rows, options.csv)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fit", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="a constant; without one, the list")
    parser.add_argument("--values", nargs="+", type=number, help="candidates in place of the list's")
    parser.add_argument("--calls", type=int, help="at most so many calls, from all over the workload")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "fit", help="where libraries are built and kept"
    )
    for name in ("repeats", "threads", "json", "csv"):
        parser.add_argument(f"--{name}", **OPTIONS[name])
    return parser


def list_constants() -> None:
    for name, problems in WORKLOADS.items():
        print(f"{name:<18} {'; '.join(problems)}")
    print()
    for constant in CONSTANTS:
        of, place = constant.of, find(constant)
        where = f"{place.path.relative_to(CPU)}:{place.line}"
        what = f"{' '.join(of.dtypes)}, {' '.join(of.stages)} of {of.workload}"
        print(f"{constant.name:<18} {place.text:<12} {where:<36} {constant.trade}; {what}")


# ---- measuring


@dataclass
class Result:
    """Of each call and value: samples; the paths that computed it; and its gate, if that decides, too."""

    present: Number
    milliseconds: dict[Call, dict[Number, list[float]]] = field(default_factory=dict)
    paths: dict[Call, dict[Number, list[str]]] = field(default_factory=dict)
    gates: dict[Call, dict[Number, Gate | None]] = field(default_factory=dict)

    @property
    def values(self) -> list[Number]:
        return list(next(iter(self.milliseconds.values())))

    def ratio(self, value: Number) -> Quantiles:
        """Times as multiples of those with the present value: geometric means over the calls of each quantile.

        A round's two samples are divided by each other, as they met the same machine.
        """
        of_calls = [
            quantiles([a / b for a, b in zip(of[value], of[self.present], strict=True)])
            for of in self.milliseconds.values()
        ]
        return Quantiles(*(geometric_mean(each) for each in zip(*of_calls, strict=True)))

    def rerouted(self, value: Number) -> int:
        """Calls that another path computes than with the present value."""
        return sum(of[value] != of[self.present] for of in self.paths.values())

    def error(self, value: Number) -> float | None:
        """The largest, as a multiple of PyTorch's in the same dtype."""
        gates = [of[value] for of in self.gates.values() if of[value]]
        return max((gate.error / max(gate.torch_error, 1e-30) for gate in gates), default=None)

    def is_accurate(self, value: Number) -> bool:
        return all(of[value] is None or of[value].green for of in self.gates.values())

    def best(self) -> Number:
        """The fastest accurate value; the present one unless the spread of the other is below it."""
        accurate = [value for value in self.values if self.is_accurate(value)]
        found = min(accurate, key=lambda value: self.ratio(value).median_ms, default=self.present)
        return self.present if self.present in accurate and self.ratio(found).p80_ms >= 1 else found


def measure(constant: Constant, options: argparse.Namespace) -> Result:
    variants, result = Variants(options.folder), Result(find(constant).value)
    values = sorted({*(options.values or constant.candidates), result.present})
    packages = {value: variants.package(constant, value) for value in tqdm(values, desc="build", disable=None)}
    calls = constant.of.calls
    count = min(options.calls or len(calls), len(calls))
    with ExitStack() as stack:
        workers = {
            value: stack.enter_context(closing(Worker(package, options.threads))) for value, package in packages.items()
        }
        for call in tqdm([calls[i * len(calls) // count] for i in range(count)], desc=constant.name, disable=None):
            ready = {value: worker.prepare(call, constant.of.accuracy) for value, worker in workers.items()}
            result.paths[call] = {value: paths for value, (paths, _) in ready.items()}
            result.gates[call] = {value: gate for value, (_, gate) in ready.items()}
            result.milliseconds[call] = in_turns(workers, options.repeats)
    return result


def in_turns(workers: Mapping[Number, Worker], repeats: int) -> dict[Number, list[float]]:
    """Samples of each, in alternating order, as in timing.py; the first round is not kept."""
    samples = {value: [] for value in workers}
    for i in range(-1, repeats):
        for value in list(workers) if i % 2 == 0 else reversed(workers):
            milliseconds = workers[value].sample()
            if i >= 0:
                samples[value].append(milliseconds)
    return samples


def print_result(constant: Constant, result: Result) -> None:
    place, present = find(constant), result.present
    print(f"{place.path.relative_to(CPU.parents[1])}:{place.line}: {constant.name} = {place.text}, {constant.trade}")
    print(f"{device_name(DEVICE)}, {torch.get_num_threads()} threads, torch {torch.__version__}, {commit()}")
    accuracy = ["error", "gate"] if constant.of.accuracy else []
    table = Table("value", "ratio", "p20", "p80", "rerouted", *accuracy, width=12)
    for value in result.values:
        gate = [result.error(value), "green" if result.is_accurate(value) else "RED"] if constant.of.accuracy else []
        table.line(str(value), *result.ratio(value), f"{result.rerouted(value)}/{len(result.paths)}", *gate)
    best = result.best()
    print(f"best: {best}, " + ("the present value" if best == present else f"in place of {present}"))


def rows_of(constant: Constant, result: Result, repeats: int) -> list[Row]:
    return [
        make_row(
            "fit",
            f"{call.stage} of {call.problem}",
            f"{constant.name}={value}",
            call.dtype,
            DEVICE,
            repeats,
            **quantiles(samples)._asdict(),
        )
        for call, of in result.milliseconds.items()
        for value, samples in of.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
