"""`lillama plan --advise` as a user runs it."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from lillama import cli, cli_advice

FEW = ("--tokens", 512, "--seq-len", 32, "--device", "cpu")


@pytest.fixture
def command(monkeypatch, capfd):
    """command("plan", MODEL, ...) -> exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lillama", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def test_cli_advice_is_a_page_whose_command_runs(command, mixtral, text_file, tmp_path):
    arguments = ("plan", mixtral, "--advise", "--text", text_file, "--retain", 0.8, *FEW)
    code, out, err = command(*arguments)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines[:-1])) <= 80, "a terminal of 80 columns; the command is not wrapped"
    page = " ".join(out.split())
    for part in (
        "near-random",
        "kept, at half",
        "forecast",
        "40%",
        "fast",
        "default",
        "GFLOP/s",
        "advice: ",
    ):
        assert part in page
    words = shlex.split(lines[-1])
    assert words[:3] == ["lillama", "compress", str(mixtral)]
    words[3] = str(tmp_path / words[3])
    code, _, err = command(*words[1:], "--preset", "fast")
    assert (code, err) == (0, "")
    assert (Path(words[3]) / "report.json").is_file()


def test_cli_advice_as_json(command, mixtral):
    code, out, err = command("plan", mixtral, "--advise", "--reduction", 0.3, *FEW, "--json")
    assert (code, err, len(out.splitlines())) == (0, "", 1)
    document = json.loads(out)
    assert document["recommendation"]["reduction"] == 0.3
    assert {"spectra", "forecast", "device", "warnings", "caveats"} <= document.keys()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--reduction", 0.2, "--retain", 0.9], "--retain of plan need --advise"),
        (["--reduction", 0.2, "--text", "t", "--device", "cpu"], "--text, --device of plan need"),
        (["--advise", "--strategy", "uniform"], "leave --strategy uniform out"),
        (["--advise", "--no-train"], "leave --no-train out"),
        (["--advise", "--preset", "paper"], "--preset with --advise must be one of fast, default"),
        (["--advise", "--retain", "2"], "--retain must lie between 0 and 1"),
        (["--advise", "--reduction", "0.9"], "--reduction 0.9 cannot be reached"),
        (["--advise", "--activation-memory", "much"], "--activation-memory must be a size"),
    ],
)
def test_cli_advice_mistakes_are_one_line(options, part, command, mamba):
    code, out, err = command("plan", mamba, *options)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("lillama: error: ") and part in err


def test_sparkline_falls_from_left_to_right():
    ramp = cli_advice.BLOCKS
    assert cli_advice.sparkline([4.0, 2.0, 1.0, 0.0], 4, ramp) == "\u2588\u2585\u2583\u2581"
    line = cli_advice.sparkline([float(n) for n in range(64, 0, -1)], 10, cli_advice.ASCII)
    assert len(line) == 10 and line[0] == "#" and line[-1] == "_"
    heights = [cli_advice.ASCII.index(sign) for sign in line]
    assert heights == sorted(heights, reverse=True)
    assert cli_advice.sparkline([0.0, 0.0], 10, ramp) == "\u2581\u2581"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (5.26, "5.3 s"), (100, "100 s"), (121, "2 min"), (7300, "2 h"), (2e5, "2 d")],
)
def test_durations(seconds, shown):
    assert cli_advice._duration(seconds) == shown
