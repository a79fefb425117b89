"""`python -m benchmarks step`: one GradAug step, its sub-networks given; and the first step at a new width."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from gradaug_kernels.recipes.memory import keep_freed_blocks

from .cases import DTYPES, Network
from .gate import Gate, check, speedups
from .memory import peak_bytes
from .providers import OURS, StepRun, reference_results, step_results
from .rows import Row, Table, make_row, speedup_cells
from .timing import Workload, interleave, quantiles, seconds, synchronize

NEW_WIDTHS = 3  # steps at a width never seen before


def run_step(
    net: Network, dtype: str, providers: Sequence[str], repeats: int, device: torch.device, new_width: bool = False
) -> list[Row]:
    keep_freed_blocks()  # or a step would time the pages that the provider before it gave back
    gate, runs, first = gated_runs(net, dtype, providers, device)
    samples = interleave(
        {name: Workload(lambda: None, {"step": run}) for name, run in runs.items()}, device, repeats, description="step"
    )
    quantile = {name: quantiles(samples[name]["step"]) for name in providers}
    peaks = {name: peak_bytes(run, device) / 1e6 for name, run in runs.items()}
    medians = {name: q.median_ms for name, q in quantile.items()}

    tqdm.write(f"step {case_name(net)}, {dtype}; gate {gate}")
    table = Table(
        "provider", "median ms", "p20", "p80", "images/s", "peak MB", "first s", "x eager", "x best", width=10
    )
    rows = []
    for name, q in quantile.items():
        figures = dict(q._asdict(), first_s=first[name], peak_mb=peaks[name])
        figures |= {"rate": 1e3 * net.batch / q.median_ms, "unit": "images/s"}
        if name in OURS:
            x_eager, x_best = speedups(medians, gate, name)
            figures |= {"gate": "green" if gate.green else "red", "x_eager": x_eager, "x_best": x_best}
        rows.append(make_row("step", case_name(net), name, dtype, device, repeats, **figures))
        table.line(name, *q, rows[-1].rate, peaks[name], first[name], *speedup_cells(rows[-1]))
    if new_width:
        rows += _new_width_rows(net, dtype, runs, medians, device)
    return rows


def case_name(net: Network) -> str:
    subnets = " ".join(f"{width:g}@{pixels}" for width, pixels in net.subnets)
    return f"{net.name} b{net.batch} {net.size}px ({subnets})"


def gated_runs(
    net: Network, dtype: str, providers: Sequence[str], device: torch.device
) -> tuple[Gate, dict[str, StepRun], dict[str, float]]:
    """The providers after their first step, how long that took in seconds, and the gate on its losses and gradients."""
    runs, first, results = {}, {}, {}
    for name in dict.fromkeys([*providers, "ours", "eager"]):
        run = StepRun(name, net, dtype, device)
        losses: list[Tensor] = []
        first[name] = seconds(lambda run=run, losses=losses: losses.extend(run()), device)
        if name in (*OURS, "eager"):
            results[name] = step_results(losses, run.model)
        if name in providers:
            runs[name] = run
    # A few losses can be right to the last bit by chance: they may be off by some units in the last place.
    slack = {"losses": 4 * torch.finfo(DTYPES[dtype]).eps}
    reference = reference_results(net, device)
    gates = [check(results[name], results["eager"], reference, slack) for name in OURS if name in results]
    return next((gate for gate in gates if not gate.green), gates[0]), runs, first


def _new_width_rows(
    net: Network, dtype: str, runs: dict[str, StepRun], median_ms: dict[str, float], device: torch.device
) -> list[Row]:
    """Steps whose widest sub-network has a width that no step had before."""
    (widest, pixels), *others = net.subnets
    tqdm.write("first step at a new width")
    table = Table("provider", "median ms", "x step", width=10)
    rows = []
    for name, run in runs.items():
        # Between the widest sub-network and the full one: widths that no earlier step had.
        widths = [widest + (1 - widest) * (i + 1) / (NEW_WIDTHS + 1) for i in range(NEW_WIDTHS)]
        new = [1e3 * seconds(lambda run=run, w=w: run([(w, pixels), *others]), device) for w in widths]
        q = quantiles(new)
        rows.append(make_row("step.new_width", case_name(net), name, dtype, device, NEW_WIDTHS, **q._asdict()))
        table.line(name, q.median_ms, f"{q.median_ms / median_ms[name]:.2f}")
    return rows


def test_step(benchmark, net, dtype, provider, device):
    gate, runs, first = gated_runs(net, dtype, [provider], device)
    if provider in OURS:
        assert gate.green, gate
    benchmark.extra_info.update(case=case_name(net), first_s=first[provider])

    def step():
        runs[provider]()
        synchronize(device)

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    benchmark.extra_info["peak_mb"] = peak_bytes(runs[provider], device) / 1e6
