"""Kill a piece of work before each of its file operations in turn."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import lillama.checkpoint.writer as checkpoint_writer
from lillama.checkpoint.journal import Journal

FILE_EVENTS = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
# what rmtree names without their folder
FILES = ("model-", "model.", "step-", "README", "recipe", "report", "config", "journal", ".")


def killed_at(moment: int, folder: Path, work: Callable[[], None]) -> bool:
    """Run `work` in a forked process that SIGKILLs itself just before file operation `moment` in
    `folder`; half a file written is a moment too. False when it ended before that."""
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status != 0
    signal.alarm(60)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, args: tuple) -> None:
        if event in FILE_EVENTS and str(args[0]).startswith((str(folder), *FILES)):
            step()

    write_shard, write_text = checkpoint_writer.write_shard, Path.write_text
    append = Journal.append

    def slow_save(file: Path, entries: list) -> str:
        step()
        digest = write_shard(file, entries)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        step()
        file.write_bytes(whole)
        return digest

    def slow_append(journal: Journal, record: dict) -> None:
        before = journal.file.stat().st_size if journal.file.exists() else 0
        append(journal, record)
        whole = journal.file.read_bytes()
        journal.file.write_bytes(whole[: (before + len(whole)) // 2])
        step()
        journal.file.write_bytes(whole)

    def slow_write(path: Path, text: str, *args) -> None:
        write_text(path, text[: len(text) // 2], *args)
        step()
        write_text(path, text, *args)

    code = 1
    try:
        checkpoint_writer.write_shard = slow_save
        Journal.append = slow_append
        Path.write_text = slow_write  # pyright: ignore[reportAttributeAccessIssue]
        sys.addaudithook(watch)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
