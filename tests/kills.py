"""What is on the disk when a piece of work is killed before each of its file operations in turn."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from lillama.checkpoint import writer
from lillama.checkpoint.journal import Journal
from tests.forked import Forked

FILE_EVENTS = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
# what rmtree names without their folder
FILES = ("model-", "model.", "step-", "README", "recipe", "report", "config", "journal", ".")


def left_by_kills(work: Callable[[], None], folder: Path, copies: Path) -> list[Path]:
    """Run `work` in a process that copies `folder` just before each of its operations on a file in
    it, to copies/1, copies/2, ..: what a SIGKILL would leave. Half a file written is a moment too.
    """
    taken = 0
    is_copying = False

    def step() -> None:
        nonlocal taken, is_copying
        taken, is_copying = taken + 1, True
        shutil.copytree(folder, copies / str(taken))
        is_copying = False

    def watch(event: str, args: tuple) -> None:
        if event in FILE_EVENTS and not is_copying:
            if str(args[0]).startswith((str(folder), *FILES)):
                step()

    write_shard, write_text = writer.write_shard, Path.write_text
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

    def watched() -> None:
        writer.write_shard = slow_save
        Journal.append = slow_append
        Path.write_text = slow_write  # pyright: ignore[reportAttributeAccessIssue]
        sys.addaudithook(watch)
        work()

    ended = Forked(watched, copies.with_name("said")).wait()
    assert ended.code == 0, ended.stderr
    return [copies / str(number) for number in range(1, len(list(copies.iterdir())) + 1)]
