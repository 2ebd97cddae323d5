"""The scripts of examples/, each run with tiny settings."""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import lillama

EXAMPLES = Path(__file__).parents[1] / "examples"
TEACHER = EXAMPLES / "teachers" / "mixtral"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """run("sweep", ...) -> stdout of a script's `main` with these arguments, in this process."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    # a server that a script starts is a process of its own
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), *sys.path]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = set(sys.modules)

    def call(script: str, *arguments: Any) -> str:
        capfd.readouterr()
        importlib.import_module(script).main([str(argument) for argument in arguments])
        return capfd.readouterr().out

    yield call
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(EXAMPLES)):
            del sys.modules[name]


def test_compress_llama(run: Any, tmp_path: Path) -> None:
    sizes = ("--hidden-size", 32, "--num-layers", 2, "--tokens", 600, "--seq-len", 32)
    out = run("compress_llama", "--out", tmp_path / "demo", "--reduction", 0.2, *sizes)
    base, small = tmp_path / "demo" / "base", tmp_path / "demo" / "small"
    assert AutoModelForCausalLM.from_pretrained(base).config.model_type == "llama"
    params = json.loads((small / "report.json").read_text())["params_after"]
    assert f"{params:,} parameters" in out and "perplexity" in out
    assert params < 0.8 * json.loads((small / "report.json").read_text())["params_before"]


def test_sweep(run: Any, tmp_path: Path) -> None:
    options = ("--reductions", 0.1, 0.3, "--tokens", 2000, "--seq-len", 64)
    options += ("--held-out-bytes", 4000)
    out = run("sweep", EXAMPLES / "teachers" / "mamba", "--out", tmp_path / "sweep", *options)
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [round(row["reduction"], 1) for row in rows] == [0.1, 0.3]
    assert rows[0]["retained"] > rows[1]["retained"] > 0.3, "less is kept where more is removed"
    assert rows[0]["bytes"] > rows[1]["bytes"]
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert out.count("removed") == 2


@pytest.mark.full
def test_serve_and_query(run: Any) -> None:
    prompt = "def read(path):"
    out = run("serve_and_query", TEACHER, "--prompt", prompt, "--max-tokens", 6)
    wanted = lillama.generate(TEACHER, prompt, max_new_tokens=6, device="cpu")
    assert out.count(wanted.rstrip("\n")) >= 2, "whole and streamed, and what generate says"


def test_every_script_is_in_the_documentation() -> None:
    pages = (EXAMPLES.parent / "docs" / "index.md", EXAMPLES / "train_teacher.py")
    text = "".join(page.read_text("utf-8") for page in pages)
    scripts = [path.name for path in EXAMPLES.glob("*.py")]
    assert scripts and [script for script in scripts if script not in text] == []
