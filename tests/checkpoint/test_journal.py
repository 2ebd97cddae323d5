"""The journal and the lock: append only, checked line by line, one writer at a time."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lillama.checkpoint.journal import Journal, locked
from lillama.errors import InputError

RECORDS = [{"kind": "shard", "piece": f"block-{i}", "loss": 0.1 * i} for i in range(3)]


def filled(folder: Path, writer: int = 0) -> Journal:
    journal = Journal(folder, writer)
    for record in RECORDS:
        journal.append(record)
    return journal


def test_journal_is_read_back_in_order(tmp_path):
    filled(tmp_path)
    assert Journal(tmp_path).records == RECORDS
    assert Journal(tmp_path).last(kind="shard") == RECORDS[2]
    assert Journal(tmp_path).last(piece="block-1") == RECORDS[1]
    assert Journal(tmp_path).last(piece="block-7") is None


def test_journal_keeps_numbers_exactly(tmp_path):
    Journal(tmp_path).append({"loss": 1 / 3, "tiny": 5e-324})
    assert Journal(tmp_path).records == [{"loss": 1 / 3, "tiny": 5e-324}]


def test_journals_of_several_writers_are_one(tmp_path):
    filled(tmp_path, 0)
    Journal(tmp_path, 1).append({"piece": "other"})
    assert len(Journal(tmp_path, 2).records) == 4
    assert len((tmp_path / "journal-0.jsonl").read_bytes().splitlines()) == 3


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_half_a_last_line_is_cut_off_and_writing_goes_on(cut, tmp_path):
    journal = filled(tmp_path)
    content = journal.file.read_bytes()
    journal.file.write_bytes(content[:-cut])
    again = Journal(tmp_path)
    assert again.records == RECORDS[:2]
    again.append(RECORDS[2])
    assert journal.file.read_bytes() == content


@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_damaged_line_is_named(line, tmp_path):
    journal = filled(tmp_path)
    lines = journal.file.read_bytes().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(b"block", b"blocc")
    journal.file.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=rf"journal-0.jsonl is damaged at line {line};"):
        Journal(tmp_path)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_no_half_line(call, tmp_path, monkeypatch):
    journal = filled(tmp_path)
    before = journal.file.read_bytes()

    def fail(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, call, fail)
        journal.append({"piece": "lost"})
    assert journal.file.read_bytes() == before and journal.records == RECORDS


def test_the_lock_is_one_processs_and_ends_with_it(tmp_path):
    code = (
        "import sys; from pathlib import Path; from lillama.checkpoint.journal import locked\n"
        "with locked(Path(sys.argv[1]), Path('OUT')):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with (
        pytest.raises(InputError, match=rf"another run \(process {process.pid}\) is writing OUT"),
        locked(tmp_path, Path("OUT")),
    ):
        pass
    process.kill()
    process.communicate()
    with locked(tmp_path, Path("OUT")):
        pass
