"""What a client asks of an engine and what it hears back. The engine and the HTTP server know each
other only through these."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lillama.errors import InputError, LillamaError

__all__ = [
    "Busy",
    "Completion",
    "Engine",
    "Event",
    "Finished",
    "SamplingParams",
    "Token",
]

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Busy(LillamaError):
    """The queue is full or the engine is stopping; try again later."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Steps run in the order of the fields, as in transformers' generate.

    Attributes:
        max_new_tokens: at most so many tokens, at least 1.
        repetition_penalty: logits of tokens in the prompt or output are divided by it where
            positive and multiplied where negative; 1 is off.
        temperature: 0 is greedy, and then the filters below have no effect.
        top_k: only the k likeliest tokens; 0 is off.
        top_p: only the smallest set of likeliest tokens whose probabilities sum to at least it; 1
            is off.
        min_p: only tokens at least so likely relative to the likeliest; 0 is off.
        seed: of this request alone: the same seed gives the same tokens whatever else is in the
            batch. None draws one.
        stop: strings that end the text; they are not part of it.
        logprobs: log-probabilities (of the model's own distribution, before the steps above) of
            the chosen token and of so many likeliest ones; None leaves them out.
        ignore_eos: go on after the end-of-text token; for benchmarks.
    """

    max_new_tokens: int = 128
    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
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
    """One generated token.

    Attributes:
        token_id: its id.
        text: what it adds to the text; empty while a character is incomplete or while the text
            could be the beginning of a stop string.
        logprob: its log-probability, when asked for.
        top_logprobs: the likeliest (token id, log-probability), likeliest first, when asked for.
    """

    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last event of a request.

    Attributes:
        reason: "stop" (end-of-text token or stop string), "length", "cancelled", or "error".
        text: text that was held back and is now known to be part of the output.
        prompt_tokens: length of the prompt.
        completion_tokens: tokens generated, the end-of-text token not counted.
        error: one line, for reason "error".
    """

    reason: FinishReason
    text: str
    prompt_tokens: int
    completion_tokens: int
    error: str | None = None


Event = Token | Finished


class Completion(Protocol):
    """A request in the queue or in the batch."""

    def cancel(self) -> None:
        """Leave the batch at the next step; Finished("cancelled") follows. No effect when done."""
        ...


class Engine(Protocol):
    """Generates for many requests at once on a thread of its own.

    Attributes:
        max_length: tokens of prompt and output together at most.
    """

    max_length: int

    def start(self) -> None: ...

    def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, work for at most drain_s seconds on what was accepted, cancel the
        rest, and end the thread."""
        ...

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_event: Callable[[Event], None],
    ) -> Completion:
        """Queue a request. Thread-safe.

        Args:
            prompt_ids: at least one token.
            params: how to generate.
            on_event: called on the engine's thread with every Token and once, last, with Finished;
                must return quickly.

        Raises:
            Busy: the queue is full or the engine stops.
            InputError: an empty prompt, unknown ids, or prompt and output longer than max_length.
        """
        ...

    def stats(self) -> Mapping[str, float]:
        """running, waiting (requests now), max_batch, prompt_tokens, generated_tokens, requests,
        errors, steps (totals since the start)."""
        ...
