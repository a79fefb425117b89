"""The CUDA kernels' own source, run on the CPU by tests/host_shim, under sanitizers.

Every case runs once under AddressSanitizer + UndefinedBehaviorSanitizer and once under ThreadSanitizer; its results are
judged by PyTorch's own error in the same dtype, against float64. Two defects planted into copies of the sources show
that the sanitizers would notice: a missing barrier, and a read one row beyond an image.
"""

import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
SHIM = ROOT / "tests" / "host_shim"
SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def compile_runner(name: str, sanitizer: str, output: Path, sources: Path = ROOT / "csrc", defines=()) -> Path:
    """Compile tests/host_shim/<name>.cpp. Without optimisation: the small cases run no longer for it."""
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


def channels_last(shape, pitch=None) -> tuple[int, ...]:
    """Strides of [N, C, H, W] (or [O, I, KH, KW]) stored as NHWC, `pitch` elements from pixel to pixel."""
    _, c, h, w = shape
    pitch = c if pitch is None else pitch
    return (h * w * pitch, 1, w * pitch, pitch)


def contiguous(shape) -> tuple[int, ...]:
    _, c, h, w = shape
    return (c * h * w, h * w, w, 1)


# ---- Sliced convolution


@dataclass(frozen=True)
class Conv:
    name: str
    image: tuple[int, int, int, int]  # N, C, H, W
    out: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    full: tuple[int, int] | None = None  # out and in channels (of one group) of the full weight
    pitch: tuple[int, int] | None = None  # of x and y, in channels
    nchw: bool = False  # images and weight contiguous
    dtype: torch.dtype = torch.float16
    tf32: bool = False
    dweight_dtype: torch.dtype | None = None  # that of x
    multiprocessors: int = 4
    bias: bool = False

    def out_size(self):
        return [
            (self.image[2 + a] + 2 * self.padding[a] - self.dilation[a] * (self.kernel[a] - 1) - 1) // self.stride[a]
            + 1
            for a in (0, 1)
        ]


HALF, BFLOAT, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
CONV_CASES = [
    Conv("aligned", (2, 16, 5, 6), 24, full=(32, 24), bias=True),
    Conv("aligned bf16", (1, 16, 4, 4), 8, full=(16, 16), dtype=BFLOAT, dweight_dtype=SINGLE, bias=True),
    Conv("aligned tf32", (1, 12, 5, 4), 8, full=(16, 16), dtype=SINGLE, tf32=True, bias=True),
    Conv("odd channels", (2, 13, 4, 5), 11, full=(20, 16), dweight_dtype=SINGLE, bias=True),
    Conv("odd channels, padded pitch", (2, 13, 4, 5), 11, full=(20, 16), pitch=(16, 16)),
    Conv("odd channels bf16", (1, 7, 4, 3), 9, full=(12, 9), dtype=BFLOAT, dweight_dtype=SINGLE),
    Conv("odd channels tf32", (1, 7, 4, 5), 5, full=(8, 9), dtype=SINGLE, tf32=True),
    Conv("even channels", (1, 6, 4, 5), 10, full=(12, 10)),
    Conv("channels of 4", (1, 12, 4, 5), 20, full=(24, 20)),
    Conv("stride 2", (1, 8, 7, 9), 10, stride=(2, 2), full=(16, 8)),
    Conv("all unequal", (1, 5, 6, 7), 4, (3, 2), (2, 1), (2, 0), (1, 3), full=(8, 8)),
    Conv("all unequal tf32", (1, 5, 6, 7), 4, (3, 2), (2, 1), (2, 0), (1, 3), full=(8, 8), dtype=SINGLE, tf32=True),
    Conv("pointwise, stride 2", (2, 9, 5, 5), 12, (1, 1), (2, 2), (0, 0), full=(16, 16), bias=True),
    Conv("gaps between taps", (1, 8, 8, 7), 8, (2, 2), (3, 3), (0, 1)),
    Conv("large tile", (1, 72, 8, 9), 72, (1, 1), padding=(0, 0), full=(80, 80), multiprocessors=1),
    Conv("large tile, odd", (1, 70, 9, 9), 69, (1, 1), padding=(0, 0), full=(72, 72), multiprocessors=1),
    Conv("large tile tf32", (1, 68, 8, 9), 68, (1, 1), padding=(0, 0), multiprocessors=1, dtype=SINGLE, tf32=True),
    Conv("splits", (3, 3, 16, 17), 5, multiprocessors=8, dweight_dtype=SINGLE),
    Conv("one pixel", (1, 1, 1, 1), 1),
    Conv("groups of 17", (1, 34, 3, 4), 34, groups=2, full=(40, 18), bias=True),
    Conv("groups of 4", (1, 16, 5, 4), 16, groups=4, full=(20, 6), stride=(2, 2), bias=True),
    Conv("depthwise", (1, 72, 4, 5), 72, groups=72, full=(72, 1), pitch=(72, 72), bias=True),
    Conv(
        "depthwise, odd", (1, 35, 5, 5), 35, groups=35, full=(40, 1), stride=(2, 2), dtype=BFLOAT, dweight_dtype=SINGLE
    ),
    Conv("depthwise, padded pitch", (1, 13, 5, 5), 13, (5, 5), padding=(2, 2), groups=13, pitch=(16, 16)),
    Conv("float32", (1, 9, 5, 6), 11, stride=(2, 1), full=(16, 12), dtype=SINGLE, bias=True),
    Conv("float32 NCHW, groups of 17", (1, 34, 4, 3), 34, groups=2, full=(36, 20), dtype=SINGLE, nchw=True),
    Conv("float64", (1, 5, 6, 5), 7, stride=(1, 2), dilation=(2, 1), full=(9, 8), dtype=DOUBLE, bias=True),
    Conv("float64 NCHW, groups of 2", (2, 6, 4, 5), 9, groups=3, full=(12, 4), dtype=DOUBLE, nchw=True),
]
PASSES = ("forward", "input_grad", "weight_grad")


def conv_tensors(case: Conv):
    """x, the full weight, bias and dy, in the case's dtype; TF32 cases hold values that TF32 can represent."""
    generator = torch.Generator().manual_seed(CONV_CASES.index(case))

    def normal(*shape):
        values = torch.randn(shape, generator=generator, dtype=DOUBLE).to(case.dtype)
        return values

    full = case.full or (case.out, case.image[1] // case.groups)
    return (
        normal(*case.image),
        normal(*full, *case.kernel),
        normal(full[0]),
        normal(case.image[0], case.out, *case.out_size()),
    )


def conv_by_torch(case: Conv, which: str, dtype: torch.dtype) -> torch.Tensor:
    x, weight, bias, dy = (tensor.to(dtype) for tensor in conv_tensors(case))
    if case.tf32 and dtype != DOUBLE:
        x, weight, dy = ((t.view(torch.int32) + 0x1000 & ~0x1FFF).view(SINGLE) for t in (x, weight, dy))
    weight = weight[: case.out, : case.image[1] // case.groups]
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    if which == "forward":
        return F.conv2d(x, weight, bias[: case.out] if case.bias else None, *geometry)
    if which == "input_grad":
        return torch.nn.grad.conv2d_input(case.image, weight, dy, *geometry)
    return torch.nn.grad.conv2d_weight(x, weight.shape, dy, *geometry)


def conv_request(case: Conv, which: str):
    """The runner's case, and the buffer in which the result appears."""
    x, weight, bias, dy = conv_tensors(case)
    x_pitch, y_pitch = case.pitch or (None, None)
    layout = (lambda shape, pitch=None: contiguous(shape)) if case.nchw else channels_last
    x_buffer = Buffer.of(x, layout(x.shape, x_pitch))
    y_buffer = Buffer.of(dy, layout(dy.shape, y_pitch))
    own = weight[: case.out, : case.image[1] // case.groups]
    w_buffer = Buffer.of(own, layout(weight.shape))
    if which == "forward":
        result = y_buffer = Buffer.empty(dy.shape, y_buffer.strides, case.dtype)
    elif which == "input_grad":
        result = x_buffer = Buffer.empty(x.shape, x_buffer.strides, case.dtype)
    else:
        result = w_buffer = Buffer.of(own.to(case.dweight_dtype or case.dtype), layout(weight.shape))
    shape = (
        *(case.image[0], case.image[2], case.image[3], *case.out_size()),
        *(case.image[1] // case.groups, case.out // case.groups, case.groups),
        *(*case.kernel, *case.stride, *case.padding, *case.dilation),
    )
    integers = [DTYPES[case.dtype], DTYPES[case.dweight_dtype or case.dtype], case.tf32, case.multiprocessors, *shape]
    for buffer in (x_buffer, y_buffer, w_buffer):
        a, c, h, w = buffer.strides
        integers += [buffer.offset, a, h, w, c]
    storages = [x_buffer.storage, y_buffer.storage, w_buffer.storage]
    return (which, integers, [], [*storages, bias[: case.out].clone() if case.bias else None]), result


RUNNERS = ("run_shim", "run_slim_conv2d")
# A line of csrc/cuda/slim_conv2d.cuh, what a planted defect makes of it, and the sanitizer that must notice.
PLANTS = {
    "missing barrier": ("    __syncthreads();  // all of this step's chunks have arrived", "    // ", "tsan"),
    "read out of bounds": (
        "  return static_cast<unsigned>(h) < static_cast<unsigned>(height) &&",
        "  return static_cast<unsigned>(h) <= static_cast<unsigned>(height) &&",
        "asan",
    ),
}


def plant(defect: str, folder: Path) -> Path:
    """The runner of the sliced convolution, compiled from a copy of csrc with a defect."""
    before, after, sanitizer = PLANTS[defect]
    sources = folder / defect.replace(" ", "_")
    shutil.copytree(ROOT / "csrc", sources)
    kernels = sources / "cuda" / "slim_conv2d.cuh"
    text = kernels.read_text()
    assert text.count(before) == 1, f"the line to plant a {defect} in is gone: {before!r}"
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
    """sanitizer -> what `make_requests` returned beside its requests, after the runner has filled in the results."""

    def one(sanitizer):
        requests, results = make_requests()
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
    request, _ = conv_request(CONV_CASES[0], "forward")
    done = run(runners[defect], [request], tmp_path)
    assert done.returncode != 0
    report = {"tsan": "ThreadSanitizer: data race", "asan": "AddressSanitizer: heap-buffer-overflow"}[PLANTS[defect][2]]
    assert report in done.stderr
    assert "tensor_core_kernel" in done.stderr


@pytest.fixture(scope="session")
def conv_results(runners, tmp_path_factory):
    """sanitizer -> {(case, pass): result buffer}."""
    keys = [(case, which) for case in CONV_CASES for which in PASSES]

    def make_requests():
        requests, buffers = zip(*(conv_request(*key) for key in keys), strict=True)
        return requests, dict(zip(keys, buffers, strict=True))

    return run_under_sanitizers(runners, "run_slim_conv2d", make_requests, tmp_path_factory.mktemp("conv"))


def relative_error(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, in units of the largest reference value."""
    return ((values.double() - reference).abs().max() / reference.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("which", PASSES)
def test_slim_conv2d(conv_results, which, sanitizer):
    worst = {}
    for case in CONV_CASES:
        buffer = conv_results[sanitizer][case, which]
        reference = conv_by_torch(case, which, DOUBLE)
        theirs = conv_by_torch(case, which, case.dtype)
        if which == "weight_grad":
            _, weight, _, _ = conv_tensors(case)
            before = weight[: case.out, : case.image[1] // case.groups].to(case.dweight_dtype or case.dtype)
            reference, theirs = before.double() + reference, before + theirs.to(before.dtype)
        ours = buffer.view()
        assert buffer.outside().isnan().all(), f"{case.name}: wrote outside the slice"
        our_error, their_error = relative_error(ours, reference), relative_error(theirs, reference)
        # In float64 PyTorch is itself the reference, and sums of up to 100 products differ in their order.
        scale = 8 if ours.dtype == DOUBLE else 1
        unit = 2.0**-11 if case.tf32 else scale * torch.finfo(ours.dtype).eps
        assert our_error <= 2 * their_error + unit, case.name
        key = "tf32" if case.tf32 else str(case.dtype).removeprefix("torch.")
        worst[key] = max(worst.get(key, (0.0, 0.0)), (our_error, their_error))
    for dtype, (ours, theirs) in worst.items():
        print(f"{which} {dtype}: worst error {ours:.1e}, PyTorch's {theirs:.1e} ({sanitizer})")
