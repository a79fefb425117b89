"""The CUDA kernels' own source, run on the CPU by tests/kernels_gpu/host_shim, under sanitizers.

Every case runs once under AddressSanitizer + UndefinedBehaviorSanitizer and once under ThreadSanitizer; its results are
judged by PyTorch's own error in the same dtype, against float64. Defects planted into copies of the sources show that
the sanitizers would notice: a missing barrier of a block or of a warp, and a read one row beyond an image.
"""

import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate
from support.cases import NCHW, NHWC, BatchNormCase, ConvCase, batch_norm_cases, conv_cases
from support.property_cases import conv_cases as drawn_conv_cases
from support.property_checks import assert_close
from support.property_oracle import Approx, conv2d, conv2d_input_grad, conv2d_weight_grad, unit
from support.property_runner import run as run_property
from support.torch_batch_norm import EPS, assert_statistics, torch_batch_norm
from torch._prims_common import suggest_memory_format

import gradaug_kernels as gk

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "tests" / "kernels_gpu" / "host_shim"
SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def compile_runner(name: str, sanitizer: str, output: Path, sources: Path = ROOT / "csrc", defines=()) -> Path:
    """Compile tests/kernels_gpu/host_shim/<name>.cpp. Without optimisation: the small cases run no longer for it."""
    command = [
        *("g++", "-std=c++20", "-O0", "-g1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-pthread"),
        *(f"-fsanitize={SANITIZERS[sanitizer]}", *(f"-D{define}" for define in defines)),
        *("-I", str(SHIM / "include"), "-I", str(sources), "-I", str(SHIM)),
        *(str(SHIM / f"{name}.cpp"), "-o", str(output)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


def why_no_shim() -> str | None:
    """None if g++ builds programs with both sanitizers that run here, otherwise the reason."""
    if shutil.which("g++") is None:
        return "no g++ found"
    program = "#include <thread>\nint main() { std::thread([] {}).join(); }"
    for flags in SANITIZERS.values():
        command = f"g++ -std=c++20 -fsanitize={flags} -pthread -x c++ - -o $DIR/a && $DIR/a"
        script = f"DIR=$(mktemp -d) && {{ {command}; R=$?; rm -r $DIR; exit $R; }}"
        if subprocess.run(["sh", "-c", script], input=program, capture_output=True, text=True).returncode:
            return f"g++ builds no program with -fsanitize={flags} that runs here"
    return None


NO_SHIM = why_no_shim()
pytestmark = pytest.mark.skipif(NO_SHIM is not None, reason=str(NO_SHIM))


@dataclass
class Buffer:
    """A strided view of a storage that ends with the view's last element; NaN wherever the view has no element."""

    storage: torch.Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @staticmethod
    def empty(shape, strides, dtype, offset=0) -> "Buffer":
        size = offset + 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        return Buffer(torch.full((size,), float("nan"), dtype=dtype), tuple(shape), tuple(strides), offset)

    @staticmethod
    def of(values: torch.Tensor, strides, offset=0) -> "Buffer":
        buffer = Buffer.empty(values.shape, strides, values.dtype, offset)
        buffer.view().copy_(values)
        return buffer

    def view(self) -> torch.Tensor:
        return self.storage.as_strided(self.shape, self.strides, self.offset)

    def outside(self) -> torch.Tensor:
        """The storage without the view's elements."""
        own = torch.zeros_like(self.storage, dtype=torch.bool)
        own.as_strided(self.shape, self.strides, self.offset).fill_(True)
        return self.storage[~own]


def run(runner: Path, cases: list, folder: Path, timeout: int = 330) -> subprocess.CompletedProcess:
    """Run cases (name, integers, numbers, storages), each storage a tensor or None; results land in the storages."""
    folder.mkdir(exist_ok=True)
    request, response = folder / "cases", folder / "results"
    with request.open("wb") as file:
        file.write(struct.pack("<I", len(cases)))
        for name, integers, numbers, storages in cases:
            file.write(struct.pack("<I", len(name)) + name.encode())
            file.write(struct.pack(f"<I{len(integers)}q", len(integers), *integers))
            file.write(struct.pack(f"<I{len(numbers)}d", len(numbers), *numbers))
            file.write(struct.pack("<I", len(storages)))
            for storage in storages:
                data = b"" if storage is None else storage.view(torch.uint8).numpy().tobytes()
                file.write(struct.pack("<Q", len(data)) + data)
    done = subprocess.run([runner, request, response], capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)
    if done.returncode == 0:
        data, position = bytearray(response.read_bytes()), 0
        for _, _, _, storages in cases:
            for storage in storages:
                if storage is not None:
                    size = storage.numel() * storage.element_size()
                    storage.view(torch.uint8).copy_(
                        torch.frombuffer(data, dtype=torch.uint8, count=size, offset=position)
                    )
                    position += size
    return done


# ---- Sliced convolution

HALF, BFLOAT, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
PASSES = ("forward", "input_grad", "weight_grad")


@dataclass(frozen=True)
class ConvJob:
    """A case of the operator, and what selects a kernel for it."""

    case: ConvCase
    dtype: torch.dtype = HALF
    tf32: bool = False
    buffer: torch.dtype | None = None  # dtype of the buffer that takes the weight gradient; None is that of x
    multiprocessors: int = 4  # few ask for large tiles, many for more splits of the weight gradient
    architecture: int = 80

    @property
    def on_tensor_cores(self) -> bool:
        groups, group_size = self.case.groups, min(self.case.channels) // self.case.groups
        multiplied = self.architecture >= 80 and (self.dtype in (HALF, BFLOAT) or self.tf32)
        return multiplied and (groups == 1 or group_size >= 16)


def conv_jobs() -> list[ConvJob]:
    """The operator's cases, each in one dtype, then those that only these kernels tell apart."""
    kinds = [
        {"dtype": HALF},
        {"dtype": SINGLE, "tf32": True},
        {"dtype": BFLOAT, "buffer": SINGLE},
        {"dtype": SINGLE},
        {"dtype": HALF, "buffer": SINGLE},
        {"dtype": DOUBLE},
        {"dtype": SINGLE, "tf32": True},
    ]  # an odd number, so that every second case still meets every kind
    jobs = [
        ConvJob(case, **kinds[i % len(kinds)]) for i, case in enumerate(case for case in conv_cases() if case.batch > 0)
    ]
    one, none = (1, 1), (0, 0)
    aligned = ConvCase("rows of 16 bytes", 1, (4, 5), (16, 24), wider=(8, 8), bias=True)
    return [
        ConvJob(aligned),
        ConvJob(aligned, BFLOAT, buffer=SINGLE),
        ConvJob(aligned, SINGLE, tf32=True),
        *jobs,
        ConvJob(ConvCase("odd channels, rows of 16 bytes", 2, (4, 5), (13, 13), x_layout="wide")),
        ConvJob(ConvCase("rows of 8 bytes", 1, (4, 5), (12, 20), wider=(8, 4))),
        ConvJob(ConvCase("rows of 4 bytes", 1, (4, 5), (6, 10), wider=(4, 2))),
        ConvJob(ConvCase("large tile", 1, (8, 9), (72, 72), one, padding=none, wider=(8, 8)), multiprocessors=1),
        ConvJob(ConvCase("large tile, odd channels", 1, (9, 8), (70, 69), one, padding=none), multiprocessors=1),
        ConvJob(
            ConvCase("large tile, TF32", 1, (9, 8), (68, 67), one, padding=none), SINGLE, tf32=True, multiprocessors=1
        ),
        ConvJob(ConvCase("splits", 2, (16, 17), (3, 5)), buffer=SINGLE, multiprocessors=8),
        ConvJob(ConvCase("2 groups of 17 channels", 1, (3, 4), (34, 34), groups=2, bias=True)),
        ConvJob(ConvCase("before tensor cores", 2, (4, 5), (5, 7), bias=True), architecture=75),
        ConvJob(ConvCase("depthwise, rows of 16 bytes", 1, (4, 5), (72, 72), groups=72, wider=(0, 8), bias=True)),
        ConvJob(ConvCase("depthwise, odd channels, rows of 16 bytes", 1, (4, 5), (13, 13), groups=13, x_layout="wide")),
    ]


CONV_JOBS = conv_jobs()
OWN_JOBS = [job for job in CONV_JOBS if job.case not in conv_cases()]
# A race does not depend on sizes: every second case of the operator will do where a barrier costs most.
JOBS_UNDER = {"asan": CONV_JOBS, "tsan": OWN_JOBS + [job for job in CONV_JOBS if job not in OWN_JOBS][::2]}


def conv_tensors(job: ConvJob):
    """x, the full weight, bias and dy."""
    x, weight, bias = job.case.tensors(job.dtype)
    size = F.conv2d(x, job.case.slice(weight), None, *job.case.geometry).shape
    dy = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).to(job.dtype)
    return x, weight, None if bias is None else bias[: job.case.out_channels], dy


def conv_by_torch(job: ConvJob, which: str, dtype: torch.dtype) -> torch.Tensor:
    """The result in `dtype`; a weight gradient is added to the weight itself, so that it meets a filled buffer."""
    x, weight, bias, dy = (None if tensor is None else tensor.to(dtype) for tensor in conv_tensors(job))
    w = job.case.slice(weight)
    if which == "weight_grad":
        before = job.case.slice(conv_tensors(job)[1]).to(job.buffer or job.dtype)
    if job.tf32 and dtype != DOUBLE:
        x, w, dy = (((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(SINGLE) for t in (x, w, dy))
    if which == "forward":
        return F.conv2d(x, w, bias, *job.case.geometry)
    if which == "input_grad":
        return torch.nn.grad.conv2d_input(x.shape, w, dy, *job.case.geometry)
    return before.to(dtype) + torch.nn.grad.conv2d_weight(x, w.shape, dy, *job.case.geometry)


def conv_request(job: ConvJob, which: str):
    """The runner's case, and the buffer in which the result appears."""
    x, weight, bias, dy = conv_tensors(job)
    nhwc = any(suggest_memory_format(tensor) == NHWC for tensor in (x, weight))
    if job.on_tensor_cores:  # as the binding does
        nhwc, x = True, x if x.stride(1) == 1 else x.contiguous(memory_format=NHWC)
        if weight.stride(1) != 1:
            weight = weight.contiguous(memory_format=NHWC)
    dy = dy.contiguous(memory_format=NHWC if nhwc else NCHW)
    if job.case.x_layout == "wide":
        dy = F.pad(dy, (0, 0, 0, 0, 0, 3)).contiguous(memory_format=NHWC)[:, : dy.shape[1]]
    own = job.case.slice(weight)
    x_buffer, y_buffer, w_buffer = (Buffer.of(tensor, tensor.stride()) for tensor in (x, dy, own))
    if which == "forward":
        result = y_buffer = Buffer.empty(dy.shape, dy.stride(), job.dtype)
    elif which == "input_grad":
        result = x_buffer = Buffer.empty(x.shape, x.stride(), job.dtype)
    else:
        result = w_buffer = Buffer.of(own.to(job.buffer or job.dtype), own.stride())
    groups = job.case.groups
    integers = [
        *(DTYPES[job.dtype], DTYPES[job.buffer or job.dtype], job.tf32, job.multiprocessors, job.architecture),
        *(x.shape[0], *x.shape[2:], *dy.shape[2:], x.shape[1] // groups, dy.shape[1] // groups, groups),
        *(*own.shape[2:], *job.case.stride, *job.case.padding, *job.case.dilation),
    ]
    for buffer in (x_buffer, y_buffer, w_buffer):
        n, c, h, w = (stride if size > 1 else 0 for size, stride in zip(buffer.shape, buffer.strides, strict=True))
        integers += [buffer.offset, n, h, w, c if buffer.shape[1] > 1 else 1]
    storages = [x_buffer.storage, y_buffer.storage, w_buffer.storage]
    storages += [None if bias is None else bias.clone(), torch.zeros(32, dtype=torch.uint8)]
    return (which, integers, [], storages), result


RUNNERS = ("run_shim", "run_slim_batch_norm", "run_slim_conv2d")
# A file of csrc/cuda/conv, a text in it, what a planted defect makes of it, and the sanitizer that must notice.
PLANTS = {
    "missing barrier": (
        "tensor_core_sm80.cuh",
        "    __syncthreads();  // all of this step's chunks have arrived",
        "    // ",
        "tsan",
    ),
    "missing warp barrier": (
        "tensor_core_sm80.cuh",
        "    __syncwarp();\n    const int tile_row",
        "    const int tile_row",
        "tsan",
    ),
    "read out of bounds": (
        "problem.cuh",
        "  return static_cast<unsigned>(h) < static_cast<unsigned>(height) &&",
        "  return static_cast<unsigned>(h) <= static_cast<unsigned>(height) &&",
        "asan",
    ),
}


def plant(defect: str, folder: Path) -> Path:
    """The runner of the sliced convolution, compiled from a copy of csrc with a defect."""
    name, before, after, sanitizer = PLANTS[defect]
    sources = folder / defect.replace(" ", "_")
    shutil.copytree(ROOT / "csrc", sources)
    kernels = sources / "cuda" / "conv" / name
    text = kernels.read_text()
    assert text.count(before) == 1, f"the place to plant a {defect} in is gone: {before!r}"
    kernels.write_text(text.replace(before, after))
    return compile_runner("run_slim_conv2d", sanitizer, sources / "runner", sources, ["ONLY_FLOAT16"])


@pytest.fixture(scope="session")
def runners(tmp_path_factory) -> dict:
    """Every runner under every sanitizer and every planted defect, compiled once, two at a time."""
    folder = tmp_path_factory.mktemp("host_shim")
    keys = [(name, sanitizer) for name in reversed(RUNNERS) for sanitizer in SANITIZERS]
    with ThreadPoolExecutor(2) as pool:
        compiled = {key: pool.submit(compile_runner, *key, folder / "_".join(key)) for key in keys}
        compiled |= {defect: pool.submit(plant, defect, folder) for defect in PLANTS}
        return {key: future.result() for key, future in compiled.items()}


def run_under_sanitizers(runners, name: str, make_requests, folder: Path) -> dict:
    """sanitizer -> what `make_requests(sanitizer)` returned beside its requests, filled in by the runner."""

    def one(sanitizer):
        requests, results = make_requests(sanitizer)
        done = run(runners[name, sanitizer], requests, folder / sanitizer)
        assert done.returncode == 0, done.stderr[-4000:]
        return results

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SANITIZERS, pool.map(one, SANITIZERS), strict=True))


# ---- The shim itself


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_conversions(runners, sanitizer, tmp_path):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 20, (4000,), generator=generator)
    ties = torch.tensor(
        [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 65519.0, 65520.0, 2.0**-25, 3 * 2.0**-26]
    )
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3.4e38])
    values = torch.cat([torch.randn(4000, generator=generator) * 2.0**exponents, ties, -ties, special])
    half, bfloat = torch.empty_like(values, dtype=HALF), torch.empty_like(values, dtype=BFLOAT)
    patterns = torch.arange(-(2**15), 2**15, 7, dtype=torch.int32).to(torch.int16)
    from_half, from_bfloat = torch.empty(len(patterns)), torch.empty(len(patterns))
    cases = [
        ("convert", [len(values)], [], [values, half, bfloat]),
        ("widen", [len(patterns)], [], [patterns.view(HALF), patterns.view(BFLOAT), from_half, from_bfloat]),
    ]
    done = run(runners["run_shim", sanitizer], cases, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for ours, theirs in (
        (half, values.to(HALF)),
        (bfloat, values.to(BFLOAT)),
        (from_half, patterns.view(HALF).float()),
        (from_bfloat, patterns.view(BFLOAT).float()),
    ):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
        assert torch.equal(ours.signbit() | ours.isnan(), theirs.signbit() | theirs.isnan())


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_shuffles_shared_memory_and_asynchronous_copies(runners, sanitizer, tmp_path):
    flat = torch.empty(4 * 64, dtype=torch.int32)
    values, total = torch.arange(192.0), torch.zeros(1)
    copied = [torch.zeros(4), torch.zeros(4), torch.arange(4.0)]
    cases = [("shuffles", [], [], [flat]), ("sum", [3], [], [values, total]), ("copy", [], [], copied)]
    done = run(runners["run_shim", sanitizer], cases, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    results, lane = flat.view(4, 64), torch.arange(64)
    within = lane % 16
    assert torch.equal(results[0].long(), lane ^ 5)
    assert torch.equal(results[1].long(), torch.where(within + 3 < 16, lane + 3, lane))
    assert torch.equal(results[2].long(), torch.where(within >= 3, lane - 3, lane))
    assert torch.equal(results[3].long(), lane - within + 7)
    assert total.item() == values.sum().item()
    assert copied[0].isnan().all()  # not waited for
    assert copied[1].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("defect", PLANTS)
def test_planted_defect_is_noticed(runners, defect, tmp_path):
    request, _ = conv_request(CONV_JOBS[0], "forward")
    done = run(runners[defect], [request], tmp_path)
    assert done.returncode != 0
    report = {"tsan": "ThreadSanitizer: data race", "asan": "AddressSanitizer: heap-buffer-overflow"}[
        PLANTS[defect][-1]
    ]
    assert report in done.stderr
    assert "tensor_core_kernel" in done.stderr


@pytest.fixture(scope="session")
def conv_results(runners, tmp_path_factory):
    """sanitizer -> {(job, pass): result buffer}."""

    def make_requests(sanitizer):
        keys = [(job, which) for job in JOBS_UNDER[sanitizer] for which in PASSES]
        requests, buffers = zip(*(conv_request(*key) for key in keys), strict=True)
        return requests, dict(zip(keys, buffers, strict=True))

    return run_under_sanitizers(runners, "run_slim_conv2d", make_requests, tmp_path_factory.mktemp("conv"))


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("which", PASSES)
def test_slim_conv2d(conv_results, which, sanitizer):
    worst = {}
    for job in JOBS_UNDER[sanitizer]:
        buffer = conv_results[sanitizer][job, which]
        assert buffer.outside().isnan().all(), f"{job.case.name}: memory outside the slice was written"
        ours, exact, theirs = (
            *(buffer.view(), conv_by_torch(job, which, DOUBLE)),
            conv_by_torch(job, which, job.dtype).to(buffer.storage.dtype),
        )
        if job.dtype == DOUBLE:
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
        else:
            assert_as_accurate(ours, theirs, exact)
        errors = [((values.double() - exact).abs().max() / exact.abs().max()).item() for values in (ours, theirs)]
        kind = "TF32" if job.tf32 else str(job.dtype).removeprefix("torch.")
        worst[kind] = max(worst.get(kind, [0.0, 0.0]), errors)
    print(f"\n{which} under {sanitizer}, {len(JOBS_UNDER[sanitizer])} cases; worst error / largest value:")
    for kind, (ours, theirs) in worst.items():
        print(f"  {kind:9} {ours:.1e}, PyTorch's {theirs:.1e}")


PIXELS = (4, 5)
DENSE = ConvCase("dense", 1, PIXELS, (16, 24), wider=(8, 8))
GROUPS = ConvCase("groups of 8", 1, PIXELS, (16, 16), groups=2)
DEPTHWISE = ConvCase("depthwise", 1, PIXELS, (8, 8), groups=8)
LARGE = ConvCase("depthwise 11x11", 1, PIXELS, (8, 8), (11, 11), padding=(5, 5), groups=8)
LARGER = ConvCase("depthwise 15x15", 1, PIXELS, (8, 8), (15, 15), padding=(7, 7), groups=8)
CHOICES = [
    *((ConvJob(DENSE, architecture=sm), ("tensor_core_sm80",) * 3) for sm in (80, 86, 90, 120)),
    (ConvJob(DENSE, architecture=75), ("direct",) * 3),
    (ConvJob(DENSE, SINGLE), ("fma",) * 3),
    (ConvJob(DENSE, SINGLE, tf32=True), ("tensor_core_sm80",) * 3),
    (ConvJob(DENSE, SINGLE, tf32=True, architecture=75), ("fma",) * 3),
    (ConvJob(DENSE, DOUBLE), ("fma",) * 3),
    (ConvJob(replace(DENSE, channels=(32, 32), groups=2)), ("tensor_core_sm80",) * 3),
    *((ConvJob(GROUPS, *kind), ("direct",) * 3) for kind in ((HALF,), (SINGLE, True), (SINGLE,), (DOUBLE,))),
    (ConvJob(DEPTHWISE), ("depthwise", "depthwise", "direct")),
    (ConvJob(replace(DEPTHWISE, channels=(8, 16))), ("direct",) * 3),
    (ConvJob(LARGE), ("depthwise", "depthwise", "direct")),
    (ConvJob(replace(LARGE, channels=(7, 7), groups=7)), ("direct",) * 3),  # rows of 14 bytes
    (ConvJob(LARGER), ("direct",) * 3),
]


def test_which_kernel_is_chosen(runners, tmp_path):
    requests = [conv_request(job, which)[0] for job, _ in CHOICES for which in PASSES]
    done = run(runners["run_slim_conv2d", "asan"], requests, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    chosen = [bytes(storages[4]).rstrip(b"\0").decode() for *_, storages in requests]
    for i, (job, expected) in enumerate(CHOICES):
        assert tuple(chosen[3 * i : 3 * i + 3]) == expected, job


# ---- Sliced convolution, random cases


@st.composite
def conv_jobs_drawn(draw):
    """A job of any geometry that property_cases.py draws, in the layouts of ConvCase."""
    drawn = draw(drawn_conv_cases(budget=20000))
    batch, channels, *size = drawn.shape
    case = ConvCase(
        "drawn",
        max(1, batch),
        tuple(max(1, length) for length in size),
        (channels, drawn.out),
        *(drawn.kernel, drawn.stride, drawn.padding, drawn.dilation, drawn.groups),
        wider=drawn.wider[::-1],
        bias=drawn.bias,
        x_layout=draw(st.sampled_from(("nhwc", "nchw", "wide", "swapped"))),
        weight_format=draw(st.sampled_from((NHWC, NCHW))),
    )
    kind = draw(st.sampled_from(((HALF, None), (SINGLE, None), (HALF, SINGLE), (BFLOAT, SINGLE), (DOUBLE, None))))
    tf32 = kind[0] == SINGLE and draw(st.booleans())
    return ConvJob(case, kind[0], tf32, kind[1], draw(st.sampled_from((1, 4, 16))), draw(st.sampled_from((75, 90))))


def test_slim_conv2d_of_random_cases(request, runners, tmp_path):
    """Tens of calls, a fiftieth of --cases, each pass against float64 within what rounding explains."""

    def check(job):
        requests, buffers = zip(*(conv_request(job, which) for which in PASSES), strict=True)
        done = run(runners["run_slim_conv2d", "asan"], requests, tmp_path / "drawn")
        assert done.returncode == 0, f"{job!r}\n{done.stderr[-4000:]}"
        for buffer, (name, expected) in zip(buffers, expected_results(job).items(), strict=True):
            assert buffer.outside().isnan().all(), f"{job!r}: memory outside the slice of {name} was written"
            assert_close(f"{job!r}: {name}", buffer.view(), expected)

    run_property(request, conv_jobs_drawn(), request.config.getoption("--cases") // 50, check)


def expected_results(job: ConvJob) -> dict:
    """Of PASSES, with their bounds."""
    x, weight, bias, dy = (None if t is None else Approx.of(t) for t in conv_tensors(job))
    w, geometry, u = job.case.slice(weight.value), job.case.geometry, unit(job.dtype)
    old = Approx.of(job.case.slice(conv_tensors(job)[1]).to(job.buffer or job.dtype))
    x, w, dy = (t.stored(torch.float16) if job.tf32 else t for t in (x, Approx.of(w), dy))  # as many bits as TF32
    dw = old + conv2d_weight_grad(dy, x, w.value.shape, geometry, u)
    return {
        "y": conv2d(x, w, bias, geometry, u).stored(job.dtype),
        "dx": conv2d_input_grad(dy, w, x.value.shape, geometry, u).stored(job.dtype),
        "dw": dw.stored(job.buffer or job.dtype),
    }


# ---- Batch norm


@dataclass(frozen=True)
class BatchNormJob:
    """A case of the operator, and what selects a kernel for it."""

    case: BatchNormCase
    dtype: torch.dtype = HALF
    multiprocessors: int = 2  # more ask for more splits of the sums
    pitch: int | None = None  # NHWC: elements from one pixel to the next, the first one 8 elements into the storage
    needs_dz: bool = True


def batch_norm_jobs() -> list[BatchNormJob]:
    """The operator's cases, each in one dtype, then those that only these kernels tell apart."""
    dtypes = (HALF, SINGLE, BFLOAT, DOUBLE, SINGLE)
    cases = [case for case in batch_norm_cases() if case.shape[0] > 0]
    both = {"residual": True, "relu": True}
    return [
        *(BatchNormJob(case, dtypes[i % len(dtypes)], needs_dz=i % 3 > 0) for i, case in enumerate(cases)),
        BatchNormJob(BatchNormCase("splits", (2, 16, 17, 16), **both), BFLOAT, multiprocessors=16),
        BatchNormJob(BatchNormCase("splits of odd channels", (2, 5, 17, 16), **both), SINGLE, multiprocessors=16),
        BatchNormJob(
            BatchNormCase("splits of planes", (6, 2, 9, 8), x_layout="nchw", **both), HALF, multiprocessors=16
        ),
        BatchNormJob(BatchNormCase("two tiles of channels", (2, 264, 2, 3), **both), BFLOAT),
        BatchNormJob(BatchNormCase("two tiles of odd channels", (2, 37, 5, 5), **both), HALF),
        BatchNormJob(BatchNormCase("wide rows of 16 bytes", (2, 24, 4, 5), **both), HALF, pitch=40),
        BatchNormJob(BatchNormCase("wide rows of odd channels", (2, 23, 4, 5), **both), HALF, pitch=40),
        BatchNormJob(BatchNormCase("planes of 16 bytes", (3, 5, 4, 6), x_layout="nchw", **both), BFLOAT),
        BatchNormJob(BatchNormCase("planes of 16 bytes, float64", (2, 3, 5, 6), x_layout="nchw", **both), DOUBLE),
        BatchNormJob(BatchNormCase("large planes", (1, 2, 33, 32), x_layout="nchw", relu=True), SINGLE),
    ]


BATCH_NORM_JOBS = batch_norm_jobs()
BATCH_NORM_JOBS_UNDER = {"asan": BATCH_NORM_JOBS, "tsan": BATCH_NORM_JOBS[::3]}


def batch_norm_lines(case: BatchNormCase, x: torch.Tensor):
    """Rows or planes, as the binding chooses, and whether a tensor can be read where it lies."""
    _, c, height, width = case.shape
    rows = height * width == 1 or (suggest_memory_format(x) == NHWC and c > 1)
    return rows, suggest_memory_format(x)


def batch_norm_buffer(job: BatchNormJob, values: torch.Tensor, rows: bool, memory_format, wide: bool = True):
    """A buffer that holds the values as the kernels may be given them, and its offset and two strides."""
    n, c, height, width = values.shape
    if rows and job.pitch and wide:
        strides, offset = (height * width * job.pitch, 1, width * job.pitch, job.pitch), 8
    else:
        readable = values.permute(0, 2, 3, 1).flatten(0, 2) if rows else values.flatten(2)
        in_place = readable.data_ptr() == values.data_ptr() and readable.stride(-1) == 1
        strides, offset = (values if in_place else values.contiguous(memory_format=memory_format)).stride(), 0
    buffer = Buffer.of(values, strides, offset)
    if not rows:
        return buffer, [offset, strides[0], strides[1]]
    sizes_and_strides = zip((width, height, n), (strides[3], strides[2], strides[0]), strict=True)
    return buffer, [offset, next((stride for size, stride in sizes_and_strides if size > 1), c), 0]


def batch_norm_request(job: BatchNormJob, which: str):
    """The runner's case, and the tensors in which results appear."""
    case, dtype = job.case, job.dtype
    tensors = case.tensors(dtype)
    x = tensors["x"]
    n, c, height, width = case.shape
    rows, memory_format = batch_norm_lines(case, x)
    lines = (n * height * width, c) if rows else (n, height * width)
    stats_dtype = DOUBLE if dtype == DOUBLE else SINGLE
    integers = [DTYPES[dtype], job.multiprocessors, rows, c, *lines]
    storages, results = [], {}

    def add(name: str, values: torch.Tensor | None, wide: bool = True):
        buffer, places = (
            (None, [0, 0, 0]) if values is None else batch_norm_buffer(job, values, rows, memory_format, wide)
        )
        storages.append(None if buffer is None else buffer.storage)
        results[name] = buffer
        integers.extend(places)

    like_x = [tensors[p] is not None and tensors[p].dtype == dtype for p in ("weight", "bias")]
    own = {p: None if tensors[p] is None else tensors[p][:c].clone() for p in ("weight", "bias")}
    empty = torch.full(case.shape, float("nan"), dtype=dtype)
    if which == "forward":
        integers.append(case.relu)
        for name in ("x", "residual"):
            add(name, tensors[name])
        add("y", empty, wide=False)
        integers += like_x
        storages += [own["weight"], own["bias"], tensors["mean"], tensors["var"]]
        outputs = {name: torch.full((c,), float("nan"), dtype=stats_dtype) for name in ("mean", "var")}
    else:
        arguments = {name: tensors[name] for name in ("x", "weight", "bias", "mean", "var", "residual")}
        y, mean, var = gk.slim_batch_norm(**arguments, relu=case.relu, eps=EPS)
        integers.append(not case.given)
        add("dy", tensors["dy"])
        add("x", x)
        add("y", y if case.relu else None, wide=False)
        add("dx", empty, wide=False)
        add("dz", empty if job.needs_dz else None, wide=False)
        integers.append(like_x[0])
        outputs = {}
        for parameter, same in zip(("weight", "bias"), like_x, strict=True):
            full = tensors[parameter]
            outputs["d" + parameter] = None if full is None else torch.full_like(full, float("nan"))
            integers += [same, 0 if full is None else len(full)]
        storages.append(own["weight"])
        storages += [*outputs.values(), mean, var]
        results["given"] = y, mean, var
        return (which, integers, [EPS], storages), results | outputs
    storages += outputs.values()
    return (which, integers, [EPS], storages), results | outputs


def batch_norm_gradients(job: BatchNormJob, y: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """PyTorch's gradients in `dtype` of what lies before the ReLU, which y tells."""
    case = job.case
    tensors = {
        n: None if t is None else t.to(dtype) if dtype == DOUBLE else t for n, t in case.tensors(job.dtype).items()
    }
    dz = tensors["dy"] * (y > 0) if case.relu else tensors["dy"]
    inputs = {n: tensors[n].detach().requires_grad_() for n in ("x", "weight", "bias") if tensors[n] is not None}
    plain = replace(case, relu=False, residual=False)
    out = torch_batch_norm(plain, {**tensors, **inputs, "residual": None})
    grads = torch.autograd.grad(out, list(inputs.values()), dz, allow_unused=True)
    return {"dz": dz} | {
        "d" + n: torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(inputs, grads, strict=True)
    }


@pytest.fixture(scope="session")
def batch_norm_results(runners, tmp_path_factory):
    """sanitizer -> {(job, pass): results}."""

    def make_requests(sanitizer):
        keys = [(job, which) for job in BATCH_NORM_JOBS_UNDER[sanitizer] for which in ("forward", "backward")]
        requests, buffers = zip(*(batch_norm_request(*key) for key in keys), strict=True)
        return requests, dict(zip(keys, buffers, strict=True))

    return run_under_sanitizers(runners, "run_slim_batch_norm", make_requests, tmp_path_factory.mktemp("batch_norm"))


def summed_terms(case: BatchNormCase, dz: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> float:
    """The size of what is rounded in a parameter's gradient: dz, dz * x_hat, what the rounding of the mean moves."""
    mean, rstd = mean.double(), (var.double() + EPS).rsqrt()
    x_hat = (case.tensors(DOUBLE)["x"] - mean[:, None, None]) * rstd[:, None, None]
    norms = [(dz * factor).square().sum((0, 2, 3)).sqrt() for factor in (1, x_hat)]
    return float((sum(norms) + dz.sum((0, 2, 3)).abs() * mean.abs() * rstd).max())


def close_or_as_accurate(dtype: torch.dtype, ours, theirs, exact, **options) -> None:
    if dtype == DOUBLE:
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    else:
        assert_as_accurate(ours, theirs, exact, **options)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_slim_batch_norm_forward(batch_norm_results, sanitizer):
    for job in BATCH_NORM_JOBS_UNDER[sanitizer]:
        results, tensors = batch_norm_results[sanitizer][job, "forward"], job.case.tensors(job.dtype)
        y, mean, var = results["y"].view(), results["mean"], results["var"]
        assert results["y"].outside().isnan().all(), job
        exact = torch_batch_norm(job.case, {n: None if t is None else t.double() for n, t in tensors.items()})
        close_or_as_accurate(job.dtype, y, torch_batch_norm(job.case, tensors), exact)
        if job.case.given:
            assert torch.equal(mean, tensors["mean"])
            assert torch.equal(var, tensors["var"])
        elif job.dtype != DOUBLE:
            assert_statistics(tensors["x"], mean, var)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_slim_batch_norm_backward(batch_norm_results, sanitizer):
    for job in BATCH_NORM_JOBS_UNDER[sanitizer]:
        results, case = batch_norm_results[sanitizer][job, "backward"], job.case
        y = results["given"][0]
        theirs, exact = (batch_norm_gradients(job, y, dtype) for dtype in (job.dtype, DOUBLE))
        if job.needs_dz:
            assert torch.equal(results["dz"].view(), theirs["dz"])
        assert results["dx"].outside().isnan().all(), job
        values = case.shape[0] * case.shape[2] * case.shape[3]
        close_or_as_accurate(job.dtype, results["dx"].view(), theirs["dx"], exact["dx"], gradient=True, sharing=values)
        terms = summed_terms(case, exact["dz"], *results["given"][1:])
        for name in ("dweight", "dbias"):
            if results[name] is not None:
                close_or_as_accurate(job.dtype, results[name], theirs[name], exact[name], gradient=True, terms=terms)
                assert results[name][case.channels :].count_nonzero() == 0
