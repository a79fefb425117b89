"""What the machine and the files can do to the commands: one sentence, exit status 2, and what was kept is intact.

docs/robustness.md is the table of it, and names these tests.
"""

import ast
import contextlib
import errno
import gzip
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gradaug_kernels as gk
from gradaug_kernels import data
from gradaug_kernels.cli.main import main
from gradaug_kernels.data import _idx, fashion_mnist, image_data, image_folder
from gradaug_kernels.data._idx import idx_bytes, read_idx
from gradaug_kernels.recipes.config import parse_setting, to_toml
from gradaug_kernels.train import load_config, run
from gradaug_kernels.train.folder import FILES, claim_folder, read_checkpoint, write_checkpoint

ROOT = Path(__file__).parents[2]
PRESET = """
preset = "tiny"
[data]
root = "{root}"
[model]
depth = 8
base_width = 2
stem_stride = 4
[gradaug]
num_subnets = 1
min_width = 0.5
[train]
epochs = 2
batch_size = 10
device = "cpu"
[evaluate]
widths = [1.0]
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A preset of a run that takes a tenth of a second: 20 + 10 images, two epochs of two steps."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        arrays = rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
        for name, array in zip(fashion_mnist.FILES[split], arrays, strict=True):
            (folder / name).write_bytes(idx_bytes(array))
    path = folder / "tiny.toml"
    path.write_text(PRESET.format(root=folder))
    return str(path)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(run, "write_curves", lambda *arguments: None)


@pytest.fixture
def command(preset, capsys):
    """Run `gradaug train` on the tiny preset: (exit status, output, error output)."""

    def call(*arguments, preset=preset):
        status = main(["train", preset, *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory, preset):
    """The output folder of a whole run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    torch.set_num_threads(2)  # as in each test
    assert main(["train", preset, "--out", str(out)]) == 0
    return out


@pytest.fixture
def stopped(finished, tmp_path):
    """A run that stopped after its whole training, of which the checkpoint and the settings are left."""
    out = tmp_path / "stopped"
    out.mkdir()
    for name in ("checkpoint.pt", "config.toml"):
        (out / name).write_bytes((finished / name).read_bytes())
    return out


def assert_refused(result, *words):
    """Exit status 2 and one printable sentence that has the words."""
    status, _, error = result
    assert status == 2
    assert error.startswith("gradaug: error: ")
    assert error.count("\n") == 1
    assert error.removesuffix("\n").isprintable()
    for word in words:
        assert word in error


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def assert_same_weights(out, other):
    ours, theirs = weights(out), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@contextlib.contextmanager
def at_step(number, action):
    """Inside, `action` runs before that step of all steps, counted from 1."""
    steps, call = [], gk.GradAug.__call__

    def patched(self, *arguments, **options):
        steps.append(1)
        if len(steps) == number:
            action()
        return call(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gk.GradAug, "__call__", patched)
        yield


# ---- checkpoints


def test_a_flipped_bit_is_noticed_or_changes_nothing(finished, tmp_path):
    raw = (finished / "checkpoint.pt").read_bytes()
    whole, path, noticed = weights(finished), tmp_path / "checkpoint.pt", 0
    for position in np.random.default_rng(0).integers(0, len(raw), 60).tolist():
        flipped = bytearray(raw)
        flipped[position] ^= 16
        path.write_bytes(flipped)
        try:
            read = read_checkpoint(path)["model"]
        except ValueError:
            noticed += 1
        else:
            assert all(torch.equal(read[name], whole[name]) for name in whole), position
    assert noticed > 30


def test_an_entry_marked_as_a_folder_is_noticed(finished, tmp_path):
    """One bit of the zip's directory, and torch.load gives a tensor whatever its memory held."""
    with zipfile.ZipFile(finished / "checkpoint.pt") as archive:
        position, entries = archive.start_dir, len(archive.infolist())
    raw, path = (finished / "checkpoint.pt").read_bytes(), tmp_path / "checkpoint.pt"
    for _ in range(entries):
        flipped = bytearray(raw)
        flipped[position + 38] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="damaged or none: an entry marked as a folder"):
            read_checkpoint(path)
        position += 46 + sum(struct.unpack_from("<HHH", raw, position + 28))  # name, extra field, comment


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def hostile(path, content):
    """A checkpoint whose pickle is `content`, with checksums that are right."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("checkpoint/data.pkl", content)
        archive.writestr("checkpoint/version", "3\n")
        archive.writestr("checkpoint/byteorder", "little")


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("checkpoint/data.pkl", bytes(10_000_000))


def link_to_itself(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path)


NO_CHECKPOINTS = {
    "no bytes": (lambda path: path.write_bytes(b""), "damaged or none"),
    "half of it": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "damaged or none"),
    "text": (lambda path: path.write_text("weights"), "damaged or none"),
    "a zip bomb": (bomb, "compressed entries"),
    "a pickle that runs code": (lambda path: hostile(path, pickle.dumps(Evil())), "torch.load cannot read"),
    "no pickle": (lambda path: hostile(path, b"\x80\x02\xff\xff"), "torch.load cannot read"),
    "a list": (lambda path: torch.save([1], path), "format 1, got None"),
    "another format": (lambda path: torch.save({"format": 2}, path), "format 1, got 2"),
    "a link to itself": (link_to_itself, "checkpoint"),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_files_that_are_no_checkpoint(command, stopped, capsys, monkeypatch, kind):
    monkeypatch.chdir(stopped)
    make, words = NO_CHECKPOINTS[kind]
    make(stopped / "checkpoint.pt")
    if kind != "a link to itself":  # which --resume takes for none
        assert_refused(command("--out", stopped, "--resume"), words)
    assert_refused((main(["eval", str(stopped / "checkpoint.pt")]), *capsys.readouterr()), words)
    assert not (stopped / "evil").exists()


def test_a_checkpoint_that_is_a_folder(command, stopped):
    (stopped / "checkpoint.pt").unlink()
    (stopped / "checkpoint.pt").mkdir()
    assert_refused(command("--out", stopped, "--resume"), "a checkpoint must be at", "got no file")


def spoil(keys, value=None):
    """Sets, or without a value removes, state[keys[0]][keys[1]]..."""

    def spoil(state):
        *path, last = keys
        for key in path:
            state = state[key]
        if value is None:
            del state[last]
        else:
            state[last] = value(state[last]) if callable(value) else value

    return spoil


def private_statistics(**changed):
    """Adds a norm's statistics of width 0.5, with `changed` in place of its own, None for one that is missing."""

    def add(state):
        model = state["model"]
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value = changed.get(name, model[f"{NORM}.{name}"])
            if value is not None:
                model[f"{NORM}.{name}_0_5"] = value

    return add


NORM = "layer1.0.bn1"
WEIGHT, MOMENTUM = "layer1.0.conv1.weight", ("optimizer", "state", 0, "momentum_buffer")
ILL_FORMED = {
    **{f"no {key}": (spoil([key]), key) for key in ("preset", "config", "epoch", "model", "optimizer", "gradaug")},
    **{f"no {key}": (spoil([key]), key) for key in ("scheduler", "history", "seconds")},
    "an epoch that is true": (spoil(["epoch"], True), "epoch must be of type int"),
    "a configuration of another version": (spoil(["config", "train", "speed"], 3), 'unknown key "train.speed"'),
    "a section that is a number": (spoil(["config", "train"], 3), "train must be a section of keys, got 3"),
    "no weight": (spoil(["model", WEIGHT]), f"got no {WEIGHT}"),
    "one weight more": (spoil(["model", "other"], torch.ones(1)), "configuration describes, got also other"),
    "a key that is a number": (spoil(["model", 3], torch.ones(1)), "configuration describes, got also 3"),
    "a list that is one too many": (spoil(["model", "other"], [1]), "model.other must be a tensor, got list"),
    "a list for statistics": (spoil(["model", f"{NORM}.running_mean"], [1.0]), "got list"),
    "a variance that is NaN": (spoil(["model", f"{NORM}.running_var"], lambda v: v * float("nan")), "must be finite"),
    "a negative variance": (
        spoil(["model", f"{NORM}.running_var"], lambda v: -v),
        f"got: {NORM}.running_var must not be negative, got -",
    ),
    "a private statistic of another size": (
        private_statistics(running_mean=torch.zeros(3)),
        f"got: size mismatch for {NORM}.running_mean_0_5: ",
    ),
    "a private statistic that is a list": (private_statistics(running_var=[1.0]), "running_var_0_5 must be a tensor"),
    "no private mean": (private_statistics(running_mean=None), f"got no {NORM}.running_mean_0_5"),
    "no private count": (private_statistics(num_batches_tracked=None), "got also "),
    "another shape": (
        spoil(["model", WEIGHT], torch.ones(3)),
        "must be torch.float32 [2, 2, 3, 3], got torch.float32 [3]",
    ),
    "another dtype": (spoil(["model", WEIGHT], lambda w: w.half()), "got torch.float16 [2, 2, 3, 3]"),
    "a list for a weight": (spoil(["model", WEIGHT], [1]), "got list"),
    "a weight that is NaN": (spoil(["model", WEIGHT], lambda w: w * float("nan")), "must be finite"),
    "no momentum": (spoil(MOMENTUM), "optimizer's state 0"),
    "momentum of another shape": (spoil(MOMENTUM, torch.ones(3)), "momentum_buffer must be torch.float32"),
    "momentum of a parameter too many": (spoil(["optimizer", "state", 99], {}), "got one of 99"),
    "no groups": (spoil(["optimizer", "param_groups"]), "optimizer must have param_groups"),
    "groups that are a number": (
        spoil(["optimizer", "param_groups"], 3),
        "optimizer must have param_groups, of type list",
    ),
    "a group that is a number": (spoil(["optimizer", "param_groups", 0], 3), "a group must have params, of type list"),
    "a state that is a list": (spoil(["optimizer", "state"], [1]), "optimizer must have state, of type dict"),
    "a rate that is text": (spoil(["optimizer", "param_groups", 0, "lr"], "0.1"), "must have lr, of type float"),
    "no iteration": (spoil(["scheduler", "last_epoch"]), "must have last_epoch, of type int"),
    "another iteration": (spoil(["scheduler", "last_epoch"], 3), "2 epochs must be 4 iterations"),
    "another generator": (spoil(["gradaug", "generator"], torch.zeros(5056, dtype=torch.uint8)), "gradaug"),
    "no generator": (spoil(["gradaug", "generator"]), "gradaug must have the keys of this run, got no generator"),
    "a row too few": (spoil(["history", 1]), "history must have 2 rows"),
    "no column": (spoil(["history", 1, "lr"]), "row 2 of the history must have the columns"),
    "a column that is text": (spoil(["history", 0, "lr"], "fast"), "row 1 of the history must hold numbers"),
    "no seconds in a row": (spoil(["history", 0, "seconds"], 0.0), "row 1 of the history must hold numbers"),
}


@pytest.mark.parametrize("kind", ILL_FORMED)
def test_ill_formed_checkpoints(command, stopped, kind):
    path = stopped / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    make, words = ILL_FORMED[kind]
    make(state)
    torch.save(state, path)
    before = path.read_bytes()
    assert_refused(command("--out", stopped, "--resume"), str(path), words)
    assert path.read_bytes() == before
    assert {entry.name for entry in stopped.iterdir()} == {"checkpoint.pt", "config.toml"}


@pytest.mark.parametrize("kind", [kind for kind in ILL_FORMED if "private" in kind or "variance" in kind])
def test_evaluation_of_ill_formed_statistics(stopped, capsys, kind):
    path = stopped / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    make, words = ILL_FORMED[kind]
    make(state)
    torch.save(state, path)
    assert_refused((main(["eval", str(path)]), *capsys.readouterr()), str(path), words)
    assert not (stopped / "evaluation").exists()


def test_evaluation_of_another_networks_weights(stopped, capsys):
    path = stopped / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["config"]["model"]["depth"] = 14
    torch.save(state, path)
    assert_refused((main(["eval", str(path)]), *capsys.readouterr()), str(path), "got no layer1.1")
    assert not (stopped / "evaluation").exists()


def test_nothing_that_is_not_finite_is_kept(command, tmp_path, monkeypatch):
    steps, call = [], gk.GradAug.__call__

    def spoilt_by_the_last_update(self, *arguments):
        losses = call(self, *arguments)
        steps.append(1)
        if len(steps) == 4:
            self.optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))
        return losses

    monkeypatch.setattr(gk.GradAug, "__call__", spoilt_by_the_last_update)
    result = command("--out", tmp_path / "out")
    assert_refused(result, "weights must be finite", "keeps the state after epoch 1")
    assert read_checkpoint(tmp_path / "out" / "checkpoint.pt")["epoch"] == 1
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())


# ---- the machine


def test_a_full_disk_keeps_the_last_checkpoint(command, finished, tmp_path):
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():  # to the system a file that may not grow is as a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with at_step(3, fill):
            result = command("--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_refused(result, f"{out}/checkpoint.pt must be writable, got: File too large; the previous one stays")
    assert read_checkpoint(out / "checkpoint.pt")["epoch"] == 1
    assert not list(out.glob(".*"))
    assert command("--out", out, "--resume")[0] == 0
    assert_same_weights(out, finished)


def test_a_disk_that_is_full_from_the_start(tmp_path):
    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", lambda *arguments, **options: Full())
        with pytest.raises(OSError, match="must be writable, got: No space left on device; none was there before"):
            write_checkpoint(tmp_path / "checkpoint.pt", model={"w": torch.ones(100_000)})
    assert not list(tmp_path.iterdir())


def cuda_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def python_memory():
    raise MemoryError


@pytest.mark.parametrize("exhaust", [lambda: torch.empty(2**48), cuda_memory, python_memory])
def test_no_memory_left(command, tmp_path, exhaust):
    with at_step(3, exhaust):
        result = command("--out", tmp_path / "out")
    assert_refused(result, "memory must suffice (smaller batches need less), got: ")
    assert read_checkpoint(tmp_path / "out" / "checkpoint.pt")["epoch"] == 1


def test_errors_of_the_package_keep_their_traceback(command, images, tmp_path, monkeypatch):
    def wrong(*arguments):
        raise RuntimeError("shape '[2]' is invalid for input of size 3")

    with at_step(1, wrong), pytest.raises(RuntimeError, match="is invalid for input"):
        command("--out", tmp_path / "out")
    monkeypatch.setattr(image_folder, "read_image", wrong)
    words = [word for setting in ("data.workers=1", "train.batch_size=2") for word in ("--set", setting)]
    with pytest.raises(RuntimeError, match="is invalid for input"):
        command("--out", tmp_path / "other", "--data", images, "--set", "data.name=image_folder", *words)


def test_a_killed_data_loader(command, images, tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder, "read_image", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    settings = ("data.size=32", "data.workers=1", "train.batch_size=2")
    words = [word for setting in settings for word in ("--set", setting)]
    result = command("--out", tmp_path / "out", "--data", images, "--set", "data.name=image_folder", *words)
    assert_refused(result, "DataLoader worker")
    assert read_checkpoint(tmp_path / "out" / "checkpoint.pt")["epoch"] == 0


@pytest.mark.parametrize("out", ["/proc/gradaug", "/dev/null/out", "a\0b", "x" * 300])
def test_output_folders_that_cannot_be(command, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    assert_refused(command("--out", out))
    assert not list(tmp_path.iterdir())


def test_no_home_for_a_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(FileNotFoundError, match="a cache folder must be given by XDG_CACHE_HOME or HOME"):
        image_data.cache_folder()


# ---- stopping


def test_kills_lose_nothing_but_the_unfinished_epoch(finished, preset, tmp_path):
    """Children are killed at moments spread over a run; what goes on from what they left ends with the same weights."""
    code = """
import os, signal, sys, time
import torch
from gradaug_kernels.train import run
from gradaug_kernels.cli import main
preset, out = sys.argv[1:]
run.write_curves = lambda *arguments: None
def attempt(*options, seconds=0.0):
    start, child = time.monotonic(), os.fork()
    if child == 0:
        torch.set_num_threads(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends a process as SIGKILL does
        os._exit(main(["train", preset, *options]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - start
status, whole = attempt("--out", out + "-whole")
assert status == 0, status
killed = 0
for part in (0.4, 0.6, 0.9):
    options = ["--resume"] if os.path.isdir(out) else []
    killed += attempt("--out", out, *options, seconds=part * whole)[0] == -signal.SIGALRM
if not os.path.isdir(out): os.mkdir(out)
assert attempt("--out", out, "--resume")[0] == 0
print(killed)
"""
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", code, preset, str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2
    assert_same_weights(out, finished)
    assert not list(out.glob(".*"))


def test_a_kill_before_the_first_checkpoint(command, finished, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".config.toml.a1b2c3d4").write_text("half")
    assert command("--out", out, "--resume")[0] == 0
    (out / "checkpoint.pt").unlink()
    assert_refused(command("--out", out, "--resume", "--seed", 5), "must keep its settings, train.seed = 0, got 5")
    assert command("--out", out, "--resume")[0] == 0
    assert_same_weights(out, finished)
    (out / "checkpoint.pt").unlink()
    (out / "config.toml").unlink()
    assert_refused(command("--out", out, "--resume"), "--resume must find a checkpoint, got none")


def test_temporary_files_of_killed_runs_are_removed(command, stopped):
    ours = [f".{name}.abcd_123" for name in FILES]
    theirs = [".config.toml.swp", ".checkpoint.pt.backup", "notes.txt"]
    for name in (*ours, *theirs):
        (stopped / name).write_text("half")
    assert command("--out", stopped, "--resume")[0] == 0
    left = {path.name for path in stopped.iterdir()}
    assert left >= set(theirs)
    assert not left & set(ours)


def test_a_folder_is_of_one_process(command, stopped):
    temporary = stopped / ".checkpoint.pt.abcd1234"
    temporary.write_text("half of a live run's")
    reading, ready = os.pipe()
    other = os.fork()
    if other == 0:
        with claim_folder(stopped, []):
            os.write(ready, b"x")
            signal.pause()
    os.read(reading, 1)
    words = ("output folder must be of one process at a time", str(stopped))
    assert_refused(command("--out", stopped, "--resume"), *words)
    assert_refused(command("--out", stopped, "--overwrite"), *words)
    assert temporary.exists()
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert command("--out", stopped, "--resume")[0] == 0
    assert not temporary.exists()


def test_data_loaders_do_not_keep_a_killed_runs_folder(tmp_path):
    (reading, ready), (waiting, hold) = os.pipe(), os.pipe()
    killed = os.fork()
    if killed == 0:
        with claim_folder(tmp_path, []):
            if os.fork() == 0:  # as a data loader's process, which outlives the run by seconds
                os.write(ready, b"x")
                os.close(hold)
                os.read(waiting, 1)
                os._exit(0)
            signal.pause()
    os.read(reading, 1)
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    with claim_folder(tmp_path, []):
        os.close(hold)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_interrupt(command, tmp_path, number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with at_step(3, lambda: os.kill(os.getpid(), number)):
            status, _, error = command("--out", tmp_path / "out")
        assert status == 130
        assert error == f"gradaug: interrupted; --resume --out {tmp_path}/out goes on after the last complete epoch\n"
        assert signal.getsignal(number) == signal.SIG_DFL
        assert not list((tmp_path / "out").glob(".*"))
    finally:
        signal.signal(number, before)


def test_a_run_under_nohup_goes_on(command, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with at_step(3, lambda: os.kill(os.getpid(), signal.SIGHUP)):
            assert command("--out", tmp_path / "out")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- where output goes


@contextlib.contextmanager
def standard_output(file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        yield
    with contextlib.suppress(OSError):
        file.close()


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def test_output_that_nobody_reads(preset, tmp_path, capsys):
    with standard_output(closed_pipe()):
        assert main(["info"]) == 0
    assert capsys.readouterr().err == ""
    with standard_output(closed_pipe()):
        status = main(["train", preset, "--out", str(tmp_path / "out")])
    assert_refused((status, *capsys.readouterr()), "standard output must be read until the end, got a closed pipe")


def test_closed_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["info"]) == 0
    assert main(["train", "quickstat"]) == 2


def test_output_to_a_full_disk(capsys):
    with standard_output(open("/dev/full", "w")):
        status = main(["info"])
    assert_refused((status, *capsys.readouterr()), "No space left on device")


def test_a_terminal_without_unicode(capsys, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with standard_output(io.TextIOWrapper(buffer, "ascii")):
        monkeypatch.setattr(sys.modules[main.__module__], "format_info", lambda info: "70.00 ± 0.10 \udce9")
        assert main(["info"]) == 0
        assert buffer.getvalue() == b"70.00 \\xb1 0.10 \\udce9\n"


# ---- names and settings


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "..", "", "a/b", "a\\b", ".x", "a\nb", "a$b", "\x1b[31m", "x" * 101]
)
def test_presets_have_plain_names(command, preset, tmp_path, monkeypatch, name):
    path = tmp_path / "mine.toml"
    path.write_text(Path(preset).read_text().replace('"tiny"', json.dumps(name)))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    assert_refused(command(preset=str(path)), "preset must be a plain name")
    assert {entry.name for entry in tmp_path.rglob("*")} == {"mine.toml", "deep", "er"}


def test_a_file_gives_its_preset_a_plain_name(preset, tmp_path, monkeypatch):
    path = tmp_path / "a" / "mine.toml"
    path.parent.mkdir()
    path.write_text("[train]\nepochs = 1\n")
    monkeypatch.chdir(tmp_path / "a")
    assert load_config(str(path)).preset == load_config("mine.toml").preset == "mine"


def test_every_character_survives_the_configuration_file(tmp_path):
    text = "".join(map(chr, (*range(0x2100), 0xE000, 0xFEFF, 0x1F600))) + '"\\'
    config = load_config("quickstart", {"data.root": text})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(str(path)) == config
    with pytest.raises(ValueError, match=r"data\.root must be text that UTF-8 can hold"):
        load_config("quickstart", {"data.root": "a\udce9"})


def test_control_characters_are_escaped(command, tmp_path):
    result = command("--out", tmp_path / "out", "--data", tmp_path / "\x1b[31mred\x9b\n")
    assert_refused(result, "\\x1b[31mred\\x9b")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.lr=nan", "optimizer.lr must be a finite number of at most 1e+18, got nan"),
        ("optimizer.lr=inf", "optimizer.lr must be a finite number of at most 1e+18, got inf"),
        ("gradaug.temperature=1e300", "gradaug.temperature must be a finite number of at most 1e+18"),
        ("optimizer.lr=1" + 400 * "0", "optimizer.lr must be a number below 2^31, got one of 401 digits"),
        ("train.epochs=1" + 5000 * "0", "train.epochs must be an integer, got "),
        ("train.epochs=4294967296", "train.epochs must be a number below 2^31, got one of 10 digits"),
        ("train.seed=9223372036854775808", "train.seed must be a number below 2^63"),
        ("train.epochs=2\nx=3", 'train.epochs must be an integer, got "2\\nx=3"'),
        ("train.epochs=" + 5000 * "[", "train.epochs must be an integer, got "),
        ("evaluate.widths=[]", "evaluate.widths must be widths in (0, 1], got []"),
        ("evaluate.widths=[nan]", "each entry of evaluate.widths must be a finite number"),
        ("gradaug.num_subnets=100000", "gradaug.num_subnets must be from 0 to 1000, got 100000"),
        ("gradaug.resolutions=[2000000000]", "memory must suffice (smaller batches need less), got: "),
        ("data.workers=100000", "data.workers must be from 0 to 512, got 100000"),
        ("model.depth=600002", "depth must be 6n + 2 with n at least 1 (8, 14, 20, ..., 9998), got 600002"),
        ("train.device=cuda:99", "train.device must be"),
        ("schedule.gamma=-1", "schedule.gamma must be at least 0, got -1.0"),
    ],
)
def test_numbers_out_of_all_bounds(command, tmp_path, setting, message):
    assert_refused(command("--out", tmp_path / "out", "--set", setting), message)


def test_settings_given_twice(command, tmp_path):
    twice = ("--set", "optimizer.lr=0.1", "--set", "optimizer.lr=0.2")
    assert_refused(command("--out", tmp_path / "out", *twice), "--set must give a key once, got optimizer.lr twice")
    assert parse_setting("a.b=1\nc=2") == ("a.b", "1\nc=2")


COMPARISONS = {
    '[methods."../../x"]': "a method must be a plain name",
    "[methods]\nplain = 3": "must have sections [methods.NAME], got plain as a key",
    "methods = 3": "must hold keys in sections, got methods outside of one",
    "[compare]\nseeds = 3\n[methods.a]": "compare.seeds a list, got quickstart and 3",
    "[compare]\nseeds = [1, 1]\n[methods.a]": "seeds must be different integers, at least one, got [1, 1]",
    "[compare]\nseeds = []\n[methods.a]": "seeds must be different integers, at least one, got []",
    '[compare]\nseeds = ["1"]\n[methods.a]': "seeds must be different integers",
    "[compare]\npreset = 3\n[methods.a]": "compare.preset must be a name",
    "[methods.a]\ntrain = 3": 'unknown key "train"',
}


@pytest.mark.parametrize("text", COMPARISONS)
def test_ill_formed_comparisons(capsys, tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    status = main(["compare", str(path), "--out", str(tmp_path / "out")])
    assert_refused((status, *capsys.readouterr()), COMPARISONS[text])
    assert not (tmp_path / "out").exists()


def test_a_comparison_with_a_damaged_summary(preset, finished, tmp_path, capsys):
    path, out = tmp_path / "mine.toml", tmp_path / "out"
    path.write_text(f'[compare]\npreset = "{preset}"\nseeds = [0]\n[methods.a]\n')
    folder = out / "runs" / "a" / "2-epochs" / "seed-0"
    folder.parent.mkdir(parents=True)
    shutil.copytree(finished, folder)
    for name, content, message in (
        ("metrics.csv", "epoch\n1\n", "metrics.csv must have numbers in the column cpu_seconds"),
        ("summary.json", "{}", "summary.json must be a JSON object with top1"),
        ("summary.json", '{"top1": ', "summary.json must be a JSON file, got: "),
    ):
        (folder / name).write_text(content)
        assert_refused((main(["compare", str(path), "--out", str(out)]), *capsys.readouterr()), message)


def test_files_that_are_no_configuration(command, tmp_path):
    path = tmp_path / "mine.toml"
    for content in (b"\xff\xfe", b"a = " + 5000 * b"[", b"[train]\nepochs = " + 5000 * b"1", b"\0"):
        path.write_bytes(content)
        assert_refused(command(preset=str(path)), f"{path} must be a TOML file, got: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epsilons", "nan"), "epsilons positive, up to 255, got"),
        (("--seed", "-1"), "seed must be in [0, 2^32), got -1"),
        (("--workers", "100000"), "data.workers must be from 0 to 512"),
        (("--widths", "0.001"), "width must leave at least 1 of 2 channels"),
        (("--widths", "nan"), "must be a finite number"),
        (("--relative-to", "list.json"), "list.json must be a JSON object with corruptions"),
        (("--relative-to", "half.json"), "half.json must be a JSON file, got: "),
        (("--relative-to", "few.json"), "--relative-to must be alexnet or an evaluation.json with the errors of all"),
    ],
)
def test_ill_formed_evaluations(finished, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    Path("half.json").write_text('{"corruptions": ')
    Path("few.json").write_text('{"corruptions": {"errors": {"fog": []}}}')
    status = main(["eval", str(finished), "--out", "out", *arguments])
    assert_refused((status, *capsys.readouterr()), message)
    assert not Path("out").exists()


# ---- files of images


@pytest.fixture
def images(tmp_path):
    """A folder with two classes of three and of one image each."""
    root, rng = tmp_path / "images", np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 1)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40, 48, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def first_pixels(image, path, name="x.png", size=32, **options):
    """Pixel values in [0, 1], [3, size, size], of an image saved at `path` and read as a test image."""
    for part in ("train", "val"):
        (path / part / "a").mkdir(parents=True)
        image.save(path / part / "a" / name, **options)
    read, _ = data.load("image_folder", path, size=size).test[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (image_folder.MEAN, image_folder.STD))
    return read * std + mean


GREY = np.full((40, 40), 30000, np.uint16)
MODES = {
    "I;16": (Image.fromarray(GREY), "x.png", 30000 / 65535),
    "I;16 in TIFF": (Image.fromarray(GREY), "x.tif", 30000 / 65535),
    "I": (Image.fromarray(GREY.astype(np.int32)), "x.tif", 30000 / 65535),
    "16-bit PGM": (Image.fromarray(GREY.astype(np.int32)), "x.pgm", 30000 / 65535),
    "F": (Image.fromarray(np.full((40, 40), 0.25, np.float32)), "x.tif", 0.25),
    "L": (Image.new("L", (40, 40), 51), "x.png", 0.2),
    "1": (Image.new("1", (40, 40), 1), "x.png", 1.0),
    "LA": (Image.new("LA", (40, 40), (51, 255)), "x.png", 0.2),
    "RGBA, transparent": (Image.new("RGBA", (40, 40), (0, 0, 0, 0)), "x.png", 1.0),
    "RGBA, half": (Image.new("RGBA", (40, 40), (0, 0, 0, 128)), "x.png", 127 / 255),
    "CMYK": (Image.new("CMYK", (40, 40), (0, 0, 0, 204)), "x.tif", 0.2),
}


@pytest.mark.parametrize("mode", MODES)
def test_images_of_every_mode_keep_their_values(tmp_path, mode):
    image, name, value = MODES[mode]
    pixels = first_pixels(image, tmp_path, name=name)
    torch.testing.assert_close(pixels, torch.full_like(pixels, value), atol=0.003, rtol=0)


def test_a_palette_with_transparency_and_an_animation(tmp_path):
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 51, 51, 51])
    assert first_pixels(palette, tmp_path / "p", transparency=1).mean() == pytest.approx(1.0, abs=0.01)
    frames = [Image.new("L", (40, 40), 51), Image.new("L", (40, 40), 204)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert image_folder.read_image(tmp_path / "x.gif").getpixel((0, 0)) == (51, 51, 51)


def test_values_that_have_no_scale_are_refused(tmp_path):
    for values in (
        np.full((4, 4), 70000, np.int32),
        np.full((4, 4), 2, np.float32),
        np.full((4, 4), np.nan, np.float32),
    ):
        Image.fromarray(values).save(tmp_path / "x.tif")
        with pytest.raises(
            ValueError, match=r"every image file must be readable, got .*x.tif: values must be from 0 to"
        ):
            image_folder.read_image(tmp_path / "x.tif")


def test_images_are_turned_upright(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40] = 255
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left half comes to the top
    image.save(tmp_path / "x.jpg", exif=exif)
    upright = np.asarray(image_folder.read_image(tmp_path / "x.jpg"))
    assert upright.shape == (80, 40, 3)
    assert upright[:30].min() > 240
    assert upright[50:].max() < 15
    image.save(tmp_path / "x.jpg", exif=b"Exif\0\0damaged")
    assert image_folder.read_image(tmp_path / "x.jpg").size == (80, 40)


def pipe(path):
    os.mkfifo(path)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # names of sockets are short
        server.bind(path.name)


REFUSED = {
    "a pipe": (pipe, "every image must be a file, got a pipe, a socket or a device"),
    "a socket": (unix_socket, "every image must be a file, got a pipe, a socket or a device"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "got a link to no file"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere.png"), "got a link to no file"),
    "a link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "a link to its folder": (lambda path: path.symlink_to(path.parent), "no link in a data folder may lead back"),
    "a link to the classes": (lambda path: path.symlink_to(path.parents[1]), "no link in a data folder may lead back"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_and_links_that_are_refused(command, images, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make, message = REFUSED[kind]
    make(images / "train" / "a" / "z.png")
    settings = ("--set", "data.name=image_folder", "--set", "train.batch_size=2", "--set", "data.size=32")
    assert_refused(command("--out", tmp_path / "out", "--data", images, *settings), message, str(images))
    assert not (tmp_path / "out").exists()


UNREADABLE = {
    "text": lambda path: path.write_text("no image"),
    "no bytes": lambda path: path.write_bytes(b""),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "a folder's name": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
    "a bomb": lambda path: Image.new("1", (20_000, 20_000)).save(path),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_images_are_named(command, images, tmp_path, kind, workers):
    path = images / "train" / "a" / "1.png"
    UNREADABLE[kind](path)
    settings = ("data.name=image_folder", "train.batch_size=6", "data.size=32", f"data.workers={workers}")
    words = [word for setting in settings for word in ("--set", setting)]
    result = command("--out", tmp_path / "out", "--data", images, *words)
    assert_refused(result, f"every image file must be readable, got {path}: ")


def test_hidden_files_and_folders_are_no_images(images):
    for name in (".git", ".ipynb_checkpoints", "__MACOSX"):
        (images / "train" / name).mkdir()
        (images / "train" / "a" / name).mkdir()
        (images / "train" / name / "x.png").write_text("no image")
        (images / "train" / "a" / name / "x.png").write_text("no image")
    (images / "train" / "a" / "._0.png").write_text("no image")
    found = data.load("image_folder", images)
    assert found.classes == ("a", "b")
    assert [Path(path).name for path, _ in found.train.folder.samples] == 2 * ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("setting", ["size=0", "min_area=2.0", "min_area=0.0", "color_jitter=-1.0", "lighting=-1.0"])
def test_augmentations_out_of_range(images, setting):
    name, value = setting.split("=")
    with pytest.raises(ValueError, match="size must be at least 1, min_area in"):
        data.load("image_folder", images, **{name: type(data.find("image_folder").__kwdefaults__[name])(value)})


def test_quickstart_on_a_folder_of_images(images, tmp_path, capsys):
    settings = ("data.name=image_folder", "data.size=16", "train.batch_size=2", "model.depth=8", "model.base_width=5")
    words = [word for setting in settings for word in ("--set", setting)]
    out = tmp_path / "out"
    status = main(["train", "quickstart", "--data", str(images), "--epochs", "1", "--out", str(out), *words])
    assert status == 0, capsys.readouterr().err
    config = load_config(str(out / "config.toml"))
    assert "source" not in config.data.options
    assert config.gradaug.resolutions == (16, 14, 12)
    assert config.model.options["stem_stride"] == 2
    assert weights(out)["conv1.weight"].shape == (5, 3, 3, 3)
    other = load_config("quickstart", {"model.name": "wide_resnet"})
    assert other.model.options["depth"] == 28
    assert load_config("quickstart", {"data.name": "cifar10"}).gradaug.resolutions == (32, 28, 24)


# ---- compressed files


def test_a_file_is_unpacked_no_further_than_its_header_says(tmp_path, monkeypatch):
    path = tmp_path / "x.gz"
    packed = gzip.compress(idx_bytes(np.zeros(10, np.uint8)) + bytes(50_000_000))
    path.write_bytes(packed[:-1000])  # whoever unpacks all of it meets a truncated file
    with pytest.raises(ValueError, match="must hold 10 bytes after its header, got more"):
        read_idx(path)
    for shape in ((2**32 - 1, 2**32 - 1), (2**31,), (0, 28, 28)):
        path.write_bytes(gzip.compress(struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)))
        with pytest.raises(ValueError, match=rf"must state sizes of 1 to {_idx.LARGEST} bytes"):
            read_idx(path)


def test_damaged_compressed_files(tmp_path):
    path, packed = tmp_path / "x.gz", gzip.compress(idx_bytes(np.arange(200, dtype=np.uint8)), mtime=0)
    path.write_bytes(packed)
    assert read_idx(path).tolist() == list(range(200))
    for damaged in (packed[:40], packed[:-1], packed[:-6] + b"\0" + packed[-5:], packed + b"more", b"", b"\x1f\x8b"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} must be"):
            read_idx(path)


def test_a_damaged_cifar_archive(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(FileNotFoundError, match="must hold cifar-10-batches-py, undamaged"):
        data.load("cifar10", tmp_path)


# ---- the table


def test_every_row_of_the_table_names_tests_that_exist():
    lines = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|") and not line.startswith(("| fault |", "|---|"))]
    assert len(rows) >= 40
    tests = {}
    for row in rows:
        assert re.fullmatch(r"\|( .+ \|){3} `test_\w+::test_\w+`(, `test_\w+::test_\w+`)* \|", row), row
        for module, test in re.findall(r"`(test_\w+)::(test_\w+)`", row):
            if module not in tests:
                tree = ast.parse(next((ROOT / "tests").rglob(f"{module}.py")).read_text(encoding="utf-8"))
                tests[module] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert test in tests[module], f"{module}::{test}"
