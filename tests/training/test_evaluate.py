"""`gradaug eval` on a small run, and the numbers that it reports against their definitions."""

import csv
import json

import pytest
import torch
from PIL import Image

import gradaug_kernels as gk
from gradaug_kernels import data
from gradaug_kernels.cli.main import main
from gradaug_kernels.evaluate import expected_calibration_error, measure
from gradaug_kernels.evaluate.checkpoint import FILES
from gradaug_kernels.evaluate.corruptions import COMMON, EXTRA

SETTINGS = (
    *("model.depth=8", "model.base_width=4", "train.batch_size=50", "evaluate.widths=[0.5, 1.0]"),
    *("gradaug.num_subnets=1", "gradaug.min_width=0.5", "evaluate.calibration_batches=2"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    arguments = ["train", "quickstart", "--out", out, "--epochs", 1, "--per-class", 40, "--device", "cpu", *settings]
    assert main([*map(str, arguments)]) == 0
    return out


def test_an_evaluation(run, tmp_path, capsys):
    out = tmp_path / "evaluation"
    command = ["eval", run, "--out", out, "--images", 16, "--pgd-steps", 2, "--epsilons", 2, 8, "--device", "cpu"]
    assert main([*map(str, command)]) == 0
    output = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == set(FILES)
    found = json.loads((out / "evaluation.json").read_text())
    for text in (
        "top-1, width 0.5",
        "mean corruption error (cifar)",
        "top-1, FGSM 8/255",
        "expected calibration error",
    ):
        assert text in output
    assert (found["images"], found["epoch"], found["corruptions"]["constants"]) == (16, 1, "cifar")
    assert found["widths"]["1"] == found["top1"]
    assert list(found["corruptions"]["errors"]) == [*COMMON, *EXTRA]
    rows = list(csv.DictReader((out / "corruptions.csv").open()))
    assert len(rows) == 19
    mean = sum(float(row["mean_error"]) for row in rows if row["corruption"] in COMMON) / 15
    assert found["corruptions"]["mean_corruption_error"] == pytest.approx(mean)
    attacks = list(csv.DictReader((out / "attacks.csv").open()))
    assert [(row["attack"], row["epsilon_255"]) for row in attacks] == [
        ("none", "0"), ("fgsm", "2"), ("fgsm", "8"), ("pgd", "2"), ("pgd", "8")
    ]  # fmt: skip
    assert sum(int(row["images"]) for row in csv.DictReader((out / "calibration.csv").open())) == 16
    for part in ("widths", "corruptions", "attacks", "calibration"):
        with Image.open(out / f"{part}.png") as figure:
            assert len(figure.convert("L").getcolors()) > 30

    again = [*map(str, [*command, "--parts", "calibration"])]
    assert main(again) == 2
    assert "must hold no evaluation" in capsys.readouterr().err
    relative = ["eval", run, "--out", tmp_path / "b", "--images", 16, "--parts", "corruptions", "--relative-to"]
    assert main([*map(str, [*relative, out / "evaluation.json"])]) == 0
    found = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    assert found["corruptions"]["relative_mean_corruption_error"] == pytest.approx(100)
    assert "widths" not in found


def test_the_accuracy_is_that_of_the_run(run, tmp_path):
    """All test images; statistics of the sub-network come with the checkpoint, those of another width are made."""
    command = ["eval", run, "--out", tmp_path / "out", "--parts", "widths", "--device", "cpu"]
    assert main([*map(str, command)]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert found["top1"] == pytest.approx(summary["top1"])
    assert found["widths"]["0.5"] == pytest.approx(summary["widths"]["0.5"])
    command = ["eval", run, "--out", tmp_path / "wider", "--parts", "widths", "--widths", "0.75", "--images", 20]
    assert main([*map(str, command)]) == 0
    assert list(json.loads((tmp_path / "wider" / "evaluation.json").read_text())["widths"]) == ["0.75"]


def test_corrupted_images_depend_on_their_index_alone():
    images = data.load("fashion-mnist", source="embedded").test
    corrupted = measure.CorruptedImages(images, "gaussian_noise", 3, "cifar", seed=1)
    assert torch.equal(corrupted[7][0], corrupted[7][0])
    assert corrupted[7][1] == images[7][1]
    noise = [corrupted[i][0] - images[i][0] for i in (7, 8)]
    assert not torch.equal(*noise)
    other = measure.CorruptedImages(images, "gaussian_noise", 3, "cifar", seed=2)
    assert not torch.equal(other[7][0], corrupted[7][0])
    plain = measure.CorruptedImages(images, "jpeg_compression", 1, "cifar", seed=1)[7][0]
    assert (plain - images[7][0]).abs().mean() < 0.2, "normalised as the images are"


def test_mean_corruption_error():
    errors = {name: [10.0 * i, 20.0 * i, 30.0 * i, 40.0 * i, 50.0 * i] for i, name in enumerate(COMMON)}
    assert measure.mean_corruption_error(errors) == pytest.approx(30 * 7)
    assert measure.mean_corruption_error(errors, dict.fromkeys(COMMON, 60.0)) == pytest.approx(50 * 7)
    assert measure.mean_corruption_error(errors | {"saturate": [1000.0] * 5}) == pytest.approx(210)
    del errors["fog"]
    assert measure.mean_corruption_error(errors) is None


def test_expected_calibration_error():
    confidence = torch.tensor([0.95, 0.85, 0.81, 0.3, 0.2, 1.0], dtype=torch.double)
    correct = torch.tensor([True, False, True, False, True, True])
    error, bins = expected_calibration_error(confidence, correct, bins=5)
    # (0.8, 1.0]: 3.61 sure, 3 right; (0.2, 0.4]: 0.3 sure, 0 right; (0, 0.2]: 0.2 sure, 1 right
    assert error == pytest.approx((0.61 + 0.3 + 0.8) / 6)
    assert [row.count for row in bins] == [1, 1, 0, 0, 4]
    assert bins[4].accuracy == pytest.approx(0.75)
    assert bins[4].confidence == pytest.approx(3.61 / 4)
    assert expected_calibration_error(torch.tensor([0.0]), torch.tensor([False]))[0] == 0


def test_a_calibrated_network():
    confidence = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    correct = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) < confidence
    assert expected_calibration_error(confidence, correct)[0] < 0.01
    assert expected_calibration_error(confidence, confidence > 2)[0] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parts", "speed"), "parts must be of widths, corruptions, attacks, calibration, got speed"),
        (("--constants", "mnist"), "constants must be one of auto, imagenet, cifar, got mnist"),
        (("--epsilons", "0"), "epsilons positive, up to 255, got 0, 10 and [0.0]"),
        (("--relative-to", "nowhere.json"), "No such file or directory: 'nowhere.json'"),
        (("--widths", "1.5"), "evaluate.widths must be widths in (0, 1], got [1.5]"),
    ],
)
def test_bad_commands(run, tmp_path, capsys, arguments, message):
    assert main(["eval", str(run), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_checkpoint_that_is_not_there(tmp_path, capsys):
    assert main(["eval", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"gradaug: error: a checkpoint must be at {tmp_path}/checkpoint.pt, got none\n"


def test_slim_widths_with_statistics_are_not_calibrated_again():
    torch.manual_seed(0)
    model = gk.convert(torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()))
    model.append(torch.nn.AdaptiveAvgPool2d(1)).append(torch.nn.Flatten()).append(gk.SlimLinear(8, 3))
    loader = [(torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0]))]
    asked = []

    def calibrate(widths):
        asked.append(widths)
        gk.calibrate(model, widths, loader)

    measure.accuracy_by_width(model, [1.0, 0.5], loader, calibrate)
    measure.accuracy_by_width(model, [0.5, 0.75], loader, calibrate)
    assert asked == [[0.5], [0.75]]
