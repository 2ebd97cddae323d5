"""Processes that begin as a copy of this one: ready in milliseconds, where a new interpreter takes
seconds to import torch."""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["Ended", "Forked"]

LONGEST_S = 100


class Ended(NamedTuple):
    """What a process left: its code, negative for the signal that ended it."""

    code: int
    stdout: str
    stderr: str


class Forked:
    """A process that runs `work` and ends, with the code of its SystemExit where it raises one.

    Args:
        folder: where its output goes. environment: variables that it has besides this one's.
    """

    def __init__(self, work: Callable[[], object], folder: Path, **environment: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / "stdout.txt", folder / "stderr.txt"]
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Python 3.12 warns about every fork of a process with threads, as pytest-xdist's are
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if not self.pid:
            os.environ |= {name: str(value) for name, value in environment.items()}
            self._run(work)

    def _run(self, work: Callable[[], object]) -> None:
        code = 1
        signal.alarm(LONGEST_S)
        try:
            for number, file in enumerate(self.files, start=1):
                stream = open(file, "w")  # noqa: SIM115 (closed by the end of the process)
                os.dup2(stream.fileno(), number)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            work()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Ended(code, *(file.read_text() if file.exists() else "" for file in self.files))
