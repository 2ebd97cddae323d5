"""Tiny models of every family and what compress makes of them, made once for all tests here."""

from pathlib import Path
from typing import Any

import pytest

import lillama
from lillama.models.families import FAMILIES


@pytest.fixture(scope="session")
def base(make_checkpoint):
    """base(kind) -> folder of a tiny random model."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_checkpoint(kind)
        return made[kind]

    return of


@pytest.fixture(scope="session")
def compressed(base, text_file, tmp_path_factory, device):
    """compressed(kind, preset) -> (folder, report), trained."""
    made: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}

    def of(kind: str, preset: str = "default") -> tuple[Path, dict[str, Any]]:
        if (kind, preset) not in made:
            out = tmp_path_factory.mktemp("compressed") / kind
            tokens = 300
            if preset == "whitened" and (FAMILIES[kind].experts is not None or kind == "gpt2"):
                # random routers decide by so little that the first steps only send tokens
                # elsewhere; two steps make GPT-2's first block worse
                tokens = 6000
            report = lillama.compress(
                base(kind), out, text=text_file, preset=preset, reduction=0.2,
                tokens=tokens, seq_len=32, device=str(device),
            )  # fmt: skip
            made[kind, preset] = out, report
        return made[kind, preset]

    return of
