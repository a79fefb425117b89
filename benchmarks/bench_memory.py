"""`python -m benchmarks memory`: the peak of one GradAug step.

It is counted above what any provider must hold between steps: weights, gradients, optimizer state and the batch, but
not low-precision copies of the weights. peak_mb is what torch's allocator handed out (memory.peak_bytes), resident_mb
what the whole CPU process took (resident_peak_bytes).
"""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from .bench_step import case_name, gated_runs
from .cases import Network
from .memory import peak_bytes, resident_peak_bytes, return_freed_blocks
from .providers import OURS, StepRun
from .rows import Row, Table, make_row


def run_memory(net: Network, dtype: str, providers: Sequence[str], device: torch.device) -> list[Row]:
    return_freed_blocks()
    gate, runs, _ = gated_runs(net, dtype, providers, device)
    resident = {name: _resident_mb(run, device) for name, run in runs.items()}  # first: what the profiler frees counts
    peaks = {name: (peak_bytes(run, device) + _copies_bytes(run)) / 1e6 for name, run in runs.items()}
    tqdm.write(f"peak memory of a step, {case_name(net)}, {dtype}; gate {gate}")
    table = Table("provider", "peak MB", "of eager", "resident", "of eager", "held MB", width=10)
    rows = []
    for name in providers:
        trusted = name not in OURS or gate.green
        shares = [_share(megabytes, name) if trusted else "RED GATE" for megabytes in (peaks, resident)]
        table.line(name, peaks[name], shares[0], resident[name], shares[1], held_bytes(runs[name]) / 1e6)
        figures = {"peak_mb": peaks[name], "resident_mb": resident[name]}
        if name in OURS:
            figures["gate"] = "green" if gate.green else "red"
        rows.append(make_row("memory", case_name(net), name, dtype, device, 1, **figures))
    return rows


def _resident_mb(run: StepRun, device: torch.device) -> float | None:
    peak = resident_peak_bytes(run) if device.type == "cpu" else None
    return None if peak is None else (peak + _copies_bytes(run)) / 1e6


def _copies_bytes(run: StepRun) -> int:
    return sum(copy.nbytes for copy in run.copies_of_weights())


def _share(megabytes: dict[str, float | None], name: str) -> str:
    if megabytes[name] is None or "eager" not in megabytes:
        return "-"
    return f"{megabytes[name] / megabytes['eager']:.2f}"


def held_bytes(run: StepRun) -> int:
    """Weights, gradients and optimizer state."""
    parameters = list(run.model.parameters())
    state = [v for state in run.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    return sum(tensor.nbytes for tensor in (*parameters, *gradients, *state, *run.model.buffers()))


def test_memory(benchmark, net, dtype, provider, device):
    gate, runs, _ = gated_runs(net, dtype, [provider], device)
    if provider in OURS:
        assert gate.green, gate
    peak = benchmark.pedantic(peak_bytes, args=(runs[provider], device), rounds=1)
    peak += _copies_bytes(runs[provider])
    benchmark.extra_info.update(case=case_name(net), peak_mb=peak / 1e6)
