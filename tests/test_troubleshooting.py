"""docs/troubleshooting.md: each message of its tables is what a call or command really says."""

import re
from pathlib import Path
from typing import Any

import pytest

import lillama
from tests import messages_input, messages_run
from tests.messages import CASES, Kit

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
ROWS = re.findall(r"^\| `(.+?)` \|", PAGE.read_text("utf-8"), re.M)
assert messages_input and messages_run  # importing them fills CASES


@pytest.fixture(scope="module")
def small(mamba: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "small"
    options: dict[str, Any] = {"tokens": 300, "seq_len": 32, "device": "cpu"}
    lillama.compress(
        mamba, out, reduction=0.2, text=text_file, preset="whitened", train=False, **options
    )
    return out


def test_every_row_has_its_case() -> None:
    assert len(ROWS) == len(set(ROWS)) and set(ROWS) == set(CASES)


@pytest.mark.parametrize("message", ROWS)
def test_message_is_what_is_said(
    message, mamba, mixtral, small, text_file, tmp_path, monkeypatch, make_checkpoint, capfd
):
    kit = Kit(mamba, mixtral, small, text_file, tmp_path, monkeypatch, make_checkpoint)
    with pytest.raises((lillama.LillamaError, RuntimeError, SystemExit)) as caught:
        CASES[message](kit)
    said = str(caught.value)
    if isinstance(caught.value, SystemExit):
        said = capfd.readouterr().err.strip().removeprefix("lillama: error: ")
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    assert re.fullmatch(pattern + ".*", said), said
    assert "\n" not in said.strip()
