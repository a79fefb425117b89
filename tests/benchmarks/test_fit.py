"""The list of fitted constants is complete, a variant has one other value, and the table says what was measured."""

import csv
import re
import subprocess
from fnmatch import fnmatch

import pytest
import torch

from benchmarks.fit.__main__ import Result, main, print_result, rows_of
from benchmarks.fit.constants import CONSTANTS, NOT_FITTED, WORKLOADS, Call, Constant, Of
from benchmarks.fit.problems import prepare
from benchmarks.fit.sources import CPU, chosen, code, find, number
from benchmarks.fit.variants import ROOT, Variants, Worker
from benchmarks.gate import Gate
from gradaug_kernels._library import backends

CALL = Call("conv 1,4,5,5,6,3,1,1", "forward", "fp32")
PATHS = CPU / "conv" / "paths.cpp"
needs_library = pytest.mark.skipif(
    backends()["slim_conv2d"]["cpu"] != "cpp", reason="the native library of the CPU was not built"
)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def identity(constant: Constant) -> str:
    return f"{constant.of.file}:{constant.name}"


def constant(name="kOne", file="conv/a.cpp", pattern=None, accuracy=False) -> Constant:
    return Constant(Of(file, "columns", ("forward",), ("fp32",), accuracy), name, "for a test", (1, 2, 4), pattern)


# ---- the list


@pytest.mark.parametrize("constant", CONSTANTS, ids=identity)
def test_a_listed_constant_is_in_the_sources_once(constant):
    assert find(constant).value in constant.candidates
    assert len(set(constant.candidates)) == len(constant.candidates) > 2
    assert chosen(f"{find(constant).path.relative_to(CPU)}:{constant.name}") is constant


def declared_numbers() -> dict[tuple[str, str], None]:
    """(file, name) of every `constexpr <type> name = <number>` in csrc/cpu."""
    declaration = re.compile(r"\bconstexpr\s+[\w:]+\s+(\w+\s*=\s*[^;{}]+);")
    found = {}
    for path in sorted(path for path in CPU.rglob("*") if path.suffix in (".h", ".cpp")):
        for names in declaration.findall(code(path)):
            for name, value in re.findall(r"(\w+)\s*=\s*([^,;]+)", names):
                try:
                    number(value.rstrip("fF"))
                except ValueError:
                    continue  # made of other constants
                found[path.relative_to(CPU).as_posix(), name] = None
    return found


def is_listed(file: str, name: str) -> bool:
    return any(each.name == name and fnmatch(file, each.of.file) for each in CONSTANTS)


def test_every_number_is_fitted_or_has_a_reason():
    declared = declared_numbers()
    assert ("conv/paths.cpp", "kMaxIdle") in declared
    for file, name in declared:
        reasons = [why for (glob, other), why in NOT_FITTED.items() if other == name and fnmatch(file, glob)]
        assert len(reasons) + is_listed(file, name) == 1, (
            f"csrc/cpu/{file} has {name}, which must be in benchmarks/fit/constants.py: in TABLE, or in NOT_FITTED"
        )


@pytest.mark.parametrize(("glob", "name"), NOT_FITTED)
def test_a_number_with_a_reason_is_in_the_sources(glob, name):
    assert any(other == name and fnmatch(file, glob) for file, other in declared_numbers()), (
        f"csrc/cpu/{glob} must have {name}, which NOT_FITTED of benchmarks/fit/constants.py gives a reason for"
    )


def test_every_workload_decides_something():
    used = {name for each in CONSTANTS for name in each.of.workload.split(" + ")}
    assert used == set(WORKLOADS)
    for problems in WORKLOADS.values():
        assert len(set(problems)) == len(problems)


def test_the_list_is_printed(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("kMaxIdle "))
    assert re.search(r" 1\.12 +conv/paths\.cpp:\d+ .*full panels; fp32 bf16, forward of columns$", line)
    assert lines.index("") == len(WORKLOADS)
    assert len(lines) == len(WORKLOADS) + 1 + len(CONSTANTS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kUnknown", "a name must be in the list that `python -m benchmarks.fit` prints, got kUnknown\n"),
        ("kMaxPixels", "a name must be that of one constant, paths.cpp:kMaxPixels or weight_grad.cpp:kMaxPixels, got "),
    ],
)
def test_a_wrong_name_is_one_sentence(name, message, capsys):
    assert main([name]) == 2
    assert capsys.readouterr().err.startswith(message)


# ---- the sources


@pytest.fixture
def clone(tmp_path):
    """A clone with other constants."""
    (tmp_path / "csrc" / "cpu" / "conv").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "conv" / "a.cpp").write_text(
        "// constexpr int64_t kNone = 1;\n"
        "constexpr int64_t kOne = 4 * 1024, kTwo = 1 << 3;  // kOne = 5\n"
        "struct S { static constexpr double kThree = 0.5; };\n"
        "constexpr int kDerived = kOne / 2;\n"
        "if (x <= 16 * y && kOne == 4) f();\n"
    )
    (tmp_path / "csrc" / "cpu" / "conv" / "b.h").write_text("inline constexpr int64_t kTwo = 7;\n")
    (tmp_path / "csrc" / "autograd.cpp").write_text("constexpr int kOne = 1;\n")
    (tmp_path / "setup.py").write_text("raise SystemExit('conv/a.cpp:2: error: kOne is too small')\n")
    return tmp_path


@pytest.mark.parametrize(
    ("constant", "value", "line"),
    [
        (constant(), 4096, 2),
        (constant("kTwo"), 8, 2),
        (constant("kTwo", "conv/*.h"), 7, 1),
        (constant("kThree", "conv/*"), 0.5, 3),
        (constant("rows", pattern=r"x <= (\d+) \* y"), 16, 5),
    ],
)
def test_a_variant_has_one_other_value_and_nothing_else(constant, value, line, clone):
    place = find(constant, clone / "csrc" / "cpu")
    assert (place.value, place.line) == (value, line)
    variants = Variants(clone / "built", clone)
    present, other = variants.files(constant, value), variants.files(constant, 96)
    assert {str(path) for path in present} == {
        "csrc/autograd.cpp",
        "csrc/cpu/conv/a.cpp",
        "csrc/cpu/conv/b.h",
        "setup.py",
    }
    assert all((clone / path).read_bytes() == content for path, content in present.items())
    (changed,) = (path for path in present if present[path] != other[path])
    before, after = present[changed].decode(), other[changed].decode()
    assert after == before[: place.begin] + "96" + before[place.begin + len(place.text) :]


@pytest.mark.parametrize(
    ("constant", "message"),
    [
        (constant("kNone"), r"csrc/cpu/conv/a.cpp must have kNone once, got it 0 times"),
        (constant("kTwo", "conv/*"), r"csrc/cpu/conv/\* must have kTwo once, got it 2 times"),
        (constant("rows", pattern=r"x < (\d+)"), r"csrc/cpu/conv/a.cpp must have rows once, got it 0 times"),
    ],
)
def test_a_missing_or_ambiguous_constant_is_one_sentence(constant, message, clone):
    with pytest.raises(LookupError, match=message):
        find(constant, clone / "csrc" / "cpu")


def test_what_is_no_number_is_told():
    assert number("160 * 1024") == 163840
    assert number("1 << 20") == 1048576
    for text in ("kOne / 2", "f(2)", "1 +", "1 1", "INT64_MAX"):
        with pytest.raises(ValueError, match="a constant must be made of numbers, got "):
            number(text)


def test_what_does_not_compile_is_one_sentence(clone):
    variants = Variants(clone / "built", clone)
    with pytest.raises(
        RuntimeError, match=r"^the library with kOne = 2 must compile, got conv/a.cpp:2: error: kOne is"
    ):
        variants.package(constant(), 2)
    assert "kOne = 2," in (clone / "built" / "csrc" / "cpu" / "conv" / "a.cpp").read_text()
    assert "kOne = 4 * 1024," in (clone / "csrc" / "cpu" / "conv" / "a.cpp").read_text(), "the clone stays as it is"
    assert not list((clone / "built" / "packages").iterdir())


def test_a_variant_is_built_once_and_again_for_other_sources(clone, monkeypatch):
    variants, built = Variants(clone / "built", clone), []

    def build(command, cwd, **options):
        built.append({path.relative_to(cwd).as_posix() for path in cwd.rglob("*.*") if path.suffix in (".h", ".cpp")})
        (cwd / command[-1]).mkdir()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", build)
    packages = [variants.package(constant(), value) for value in (1, 2, 1)]
    assert packages[0] == packages[2] != packages[1]
    assert len(built) == 2
    (clone / "csrc" / "cpu" / "conv" / "b.h").unlink()
    assert variants.package(constant(), 1) not in packages
    assert built[-1] == {"csrc/autograd.cpp", "csrc/cpu/conv/a.cpp"}


# ---- what is timed


SMALL = {
    "conv": "conv 1,6,5,7,6,3,1,1",
    "linear": "linear 3,20,6",
    "linear16": "linear16 3,20,6",
    "norm": "norm 2,5,4,4",
    "planes": "planes 2,5,4,4",
    "pool": "pool 1,5,8,8",
}
KINDS = {(call.problem.split(" ")[0], call.stage, call.dtype): None for each in CONSTANTS for call in each.of.calls}


@pytest.mark.parametrize("problem", sorted({problem for each in WORKLOADS.values() for problem in each}))
def test_every_problem_is_well_formed(problem):
    kind, _, sizes = problem.partition(" ")
    assert kind in SMALL
    assert len(sizes.split(",")) in {"conv": range(6, 11), "linear": (3,), "linear16": (3,)}.get(kind, (4,))


@needs_library
@pytest.mark.parametrize(("kind", "stage", "dtype"), KINDS)
def test_every_kind_of_call_runs_and_passes_its_gate(kind, stage, dtype):
    problem = prepare(Call(SMALL[kind], stage, dtype))
    problem.run()
    assert problem.gate().green


def test_what_is_no_problem_is_told():
    for problem in ("cone 1,2,3", "linear"):
        with pytest.raises(ValueError, match=r"a problem must be one of conv, linear, .* and its sizes, got "):
            prepare(CALL._replace(problem=problem))


# ---- processes


@needs_library
def test_a_worker_answers_and_its_end_is_one_sentence():
    worker = Worker(ROOT, 1)
    paths, gate = worker.prepare(CALL, True)
    assert len(paths) == 1
    assert gate.green
    assert worker.sample() > 0
    assert worker.prepare(CALL, False)[1] is None
    with pytest.raises(RuntimeError, match=r'ValueError: a problem must be one of .*, got "nothing"'):
        worker.prepare(CALL._replace(problem="nothing"), False)
    worker.process.kill()
    with pytest.raises(RuntimeError, match="a variant must survive sample, got exit status -9"):
        worker.sample()
    worker.close()


@needs_library
def test_another_package_is_not_measured(tmp_path):
    worker = Worker(tmp_path, 1)
    with pytest.raises(RuntimeError, match="a variant must survive sample, got exit status 1"):
        worker.sample()
    worker.close()


@needs_library
def test_a_constant_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(Variants, "package", lambda self, constant, value: ROOT)
    file = tmp_path / "rows.csv"
    options = ["--values", "96", "--calls", "2", "--repeats", "1", "--threads", "1", "--csv", str(file)]
    assert main(["kMinDepth", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"csrc/cpu/conv/paths\.cpp:\d+: kMinDepth = 58, channels from which on ", lines[0])
    assert lines[2].split() == ["value", "ratio", "p20", "p80", "rerouted", "error", "gate"]
    assert [line.split()[0] for line in lines[3:5]] == ["58", "96"]
    assert lines[3].split()[1:5] == ["1", "1", "1", "0/2"]
    assert lines[3].split()[-1] == "green"
    assert lines[5].startswith("best: ")
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["provider"] for row in rows] == ["kMinDepth=58", "kMinDepth=96"] * 2
    assert all(float(row["median_ms"]) > 0 for row in rows)


# ---- the table


def result(times: dict, red=()) -> Result:
    """times: value -> the samples of two calls; the present value is 2."""
    calls, found = [CALL, CALL._replace(dtype="bf16")], Result(2)
    for i, call in enumerate(calls):
        found.milliseconds[call] = {value: of[i] for value, of in times.items()}
        found.paths[call] = {value: ["gemm" if value == 4 and i == 0 else "torch"] for value in times}
        found.gates[call] = {value: Gate(value not in red, "result", 3e-7 * (i + 1), 2e-7) for value in times}
    return found


def test_ratios_are_those_of_rounds_and_their_mean_is_geometric():
    # The machine takes twice as long in the second round, and the values of a round are compared.
    found = result({2: ([1, 2, 1], [8, 8, 8]), 4: ([2, 4, 2], [4, 4, 4]), 8: ([1, 2, 1], [16, 16, 4])})
    assert found.ratio(2) == pytest.approx((1, 1, 1))
    assert found.ratio(4) == pytest.approx((1, 1, 1)), "twice and half the time"
    median, p20, p80 = found.ratio(8)
    assert median == pytest.approx(2**0.5)
    assert p20 == pytest.approx((0.5 + 0.4 * 1.5) ** 0.5)
    assert p80 == pytest.approx(2**0.5)
    assert found.rerouted(4) == 1
    assert found.rerouted(8) == 0
    assert found.error(4) == pytest.approx(3)


@pytest.mark.parametrize(
    ("times", "red", "best"),
    [
        ({1: 0.9, 2: 1.0, 4: 0.8}, (), 4),
        ({1: 0.9, 2: 1.0, 4: 0.8}, (4,), 1),
        ({1: 1.1, 2: 1.0, 4: 1.2}, (), 2),
        ({1: 1.1, 2: 1.0, 4: 1.2}, (2,), 1),
        ({1: 0.9, 2: 1.0, 4: 0.8}, (1, 2, 4), 2),
    ],
)
def test_the_fastest_accurate_value_is_the_best(times, red, best):
    assert result({value: ([ms] * 3, [ms] * 3) for value, ms in times.items()}, red).best() == best


def test_a_value_within_the_spread_does_not_replace_the_present_one():
    assert result({2: ([1.0] * 5, [1.0] * 5), 4: ([0.9, 0.9, 0.9, 1.1, 1.1], [1.0] * 5)}).best() == 2


def test_the_table_is_printed(capsys):
    listed = chosen("kMinDepth")
    found = result({2: ([1.0] * 3, [1.0] * 3), 4: ([0.5] * 3, [0.5] * 3)}, red=(4,))
    print_result(listed, found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["2", "1", "1", "1", "0/2", "3", "green"]
    assert lines[4].split() == ["4", "0.5", "0.5", "0.5", "1/2", "3", "RED"]
    assert lines[5] == "best: 2, the present value"
    rows = rows_of(listed, found, 3)
    assert [(row.case, row.provider, row.dtype, row.median_ms) for row in rows[:2]] == [
        ("forward of conv 1,4,5,5,6,3,1,1", "kMinDepth=2", "fp32", 1.0),
        ("forward of conv 1,4,5,5,6,3,1,1", "kMinDepth=4", "fp32", 0.5),
    ]
