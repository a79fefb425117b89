"""The benchmarks on tiny cases: every command writes full rows, and a wrong result is never called fast."""

import csv
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradaug_kernels as gk
from benchmarks import bench_slim_conv2d, bench_throughput, kernels, plot
from benchmarks.__main__ import main
from benchmarks.cases import called_layers, distinct_layers, network
from benchmarks.gate import check, speedups
from benchmarks.memory import peak_bytes
from benchmarks.rows import FIELDS
from benchmarks.timing import Workload, interleave, quantiles

CPU = torch.device("cpu")
TINY = ["--model", "wrn-10-1", "--batch", "2", "--size", "8", "--threads", "1"]
ALWAYS = (
    *("bench", "case", "provider", "backend", "dtype", "layout", "device", "threads", "torch", "commit", "date"),
    "repeats",
)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of one CSV file for each command, and the rows of each command's JSON file."""
    folder = tmp_path_factory.mktemp("results")
    providers = ["--providers", "ours,eager,eager8"]
    commands = {
        "layers": [*providers, "--widths", "0.8", "--repeats", "2"],
        "step": [*providers, "--repeats", "2", "--new-width", "--dtype", "bf16"],
        "throughput": [*providers, "--widths", "1,0.8", "--repeats", "2"],
        "memory": providers,
    }
    rows = {}
    for name, options in commands.items():
        files = ["--json", str(folder / f"{name}.json"), "--csv", str(folder / f"{name}.csv")]
        assert main([name, *TINY, *options, *files]) == 0
        rows[name] = json.loads((folder / f"{name}.json").read_text())
    return folder, rows


@pytest.mark.parametrize("command", ["layers", "step", "throughput", "memory"])
def test_every_row_is_a_full_record(results, command):
    folder, rows = results
    for row in rows[command]:
        assert tuple(row) == FIELDS
        assert all(row[name] not in (None, "") for name in ALWAYS if name != "commit"), row
        if command != "memory":
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        if row["provider"] == "ours" and row["bench"] != "step.new_width":
            assert row["gate"] == "green"
    with (folder / f"{command}.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["case"] for row in written] == [row["case"] for row in rows[command]]


def test_layers_measure_forward_backward_and_total(results):
    rows = results[1]["layers"]
    cases = {row["case"] for row in rows}
    assert len(cases) == len(distinct_layers(network("wrn-10-1", 2, 8), 0.8))
    for op in ("slim_conv2d", "slim_linear", "slim_batch_norm"):
        for stage in ("forward", "backward", "total"):
            chosen = [row for row in rows if row["bench"] == f"{op}.{stage}"]
            assert {row["provider"] for row in chosen} == {"ours", "eager", "eager8"}
            for row in chosen:
                if row["provider"] == "ours":
                    eager, eager8 = (
                        next(r for r in chosen if r["case"] == row["case"] and r["provider"] == name)
                        for name in ("eager", "eager8")
                    )
                    assert row["x_eager"] == pytest.approx(eager["median_ms"] / row["median_ms"])
                    assert row["x_best"] == pytest.approx(
                        min(eager["median_ms"], eager8["median_ms"]) / row["median_ms"]
                    )
                if row["provider"] != "eager8":
                    assert row["unit"] == ("GB/s" if op == "slim_batch_norm" else "GFLOP/s")
                if stage == "total":
                    assert row["peak_mb"] > 0


def test_step_times_the_first_step_at_a_new_width(results):
    rows = results[1]["step"]
    assert [row["provider"] for row in rows if row["bench"] == "step.new_width"] == ["ours", "eager", "eager8"]


def test_memory_counts_the_whole_process_too(results):
    for row in results[1]["memory"]:
        assert row["peak_mb"] > 0
        assert sys.platform != "linux" or row["resident_mb"] > 0


def test_figures_are_drawn(results):
    names = {path.name for path in plot.draw_all(results[0], results[0])}
    assert names == {"step.png", "memory.png", "layers.png", "throughput.png"}


def test_a_wrong_layer_has_no_speedup(monkeypatch, capsys, tmp_path):
    ours = bench_slim_conv2d.ours

    class Wrong(gk.FastSlimConv2d):
        def _arguments(self, x):
            (weight, *others), weight_grad = super()._arguments(x)
            return (weight * 1.001, *others), weight_grad

    def wrong(layer):
        module = ours(layer)
        module.__class__ = Wrong
        return module

    monkeypatch.setattr(bench_slim_conv2d, "ours", wrong)
    options = ["--widths", "0.8", "--repeats", "1", "--json", str(tmp_path / "rows.json")]
    assert main(["layers", *TINY, *options]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(("RED GATE", "RED GATE          "))]
    rows = [row for row in json.loads((tmp_path / "rows.json").read_text()) if row["provider"] == "ours"]
    convolutions = [row for row in rows if "conv2d" in row["bench"]]  # alone and in pairs
    assert len(lines) == len({row["case"] for row in convolutions}) > 0
    for row in rows:
        red = row in convolutions
        assert row["gate"] == ("red" if red else "green")
        assert (row["x_eager"] is None) == (row["x_best"] is None) == red


def test_recomputing_is_measured_for_whole_steps(capsys, tmp_path):
    options = ["--providers", "recompute,eager", "--json", str(tmp_path / "rows.json")]
    assert main(["step", *TINY, *options, "--repeats", "1"]) == 0
    recompute, eager = json.loads((tmp_path / "rows.json").read_text())
    assert (recompute["provider"], recompute["gate"], eager["gate"]) == ("recompute", "green", None)
    assert recompute["x_eager"] == pytest.approx(eager["median_ms"] / recompute["median_ms"])
    with pytest.raises(SystemExit):
        main(["layers", *TINY, *options])
    assert "recompute is a provider of whole steps" in capsys.readouterr().err


def test_a_wrong_step_has_no_speedup(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gk, "GradAug", functools.partial(gk.GradAug, reduction="mean"))
    assert main(["step", *TINY, "--repeats", "1", "--json", str(tmp_path / "rows.json")]) == 1
    assert "RED GATE" in capsys.readouterr().out
    (ours,) = (row for row in json.loads((tmp_path / "rows.json").read_text()) if row["provider"] == "ours")
    assert (ours["gate"], ours["x_eager"], ours["x_best"]) == ("red", None, None)
    plot_rows = {name: "" if value is None else str(value) for name, value in ours.items()}
    with (tmp_path / "step.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerow(plot_rows)
    assert plot.read_rows(tmp_path) == []


def test_the_gate_allows_twice_the_error_of_pytorch():
    reference = {"y": torch.tensor([1.0, 0.0]).double()}
    pytorch = {"y": torch.tensor([1.0, 1e-3])}
    for error, green in ((1.9e-3, True), (2.1e-3, False), (float("nan"), False)):
        gate = check({"y": torch.tensor([1.0, error])}, pytorch, reference)
        assert gate.green == green
        assert gate.torch_error == pytest.approx(1e-3)
    assert not check({"y": torch.tensor([1.0])}, pytorch, reference).green, "another shape"
    several = {"a": torch.ones(2).double(), "b": torch.ones(2).double()}
    exact = {name: tensor.float() for name, tensor in several.items()}
    assert check(exact | {"a": torch.full((2,), 1.01)}, exact, several)[:2] == (False, "a")


def test_a_speedup_is_against_eager_and_the_best_baseline():
    exact = {"y": torch.ones(1)}
    green = check(exact, exact, exact)
    assert green.green
    assert speedups({"ours": 2.0, "eager": 4.0, "compile": 3.0, "eager8": 5.0}, green) == (2.0, 1.5)
    assert speedups({"ours": 2.0, "compile": 3.0}, green) == (None, 1.5)
    assert speedups({"ours": 2.0}, green) == speedups({"eager": 2.0}, green) == (None, None)
    assert speedups({"ours": 2.0, "eager": 4.0}, green._replace(green=False)) == (None, None)


def test_providers_take_turns():
    calls = []
    loads = {
        name: Workload(lambda: None, {"go": functools.partial(calls.append, name), "rest": lambda: None})
        for name in "ab"
    }
    samples = interleave(loads, CPU, repeats=3, warmup=1)
    assert "".join(calls) == "baabbaab"
    for stages in samples.values():
        assert [len(times) for times in stages.values()] == [3, 3, 3]
        assert stages["total"] == [sum(pair) for pair in zip(stages["go"], stages["rest"], strict=True)]
    assert quantiles([float(i) for i in range(11)]) == pytest.approx((5, 2, 8))


def test_peak_memory_is_exact_and_above_what_was_held():
    held = {"old": torch.zeros(1000)}

    def call():
        held.pop("old")  # 4,000 bytes less
        first = torch.zeros(2000)
        second = torch.zeros(3000)  # the peak: 16,000 above the start
        del second
        held["old"] = first[:1000].clone()

    assert peak_bytes(call, CPU) == 16_000


def test_layers_of_a_network_are_found():
    layers = [layer for layer in called_layers(network("mobilenet_v3_small"), 0.8) if not layer.parts]
    names = [str(layer) for layer in layers]
    assert names[0] == "3->13 3x3 stride 2 @224 w0.8"
    assert "13->13 3x3 stride 2 depthwise @112 w0.8" in names
    assert "13 + relu @56 w0.8" in names
    assert not layers[0].needs_dx
    assert all(layer.needs_dx for layer in layers[1:])
    for layer in called_layers(network("wrn-10-1"), 0.7, divisor=8):
        assert layer.x[1] % 8 == 0 or layer.x[1] in (3, 100)
    with pytest.raises(ValueError, match='model must be "wrn-<depth>-<factor>" or a torchvision classifier, got "vgg"'):
        network("vgg")


def test_an_extracted_network_equals_its_subnetwork():
    net = network("mobilenet_v3_small", 2, 32)
    model = bench_throughput.slimmable(net, [0.8], 1, CPU)
    plain = bench_throughput.extracted(net, model, 0.8, CPU).double()
    images = net.images_and_targets(CPU)[0].double()
    with torch.no_grad(), gk.use_width(model.double(), 0.8):
        torch.testing.assert_close(plain(images), model(images), rtol=1e-9, atol=1e-12)


def test_small_cases_of_every_kernel_run(capsys):
    assert kernels.main() == 0
    assert "42 cases" in capsys.readouterr().out


def test_the_cases_run_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-k", "linear or throughput"]
    done = subprocess.run(
        [*command, *TINY, "--widths", "0.8"], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout


def test_pairs_of_layers_in_one_operator():
    pairs = [layer for layer in called_layers(network("resnet50"), 0.9) if layer.parts]
    ops = [layer.op for layer in pairs]
    assert {op: ops.count(op) for op in set(ops)} == {
        "slim_norm_conv2d": 32,
        "slim_conv2d_norm": 20,
        "slim_norm_max_pool2d": 1,
    }
    assert all(layer.parts[0].y == layer.parts[1].x for layer in pairs)
    names = [str(layer) for layer in pairs]
    assert names[0] == "58 + relu @112 | max pool 3 stride 2 w0.9"
    assert "58 + relu @56 | 58->58 3x3 @56 w0.9" in names
    assert "58->230 1x1 @56 | 230 + add + relu @56 w0.9" in names
