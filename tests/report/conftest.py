"""Two compressions for all tests of the report, and what they left."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import lillama
from tests.report.html_page import Page


@dataclass
class Run:
    """A compression; `html` is its page with everything on it."""

    model: Path
    out: Path
    events: Path | None = None
    eval: Path | None = None
    html: str = ""

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "report.json").read_text("utf-8"))

    @property
    def ranks(self) -> dict[str, int]:
        config = json.loads((self.out / "config.json").read_text("utf-8"))
        return config["quantization_config"]["ranks"]

    @property
    def page(self) -> Page:
        return Page(self.html)

    def write(self, **options: Any) -> str:
        lillama.report(self.out, **{"events": self.events, "eval": self.eval, **options})
        return (self.out / "report.html").read_text("utf-8")

    def copy(self, folder: Path, **changes: Any) -> "Run":
        """Copy it, to be damaged; changes: of report.json, None takes an entry away."""
        shutil.copytree(self.out, folder / "out")
        run = Run(self.model, folder / "out", self.events, self.eval)
        (run.out / "report.html").unlink(missing_ok=True)
        run.edit("report.json", **changes)
        return run

    def edit(self, name: str, **changes: object) -> None:
        values = json.loads((self.out / name).read_text("utf-8")) | changes
        values = {key: value for key, value in values.items() if value is not None}
        (self.out / name).write_text(json.dumps(values), "utf-8")


@pytest.fixture(scope="session")
def run(make_checkpoint, text_file, tmp_path_factory, device) -> Run:
    """A mixture of experts, trained, with events and a comparison; do not change the folder."""
    folder = tmp_path_factory.mktemp("report")
    model = make_checkpoint("mixtral", tie_word_embeddings=False)
    found = Run(model, folder / "out", folder / "events.jsonl", folder / "eval.json")
    targets = ("w1", "w2", "w3", "embed_tokens", "lm_head")
    lillama.compress(
        model, found.out, reduction=0.4, text=text_file, tokens=600, seq_len=32, targets=targets,
        preset="default", events=found.events, device=str(device),
    )  # fmt: skip
    quality = lillama.eval(found.out, text_file, against=model, seq_len=64, device=str(device))
    found.eval.write_text(json.dumps(quality), "utf-8")
    found.html = found.write()
    return found


@pytest.fixture(scope="session")
def plain(mamba, text_file, tmp_path_factory, device) -> Run:
    """A Mamba, not trained and without gradients; its base has a hostile name."""
    folder = tmp_path_factory.mktemp("plain")
    model = shutil.copytree(mamba, folder / "<b>&'\" base")
    found = Run(model, folder / "out")
    lillama.compress(
        model, found.out, reduction=0.2, text=text_file, tokens=300, seq_len=32, train=False,
        preset="whitened", device=str(device),
    )  # fmt: skip
    found.html = found.write()
    return found
