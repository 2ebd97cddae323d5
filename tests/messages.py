"""What raises each message of docs/troubleshooting.md: the parts that the cases share."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import lillama

CASES: dict[str, Callable[["Kit"], Any]] = {}


@dataclass
class Kit:
    """What a case breaks: checkpoints (copied first), a text, a folder of its own."""

    mamba: Path
    mixtral: Path
    small: Path
    text: Path
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    make_checkpoint: Any

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def copy(self, path: Path) -> Path:
        return Path(shutil.copytree(path, self.folder / "copy"))

    def compress(self, model: Path | None = None, **options: Any) -> None:
        values = {"tokens": 300, "seq_len": 32, "device": "cpu", "preset": "whitened"}
        values |= {"train": False, "reduction": 0.2, "text": self.text, "out": self.out}
        lillama.compress(model or self.mamba, **{**values, **options})

    def written(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def edited_config(self, path: Path, **changes: Any) -> Path:
        copy = self.copy(path)
        config = json.loads((copy / "config.json").read_text())
        for key, value in changes.items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    def edited_weights(self, path: Path, change: Callable[[dict], Any], name: str = "") -> Path:
        copy = self.copy(path)
        for file in copy.glob("*.safetensors"):
            tensors = load_file(file)
            if name in tensors or not name:
                change(tensors)
                save_file(tensors, file, metadata={"format": "pt"})
        return copy


def case(message: str) -> Callable[[Callable[[Kit], Any]], Callable[[Kit], Any]]:
    """The row of the table with this message, and what raises it."""

    def add(function: Callable[[Kit], Any]) -> Callable[[Kit], Any]:
        assert message not in CASES
        CASES[message] = function
        return function

    return add
