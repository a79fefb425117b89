"""The output folder of a run: what is in it, who may write to it, and files that are complete or absent."""

import contextlib
import errno
import fcntl
import json
import os
import re
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..recipes.config import Config, difference, from_tables, load_config, to_tables, to_toml
from .state import check_content

CHECKPOINT = "checkpoint.pt"
CONFIG = "config.toml"
FILES = (CHECKPOINT, CONFIG, "metrics.csv", "curves.png", "summary.json")
FORMAT = 1  # of the checkpoint
MARKS_A_FOLDER = 0x10  # among a zip entry's external attributes
FREE_ON_RESUME = ("data.root", "data.workers", "train.device")  # they do not change the result of a run

_claimed: set[int] = set()  # descriptors of the folders that this process has claimed
os.register_at_fork(after_in_child=lambda: [os.close(descriptor) for descriptor in _claimed])  # not for data loaders


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it to `path` when the block ends without an exception.

    A reader never sees half a file, and an interruption leaves the previous one. Raises: OSError naming `path` where it
    cannot be written, on a full disk for one.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        yield Path(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            kept = "the previous one stays" if path.is_file() else "none was there before"
            raise type(error)(f"{path} must be writable, got: {error.strerror}; {kept}") from error
        raise


@contextlib.contextmanager
def claim_folder(out: Path, files: Iterable[str], create: bool = True) -> Iterator[None]:
    """In the block this process is the only one that claims the folder `out`, which `create` makes.

    Temporary files of `files` that killed processes left in it are removed. Raises: BlockingIOError where another
    process has claimed it; FileExistsError and FileNotFoundError where it is no folder, or none to be made.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"output must be a folder, got the file {out}")
    if not create and not out.is_dir():
        raise FileNotFoundError(f"--resume must find a checkpoint, got none in {out}")
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    _claimed.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"output folder must be of one process at a time, got {out}, of another one"
            ) from None
        except OSError as error:  # some network file systems lock no folders
            if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        # As tempfile.mkstemp names them; an editor's .config.toml.swp is not ours.
        left = re.compile(rf"\.({'|'.join(map(re.escape, files))})\.[a-z0-9_]{{8}}")
        for path in out.iterdir():
            if left.fullmatch(path.name):
                path.unlink(missing_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also where a process just forked has not closed it yet
        _claimed.discard(descriptor)
        os.close(descriptor)


def open_folder(out: Path, config: Config, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Make the claimed output folder ready and write the resolved configuration into it.

    resume: go on from the checkpoint, which must be of the same configuration; a run that was killed before its first
    checkpoint starts anew. overwrite: remove the files of an earlier run, and only those.
    Returns: the checkpoint to go on from, or None.
    Raises: FileExistsError when the folder is not empty and neither is asked for; ValueError when it cannot be resumed.
    """
    if resume and overwrite:
        raise ValueError("one of --resume and --overwrite must be given, got both")
    present = {path.name for path in out.iterdir()}
    if resume and CHECKPOINT in present:
        checkpoint = read_checkpoint(out / CHECKPOINT)
        _check_same(config, stored_config(out / CHECKPOINT, checkpoint))
        return checkpoint
    if resume and CONFIG in present:
        _check_same(config, load_config(str(out / CONFIG)))
    elif resume and present:
        raise FileNotFoundError(f"--resume must find a checkpoint, got none in {out}")
    elif present and not overwrite:
        raise FileExistsError(
            f"output folder must be new or empty, got {out}; --resume goes on, --overwrite starts anew"
        )
    with complete_file(out / CONFIG) as path:
        path.write_text(to_toml(config), encoding="utf-8")
        for name in FILES:
            if name != CONFIG:
                (out / name).unlink(missing_ok=True)
    return None


def _check_same(config, earlier):
    key = difference(config, earlier, FREE_ON_RESUME)
    if key is not None:
        section, name = key.split(".")
        was, now = (to_tables(each)[section].get(name) for each in (earlier, config))
        raise ValueError(f"a resumed run must keep its settings, {key} = {was}, got {now}")


def read_json(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """A JSON file of an object with at least these keys. Raises: ValueError for another one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file, got: {error}") from None
    if not isinstance(found, dict) or not set(keys) <= found.keys():
        raise ValueError(f"{path} must be a JSON object with {', '.join(keys)}, got one without")
    return found


def write_checkpoint(path: Path, **content: Any) -> None:
    """Write a checkpoint that `torch.load(weights_only=True)` reads: tensors and plain values only."""
    with complete_file(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save({"format": FORMAT, **content}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # its writer meets the half file, and hides why it is half
                raise error.__context__ from None
            raise


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote, onto the CPU.

    Raises: FileNotFoundError when there is none; ValueError when it is damaged, incomplete or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"a checkpoint must be at {path}, got {'no file' if path.exists() else 'none'}")
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed entries")  # never ours: what they unpack to has no bound
            if any(entry.external_attr & MARKS_A_FOLDER for entry in archive.infolist()):
                raise ValueError("an entry marked as a folder")  # torch.load leaves its tensor's memory as it was
            damaged = archive.testzip()  # torch.load does not compare the checksums
            if damaged is not None:
                raise ValueError(f"another checksum than stated for {damaged}")
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} must be a checkpoint, got a file that is damaged or none: {error}") from None
    try:
        with warnings.catch_warnings(action="ignore"):  # about what follows as an error
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a pickle made by others leads the unpickler to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} must be a checkpoint, got a file that torch.load cannot read: {reason}") from None
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if type(found) is not int or found != FORMAT:
        raise ValueError(f"{path} must be a checkpoint of format {FORMAT}, got {found}")
    try:
        check_content(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path} must be a complete checkpoint: {error}") from None
    return checkpoint


def stored_config(path: Path, checkpoint: dict[str, Any]) -> Config:
    """The configuration in the checkpoint of `path`. Raises: ValueError where this version has no such one."""
    try:
        return from_tables(checkpoint["preset"], checkpoint["config"])
    except ValueError as error:
        raise ValueError(f"{path} must hold a configuration of this version: {error}") from None
