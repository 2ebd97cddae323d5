"""What an unfinished run has done so far: one line a finished piece of work, only ever appended.

Every line carries a checksum of itself. A line is written after the file that it speaks of has
reached the disk, so what the journal names is there, whenever the power goes.
"""

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lillama.errors import InputError

__all__ = ["LOCK", "Journal", "locked"]

LOCK = ".lock"


class Journal:
    """The records of a folder: `<folder>/journal-<writer>.jsonl`, one file for each process that
    writes, all of them read.

    Raises (on construction):
        InputError: a line is damaged. The half line that a kill leaves at the end of a file is not:
            its work was not finished, and it is cut off.
    """

    def __init__(self, folder: Path, writer: int = 0) -> None:
        self.file = folder / f"journal-{writer}.jsonl"
        self.records: list[dict[str, Any]] = []
        for file in sorted(folder.glob("journal-*.jsonl")):
            self.records += self._read(file, cut=file == self.file)

    @staticmethod
    def _read(file: Path, cut: bool) -> list[dict[str, Any]]:
        content = file.read_bytes()
        lines = content.split(b"\n")
        records = []
        for number, line in enumerate(lines[:-1], start=1):
            try:
                check, _, text = line.partition(b" ")
                if int(check, 16) != zlib.crc32(text):
                    raise ValueError("checksum")
                records.append(json.loads(text))
            except ValueError as error:
                raise InputError(
                    f"{file} is damaged at line {number}; the finished work cannot be trusted: "
                    f"delete {file.parent} to begin again"
                ) from error
        if cut and lines[-1]:
            os.truncate(file, len(content) - len(lines[-1]))
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add one record and flush it to disk. Raises OSError."""
        text = json.dumps(record).encode()
        line = b"%08x " % zlib.crc32(text) + text + b"\n"
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError(f"only part of a line fitted into {self.file}")
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        self.records.append(record)

    def last(self, **wanted: Any) -> dict[str, Any] | None:
        """The newest record that has all of `wanted`."""
        for record in reversed(self.records):
            if all(record.get(key) == value for key, value in wanted.items()):
                return record
        return None


@contextlib.contextmanager
def locked(folder: Path, out: Path) -> Iterator[None]:
    """Hold the folder for this process; the kernel lets go of it however the process ends.

    Raises:
        InputError: another process holds it, or put it in the place of OUT just now.
    """
    file = folder / LOCK
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode() or "unknown"
            raise InputError(
                f"another run (process {holder}) is writing {out}; wait for it or choose another "
                "OUT"
            ) from None
        if not file.exists() or os.fstat(descriptor).st_ino != file.stat().st_ino:
            raise InputError(f"another run has just finished writing {out}; run again")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
