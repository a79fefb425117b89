"""A process that checks cases, so that one which crashes is reported instead of ending the tests.

The parent sends a case and waits for the verdict. A process that dies has told by that what it died of; the next one is
forked from a server that has imported everything and never computed anything, which takes milliseconds.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
import unittest.mock

PRELOADED = ["torch", "gradaug_kernels", "support.property_checks"]
SECONDS = 120  # for one case


class Crash(AssertionError):
    """The process of the case died."""


class Fault(AssertionError):
    """A result is wrong, or the operator raised."""


def serve(connection, check) -> None:
    """Check what comes until the parent hangs up."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_deterministic_debug_mode("warn")  # fills memory; use_deterministic_algorithms imports the compiler too
    torch.utils.deterministic.fill_uninitialized_memory = True
    with contextlib.suppress(EOFError):
        while True:
            case = connection.recv()
            try:
                verdict = True, check(case)
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                place = "" if isinstance(error, AssertionError) else f" ({frames[-1].name}, line {frames[-1].lineno})"
                verdict = False, f"{type(error).__name__}: {error}{place}"
            connection.send(verdict)


class Worker:
    """Checks cases by `check`, a function of a module that the process can import, in a process of its own."""

    def __init__(self, check, environment: dict[str, str] | None = None):
        self.check, self.environment = check, environment or {}
        # The server has an environment already, and what is imported there has read it.
        self.context = multiprocessing.get_context("spawn" if environment else "forkserver")
        if not environment:
            self.context.set_forkserver_preload(PRELOADED)
        self.process = self.connection = None

    def __call__(self, case) -> str:
        """What `check` returned; raises Fault or Crash with the case as a command."""
        if self.process is None:
            self._start()
        try:
            self.connection.send(case)
            if not self.connection.poll(SECONDS):
                self.close()
                raise Crash(f"no answer in {SECONDS} s{self._command(case)}")
            fine, verdict = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code, self.process = self.process.exitcode, None
            died = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            raise Crash(f"the process died of {died}{self._command(case)}") from None
        if not fine:
            raise Fault(f"{verdict}{self._command(case)}")
        return verdict

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        self.connection, theirs = self.context.Pipe()
        self.process = self.context.Process(target=serve, args=(theirs, self.check), daemon=True)
        path = os.pathsep.join(filter(None, sys.path))  # for the server, which preloads by it
        with unittest.mock.patch.dict(os.environ, self.environment | {"PYTHONPATH": path}):
            self.process.start()
        theirs.close()

    def _command(self, case) -> str:
        module, name = self.check.__module__, self.check.__name__
        variables = "".join(f" {variable}={value}" for variable, value in self.environment.items())
        code = f"from {module} import *; {name}({case!r})".replace("'", '"')  # no string of a case has either
        return f"\n\nPYTHONPATH=.:tests{variables} python -c '{code}'\n"
