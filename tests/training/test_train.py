import csv
import json
import math
import os
import re
import signal
import tomllib

import numpy as np
import pytest
import torch
from PIL import Image

import gradaug_kernels as gk
from gradaug_kernels import models
from gradaug_kernels.cli.main import main
from gradaug_kernels.data import fashion_mnist
from gradaug_kernels.data._idx import idx_bytes
from gradaug_kernels.recipes.build import build_network, build_optimizer, build_step
from gradaug_kernels.recipes.choices import SAMPLERS
from gradaug_kernels.recipes.config import parse_setting, to_toml
from gradaug_kernels.train import load_config, preset_names, run
from gradaug_kernels.train.folder import FILES, complete_file
from gradaug_kernels.train.run import _schedule

PRESET = """
[data]
name = "fashion-mnist"
[model]
name = "cifar_resnet"
depth = 8
base_width = 4
stem_stride = 2
[gradaug]
num_subnets = 2
min_width = 0.5
resolutions = [32, 24]
[optimizer]
lr = 0.05
[train]
epochs = 3
batch_size = 16
seed = 3
device = "cpu"
[evaluate]
widths = [0.5, 1.0]
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A data folder in Fashion-MNIST's format: 48 + 20 images whose class is the row of a white band."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 20)):
        targets = np.arange(count, dtype=np.uint8) % 10
        pixels = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, target in zip(pixels, targets, strict=True):
            image[2 * target : 2 * target + 8] = 255
        for name, array in zip(fashion_mnist.FILES[split], (pixels, targets), strict=True):
            (folder / name).write_bytes(idx_bytes(array))
    return folder


@pytest.fixture(scope="module")
def preset(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    path.write_text(PRESET.replace("[model]", f'root = "{images}"\n[model]'))
    return str(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, preset):
    """The output folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(2)  # as in each test; another number rounds otherwise
    assert main(["train", preset, "--out", str(out)]) == 0
    return out


@pytest.fixture
def command(preset, capsys):
    """Run `gradaug train` on the tiny preset: (exit status, output, error output)."""

    def call(*arguments, preset=preset):
        status = main(["train", preset, *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def no_curves(monkeypatch):
    """Drawing takes most of a tiny run's time; `whole` has drawn them."""
    monkeypatch.setattr(run, "write_curves", lambda *arguments: None)


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


def assert_same_run(out, other):
    """Everything but the time that it took is equal, bit by bit."""
    first, second = checkpoint(out), checkpoint(other)
    for state in (first, second):
        state.pop("seconds")
        for row in state["history"]:
            row.pop("seconds")
            row.pop("cpu_seconds")
            row.pop("images_per_second")
    assert_same(first, second)


# ---- a run


def test_a_run_leaves_its_files(whole):
    assert {path.name for path in whole.iterdir()} == set(FILES)

    summary = json.loads((whole / "summary.json").read_text())
    assert list(summary["widths"]) == ["0.5", "1.0"]
    assert summary["widths"]["1.0"] == summary["top1"]
    assert (summary["seed"], summary["epochs"], summary["evaluated_on"]) == (3, 3, "test")
    assert summary["seconds"] > 0
    assert summary["images_per_second"] > 0

    rows = list(csv.DictReader((whole / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["eval_top1"]) == summary["top1"]
    assert all(float(row[f"loss_{name}"]) > 0 for row in rows for name in ("full", "subnet_1", "subnet_2"))
    assert float(rows[2]["loss_full"]) < float(rows[0]["loss_full"])

    with Image.open(whole / "curves.png") as curves:
        assert curves.width > 1200
        assert len(curves.convert("L").getcolors()) > 50


def test_a_run_tells_what_it_does(command, no_curves, tmp_path):
    status, output, _ = command("--out", tmp_path / "out", "--epochs", 1)
    assert status == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for text in ("48 training and 20 test images", "epoch 1/1  loss ", "width 0.5", f"{summary['top1']:.2f} %"):
        assert text in output


def test_the_checkpoint_is_the_evaluated_network(whole, images):
    state, summary = checkpoint(whole), json.loads((whole / "summary.json").read_text())
    options = {key: value for key, value in state["config"]["model"].items() if key != "name"}
    model = gk.convert(models.build_model("cifar_resnet", 10, 1, **options))
    model.load_state_dict(state["model"])
    loader = fashion_mnist.fashion_mnist(images).test.loader(7)
    for width, top1 in summary["widths"].items():
        with gk.use_width(model, float(width)):
            assert run.evaluate(model, loader)[1] == pytest.approx(top1)


def test_the_resolved_configuration_repeats_the_run(command, no_curves, tmp_path):
    command("--out", tmp_path / "a", "--epochs", 1, "--set", "gradaug.min_width=0.7")
    status, *_ = command("--out", tmp_path / "b", preset=str(tmp_path / "a" / "config.toml"))
    assert status == 0
    assert tomllib.loads((tmp_path / "a" / "config.toml").read_text())["gradaug"]["min_width"] == 0.7
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_another_seed_is_another_run(command, no_curves, tmp_path):
    command("--out", tmp_path / "a", "--epochs", 1)
    command("--out", tmp_path / "b", "--epochs", 1, "--seed", 4)
    a, b = (checkpoint(tmp_path / name)["model"]["layer1.0.conv1.weight"] for name in "ab")
    assert not torch.equal(a, b)


def test_plain_training_bf16_and_held_out_images(command, no_curves, tmp_path):
    out = tmp_path / "out"
    settings = ("gradaug.num_subnets=0", "train.precision=bf16", "data.holdout=12", "train.channels_last=false")
    status, output, _ = command("--out", out, "--epochs", 1, *(word for text in settings for word in ("--set", text)))
    assert status == 0
    assert "36 training and 12 held-out images" in output
    header, row = csv.reader((out / "metrics.csv").open())
    assert [name for name in header if name.startswith("loss")] == ["loss_full"]
    assert math.isfinite(float(row[header.index("loss_full")]))
    assert json.loads((out / "summary.json").read_text())["evaluated_on"] == "held-out"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_by_name(command, no_curves, tmp_path, sampler):
    settings = (f"gradaug.sampler={sampler}", "gradaug.min_width=0.5")
    words = [word for text in settings for word in ("--set", text)]
    assert command("--out", tmp_path / "out", "--epochs", 1, *words)[0] == 0
    assert command("--out", tmp_path / "out", "--epochs", 1, "--resume", *words)[0] == 0


@pytest.mark.parametrize("sampler", ["width", "layer_width"])
def test_random_channels_by_name(command, no_curves, tmp_path, sampler):
    weights = {}
    for channels in ("first", "random"):
        settings = (f"gradaug.sampler={sampler}", f"gradaug.channels={channels}", "gradaug.min_width=0.5")
        words = (word for text in settings for word in ("--set", text))
        assert command("--out", tmp_path / channels, "--epochs", 1, *words)[0] == 0
        weights[channels] = checkpoint(tmp_path / channels)["model"]["layer1.0.conv1.weight"]
    assert not torch.equal(weights["first"], weights["random"])


# ---- stopping and going on


@pytest.fixture
def ctrl_c_interrupts():
    """As in a terminal; a shell starts its background jobs with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(command, whole, no_curves, tmp_path, monkeypatch, stop):
    steps, call = [], gk.GradAug.__call__

    def stopped(self, *arguments):
        steps.append(1)
        if len(steps) == 5:  # in the second of the epochs of three steps
            os.kill(os.getpid(), stop)
        return call(self, *arguments)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(gk.GradAug, "__call__", stopped)
        status, _, error = command("--out", out)
    assert status == 130
    assert error == f"gradaug: interrupted; --resume --out {out} goes on after the last complete epoch\n"
    assert checkpoint(out)["epoch"] == 1
    assert {path.name for path in out.iterdir()} == {"config.toml", "checkpoint.pt", "metrics.csv"}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    status, output, _ = command("--out", out, "--resume")
    assert status == 0
    assert "epoch 1/3" not in output
    assert "epoch 2/3" in output
    assert_same_run(whole, out)
    metrics = [list(csv.DictReader((path / "metrics.csv").open())) for path in (whole, out)]
    assert [row["loss_subnet_2"] for row in metrics[0]] == [row["loss_subnet_2"] for row in metrics[1]]


def test_a_finished_run_is_only_reported_again(command, no_curves, tmp_path):
    out = tmp_path / "out"
    command("--out", out, "--epochs", 1)
    before = json.loads((out / "summary.json").read_text())
    (out / "summary.json").unlink()
    status, output, _ = command("--out", out, "--epochs", 1, "--resume")
    assert status == 0
    assert "epoch 1/1" not in output
    assert json.loads((out / "summary.json").read_text())["widths"] == before["widths"]


def test_resuming_needs_the_same_settings(command, no_curves, tmp_path):
    out = tmp_path / "out"
    assert command("--out", out, "--resume")[0::2] == (
        2, f"gradaug: error: --resume must find a checkpoint, got none in {out}\n"
    )  # fmt: skip
    command("--out", out, "--epochs", 1)
    status, _, error = command("--out", out, "--epochs", 1, "--resume", "--set", "optimizer.lr=0.2")
    assert status == 2
    assert error == "gradaug: error: a resumed run must keep its settings, optimizer.lr = 0.05, got 0.2\n"
    (out / "checkpoint.pt").write_bytes(b"not a checkpoint")
    status, _, error = command("--out", out, "--epochs", 1, "--resume")
    assert status == 2
    assert "checkpoint.pt must be a checkpoint, got a file that is damaged or none" in error


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(command, tmp_path, monkeypatch):
    out = tmp_path / "out"
    status, _, error = command("--out", out, "--set", "optimizer.lr=1e18")
    assert status == 2
    assert error.startswith("gradaug: error: loss, gradient and statistics must be finite, got ")
    assert error.endswith(f"in epoch 1; {out}/checkpoint.pt keeps the state after epoch 0\n")
    assert all(value.isfinite().all() for value in checkpoint(out)["model"].values())

    steps, call = [], gk.GradAug.__call__

    def spoilt(self, images, targets):
        steps.append(1)
        return call(self, images * math.nan if len(steps) > 3 else images, targets)

    monkeypatch.setattr(gk.GradAug, "__call__", spoilt)
    status, _, error = command("--out", out, "--overwrite")
    assert status == 2
    assert error.endswith(f"got nan as loss_full in epoch 2; {out}/checkpoint.pt keeps the state after epoch 1\n")
    assert checkpoint(out)["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint(out)["model"].values())


def test_an_output_folder_with_files_is_refused(command, no_curves, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "summary.json").write_text("{}")
    status, _, error = command("--out", out, "--epochs", 1)
    assert status == 2
    expected = f"output folder must be new or empty, got {out}; --resume goes on, --overwrite starts anew"
    assert error == f"gradaug: error: {expected}\n"
    assert (out / "summary.json").read_text() == "{}"
    status, _, error = command("--out", out, "--resume", "--overwrite")
    assert (status, error) == (2, "gradaug: error: one of --resume and --overwrite must be given, got both\n")
    status, _, error = command("--out", out / "notes.txt")
    assert (status, error) == (2, f"gradaug: error: output must be a folder, got the file {out}/notes.txt\n")

    assert command("--out", out, "--epochs", 1, "--overwrite")[0] == 0
    assert json.loads((out / "summary.json").read_text())["epochs"] == 1
    assert (out / "notes.txt").read_text() == "mine"


def test_overwrite_removes_nothing_when_the_new_run_cannot_start(command, whole, tmp_path):
    assert command("--out", whole, "--overwrite", "--data", tmp_path)[0] == 2
    assert {path.name for path in whole.iterdir()} == set(FILES)


def test_an_interruption_leaves_the_previous_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted():
        with complete_file(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- presets and settings


@pytest.mark.parametrize("name", preset_names())
def test_presets(name):
    config = load_config(name)
    assert config.preset == name
    with torch.device("meta"):
        model = build_network(config, 10, 1 if config.data.name == "fashion-mnist" else 3)
    build_step(config, model, build_optimizer(config, model), fashion_mnist.fashion_mnist(source="embedded"))


def test_published_settings():
    config = load_config("imagenet-resnet50")
    assert (config.gradaug.num_subnets, config.gradaug.min_width) == (3, 0.9)
    assert config.gradaug.resolutions == (224, 192, 160, 128)
    assert (config.train.epochs, config.train.batch_size, config.optimizer.lr) == (120, 256, 0.2)
    assert config.optimizer.weight_decay == 1e-4
    config = load_config("cifar100-wrn-28-10")
    assert (config.gradaug.num_subnets, config.gradaug.min_width) == (3, 0.8)
    assert config.gradaug.resolutions == (32, 28, 24)
    assert (config.train.epochs, config.train.batch_size, config.optimizer.lr) == (200, 128, 0.1)
    assert config.optimizer.weight_decay == 5e-4
    assert config.optimizer.nesterov


def test_a_configuration_survives_its_file(tmp_path):
    settings = {"data.root": 'a "b"\\c', "evaluate.widths": [0.8, 1], "optimizer.weight_decay": 1e-5}
    config = load_config("cifar100-wrn-28-10", settings)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load_config(str(path)) == config
    assert config.evaluate.widths == (0.8, 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs=3", ("train.epochs", 3)),
        ("optimizer.lr = 1e-2", ("optimizer.lr", 0.01)),
        ("gradaug.resolutions=[32, 24]", ("gradaug.resolutions", [32, 24])),
        ("train.channels_last=false", ("train.channels_last", False)),
        ("schedule.name=step", ("schedule.name", "step")),
        ("data.root=/a=b", ("data.root", "/a=b")),
    ],
)
def test_settings_on_the_command_line(text, expected):
    assert parse_setting(text) == expected


def test_schedules():
    def factors(iterations, **settings):
        settings = {f"{key.replace('__', '.')}": value for key, value in settings.items()}
        factor = _schedule(load_config("quickstart", settings), iterations_per_epoch=10)
        return [factor(iteration) for iteration in iterations]

    cosine = {"train__epochs": 20, "schedule__warmup_epochs": 0}
    assert factors((0, 100, 200), **cosine) == pytest.approx([1, 0.5, 0])
    assert factors((0, 9), train__epochs=20, schedule__warmup_epochs=1) == pytest.approx([0.1, 1])
    step = cosine | {"schedule__name": "step", "schedule__milestones": [10, 15]}
    assert factors((0, 99, 100, 149, 150, 199), **step) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("train",), "the following arguments are required: PRESET"),
        (("train", "quickstat"), 'unknown preset "quickstat"; the nearest is "quickstart"'),
        (("train", "nowhere.toml"), "preset must be a name or an existing TOML file, got nowhere.toml"),
        (("train", "quickstart", "--epochs", "few"), "argument --epochs: invalid int value: 'few'"),
        (("train", "quickstart", "--epochs", "0"), "train.epochs must be at least 1, got 0"),
        (("train", "quickstart", "--seed", "-1"), "train.seed must be at least 0, got -1"),
        (("train", "quickstart", "--device", "tpu"), 'train.device must be "auto", "cpu" or "cuda", got "tpu"'),
    ],
)
def test_bad_commands(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", f"gradaug: error: {message}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epochs", "--set must be given section.key=value, got epochs"),
        ("epochs=3", 'unknown key "epochs"; the nearest is "train.epochs"'),
        ("trian.epochs=3", 'unknown key "trian.epochs"; the nearest is "train.epochs"'),
        ("model.deph=20", 'unknown key "model.deph"; the nearest is "model.depth"'),
        ("data.lighting=0.2", 'unknown key "data.lighting"; the nearest is'),  # of image_folder, not of this data set
        ("model.name=cifar_resnt", 'unknown model "cifar_resnt"; the nearest is "cifar_resnet"'),
        ("data.name=fashion", 'unknown data set "fashion"; the nearest is "fashion-mnist"'),
        ("data.source=web", 'source must be "auto" or "embedded", got "web"'),
        ("model.depth=18", "depth must be 6n + 2 with n at least 1 (8, 14, 20, ..., 9998), got 18"),
        ("model.depth=8.0", "model.depth must be an integer, got 8.0"),
        ("train.epochs=true", "train.epochs must be an integer, got true"),
        ("optimizer.lr=fast", 'optimizer.lr must be a number, got "fast"'),
        ("train.channels_last=1", "train.channels_last must be true or false, got 1"),
        ("train.precision=fp16", 'train.precision must be "fp32" or "bf16", got "fp16"'),
        ("gradaug.resolutions=32", "gradaug.resolutions must be a list, got 32"),
        ("gradaug.resolutions=[32, 0]", "gradaug.resolutions must be sizes of at least 1 pixel, got [32, 0]"),
        ("gradaug.min_width=0", "gradaug.min_width must be in (0, 1], got 0.0"),
        ("gradaug.min_width=0.01", "width must leave at least 1 of 4 channels (be at least 0.125), got 0.01"),
        ("gradaug.channels=last", 'gradaug.channels must be "first" or "random", got "last"'),
        ("evaluate.widths=[0.5, 1.5]", "evaluate.widths must be widths in (0, 1], got [0.5, 1.5]"),
        ("schedule.name=step", 'schedule.milestones must be set for "step", and only for it, got []'),
        ("schedule.warmup_epochs=9", "schedule.warmup_epochs must be in [0, 3], got 9.0"),
        ("train.batch_size=49", "batch_size must be at most 48, the number of images, got 49"),
        ("data.holdout=48", "holdout must be between 1 and 47 training images, got 48"),
    ],
)
def test_bad_settings(command, tmp_path, setting, message):
    status, _, error = command("--out", tmp_path / "out", "--set", setting)
    assert status == 2
    assert error.startswith(f"gradaug: error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"gradaug.channels": "random", "gradaug.sampler": "depth"},
            'gradaug.channels must be "first" for the sampler "depth", got "random"',
        ),
        (
            {"gradaug.channels": "random", "gradaug.private_statistics": True},
            "gradaug.private_statistics must be false for random channels, got true",
        ),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config("quickstart", settings)


def test_bad_preset_files(tmp_path, capsys):
    path = tmp_path / "bad.toml"
    for text, message in (
        ("[train", f"{path} must be a TOML file, got: "),
        ("epochs = 3", f"{path} must hold keys in sections, got epochs outside of one"),
        ("[trian]\nepochs = 3", 'unknown section "trian"; the nearest is "train"'),
        ("[train]\nepocs = 3", 'unknown key "train.epocs"; the nearest is "train.epochs"'),
    ):
        path.write_text(text)
        assert main(["train", str(path), "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.startswith(f"gradaug: error: {message}")


def test_a_data_folder_without_images(command, tmp_path):
    for preset, message in (
        ("quickstart", "data folder must hold Fashion-MNIST's four IDX files, got"),
        ("cifar10-resnet110", "data folder must hold cifar-10-batches-py, undamaged, got"),
        ("imagenet-resnet50", "data folder must hold train/<class>/<image files>, got no folder"),
    ):
        status, _, error = command("--data", tmp_path, "--out", tmp_path / "out", preset=preset)
        assert status == 2
        assert error.startswith(f"gradaug: error: {message}")
        assert error.count("\n") == 1


def test_traceback_on_request(command, tmp_path):
    with pytest.raises(FileNotFoundError):
        command("--data", tmp_path, "--traceback")


# ---- info


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_tune_without_a_gpu(capsys):
    assert main(["tune"]) == 2
    assert "gradaug tune needs an NVIDIA GPU that torch can use, found none" in capsys.readouterr().err


def test_info_of_a_model(capsys):
    assert main(["info", "--json", "--model", "torchvision/resnet18"]) == 0
    info = json.loads(capsys.readouterr().out)
    chains = info["chains"]
    assert info["layers"][0] == {
        **{"name": "conv1", "kind": "FastSlimConv2d", "channels": [[3, 64], [3, 32]]},
        **{"is_sliced": True, "whole": ""},
    }
    assert chains["layer1.0.bn2"] == "batch_norm + add + relu"
    assert chains["layer2.0.downsample.1"] == "batch_norm"
    assert main(["info", "--model", "cifar_resnet"]) == 0
    table = capsys.readouterr().out
    assert "layer1.0.bn1" in table
    assert "64 -> 10  32 -> 10  its output leaves the network" in table
    assert main(["info", "--model", "cifar_resnt"]) == 2
    assert 'the nearest is "cifar_resnet"' in capsys.readouterr().err


def test_info_as_json_and_as_a_table(capsys):
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["torch"] == torch.__version__
    assert info["ops"].keys() >= {"slim_conv2d", "slim_linear", "slim_batch_norm"}
    assert all(set(served) == {"cpu", "cuda"} for served in info["ops"].values())
    assert main(["info"]) == 0
    table = capsys.readouterr().out
    for name, served in info["ops"].items():
        assert [name, served["cpu"], served["cuda"]] in [line.split() for line in table.splitlines()]
