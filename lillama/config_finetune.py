"""Every default of `lillama finetune`, in a frozen dataclass."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from lillama.config import check_at_least, check_device
from lillama.data.datasets import HubText
from lillama.errors import InputError
from lillama.models.hub import recorded_model

__all__ = ["FinetuneConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """Options of `lillama finetune`."""

    model: Path
    out: Path
    base: Path
    text: tuple[Path | HubText, ...]
    tokens: int = 2_000_000
    # further ones, which the base model writes
    own_tokens: int = 0
    seq_len: int = 512
    batch_size: int = 8
    packing: bool = True
    # how often every token is seen
    epochs: int = 1
    # of AdamW, at its peak; None: from the width and from how far the model is from its base
    learning_rate: float | None = None
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False
    # how often the model is judged on held-out tokens
    evaluations: int = 8

    def __post_init__(self) -> None:
        if not self.text:
            raise InputError("finetune needs training text; give at least one --text FILE")
        check_at_least("--tokens", self.tokens, 1)
        check_at_least("--own-tokens", self.own_tokens, 0)
        check_at_least("--seq-len", self.seq_len, 2)
        check_at_least("--batch-size", self.batch_size, 1)
        check_at_least("--epochs", self.epochs, 1)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(
                f"--learning-rate must be a finite number > 0, got {self.learning_rate}"
            )
        check_device(self.device)

    def recorded(self) -> dict[str, object]:
        """Plain JSON values of what decides the result."""
        plain = {
            k: v
            for k, v in dataclasses.asdict(self).items()
            if k not in ("out", "device", "overwrite")
        }
        texts = {"text": [str(path) for path in self.text]}
        return {**plain, **recorded_model(self.model), **recorded_model(self.base, "base"), **texts}
