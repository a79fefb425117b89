"""The output folder of a run: what is in it, who may write to it, and files that are complete or absent."""

import contextlib
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from .config import Config, difference, from_tables, to_tables, to_toml

CHECKPOINT = "checkpoint.pt"
FILES = (CHECKPOINT, "config.toml", "metrics.csv", "curves.png", "summary.json")
FORMAT = 1  # of the checkpoint
FREE_ON_RESUME = ("data.root", "data.workers", "train.device")  # they do not change the result of a run


@contextlib.contextmanager
def complete_file(path: Path):
    """Yields a temporary path beside `path` and renames it to `path` when the block ends without an exception.

    A reader never sees half a file, and an interruption leaves the previous one.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def open_folder(out: Path, config: Config, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Make the output folder ready and write the resolved configuration into it.

    resume: go on from the checkpoint, which must be of the same configuration; overwrite: remove the files of an
    earlier run, and only those.
    Returns: the checkpoint to go on from, or None.
    Raises: FileExistsError when the folder is not empty and neither is asked for; ValueError when it cannot be resumed.
    """
    if resume and overwrite:
        raise ValueError("one of --resume and --overwrite must be given, got both")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"output must be a folder, got the file {out}")
    if resume:
        if not (out / CHECKPOINT).is_file():
            raise FileNotFoundError(f"--resume must find a checkpoint, got none in {out}")
        checkpoint = read_checkpoint(out / CHECKPOINT)
        key = difference(config, from_tables(checkpoint["preset"], checkpoint["config"]), FREE_ON_RESUME)
        if key is not None:
            section, name = key.split(".")
            was, now = (tables.get(section, {}).get(name) for tables in (checkpoint["config"], to_tables(config)))
            raise ValueError(f"a resumed run must keep its settings, {key} = {was}, got {now}")
        return checkpoint
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"output folder must be new or empty, got {out}; --resume goes on, --overwrite starts anew"
            )
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    with complete_file(out / "config.toml") as path:
        path.write_text(to_toml(config))
    return None


def write_checkpoint(path: Path, **content: Any) -> None:
    """Write a checkpoint that `torch.load(weights_only=True)` reads: tensors and plain values only."""
    with complete_file(path) as temporary:
        torch.save({"format": FORMAT, **content}, temporary)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote, onto the CPU.

    Raises: FileNotFoundError when there is none; ValueError when it is damaged or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"a checkpoint must be at {path}, got none")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        raise ValueError(f"{path} must be a checkpoint, got a file that torch.load cannot read") from None
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} must be a checkpoint of format {FORMAT}, got {found}")
    return checkpoint
