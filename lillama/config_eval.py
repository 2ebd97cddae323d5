"""Every default of `lillama eval`, in a frozen dataclass."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lillama.data.datasets import HubText
from lillama.errors import InputError

__all__ = ["EvalConfig", "Metric"]

Metric = Literal["blocks", "rows", "words"]
# the length of GPTQ's and SparseGPT's tables for rows; words: the model's context
_SEQ_LEN: dict[str, int | None] = {"blocks": 512, "rows": 2048, "words": None}
_DTYPES = ("auto", "float32", "float16", "bfloat16")


def _at_least(name: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise InputError(f"{name} must be at least {minimum}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Options of `lillama eval`."""

    model: Path
    text: tuple[Path | HubText, ...] = ()
    against: Path | None = None
    # what perplexity means: docs/evaluation.md
    metric: Metric = "blocks"
    # None: see `window`
    seq_len: int | None = None
    batch_size: int = 8
    # of lm-evaluation-harness, by name; a folder or a file of further ones; rows of each at most
    tasks: tuple[str, ...] = ()
    task_path: Path | None = None
    limit: int | None = None
    # prompts of the text to continue, greedily and sampled; 0: none
    generations: int = 0
    speed: bool = False
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.text and not self.tasks:
            raise InputError("eval needs text or tasks; give at least one --text FILE, or --tasks")
        if self.metric not in get_args(Metric):
            raise InputError(
                f"--metric must be one of {', '.join(get_args(Metric))}, got {self.metric!r}"
            )
        if self.metric != "blocks" and any(isinstance(text, HubText) for text in self.text):
            raise InputError(
                f"--metric {self.metric} reads files, not datasets of the Hub; give a local file"
            )
        _at_least("--seq-len", self.seq_len, 2)
        _at_least("--batch-size", self.batch_size, 1)
        _at_least("--limit", self.limit, 1)
        _at_least("--generations", self.generations, 0)
        if not self.text:
            given = {
                "--metric": self.metric != "blocks",
                "--seq-len": self.seq_len is not None,
                "--generations": self.generations > 0,
                "--speed": self.speed,
            }
            if unused := [name for name, is_given in given.items() if is_given]:
                raise InputError(f"{unused[0]} is about text; give at least one --text FILE")
        if not self.tasks:
            given = {"--task-path": self.task_path is not None, "--limit": self.limit is not None}
            if unused := [name for name, is_given in given.items() if is_given]:
                raise InputError(f"{unused[0]} is about tasks; name them with --tasks")
        if self.dtype not in _DTYPES:
            raise InputError(f"--dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(f"--device must be auto, cpu, cuda or cuda:N, got {self.device!r}")

    @property
    def window(self) -> int | None:
        """Tokens of a block, or of a window of words; None: what the model has."""
        return _SEQ_LEN[self.metric] if self.seq_len is None else self.seq_len
