"""The commands as a user runs them: stdout, stderr and exit codes."""

import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lillama.cli import app as cli
from lillama.cli import output as cli_output

COMPRESS_KEYS = {
    "params_before",
    "params_after",
    "reduction",
    "target_reduction",
    "tokens",
    "seconds",
    "peak_memory_bytes",
    "blocks",
}
PLAN_KEYS = {
    "params_before",
    "params_after",
    "bytes_before",
    "bytes_after",
    "max_reduction",
    "matrices",
}
EVAL_KEYS = {"perplexity", "bits_per_byte", "tokens", "params", "bytes"}
AGAINST_KEYS = {"base_perplexity", "retained", "kl", "top1_agreement"}


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The last line of stdout, which must be the only JSON document."""
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def lillama_command(monkeypatch, capfd):
    """lillama_command("plan", MODEL, ...) -> Result, in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["lillama", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        return Result(int(caught.value.code or 0), out, err)

    return run


@pytest.fixture
def compress(lillama_command, mamba, text_file, tmp_path, device):
    """compress(model=..., out=..., "--option", value) -> (Result, OUT) with few tokens.

    A failure must be one line and leave nothing: checked here for every case.
    """

    def run(
        *options: object, model: Path = mamba, text: Path = text_file, reduction: object = 0.2
    ) -> tuple[Result, Path]:
        out = tmp_path / "out"
        before = snapshot(model)
        result = lillama_command(
            *("compress", model, out, "--reduction", reduction, "--text", text),
            *("--tokens", 300, "--seq-len", 32, "--device", device, *options),
        )
        assert snapshot(model) == before
        if result.code:
            assert not [f.name for f in tmp_path.iterdir() if f.name.startswith("out")]
        return result, out

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()} if folder.is_dir() else {}


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    """The promise of the issue: one clear line and the right exit code."""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("lillama: error: "), lines[0]
    for part in parts:
        assert part in lines[0], lines[0]
    assert result.code == code
    assert result.out == ""


# success


def test_cli_compress_json_is_the_last_line_and_the_report(compress, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the cat sat on a mat while old dogs ran past"}\n' * 60)
    options = ["--seed", 4, "--no-packing", "--loss", "teacher"]
    result, out = compress("--json", *options, text=rows)
    assert result.code == 0
    assert result.document.keys() >= COMPRESS_KEYS
    report = json.loads((out / "report.json").read_text())
    assert report.pop("rank_losses"), "curves for the page are in the file only"
    assert result.document == report
    assert result.err == "", "no log, no progress of a short run where stderr is no terminal"
    options = json.loads((out / "recipe.json").read_text())["options"]
    assert (options["seed"], options["packing"], options["loss"]) == (4, False, "teacher")


def test_cli_compress_without_json_prints_a_table(compress):
    result, out = compress("--no-train", "--strategy", "bottom", "--targets", "in_proj, out_proj")
    assert result.code == 0 and out.is_dir()
    assert "params_after" in result.out and "2 blocks compressed" in result.out
    assert json.loads((out / "recipe.json").read_text())["options"]["targets"] == [
        "in_proj",
        "out_proj",
    ]


def test_cli_verbose_logs_go_to_stderr(lillama_command, mamba, text_file, tmp_path, device):
    result = lillama_command(
        *(
            "--verbose",
            "compress",
            mamba,
            tmp_path / "out",
            "--reduction",
            0.2,
            "--text",
            text_file,
        ),
        *("--tokens", 300, "--seq-len", 32, "--device", device, "--json"),
    )
    assert result.code == 0
    assert len(result.out.splitlines()) == 1 and result.document
    assert "held-out loss" in result.err and "backbone.layers.1" in result.err


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "table"])
def test_cli_plan(as_json, lillama_command, mixtral):
    result = lillama_command(
        "plan", mixtral, "--reduction", 0.2, "--preset", "paper", *(["--json"] if as_json else [])
    )
    assert (result.code, result.err) == (0, "")
    if as_json:
        assert len(result.out.splitlines()) == 1
        assert result.document.keys() >= PLAN_KEYS
        row = {"name", "shape", "rank", "break_even_rank"}
        assert all(matrix.keys() >= row for matrix in result.document["matrices"])
    else:
        assert "break-even" in result.out and "max_reduction" in result.out


@pytest.mark.parametrize("against", [True, False], ids=["against", "alone"])
def test_cli_eval_json(against, lillama_command, mamba, text_file, device):
    options = ["--against", mamba] if against else []
    result = lillama_command(
        *("eval", mamba, "--text", text_file, "--seq-len", 128, "--device", device, "--json"),
        *options,
    )
    assert (result.code, result.err) == (0, "")
    assert len(result.out.splitlines()) == 1
    assert result.document.keys() >= EVAL_KEYS
    assert (result.document.keys() >= AGAINST_KEYS) == against


def test_cli_generate_prints_prompt_and_text_only(lillama_command, mamba, device):
    result = lillama_command(
        *("generate", mamba, "--prompt", "the cat", "--max-new-tokens", 4, "--device", device)
    )
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("the cat") and len(result.out.strip()) > len("the cat")


@pytest.mark.parametrize("command", ["compress", "plan", "eval", "generate"])
def test_cli_help_shows_every_option_with_its_default(command, lillama_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = lillama_command(command, "--help")
    assert result.code == 0 and result.err == ""
    wanted = {
        "compress": [
            "--reduction",
            "--text",
            "--tokens",
            "2,000,000",
            "--no-packing",
            "--overwrite",
        ],
        "plan": ["--reduction", "--strategy", "--json"],
        "eval": ["--text", "--against", "--seq-len", "512"],
        "generate": ["--prompt", "--max-new-tokens", "128", "--temperature"],
    }[command]
    assert all(part in result.out for part in wanted), result.out


def test_cli_version(lillama_command):
    result = lillama_command("--version")
    assert result.code == 0 and result.out.startswith("lillama ")


# progress where stderr is no terminal


def progress_lines(calls: list[tuple[float, str, int, int]], capfd) -> list[str]:
    """The lines that calls of progress at these seconds after the start print."""
    now = 1000.0
    with cli_output.progress_bar(clock=lambda: now) as update:
        for seconds, *call in calls:
            now = 1000 + seconds
            update(*call)  # type: ignore[arg-type]
    out, err = capfd.readouterr()
    assert out == ""
    return err.splitlines()


def test_progress_is_a_line_every_30_seconds_at_most(capfd):
    calls = [(float(second), "block 0 train", second * 100, 36_000) for second in range(95)]
    assert progress_lines(calls, capfd) == [
        "lillama: block 0 train 3,000/36,000 (8.3%), 0:00:30 elapsed, 0:05:30 left",
        "lillama: block 0 train 6,000/36,000 (16.7%), 0:01:00 elapsed, 0:05:00 left",
        "lillama: block 0 train 9,000/36,000 (25.0%), 0:01:30 elapsed, 0:04:30 left",
    ]


def test_progress_of_a_short_run_is_silent(capfd):
    assert progress_lines([(0.1, "eval", 1, 2), (29.9, "eval", 2, 2)], capfd) == []


def test_progress_of_the_next_job_has_its_own_speed(capfd):
    """Other units: a thousandth of the tokens before says nothing of the rounds now."""
    calls = [(1.0, "eval", 0, 10**6), (31.0, "eval", 10**6, 10**6), (40.0, "speed", 1, 20)]
    calls += [(100.0, "speed", 7, 20), (7200.0, "speed", 0, 20)]
    assert progress_lines(calls, capfd) == [
        "lillama: eval 1,000,000/1,000,000 (100.0%), 0:00:31 elapsed, 0:00:00 left",
        "lillama: speed 7/20 (35.0%), 0:01:40 elapsed, 0:02:10 left",
        "lillama: speed 0/20 (0.0%), 2:00:00 elapsed",
    ]


def test_progress_forgets_how_fast_it_was_long_ago(capfd):
    """A run that is taken up again is through its finished blocks at once."""
    calls = [(30.0 * n, "block 5 train", 50_000 + 100 * n, 60_000) for n in range(1, 14)]
    lines = progress_lines([(0.5, "block 0 teacher", 0, 60_000), *calls], capfd)
    assert "0:00:06 left" in lines[0]
    assert lines[-1].endswith("0:43:30 left"), "8,700 at 100 in 30 s"


# usage errors


def test_cli_without_a_command_is_one_line(lillama_command):
    assert_one_line(
        lillama_command(),
        2,
        "no command given; use compress, finetune, plan, eval, generate, export, report, "
        "sample or serve",
    )
    assert_one_line(lillama_command("--verbose"), 2, "no command given")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--fast"], ["No such option", "--fast"]),
        (["squash"], ["No such command", "squash"]),
        (["compress"], ["Missing argument"]),
        (["plan", "m"], ["Missing option", "--reduction"]),
        (["plan", "m", "--reduction", "a lot"], ["Invalid value for '--reduction'"]),
        (["plan", "m", "--reduction", "0.2", "--rank", "8"], ["No such option", "--rank"]),
        (["eval", "m"], ["give at least one --text FILE, or --tasks"]),
        (["generate", "m"], ["Missing option", "--prompt"]),
        (["plan", "m", "extra", "--reduction", "0.2"], ["extra"]),
    ],
)
def test_cli_usage_error_is_one_line(arguments, parts, lillama_command):
    assert_one_line(lillama_command(*arguments), 2, *parts)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--strategy", "middle"], "--strategy must be one of global, uniform, bottom, got"),
        (["--device", "cuda:99"], "--device cuda:99 is not available"),
        (["--targets", "dt_proj"], "--targets must be some of in_proj, out_proj, x_proj,"),
        (["--targets", ","], "got none"),
    ],
)
def test_cli_compress_bad_value_is_one_line(options, part, compress):
    assert_one_line(compress(*options)[0], 2, part)


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_cli_unreachable_reduction_says_the_maximum(command, compress, lillama_command, mamba):
    if command == "compress":
        result = compress(reduction=0.9)[0]
    else:
        result = lillama_command("plan", mamba, "--reduction", 0.9)
    assert_one_line(result, 2, "--reduction 0.9 cannot be reached", "at most 0.3")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["compress", "eval", "generate"])
def test_cli_cuda_without_a_gpu_is_refused(command, compress, lillama_command, mamba, text_file):
    if command == "compress":
        result = compress("--device", "cuda")[0]
    else:
        option = ["--text", text_file] if command == "eval" else ["--prompt", "the"]
        result = lillama_command(command, mamba, *option, "--device", "cuda")
    assert_one_line(result, 2, "--device cuda is not available: 0 CUDA devices found; use cpu")


def test_cli_out_of_memory_is_one_line(compress, monkeypatch):
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(importlib.import_module("lillama.compress.run"), "fill_student", fail)
    result, _ = compress("--preset", "whitened")
    assert_one_line(result, 1, "out of memory; lower --seq-len or --tokens")


def test_cli_unexpected_error_keeps_its_traceback(compress, monkeypatch):
    """A defect of ours is not dressed up as the user's mistake."""

    def fail(*args: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(importlib.import_module("lillama.compress.run"), "fill_student", fail)
    with pytest.raises(ZeroDivisionError):
        compress()


def test_cli_runs_in_the_callers_folder_with_relative_paths(
    lillama_command, mamba, text_file, tmp_path, monkeypatch, device
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(text_file.read_bytes())
    relative = os.path.relpath(mamba, tmp_path)
    result = lillama_command(
        *("compress", relative, "out", "--reduction", 0.2, "--text", "text.txt", "--no-train"),
        *("--tokens", 300, "--seq-len", 32, "--device", device),
    )
    assert result.code == 0, result.err
    assert load_file(next((tmp_path / "out").glob("*.safetensors")))
