"""Several processes at one run, on the CPU: the same bits as one, and after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lillama.checkpoint import card
from lillama.checkpoint.journal import Journal
from lillama.cli import main
from tests.forked import Ended, Forked

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="gloo on the CPU is tested here")

OPTIONS = ["--reduction", "0.2", "--tokens", "1300", "--seq-len", "32", "--device", "cpu"]


def arguments(model: Path, out: Path, text: Path, *options: str) -> list[str]:
    return ["compress", str(model), str(out), "--text", str(text), *OPTIONS, *options]


def alone(*given: Any) -> None:
    """The run of one process, in this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lillama", *arguments(*given)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code


def together(
    world: int, *given: Any, folder: Path, first: Callable[[int], object] = lambda rank: None
) -> list[Ended]:
    """The run of `world` processes that are told what torchrun tells its workers; each calls
    first(rank) before it begins."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]

    def work(rank: int) -> None:
        sys.argv = ["lillama", *arguments(*given)]
        first(rank)
        main()

    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": world}
    shared |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 0}
    processes = [
        Forked(
            lambda rank=rank: work(rank), folder / str(rank), RANK=rank, LOCAL_RANK=rank, **shared
        )
        for rank in range(world)
    ]
    return [process.wait() for process in processes]


def content(out: Path) -> dict[str, bytes]:
    """Everything that may not depend on how many worked at it."""
    names = ("report.json", "README.md")
    kept = {file.name: file.read_bytes() for file in out.iterdir() if file.name not in names}
    report = json.loads((out / "report.json").read_text())
    for row in report["blocks"]:
        del row["seconds"], row["peak_memory_bytes"]
    head = report.get("head", {})
    head.pop("seconds", None)
    return {**kept, "report": json.dumps([report["blocks"], head]).encode()}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mixtral", ("--strategy", "bottom")),
        ("mamba", ("--loss", "teacher")),
        ("mamba", ("--targets", "embeddings,in_proj", "--reduction", "0.3")),
    ],
)
def test_two_give_the_bits_of_one(kind, options, make_checkpoint, text_file, tmp_path):
    """Five blocks: more than one for each process, with "bottom" some that are not compressed; and
    a student's stream that begins with embeddings of its own."""
    model = make_checkpoint(kind, num_hidden_layers=5, tie_word_embeddings=False)
    one, two = tmp_path / "one" / "out", tmp_path / "two" / "out"
    one.parent.mkdir()
    two.parent.mkdir()
    alone(model, one, text_file, *options)
    ended = together(2, model, two, text_file, "--json", *options, folder=tmp_path / "said")
    assert [process.code for process in ended] == [0, 0], ended
    (line,) = "".join(process.stdout for process in ended).splitlines()
    assert json.loads(line)["world_size"] == 2
    report = json.loads((one / "report.json").read_text())
    # "ranks" are those of factors
    assert report["world_size"] == 1 and "ranks" not in report and report["blocks"][0]["ranks"]
    assert content(one) == content(two)
    if "--targets" in options:
        config = json.loads((one / "config.json").read_text())
        assert "backbone.embeddings" in config["quantization_config"]["ranks"]
    assert list(two.parent.iterdir()) == [two]


def killed_behind_its_first_piece(rank: int) -> None:
    """Make this process kill itself once its journal has a line."""
    append = Journal.append

    def killed(journal: Journal, record: dict[str, Any]) -> None:
        append(journal, record)
        os.kill(os.getpid(), signal.SIGKILL)

    Journal.append = killed  # pyright: ignore[reportAttributeAccessIssue]


def test_another_number_of_processes_takes_a_killed_run_up(make_checkpoint, text_file, tmp_path):
    """Two, of which one is killed, and the other ends by itself; three, all killed; one ends it."""
    model, staging = make_checkpoint("mamba", num_hidden_layers=4), tmp_path / "out.unfinished"
    given = (model, tmp_path / "out", text_file, "--checkpoint-seconds", "0", "--json")
    alone(model, tmp_path / "whole", *given[2:])

    def second(rank: int) -> None:
        if rank == 1:
            killed_behind_its_first_piece(rank)

    found = together(2, *given, folder=tmp_path / "two", first=second)
    assert [process.code for process in found] == [1, -signal.SIGKILL], found
    assert "lillama: error: process 1 is gone" in found[0].stderr
    assert (staging / "journal-1.jsonl").exists()
    found = together(3, *given, folder=tmp_path / "three", first=killed_behind_its_first_piece)
    assert -signal.SIGKILL in {process.code for process in found}
    assert staging.is_dir() and not (tmp_path / "out").exists()
    alone(*given)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_the_first_refuses_all_refuse(mamba, text_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    found = together(2, mamba, tmp_path / "out", text_file, folder=tmp_path / "said")
    assert {process.code for process in found} <= {1, 2}, found
    for process in found:
        assert "out exists; choose another OUT or pass --overwrite" in process.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("odd", "named"),
    [("text", r"options\.text was .*text\.txt\.other"), ("version", r"versions\.lillama.*9\.9")],
)
def test_processes_that_do_not_agree_say_on_what(odd, named, mamba, text_file, tmp_path):
    text = tmp_path / "text.txt"
    words = text_file.read_text("utf-8")
    text.write_text(words)
    (tmp_path / "text.txt.other").write_text(words[::-1])

    def change(rank: int) -> None:
        if rank == 1 and odd == "text":
            sys.argv[sys.argv.index("--text") + 1] += ".other"
        elif rank == 1:
            card.__version__ = "9.9"

    found = together(2, mamba, tmp_path / "out", text, folder=tmp_path / "said", first=change)
    for process in found:
        assert process.code and re.search(f"lillama: error: .*{named}", process.stderr), found
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()


KILLED = """
import os, sys
from tests.compress.session.test_processes import killed_behind_its_first_piece
from lillama.cli import main
if os.environ["RANK"] == os.environ["TORCHELASTIC_RESTART_COUNT"]:
    killed_behind_its_first_piece(0)
main()
"""


@pytest.mark.full
def test_torchrun_starts_all_again_when_one_is_killed(make_checkpoint, text_file, tmp_path):
    """Rank 0 at the first attempt, rank 1 at the second; they go on from the journals."""
    model, script = make_checkpoint("mamba", num_hidden_layers=4), tmp_path / "killed.py"
    script.write_text(KILLED)
    options = ("--checkpoint-seconds", "0", "--json")
    alone(model, tmp_path / "whole", text_file, *options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.1", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *arguments(model, tmp_path / "out", text_file, *options)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("exitcode: -9") >= 2, "both were killed in time"
    assert content(tmp_path / "out") == content(tmp_path / "whole")
