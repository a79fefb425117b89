"""The machine code of the CUDA C++ kernels for sm_80 and sm_90, inspected without a GPU.

Every file of gpu_code/ instantiates one file of csrc/cuda without torch's headers. No kernel may spill registers;
tensor-core kernels must multiply with HMMA and copy 16 bytes at a time. The figures are kept in gpu_code_cuda.csv:
with the nvcc that wrote it they must be equal, with another one the requirements alone must hold.

    python tests/kernels_gpu/test_gpu_code_cuda.py       print the figures and rewrite the table
"""

import csv
import importlib.util
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "tests" / "kernels_gpu" / "gpu_code").glob("*.cu"))
TABLE = ROOT / "tests" / "kernels_gpu" / "gpu_code_cuda.csv"
TARGETS = ("sm_80", "sm_90")
FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc"))
# Instructions that a kernel whose name matches must contain.
REQUIRED = {
    r"tensor_core_kernel": ("hmma", "copy_16", "store_16"),
    r"depthwise_kernel<(__half|__nv_bfloat16), .*, 8>": ("load_16", "store_16"),
    r"depthwise_kernel<float, .*, 4>": ("load_16", "store_16"),
    r"moments_kernel<(__half|__nv_bfloat16), 8, |moments_kernel<float, 4, ": ("load_16",),
    r"(apply|gradient_sums|input_gradient)_kernel<(__half|__nv_bfloat16), 8, ": ("load_16", "store_16"),
    r"(apply|gradient_sums|input_gradient)_kernel<float, 4, ": ("load_16", "store_16"),
}
INSTRUCTIONS = {
    "hmma": r"\bHMMA\.",
    "copy_16": r"\bLDGSTS\.(?:\w+\.)*128",
    "load_16": r"\bLDG\.(?:\w+\.)*128",
    "store_16": r"\bSTG\.(?:\w+\.)*128",
}
COLUMNS = ("kernel", "target", "nvcc", "registers", "spill_bytes", "static_shared_bytes", *INSTRUCTIONS)


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton installs."""
    triton = importlib.util.find_spec("triton")
    folder = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin") if triton and triton.origin else None
    return shutil.which("cuobjdump") or (folder and shutil.which("cuobjdump", path=folder))


def why_not() -> str | None:
    tools = {"nvcc": shutil.which("nvcc"), "cuobjdump": cuobjdump(), "c++filt": shutil.which("c++filt")}
    missing = [name for name, path in tools.items() if path is None]
    return f"no {' and no '.join(missing)} found" if missing else None


def nvcc_release() -> str:
    return re.search(r"V(\d+\.\d+\.\d+)", subprocess.check_output(["nvcc", "--version"], text=True))[1]


def readable(mangled: str) -> str:
    """'tensor_core_kernel<__half, 0, 64, 64>'; an enumerator is its number."""
    name = subprocess.check_output(["c++filt", mangled], text=True).strip()
    name = re.sub(r"\([\w:]+\)(?=\d)", "", name.removeprefix("void "))  # (gradaug::conv::Pass)0
    return re.sub(r"\b(?:\w+::)+", "", name.split("(")[0])


def figures(source: Path, target: str) -> list[dict]:
    """One row of the table for each kernel of a file."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "code.cubin")
        command = ["nvcc", *FLAGS, f"-arch={target}", "-cubin", "-Xptxas", "-v", str(source), "-o", str(binary)]
        compiled = subprocess.run(command, capture_output=True, text=True)
        assert compiled.returncode == 0, compiled.stderr[-4000:]
        code = subprocess.check_output([cuobjdump(), "-sass", str(binary)], text=True)
    kernels = {}
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)"
    for name, spills, registers, rest in re.findall(pattern, compiled.stderr, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels[name] = {"registers": int(registers), "spill_bytes": int(spills)}
        kernels[name]["static_shared_bytes"] = int(shared[1]) if shared else 0
    for part in code.split("Function : ")[1:]:
        name, body = part.split("\n", 1)
        kernels[name.strip()] |= {key: len(re.findall(regex, body)) for key, regex in INSTRUCTIONS.items()}
    release = nvcc_release()
    rows = [{"kernel": readable(name), "target": target, "nvcc": release, **row} for name, row in kernels.items()]
    return sorted(rows, key=lambda row: row["kernel"])


def all_figures() -> list[dict]:
    jobs = [(source, target) for source in SOURCES for target in TARGETS]
    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(lambda job: figures(*job), jobs) for row in rows]


def recorded() -> list[dict]:
    with TABLE.open() as file:
        return [{k: int(v) if v.isdigit() else v for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    return all_figures()


def table_of(rows: list[dict]) -> str:
    lines = ["  ".join(f"{column:>9}" for column in COLUMNS[3:]) + "  target  kernel"]
    lines += ["  ".join(f"{row[c]:>9}" for c in COLUMNS[3:]) + f"   {row['target']}  {row['kernel']}" for row in rows]
    return "\n".join(lines)


def test_no_kernel_spills(rows):
    print("\n" + table_of(rows))
    assert len(rows) > 0
    assert [row["kernel"] for row in rows if row["spill_bytes"] > 0] == []


def test_tensor_cores_and_16_byte_accesses(rows):
    for pattern, instructions in REQUIRED.items():
        matching = [row for row in rows if re.search(pattern, row["kernel"])]
        assert matching, pattern
        for row in matching:
            assert all(row[instruction] > 0 for instruction in instructions), row


def test_figures_are_those_of_the_table(rows):
    table = recorded()
    assert {(row["kernel"], row["target"]) for row in rows} == {(row["kernel"], row["target"]) for row in table}
    if table[0]["nvcc"] != rows[0]["nvcc"]:
        pytest.skip(f"the table was written with nvcc {table[0]['nvcc']}, this is {rows[0]['nvcc']}")
    assert rows == table


def main():
    rows = all_figures()
    print(table_of(rows))
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
