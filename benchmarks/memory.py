"""The peak memory of a call, above what was allocated before it.

Each function runs the call twice and measures the second, which may free what the first left behind.
"""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MEASURED = "measured call"
_M_MMAP_THRESHOLD = -3  # of mallopt(3)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The peak of torch's allocator.

    CUDA: the caching allocator's counters. CPU: the sum of the allocations and frees that torch's CPU allocator reports
    to the profiler, in their order. That is every tensor and temporary of ATen, of compiled graphs and of native
    kernels on the calling thread, to the byte; it leaves out what oneDNN and MKL take from malloc for themselves.
    """
    if device.type == "cuda":
        call()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()  # only frees of what was allocated under the profiler are reported
        with record_function(_MEASURED):
            call()
    events = profiled.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == _MEASURED)
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.start_ns() >= start:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def return_freed_blocks() -> None:
    """Have the C library map blocks of 64 KiB and more one by one from here on, and so return each when it is freed.

    To be called before the first tensors: the heap that they leave behind is used again, piece by piece, and its holes
    stay resident (a ResNet-50 step in float32 then measures 1360 MB instead of 630). It makes the process slower: time
    nothing after it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def resident_peak_bytes(call: Callable[[], object]) -> int | None:
    """The peak of the process's resident memory: the check on `peak_bytes` that leaves nothing out. None outside Linux.

    After `return_freed_blocks`; otherwise it is what the heap ever grew to.
    """
    if sys.platform != "linux":
        return None
    call()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
