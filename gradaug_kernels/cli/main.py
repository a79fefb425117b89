"""The command line: `gradaug train PRESET`, `gradaug eval`, `gradaug compare`, `gradaug info` and `gradaug tune`."""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

import gradaug_kernels as gk

from .._names import nearest, printable
from ..compare.run import compare, comparison_names, load_comparison
from ..evaluate import checkpoint as evaluation
from ..evaluate.measure import summary
from ..recipes.config import load_config, parse_setting, preset_names
from ..recipes.memory import keep_freed_blocks
from ..train.folder import CHECKPOINT, FILES
from ..train.report import table
from ..train.run import train
from . import tune
from .info import collect_conv_info, collect_info, format_conv_info, format_info
from .paths import DTYPES, SYNTAX, parse_convolution, parse_images

SHORTCUTS = {
    "data": "data.root",
    "fraction": "data.fraction",
    "per_class": "data.per_class",
    "seed": "train.seed",
    "epochs": "train.epochs",
    "device": "train.device",
}


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in the form of all others: one sentence, exit status 2."""

    def error(self, message):
        raise ValueError(message)


SENTENCES = (ValueError, OSError, FloatingPointError, ImportError)  # whose messages are written for the user
# In PyTorch's RuntimeErrors without a class of their own: no memory is left, or a data loader's process is gone.
ENVIRONMENT = (
    "can't allocate memory",
    "out of memory",
    "alloc_failed",
    "calculation overflowed",
    "dataloader worker (pid",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv). Returns: the exit status.

    0: done; 2: something in the input or the machine is wrong, and one sentence on stderr says what; 130: interrupted.
    Other exceptions are errors of this package, and propagate.
    """
    command = None
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):  # what a terminal's encoding lacks is escaped
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        with _signals_interrupt():
            if arguments[:1] == ["tune"]:  # has a parser of its own
                return tune.main(arguments[1:])
            command = _parser().parse_args(arguments)
            command.run(command)
            sys.stdout.flush()  # else the interpreter's end would meet what is wrong with the output
        return 0
    except KeyboardInterrupt:
        return _failed(130, f"interrupted{getattr(command, 'advice', '')}")
    except BrokenPipeError:
        if command is not None and command.run is _info:  # the reader, such as `head`, has seen enough
            return _failed(0)
        return _failed(2, "error: standard output must be read until the end, got a closed pipe")
    except Exception as error:
        if (command is not None and command.traceback) or not _expected(error):
            raise
        return _failed(2, f"error: {_sentence(error)}")


def _failed(status, sentence=None):
    """`status`, after the sentence on stderr; whatever cannot be written any more is dropped."""
    for stream, text in ((sys.stdout, None), (sys.stderr, sentence)):
        try:
            if text is not None:
                print(f"gradaug: {printable(text)}", file=stream)
            stream.flush()
        except (OSError, ValueError):  # a closed terminal or pipe, or a full disk
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def _expected(error):
    """Whether the input or the machine, not this package, is what went wrong."""
    if isinstance(error, (*SENTENCES, MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in ENVIRONMENT)


def _sentence(error):
    """The error's message on one line; of an error that a worker process passed on, what it said in the end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[-1] if "Traceback" in str(error) else " ".join(lines)
    if not isinstance(error, SENTENCES) and "worker" not in line:
        return f"memory must suffice (smaller batches need less), got: {line}"
    return line.removeprefix("ValueError: ")


@contextlib.contextmanager
def _signals_interrupt():
    """Inside, SIGTERM and a terminal that closes raise KeyboardInterrupt as Ctrl-C does, so that files are cleared up.

    A signal that is ignored, as by nohup, stays so.
    """

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _settings(texts):
    """{key: value} of --set. Raises: ValueError for one key with two values."""
    settings = {}
    for key, value in map(parse_setting, texts):
        if key in settings and settings[key] != value:
            raise ValueError(f"--set must give a key once, got {key} twice")
        settings[key] = value
    return settings


def _parser():
    parser = Parser(prog="gradaug", description="Train and inspect slimmable networks and GradAug.")
    parser.add_argument("--version", action="version", version=f"gradaug_kernels {gk.__version__}")
    parser.set_defaults(traceback=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    commands.add_parser("tune", help="measure on this GPU which kernel serves which shape, and keep the table")
    _add_eval(commands)
    _add_compare(commands)
    _add_info(commands)
    return parser


def _add_train(commands):
    train = commands.add_parser(
        "train",
        help="train a network as a preset says",
        description=f"Train a network as a preset says, and leave {', '.join(FILES)} in the output folder.",
    )
    train.add_argument("preset", metavar="PRESET", help=f"{', '.join(preset_names())}, or a TOML file")
    train.add_argument("--data", metavar="FOLDER", help="folder of the images (data.root)")
    train.add_argument("--out", metavar="FOLDER", help="output folder (default: runs/PRESET)")
    train.add_argument("--fraction", type=float, help="part of each class to train on, in (0, 1] (data.fraction)")
    train.add_argument("--per-class", type=int, help="images of each class to train on (data.per_class)")
    train.add_argument("--seed", type=int, help="seed of all draws (train.seed)")
    train.add_argument("--epochs", type=int, help="passes over the training images (train.epochs)")
    train.add_argument("--device", help='"auto", "cpu" or "cuda" (train.device)')
    train.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="any key of the preset, e.g. optimizer.lr=0.05"
    )
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    train.add_argument("--overwrite", action="store_true", help="remove an earlier run from the output folder")
    train.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    train.set_defaults(run=_train)


def _add_eval(commands):
    evaluate = commands.add_parser(
        "eval",
        help="measure a trained network: widths, corruptions, adversarial images, calibration",
        description="Measure the network of a checkpoint, and write tables and figures.",
    )
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint.pt of a run, or the run's folder")
    evaluate.add_argument("--out", metavar="FOLDER", help="output folder (default: evaluation beside the checkpoint)")
    evaluate.add_argument(
        "--parts", metavar="PART", nargs="+", default=[], help="some of: widths corruptions attacks calibration"
    )
    evaluate.add_argument(
        "--images", type=int, default=0, help="so many test images, chosen by the seed (default: all)"
    )
    evaluate.add_argument("--constants", default="auto", help="of the corruptions: auto, imagenet or cifar")
    evaluate.add_argument(
        "--epsilons", type=float, nargs="+", default=[], help="of the attacks, of 255 (default: 1 2 4 8 16)"
    )
    evaluate.add_argument("--pgd-steps", type=int, default=10, help="steps of PGD, of epsilon / 4 each (default: 10)")
    evaluate.add_argument("--widths", type=float, nargs="+", default=[], help="in place of the run's evaluate.widths")
    evaluate.add_argument(
        "--relative-to", metavar="FILE", default="", help="alexnet, or another network's evaluation.json"
    )
    evaluate.add_argument(
        "--seed", type=int, default=0, help="of the choice of images, the corruptions and PGD's start"
    )
    evaluate.add_argument("--data", metavar="FOLDER", default="", help="folder of the images, in place of the run's")
    evaluate.add_argument("--device", default="auto", help='"auto", "cpu" or "cuda"')
    evaluate.add_argument("--workers", type=int, default=0, help="processes that read and corrupt images")
    evaluate.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation")
    evaluate.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    evaluate.set_defaults(run=_eval)


def _add_compare(commands):
    comparison = commands.add_parser(
        "compare",
        help="train several methods with several seeds, at equal epochs and at equal compute",
        description="Train the methods of a comparison; write one table and one figure. Started again, it goes on.",
    )
    comparison.add_argument("comparison", metavar="COMPARISON", help=f"{', '.join(comparison_names())}, or a TOML file")
    comparison.add_argument("--out", metavar="FOLDER", help="output folder (default: runs/compare-COMPARISON)")
    comparison.add_argument("--seeds", type=int, nargs="+", default=[], help="in place of the comparison's")
    comparison.add_argument("--methods", nargs="+", default=[], help="only these of the comparison's")
    comparison.add_argument(
        "--robustness", metavar="IMAGES", type=int, default=0, help="corrupt and attack so many test images, too"
    )
    comparison.add_argument("--data", metavar="FOLDER", help="folder of the images (data.root)")
    comparison.add_argument("--epochs", type=int, help="of all methods at equal epochs (train.epochs)")
    comparison.add_argument("--device", help='"auto", "cpu" or "cuda" (train.device)')
    comparison.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="any key, for all methods that do not set it"
    )
    comparison.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    comparison.set_defaults(run=_compare)


def _add_info(commands):
    info = commands.add_parser(
        "info",
        help="show versions, device, build configuration, and the backend of each operator",
        description="Show versions, device, build configuration, and the backend of each operator on each device.",
    )
    info.add_argument("--json", action="store_true", help="as JSON")
    info.add_argument(
        "--model", metavar="NAME", help="show also what fuses in a model, e.g. torchvision/resnet50 or cifar_resnet"
    )
    info.add_argument(
        "--conv",
        metavar="CONV",
        help=f"show only who computes a convolution in each direction, and why others do not: {SYNTAX}, where an "
        "axis' option is one integer or two, such as 3x5, and the defaults are 1,0,1,1",
    )
    info.add_argument(
        "--full", metavar="C,O", help="with --conv: input and output channels at full width (default: those of CONV)"
    )
    info.add_argument(
        "--device", help='with --conv: "cpu", or "cuda" for the rule alone (default: what this machine has)'
    )
    info.add_argument(
        "--images", metavar="N,C,H,W", help="with --model: what its layers' paths are shown for (default: 32,3,224,224)"
    )
    info.add_argument("--dtype", default="float32", help=f"of the images: {', '.join(DTYPES)} (default: float32)")
    info.set_defaults(run=_info)


def _train(command):
    settings = _settings(command.set)
    for name, key in SHORTCUTS.items():
        if getattr(command, name) is not None:
            settings[key] = getattr(command, name)
    config = load_config(command.preset, settings)
    out = Path(command.out or f"runs/{config.preset}")
    keep_freed_blocks()
    command.advice = f"; --resume --out {out} goes on after the last complete epoch"
    train(config, out, resume=command.resume, overwrite=command.overwrite)


def _compare(command):
    if command.robustness < 0:
        raise ValueError(f"--robustness must be a number of images, got {command.robustness}")
    comparison = load_comparison(command.comparison)
    out = Path(command.out or f"runs/compare-{comparison.name}")
    settings = comparison.settings | _settings(command.set)
    for name in ("data", "epochs", "device"):
        if getattr(command, name) is not None:
            settings[SHORTCUTS[name]] = getattr(command, name)
    methods = comparison.methods
    for name in command.methods:
        if name not in methods:
            raise ValueError(nearest("method", name, methods))
    if command.methods:
        methods = {name: methods[name] for name in command.methods}
    seeds = tuple(command.seeds or comparison.seeds)
    comparison = dataclasses.replace(comparison, settings=settings, methods=methods, seeds=seeds)
    words = ["gradaug", "compare", command.comparison]
    for name in ("seeds", "methods"):
        words += [f"--{name}", *map(str, getattr(command, name))] if getattr(command, name) else []
    words += [f"--epochs {command.epochs}"] if command.epochs else []
    words += [f"--robustness {command.robustness}"] if command.robustness else []
    words += [f"--set {shlex.quote(setting)}" for setting in command.set]
    keep_freed_blocks()
    command.advice = "; the same command goes on after the last complete epoch"
    compare(comparison, out, " ".join(words), command.robustness)
    print((out / "table.md").read_text(encoding="utf-8"))


def _eval(command):
    path = Path(command.checkpoint)
    path = path / CHECKPOINT if path.is_dir() else path
    out = Path(command.out) if command.out else path.parent / "evaluation"
    found = evaluation.evaluate_checkpoint(
        path,
        out,
        parts=command.parts or evaluation.PARTS,
        images=command.images,
        constants=command.constants,
        epsilons=command.epsilons or evaluation.EPSILONS,
        pgd_steps=command.pgd_steps,
        widths=command.widths,
        relative_to=command.relative_to,
        seed=command.seed,
        data=command.data,
        device=command.device,
        workers=command.workers,
        overwrite=command.overwrite,
    )
    print(table([("top-1", f"{found['top1']:.2f} %"), *summary(found), ("output", str(out))]))


def _info(command):
    if command.dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {command.dtype}")
    if command.device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {command.device}")
    for option, needs in (("full", "conv"), ("device", "conv"), ("images", "model")):
        if getattr(command, option) is not None and getattr(command, needs) is None:
            raise ValueError(f"--{option} must come with --{needs}, got it alone")
    if command.conv is not None and command.model is not None:
        raise ValueError("--conv must come without --model, got both")
    if command.conv is not None:
        devices = [command.device] if command.device else ["cpu", *["cuda"] * torch.cuda.is_available()]
        info = collect_conv_info(parse_convolution(command.conv, command.full), command.dtype, devices)
    else:
        images = {} if command.images is None else {"images": parse_images(command.images)}
        info = collect_info(command.model, **images, dtype=command.dtype)
    formatted = format_info if command.conv is None else format_conv_info
    print(json.dumps(info, indent=2) if command.json else formatted(info))
