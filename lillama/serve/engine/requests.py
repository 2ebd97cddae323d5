"""What a client asks of an engine and hears back."""

import math
from dataclasses import dataclass
from typing import Literal

from lillama.errors import InputError, LillamaError

__all__ = ["Busy", "Event", "FinishReason", "Finished", "SamplingParams", "Token"]

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Busy(LillamaError):
    """The queue is full or the engine is stopping; try again later."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Steps run in the order of the fields, as in transformers' generate."""

    max_new_tokens: int = 128
    # logits of tokens in prompt or output are divided by it where positive, else multiplied; 1: off
    repetition_penalty: float = 1.0
    # 0 is greedy, and then the filters below have no effect
    temperature: float = 0.0
    # only the k likeliest tokens; 0: off
    top_k: int = 0
    # only the smallest set of likeliest tokens whose probabilities sum to at least it; 1: off
    top_p: float = 1.0
    # only tokens at least so likely relative to the likeliest; 0: off
    min_p: float = 0.0
    # the same seed gives the same tokens whatever else is in the batch; None draws one
    seed: int | None = None
    # strings that end the text and are not part of it
    stop: tuple[str, ...] = ()
    # log-probabilities, of the model's own distribution, of the chosen token and the n likeliest
    logprobs: int | None = None
    # go on after the end-of-text token
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
            ("stop", all(self.stop) and len(self.stop) <= 16, "at most 16 strings, none empty"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
        )
        for name, holds, wanted in checks:  # NaN fails every comparison
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")


@dataclass(frozen=True)
class Token:
    """One generated token. text is what it adds: empty while a character is incomplete, or while
    the text could be the beginning of a stop string."""

    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


@dataclass(frozen=True)
class Finished:
    """The last event of a request. text was held back and is now known to be part of the output;
    the end-of-text token is not counted."""

    reason: FinishReason
    text: str
    prompt_tokens: int
    completion_tokens: int
    error: str | None = None  # one line


Event = Token | Finished
