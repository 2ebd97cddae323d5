"""Several processes at one run under torchrun, on the CPU: the same bits as one, and after a
kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lillama.cli.app import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="gloo on the CPU is tested here")

OPTIONS = ["--reduction", "0.2", "--tokens", "1300", "--seq-len", "32", "--device", "cpu"]


def command(world: int, model: Path, out: Path, text: Path, *options: str) -> list[str]:
    lillama = ["compress", str(model), str(out), "--text", str(text), *OPTIONS, *options]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={world}", "--max-restarts=0", "--monitor-interval=0.1"]
    return [*torchrun, "-m", "lillama.cli.app", *lillama]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*arguments: Any, code: int = 0) -> tuple[str, str]:
    process = start(command(*arguments))
    stdout, stderr = process.communicate(timeout=150)
    assert process.returncode == code, stderr
    return stdout, stderr


def alone(model: Path, out: Path, text: Path, *options: str) -> None:
    """The run of one process, in this one: starting another costs as much as ten such runs."""
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["compress", str(model), str(out), "--text", str(text), *OPTIONS, *options]
        patch.setattr(sys, "argv", ["lillama", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code


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
    ("kind", "world", "options"),
    [
        ("mixtral", 2, ("--strategy", "bottom")),
        ("mamba", 2, ("--loss", "teacher")),
        ("mamba", 2, ("--targets", "embeddings,in_proj", "--reduction", "0.3")),
    ],
)
def test_ranks_give_the_bits_of_one(kind, world, options, make_checkpoint, text_file, tmp_path):
    """Five blocks: more than one for each rank, with "bottom" some that are not compressed; and a
    student's stream that begins with embeddings of its own."""
    model = make_checkpoint(kind, num_hidden_layers=5, tie_word_embeddings=False)
    alone(model, tmp_path / "1", text_file, *options)
    stdout, _ = run(world, model, tmp_path / str(world), text_file, "--json", *options)
    (line,) = stdout.splitlines()
    assert json.loads(line)["world_size"] == world
    report = json.loads((tmp_path / "1" / "report.json").read_text())
    # "ranks" are those of factors
    assert report["world_size"] == 1 and "ranks" not in report and report["blocks"][0]["ranks"]
    assert content(tmp_path / "1") == content(tmp_path / str(world))
    if "--targets" in options:
        config = json.loads((tmp_path / "1" / "config.json").read_text())
        assert "backbone.embeddings" in config["quantization_config"]["ranks"]
    assert {path.name for path in tmp_path.iterdir()} == {"1", str(world)}


def workers_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """{rank: process id} of torchrun's workers, from their environment."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = re.search(r"PPid:\s+(\d+)", (folder / "status").read_text())
            variables = (folder / "environ").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        ranks = [v.partition("=")[2] for v in variables if v.startswith("RANK=")]
        if parent and int(parent[1]) == process.pid and ranks:
            found[int(ranks[0])] = int(folder.name)
    return found


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists() and process.poll() is None


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_recovers(victim, make_checkpoint, text_file, tmp_path):
    """torchrun starts all again, and they go on from the journals."""
    model = make_checkpoint("mamba", num_hidden_layers=4)
    options = ("--checkpoint-seconds", "0", "--json")
    alone(model, tmp_path / "whole", text_file, *options)
    arguments = command(2, model, tmp_path / "out", text_file, *options)
    arguments[arguments.index("--max-restarts=0")] = "--max-restarts=1"
    process = start(arguments)
    wait_for(tmp_path / "out.unfinished" / f"journal-{victim}.jsonl", process)
    os.kill(workers_of(process)[victim], signal.SIGKILL)
    _, stderr = process.communicate(timeout=150)
    assert process.returncode == 0, stderr
    assert "exitcode: -9" in stderr, "it was killed in time"
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_another_number_of_ranks_takes_the_run_up(make_checkpoint, text_file, tmp_path):
    """Two ranks, killed; three, killed; one ends it."""
    model = make_checkpoint("mamba", num_hidden_layers=4)
    options = ("--checkpoint-seconds", "0", "--json")
    alone(model, tmp_path / "whole", text_file, *options)
    staging = tmp_path / "out.unfinished"
    for world, awaited in ((2, "journal-1.jsonl"), (3, "journal-2.jsonl")):
        process = start(command(world, model, tmp_path / "out", text_file, *options))
        wait_for(staging / awaited, process)
        workers = workers_of(process).values()
        process.kill()
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        process.communicate(timeout=60)
    assert staging.is_dir() and not (tmp_path / "out").exists()
    alone(model, tmp_path / "out", text_file, *options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_rank_0_refuses_all_refuse(mamba, text_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    _, stderr = run(2, mamba, tmp_path / "out", text_file, code=1)
    lines = [line for line in stderr.splitlines() if "lillama: error: " in line]
    assert lines and all("out exists; choose another OUT or pass --overwrite" in x for x in lines)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


ODD_RANK = """
import os, sys
from lillama.checkpoint import card as describe
from lillama.cli.app import main
if os.environ["RANK"] == "1":
    if sys.argv[1] == "text":
        sys.argv[sys.argv.index("--text") + 1] += ".other"
    else:
        describe.__version__ = "9.9"
del sys.argv[1]
main()
"""


@pytest.mark.parametrize(
    ("odd", "named"),
    [("text", r"options\.text was .*text\.txt\.other"), ("version", r"versions\.lillama.*9\.9")],
)
def test_ranks_that_do_not_agree_say_on_what(odd, named, mamba, text_file, tmp_path):
    script, text = tmp_path / "odd.py", tmp_path / "text.txt"
    script.write_text(ODD_RANK)
    words = text_file.read_text("utf-8")
    text.write_text(words)
    (tmp_path / "text.txt.other").write_text(words[::-1])
    arguments = command(2, mamba, tmp_path / "out", text)
    place = arguments.index("-m", 3)
    arguments[place : place + 2] = [str(script), odd]
    process = start(arguments)
    _, stderr = process.communicate(timeout=150)
    assert process.returncode != 0
    lines = [line for line in stderr.splitlines() if line.startswith("lillama: error: ")]
    assert lines and all(re.search(named, line) for line in lines), stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()
