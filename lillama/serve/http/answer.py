"""What the server answers, as OpenAI's API words it: whole, or as server-sent events."""

import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lillama.serve.engine.requests import Event, Finished, Token
from lillama.serve.http.tokens import Tokens

__all__ = ["Answer", "ChatAnswer", "CompletionAnswer", "sse"]

LOWEST = -9999.0  # JSON has no infinity; vLLM's number for a probability of 0


def sse(document: dict[str, Any]) -> bytes:
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return b"data: " + text.encode("ascii") + b"\n\n"


def _finite(logprob: float | None) -> float:
    return LOWEST if logprob is None or not math.isfinite(logprob) else max(logprob, LOWEST)


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None
    num_tokens: int = 0
    # where in the text the next token starts, as logprobs count
    offset: int = 0
    begun: bool = False


class Answer:
    """The answer to one request, grown event by event.

    Args:
        model: the served name.
        choices: prompts times n.
        prompt_tokens: of all prompts, each counted once.
        tokens: turns ids to text for logprobs; None where none were asked for.

    Attributes:
        echo: for each choice the text to begin with; () for none.
    """

    kind = ""
    chunk_kind = ""
    id_prefix = ""

    def __init__(
        self,
        model: str,
        choices: int,
        prompt_tokens: int,
        tokens: Tokens | None,
    ) -> None:
        self.head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.prompt_tokens = prompt_tokens
        self.tokens = tokens
        self.choices = [_Choice() for _ in range(choices)]
        self.echo: Sequence[str] = ()

    @property
    def usage(self) -> dict[str, int]:
        generated = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }

    async def add(self, batch: Sequence[tuple[int, Event]]) -> list[dict[str, Any]]:
        """Take events in; the choices of chunks for a stream, one for each choice that got any."""
        news: dict[int, _Choice] = {}
        for index, event in batch:
            new = news.setdefault(index, _Choice())
            new.text.append(event.text)
            if isinstance(event, Finished):
                new.reason = event.reason
                self.choices[index].num_tokens = event.completion_tokens
            else:
                new.tokens.append(event)
                self.choices[index].num_tokens += 1
        chunks = []
        for index, new in news.items():
            choice = self.choices[index]
            text = "".join(new.text)
            if not choice.begun and self.echo:
                text = self.echo[index] + text
            logprobs = None
            if self.tokens is not None:
                logprobs = await self._logprobs(self.tokens, new.tokens, choice)
            if text or new.reason or (logprobs is not None and new.tokens):
                chunks.append(self._chunk(index, text, logprobs, new.reason, not choice.begun))
                choice.begun = True
            choice.text.append(text)
            if self.tokens is not None:
                choice.tokens += new.tokens
            choice.reason = new.reason or choice.reason
        return chunks

    def chunk(self, choices: list[dict[str, Any]], usage: bool | None) -> bytes:
        """usage: True shows the counts so far, False a null, None nothing."""
        document = {**self.head, "object": self.chunk_kind, "choices": choices}
        if usage is not None:
            document["usage"] = self.usage if usage else None
        return sse(document)

    async def whole(self) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(self.choices):
            logprobs = None
            if self.tokens is not None:
                logprobs = await self._logprobs(self.tokens, choice.tokens, _Choice())
            choices.append(self._whole(index, "".join(choice.text), logprobs, choice.reason))
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage}

    async def _logprobs(
        self, names: Tokens, tokens: Sequence[Token], choice: _Choice
    ) -> dict[str, Any]:
        ids = {token.token_id for token in tokens}
        ids |= {token_id for token in tokens for token_id, _ in token.top_logprobs}
        return self._logprobs_of(tokens, await names.texts(ids), choice)

    def _chunk(
        self, index: int, text: str, logprobs: Any, reason: str | None, first: bool
    ) -> dict[str, Any]:
        raise NotImplementedError

    def _whole(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs_of(
        self, tokens: Sequence[Token], texts: dict[int, str], choice: _Choice
    ) -> dict[str, Any]:
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def _chunk(
        self, index: int, text: str, logprobs: Any, reason: str | None, first: bool
    ) -> dict[str, Any]:
        return self._whole(index, text, logprobs, reason)

    def _whole(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs_of(
        self, tokens: Sequence[Token], texts: dict[int, str], choice: _Choice
    ) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(texts[token.token_id])
        return {
            "tokens": [texts[token.token_id] for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            # likeliest first; the chosen one is always among them
            "top_logprobs": [
                {texts[i]: _finite(p) for i, p in (*t.top_logprobs, (t.token_id, t.logprob))}
                for t in tokens
            ],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def _chunk(
        self, index: int, text: str, logprobs: Any, reason: str | None, first: bool
    ) -> dict[str, Any]:
        delta = {"role": "assistant"} if first else {}
        if text or first:
            delta["content"] = text
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _whole(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs_of(
        self, tokens: Sequence[Token], texts: dict[int, str], choice: _Choice
    ) -> dict[str, Any]:
        def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
            text = texts[token_id]
            raw = list(text.encode("utf-8", "replace"))
            return {"token": text, "logprob": _finite(logprob), "bytes": raw}

        content = [
            {
                **entry(token.token_id, token.logprob),
                "top_logprobs": [entry(i, p) for i, p in token.top_logprobs],
            }
            for token in tokens
        ]
        return {"content": content}
