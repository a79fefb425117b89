"""`gradaug compare`: what it plans, what it writes, and that it goes on where it was stopped."""

import csv
import json

import pytest
import torch
from PIL import Image

import gradaug_kernels as gk
from gradaug_kernels import data
from gradaug_kernels.cli.main import main
from gradaug_kernels.compare import run as compare
from gradaug_kernels.compare.cost import multiply_adds, step_cost
from gradaug_kernels.compare.report import summarise
from gradaug_kernels.compare.run import FILES, ROBUSTNESS_FILES, comparison_names, load_comparison, plan
from gradaug_kernels.evaluate import checkpoint, measure
from gradaug_kernels.recipes.build import build_network
from gradaug_kernels.recipes.config import from_tables
from gradaug_kernels.train import load_config, run

COMPARISON = """
[compare]
preset = "quickstart"
seeds = [0, 1]
[settings]
data.per_class = 10
train.epochs = 2
train.batch_size = 25
train.device = "cpu"
model.depth = 8
model.base_width = 4
evaluate.widths = [1.0]
schedule.warmup_epochs = 0
[methods.plain]
gradaug.num_subnets = 0
schedule.name = "step"
schedule.milestones = [1]
[methods.gradaug]
gradaug.resolutions = []
gradaug.min_width = 1.0
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(COMPARISON)
    return path


@pytest.mark.parametrize("name", comparison_names())
def test_comparisons_of_the_package(name):
    comparison = load_comparison(name)
    assert len(comparison.seeds) >= 3
    for settings in comparison.methods.values():
        load_config(comparison.preset, comparison.settings | settings)


def test_the_cost_of_a_step():
    images = torch.zeros(3, 2, 8, 8)
    layers = (torch.nn.Conv2d(2, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=4), torch.nn.Flatten(), torch.nn.Linear(128, 5))
    model = gk.convert(torch.nn.Sequential(*layers), example=images)
    assert multiply_adds(model, images) == 36 * 8 * 18 + 16 * 8 * 18 + 128 * 5
    gk.set_width(model, 0.5)
    assert multiply_adds(model, images) == 36 * 4 * 18 + 16 * 4 * 18 + 64 * 5

    fashion = data.load("fashion-mnist", source="embedded")
    tables = {"model": {"depth": 8, "base_width": 8}, "gradaug": {"num_subnets": 2, "min_width": 0.5}}
    config = from_tables("test", tables | {"data": {"source": "embedded"}})
    full, total = step_cost(config, fashion, draws=40)
    model = build_network(config, 10, 1)
    assert full == multiply_adds(model, torch.zeros(2, 1, 32, 32))
    gk.set_width(model, 0.5)
    smallest = multiply_adds(model, torch.zeros(2, 1, 32, 32))
    # The other width is uniform in [0.5, 1): nearly all arithmetic is its square, 7 / 12 of the full one on average.
    assert (total - full - smallest) / full == pytest.approx(7 / 12, abs=0.06)


def test_equal_compute_is_counted(file):
    """Two sub-networks at full width and size: three plain steps, so the plain method trains three times as long."""
    text = file.read_text().replace("gradaug.min_width = 1.0", "gradaug.min_width = 1.0\ngradaug.num_subnets = 2")
    file.write_text(text)
    plans = plan(load_comparison(str(file)))
    assert [(p.method, p.epochs, p.seed, p.budgets) for p in plans[:3]] == [
        ("plain", 2, 0, ("epochs",)),
        ("plain", 6, 0, ("compute",)),
        ("gradaug", 2, 0, ("epochs", "compute")),
    ]
    assert [p.cost for p in plans[:3]] == pytest.approx([1, 1, 3])
    assert [p.config.schedule.milestones for p in plans[:2]] == [(1,), (3,)]
    assert {p.config.train.seed for p in plans} == {0, 1}


def test_a_comparison_is_stopped_and_goes_on(file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["compare", str(file), "--out", str(out)]
    trained, original = [], compare.train

    def recorded(config, folder, **options):
        trained.append((folder.relative_to(out / "runs"), options["resume"]))
        return original(config, folder, **options)

    calls, step = [], gk.GradAug.__call__

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 7:  # four steps an epoch: in the second epoch of the first run
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(compare, "train", recorded)
    monkeypatch.setattr(run, "write_curves", lambda *arguments: None)
    with monkeypatch.context() as patch:
        patch.setattr(gk.GradAug, "__call__", stopped)
        assert main(command) == 130
    assert "the same command goes on after the last complete epoch" in capsys.readouterr().err
    assert main(command) == 0
    output = capsys.readouterr().out
    assert [resumed for _, resumed in trained] == [False, True, False, False, False, False, False]
    assert {path.name for path in out.iterdir()} == {*FILES, "runs"}

    rows = list(csv.DictReader((out / "runs.csv").open()))
    assert len(rows) == 8
    assert {row["budget"] for row in rows} == {"epochs", "compute"}
    table = list(csv.DictReader((out / "table.csv").open()))
    assert [(row["budget"], row["method"], row["epochs"], row["seeds"]) for row in table] == [
        ("epochs", "plain", "2", "2"),
        ("epochs", "gradaug", "2", "2"),
        ("compute", "plain", "8", "2"),
        ("compute", "gradaug", "2", "2"),
    ]
    assert float(table[3]["step_cost"]) == pytest.approx(4)
    text = (out / "table.md").read_text()
    assert text in output
    assert f"    gradaug compare {file}\n" in text
    assert f"{float(table[0]['top1_mean']):.2f} ± {float(table[0]['top1_std']):.2f}" in text
    with Image.open(out / "figure.png") as figure:
        assert len(figure.convert("L").getcolors()) > 50

    trained.clear()
    assert main([*command, "--seeds", "0", "--methods", "gradaug"]) == 0
    assert trained == [], "finished runs are not repeated"
    assert main([*command, "--set", "optimizer.lr=0.3"]) == 2
    assert "must be a run of this comparison, got one of another optimizer.lr" in capsys.readouterr().err


def test_robustness(file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(run, "write_curves", lambda *arguments: None)
    errors = {name: [float(place)] * 5 for place, name in enumerate(measure.COMMON)}
    monkeypatch.setattr(measure, "corruption_errors", lambda *arguments, **options: errors)  # else minutes
    command = ["compare", str(file), "--out", str(out), "--epochs", "1", "--robustness", "20"]
    assert main(command) == 0
    assert {path.name for path in out.iterdir()} == {*FILES, *ROBUSTNESS_FILES, "runs"}
    rows = list(csv.DictReader((out / "robustness.csv").open()))
    assert [(row["method"], row["seed"], row["epochs"], row["images"]) for row in rows] == [
        (method, seed, "1", "20") for seed in "01" for method in ("plain", "gradaug")
    ]
    stored = json.loads((out / "runs/gradaug/1-epochs/seed-1/evaluation/evaluation.json").read_text())
    assert float(rows[3]["fgsm_4"]) == stored["attacks"]["fgsm"]["4"]
    assert float(rows[3]["mean_corruption_error"]) == stored["corruptions"]["mean_corruption_error"] == 7
    mean = (float(rows[0]["pgd_4"]) + float(rows[2]["pgd_4"])) / 2
    (plain,) = [line for line in (out / "table.md").read_text().splitlines() if line.startswith("| plain | 2 |")]
    assert plain.split("|")[7].startswith(f" {mean:.1f} ± ")
    with Image.open(out / "robustness.png") as figure:
        assert len(figure.convert("L").getcolors()) > 50

    monkeypatch.setattr(checkpoint, "evaluate_checkpoint", None)  # what is measured is not measured again
    capsys.readouterr()
    assert main(command) == 0
    assert "PGD 4/255" in capsys.readouterr().out
    assert main([*command[:-1], "-3"]) == 2
    assert "--robustness must be a number of images, got -3" in capsys.readouterr().err


def test_mean_and_standard_deviation():
    common = {"budget": "epochs", "method": "a", "epochs": 3, "step_cost": 1.0, "top5": 90.0, "seconds": 10.0}
    (row,) = summarise([common | {"seed": seed, "top1": top1} for seed, top1 in enumerate((70.0, 72.0, 77.0))])
    assert (row["top1_mean"], row["seeds"]) == (73.0, 3)
    assert row["top1_std"] == pytest.approx(13**0.5, abs=1e-3)
    assert summarise([common | {"seed": 0, "top1": 70.0}])[0]["top1_std"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[compare]", "must have sections [methods.NAME], got none"),
        ("[compar]\npreset = 3", 'unknown section "compar"; the nearest is "compare"'),
        ("[compare]\nseed = 3", 'unknown key "compare.seed"; the nearest is "compare.seeds"'),
        ("[methods.a]\ngradaug.num_subnet = 3", 'unknown key "gradaug.num_subnet"; the nearest is'),
        ("[compare", "must be a TOML file, got: "),
    ],
)
def test_bad_files(text, message, tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    assert main(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_commands(file, capsys):
    assert main(["compare", "method"]) == 2
    assert 'unknown comparison "method"; the nearest is "methods"' in capsys.readouterr().err
    assert main(["compare", str(file), "--methods", "grad"]) == 2
    assert 'unknown method "grad"; the nearest is "gradaug"' in capsys.readouterr().err
    assert main(["compare", "nowhere.toml"]) == 2
    assert "comparison must be a name or an existing TOML file, got nowhere.toml" in capsys.readouterr().err
