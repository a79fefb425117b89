"""Packages whose CPU library has another value of a constant, and processes that import them.

All are built in one copy of the clone by its setup.py, so with the flags of every build, and only what depends on a
changed file compiles again.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from ..gate import Gate
from .constants import Call, Constant, Number
from .sources import find

ROOT = Path(__file__).parents[2]
COPIED = ("csrc/**/*", "gradaug_kernels/**/*", "tools/*.py", "setup.py", "pyproject.toml", "README.md")
LEAST_MS = 2.0  # of a sample: shorter calls are repeated


# ---- building


class Variants:
    """folder: a copy of the clone, which is built in, and under packages/ what was built; root: the clone."""

    def __init__(self, folder: Path, root: Path = ROOT):
        self.folder, self.root = folder.absolute(), root

    def package(self, constant: Constant, value: Number) -> Path:
        """The folder whose gradaug_kernels has this value.

        Raises:
            RuntimeError: where it does not compile.
        """
        files = self.files(constant, value)
        digest = hashlib.sha256(f"{sys.version} {os.environ.get('CXX')} {sys.prefix}".encode())
        for path, content in files.items():
            digest.update(f"{path}\0".encode() + hashlib.sha256(content).digest())
        package = self.folder / "packages" / digest.hexdigest()[:16]
        package.parent.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not package.exists():
                self._build(files, package, f"{constant.name} = {value}")
        return package

    def files(self, constant: Constant, value: Number) -> dict[Path, bytes]:
        """What the library is built from: the clone's files, one of them with this value."""
        found = {path.relative_to(self.root): path.read_bytes() for path in self._copied(self.root)}
        place = find(constant, self.root / "csrc" / "cpu")
        if value != place.value:
            found[place.path.relative_to(self.root)] = place.replaced(value).encode()
        return found

    def _build(self, files: dict[Path, bytes], package: Path, what: str) -> None:
        for path in self._copied(self.folder):
            if path.relative_to(self.folder) not in files:
                path.unlink()
        for path, content in files.items():
            to = self.folder / path
            if not to.exists() or to.read_bytes() != content:  # a file that stays as it is does not compile again
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(content)
        partial = package.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        environment = os.environ | {"GRADAUG_BUILD_EXT": "1", "GRADAUG_BUILD_CUDA": "0", "GRADAUG_BUILD_CACHE": "0"}
        command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(partial)]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()
            errors = [line for line in lines if "error" in line.lower()] or lines[-1:]
            raise RuntimeError(f"the library with {what} must compile, got {''.join(errors[:1])}")
        partial.rename(package)

    @staticmethod
    def _copied(root: Path) -> list[Path]:
        paths = sorted(path for pattern in COPIED for path in root.glob(pattern) if path.is_file())
        return [
            path
            for path in paths
            if path.suffix not in (".so", ".pyc") and path.name != "_build.json" and "__pycache__" not in path.parts
        ]


# ---- running


class Worker:
    """A process with the package of a folder; it waits, and does not compute, while it is not asked."""

    def __init__(self, package: Path, threads: int):
        self.connection, theirs = Pipe()
        # -P: without the working folder's package before it.
        command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(package), str(threads)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), str(ROOT)])}
        self.process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()

    def prepare(self, call: Call, accuracy: bool) -> tuple[list[str], Gate | None]:
        """Get ready for a call. Returns: the paths it takes in conv/paths.cpp, and its gate where that is asked for."""
        return self._ask("prepare", call, accuracy)

    def sample(self) -> float:
        """Milliseconds of the call."""
        return self._ask("sample")

    def close(self) -> None:
        self.connection.close()
        self.process.wait()

    def _ask(self, *what):
        try:
            self.connection.send(what)
            failed, answer = self.connection.recv()
        except (EOFError, ConnectionError):
            text = " ".join(map(str, what))
            raise RuntimeError(f"a variant must survive {text}, got exit status {self.process.wait()}") from None
        if failed:
            raise RuntimeError(answer)
        return answer


class Served:
    """What a worker's process does."""

    def prepare(self, call: Call, accuracy: bool) -> tuple[list[str], Gate | None]:
        from gradaug_kernels.ops.conv_paths import recorded_paths

        from .problems import prepare

        self.problem, self.repeats = prepare(call), 1
        with recorded_paths() as paths:
            self.problem.run()
        gate = self.problem.gate() if accuracy else None
        self.repeats = max(1, round(LEAST_MS / self._milliseconds()))
        return paths, gate

    def sample(self) -> float:
        time.sleep(0.005)  # threads of the process that computed before spin for a while
        return self._milliseconds()

    def _milliseconds(self) -> float:
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.problem.run()
        return 1e3 * (time.perf_counter() - start) / self.repeats


def serve(connection: Connection, package: Path, threads: int) -> None:
    """Answer what comes, until the parent hangs up."""
    import torch

    import gradaug_kernels
    from gradaug_kernels.recipes.memory import keep_freed_blocks

    if Path(gradaug_kernels.__file__).parents[1] != package:
        raise ImportError(f"gradaug_kernels must be imported from {package}, got {gradaug_kernels.__file__}")
    torch.set_num_threads(threads)
    keep_freed_blocks()
    served = Served()
    while True:
        try:
            what, *arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, getattr(served, what)(*arguments)))
        except Exception as error:
            connection.send((True, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
