"""The machine code of the Triton kernels for sm_80 and sm_90, inspected without a GPU.

Triton compiles the launchers' own launches: they run on meta tensors, and what they would launch is compiled for the
target instead. The figures of each kernel are compared with gpu_code.csv: none may get worse. Run this file to write
the table anew, and see `git diff`:

    python tests/kernels_gpu/test_gpu_code.py

The CUDA C++ kernels are inspected by test_gpu_code_cuda.py.
"""

import csv
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from support.report import report

triton = pytest.importorskip("triton", reason="triton is not installed")

TABLE = Path(__file__).with_name("gpu_code.csv")
TARGETS = (80, 90)
KEY = ("kernel", "dtype", "variant", "target")
# What may only fall, and what may only rise. Tensor-core instructions: HMMA on sm_80, HGMMA on sm_90.
COSTS = ("registers", "spills", "shared_bytes")
GAINS = ("tensor_core", "loads_16_bytes")
SHARED_LIMIT = 99 * 1024  # of a program on the smallest GPU since sm_80 (sm_86, sm_89)


# ---- reading machine code


def tool(name: str) -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else name


def figures(cubin: bytes) -> dict[str, int]:
    """Registers, spill instructions, tensor-core instructions and 16-byte loads of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code, usage = (
            subprocess.run([tool("cuobjdump"), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code, re.M))
    assert instructions["EXIT"] > 0, f"cuobjdump printed no code:\n{code[:500]}"

    def count(pattern):
        return sum(n for name, n in instructions.items() if re.match(pattern, name))

    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": count(r"(LDL|STL)\b"),
        "tensor_core": count(r"HG?MMA\b"),
        "loads_16_bytes": count(r"LDG(STS)?\.(.*\.)?128(\.|$)"),
        "hgmma": count(r"HGMMA\b"),
    }


# ---- Triton


class Target:
    """Stands in for Triton's driver: a device of the given architecture that never runs anything."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0


def geometries():
    """What is compiled: every sliced layer of the networks in bfloat16, and layers of each kind in the other dtypes."""
    from gradaug_kernels._gpu.paths import DIRECTIONS, Geometry, path_for
    from gradaug_kernels.cli.tune import NETWORKS, layers

    for geometry in layers(NETWORKS, (0.93, 0.8), 64, [torch.bfloat16]):
        if path_for(geometry, "auto") in ("triton", "depthwise"):
            yield geometry
    pair, same = (1, 1), ((1, 1), (1, 1), (1, 1))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # float16 compiles as bfloat16 does: one layer shows it.
        for c in (240,) if dtype == torch.float16 else (64, 240, 238, 119, 24):
            full = (256, 256, 3, 3)
            for hw in (56, 14):
                yield from (Geometry(d, dtype, 64, c, hw, hw, c, *full, *same, 1) for d in DIRECTIONS)
        for c in (96,) if dtype == torch.float16 else (96, 74, 89):
            for k in (3, 5):
                filters = (1, 128, k, k)
                yield from (
                    Geometry(d, dtype, 64, c, 28, 28, c, *filters, pair, (k // 2, k // 2), pair, c) for d in DIRECTIONS
                )


def operands(geometry):
    g = geometry
    make = {"dtype": g.dtype, "device": "meta"}
    x = torch.empty(g.n, g.c, g.h, g.w, **make).to(memory_format=torch.channels_last)
    weight = torch.empty(g.full_o, g.full_c, g.kh, g.kw, **make).to(memory_format=torch.channels_last)
    dy = torch.nn.functional.conv2d(x, weight[: g.o, : g.c // g.groups], None, *g[-4:])
    return x, weight, dy.to(memory_format=torch.channels_last)


def recorded(call) -> list[tuple]:
    """(kernel, arguments) of all that a call of the launchers launches."""
    from gradaug_kernels._gpu.triton import depthwise_conv2d, slim_conv2d, slim_norm_conv2d

    found = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (slim_conv2d, depthwise_conv2d, slim_norm_conv2d):
            patch.setattr(module, "launch", lambda kernel, grid, **arguments: found.append((kernel, arguments)))
        call()
    return found


def launches(geometry) -> list[tuple]:
    """What the launcher of a geometry launches."""
    from gradaug_kernels.cli.tune import call

    return recorded(call("depthwise" if geometry.depthwise else "triton", geometry, *operands(geometry)))


def normed_launches(dtype: torch.dtype, c: int, n: int = 64) -> list[tuple]:
    """What a 3x3 convolution of c channels launches with a batch norm before it, after it, and on both sides."""
    from gradaug_kernels._gpu.paths import Geometry
    from gradaug_kernels._gpu.triton import slim_norm_conv2d as kernels

    pairs = ((1, 1), (1, 1), (1, 1))
    geometry = (*pairs, 1)
    x, weight, dy = operands(Geometry("forward", dtype, n, c, 14, 14, c, 256, 256, 3, 3, *geometry))
    (mean, var), (gamma, beta) = torch.empty((2, c), device="meta"), torch.empty((2, 256), device="meta")
    norm, conv = (mean, var, gamma, beta, True, True, 1e-5), (weight, None, c, *geometry)
    dweight = torch.empty_like(weight, dtype=torch.float32)
    after = (weight, dweight, *geometry, True, True)
    return [
        *recorded(lambda: kernels.slim_norm_conv2d_triton(x, *norm, *conv, False)),
        *recorded(lambda: kernels.slim_norm_conv2d_triton(x, *norm, *conv, True)),
        *recorded(lambda: kernels.slim_conv2d_statistics_triton(x, *conv)),
        *recorded(lambda: kernels.slim_channel_statistics_triton(dy)),
        *recorded(lambda: kernels.slim_norm_conv2d_backward__triton(dy, x, *norm, *after)),
    ]


NORMED = (
    *((torch.bfloat16, c) for c in (64, 240, 238, 119)),
    (torch.float16, 240),
    *((torch.float32, c) for c in (240, 119)),
)


def constants(kernel, arguments) -> dict:
    """What of a launch is compiled in, by the kernel's own declaration."""
    options = [name for name in ("num_warps", "num_stages") if name in arguments]
    return {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr} | {o: arguments[o] for o in options}


def variant(kernel, arguments) -> str:
    found = constants(kernel, arguments)
    return " ".join(f"{name}={int(value) if isinstance(value, bool) else value}" for name, value in found.items())


def dtype_of(arguments) -> str:
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    return str(tensors[0].dtype).removeprefix("torch.")


def compile_for(target: int, kernel, arguments):
    triton.runtime.driver.set_active(Target(target))
    return kernel.warmup(grid=(1,), **arguments)


def triton_rows(target: int) -> list[dict]:
    """One row of figures per compiled kernel. Runs in a process of its own, whose Triton driver it replaces."""
    rows = {}

    def add(kernel, arguments):
        key = (kernel.__name__, dtype_of(arguments), variant(kernel, arguments), f"sm_{target}")
        if key not in rows:
            compiled = compile_for(target, kernel, arguments)
            rows[key] = figures(compiled.asm["cubin"]) | {"shared_bytes": compiled.metadata.shared}

    for precision in ("tf32", "ieee"):
        torch.backends.cudnn.conv.fp32_precision = precision
        for geometry in geometries():
            if precision == "tf32" or geometry.dtype == torch.float32:
                for launched in launches(geometry):
                    add(*launched)
        for dtype, c in NORMED:
            if precision == "tf32":  # exact float32 is not fused
                for launched in normed_launches(dtype, c):
                    add(*launched)
    return [
        dict(zip(KEY, key, strict=True)) | row | {"compiler": f"triton {triton.__version__}"}
        for key, row in rows.items()
    ]


# ---- all rows


def all_rows() -> list[dict]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(TARGETS), os.cpu_count()), mp_context=context) as pool:
        futures = [pool.submit(triton_rows, target) for target in TARGETS]
        return sorted((row for future in futures for row in future.result()), key=lambda r: [r[k] for k in KEY])


def read_table() -> dict[tuple, dict]:
    with TABLE.open(newline="") as file:
        return {tuple(row[k] for k in KEY): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def rows(request):
    found = all_rows()
    columns = (*KEY, *COSTS, *GAINS)
    report(request.config, ", ".join(columns), *(", ".join(str(row[c]) for c in columns) for row in found))
    return found


def test_no_kernel_spills_registers(rows):
    assert [row for row in rows if row["spills"]] == []


def test_shared_memory_fits_every_gpu(rows):
    assert [row for row in rows if row["shared_bytes"] > SHARED_LIMIT] == []


def multiplies_matrices(row):
    return row["kernel"].startswith("slim_conv2d") and "reduce" not in row["kernel"]


def test_half_types_and_tf32_use_tensor_cores(rows):
    fast = [row for row in rows if multiplies_matrices(row) and (is_half(row) or "PRECISION=tf32" in row["variant"])]
    assert fast
    assert [row for row in fast if row["hgmma" if row["target"] == "sm_90" else "tensor_core"] == 0] == []


def is_half(row):
    return row["dtype"] in ("float16", "bfloat16")


def test_aligned_channels_are_loaded_16_bytes_at_a_time(rows):
    aligned = [row for row in rows if is_half(row) and "VEC=8" in row["variant"]]
    assert aligned
    assert [row for row in aligned if row["loads_16_bytes"] == 0] == []


def test_figures_are_no_worse_than_the_table(rows):
    table = read_table()
    missing, worse, compared = [], [], 0
    for row in rows:
        key = tuple(row[k] for k in KEY)
        known = table.get(key)
        if known is None:
            missing.append(key)
        elif known["compiler"] == row["compiler"]:  # another compiler's figures say nothing about these sources
            compared += 1
            worse += [(*key, n, f"{known[n]} -> {row[n]}") for n in COSTS if row[n] > int(known[n])]
            worse += [(*key, n, f"{known[n]} -> {row[n]}") for n in GAINS if row[n] < int(known[n])]
    assert not missing, f"not in {TABLE.name}; run `python {__file__}`: {missing}"
    assert not worse
    if not compared:
        pytest.skip(f"{TABLE.name} was written with {next(iter(table.values()))['compiler']}")


# ---- a new width compiles nothing


def compiled_kernels(widths: int) -> tuple[dict[str, int], dict[str, set]]:
    """Kernels in Triton's own caches after passes at many widths, and the distinct sets of declared constants."""
    from gradaug_kernels._gpu.paths import DIRECTIONS, Geometry

    declared: dict[str, set] = {}
    launched = {}
    for c in range(256 - widths, 256):
        pairs = ((1, 1), (1, 1), (1, 1))
        dense = Geometry("forward", torch.bfloat16, 8, c, 14, 14, c - 1, 256, 256, 3, 3, *pairs, 1)
        depthwise = dense._replace(o=c, full_c=1, groups=c)
        plain = (launches(g._replace(direction=d)) for g in (dense, depthwise) for d in DIRECTIONS)
        for kernel, arguments in itertools.chain(*plain, normed_launches(torch.bfloat16, c, 8)):
            launched[kernel.__name__] = kernel
            compile_for(90, kernel, arguments)
            declared.setdefault(kernel.__name__, set()).add((dtype_of(arguments), variant(kernel, arguments)))
    caches = {name: len(kernel.device_caches[90][0]) for name, kernel in launched.items()}
    return caches, declared


def test_a_new_width_compiles_nothing():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        caches, declared = pool.submit(compiled_kernels, 40).result()
    counts = {name: len(found) for name, found in declared.items()}
    assert caches == counts, "something other than the declared constants was compiled in"
    kinds = Counter(
        (name, *re.findall(r"(?:NORM|STATISTICS|MASK)=\d", constants))
        for name, found in declared.items()
        for _, constants in found
    )
    assert max(kinds.values()) <= 6, "few buckets of vector width and tile for 40 widths"


def main():
    rows = all_rows()
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*KEY, *COSTS, *GAINS, "hgmma", "compiler"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows -> {TABLE}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
