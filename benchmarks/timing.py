"""Interleaved timing, on a CPU or a CUDA device.

Every round runs each provider once, in alternating order (A B, B A, ...), so that a machine that slows down slows
all of them. A CPU is timed by perf_counter, a CUDA device by events in the current stream.
"""

import time
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from tqdm import trange

COVER_BYTES = 1 << 30  # written before each sample of a layer, see `interleave`


class Workload(NamedTuple):
    """prepare runs untimed before each sample; then the stages run in their order, each timed."""

    prepare: Callable[[], object]
    stages: Mapping[str, Callable[[], object]]

    def run(self) -> None:
        self.prepare()
        for stage in self.stages.values():
            stage()


class Quantiles(NamedTuple):
    median_ms: float
    p20_ms: float
    p80_ms: float


def quantiles(milliseconds: list[float]) -> Quantiles:
    samples = torch.tensor(milliseconds, dtype=torch.double)
    return Quantiles(*samples.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.double)).tolist())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """One call, such as the first of a compiled function."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def interleave(
    workloads: Mapping[str, Workload],
    device: torch.device,
    repeats: int,
    warmup: int = 1,
    cover: bool = False,
    description: str | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every sample: {provider: {stage: [repeats]}}, and "total" of a sample's stages.

    cover: on CUDA, queue a large write before each sample. It empties the L2 cache, and while it runs the host queues
    the sample's kernels, so that a layer's time is the device's; a step is timed without, host included.
    """
    samples = {name: {stage: [] for stage in (*load.stages, "total")} for name, load in workloads.items()}
    names = list(workloads)
    for i in trange(-warmup, repeats, desc=description, leave=False, disable=None if description else True):
        for name in names if i % 2 == 0 else reversed(names):
            times = _sample(workloads[name], device, cover)
            if i >= 0:
                for stage, milliseconds in zip(workloads[name].stages, times, strict=True):
                    samples[name][stage].append(milliseconds)
                samples[name]["total"].append(sum(times))
    return samples


def _sample(workload: Workload, device: torch.device, cover: bool) -> list[float]:
    workload.prepare()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for stage in workload.stages.values():
            stage()
            marks.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in pairwise(marks)]
    torch.cuda.synchronize(device)
    if cover:
        _cover(device).zero_()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(workload.stages) + 1)]
    events[0].record()
    for stage, event in zip(workload.stages.values(), events[1:], strict=True):
        stage()
        event.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in pairwise(events)]


@cache
def _cover(device: torch.device) -> torch.Tensor:
    return torch.empty(COVER_BYTES, dtype=torch.uint8, device=device)
