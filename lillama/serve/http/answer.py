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

__all__ = ["Answer", "ChatAnswer", "sse"]

LOWEST = -9999.0  # JSON has no infinity; vLLM's number for a probability of 0


def sse(document: dict[str, Any]) -> bytes:
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return b"data: " + text.encode("ascii") + b"\n\n"


def _finite(logprob: float | None) -> float:
    return LOWEST if logprob is None or not math.isfinite(logprob) else max(logprob, LOWEST)


@dataclass
class _Choice:
    text: str = ""
    reason: str | None = None
    num_tokens: int = 0
    begun: bool = False
    # where in the text the next token starts, as logprobs count
    offset: int = 0
    logprobs: dict[str, list[Any]] = field(default_factory=dict)


class Answer:
    """The answer to one request of prompts times n choices, grown event by event, as
    /v1/completions words it. Each prompt's tokens count once; `tokens` turns ids to text for
    logprobs, None where none were asked for."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, model: str, choices: int, prompt_tokens: int, tokens: Tokens | None) -> None:
        name = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.head = {"id": name, "created": int(time.time()), "model": model}
        self.prompt_tokens = prompt_tokens
        self.tokens = tokens
        self.choices = [_Choice() for _ in range(choices)]
        self.echo: Sequence[str] = ()  # for each choice the text to begin with

    @property
    def usage(self) -> dict[str, int]:
        given, made = self.prompt_tokens, sum(choice.num_tokens for choice in self.choices)
        return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}

    async def add(self, batch: Sequence[tuple[int, Event]]) -> list[dict[str, Any]]:
        """Take events in; return the choices of a stream's chunks, one for each that got any."""
        news: dict[int, list[Event]] = {}
        for index, event in batch:
            news.setdefault(index, []).append(event)
        grown = [await self._grow(index, events) for index, events in news.items()]
        return [choice for choice in grown if choice is not None]

    async def _grow(self, index: int, events: Sequence[Event]) -> dict[str, Any] | None:
        choice, first = self.choices[index], not self.choices[index].begun
        text = "".join(event.text for event in events)
        if first and self.echo:
            text = self.echo[index] + text
        tokens = [event for event in events if isinstance(event, Token)]
        choice.text += text
        choice.num_tokens += len(tokens)
        if isinstance(events[-1], Finished):
            choice.reason, choice.num_tokens = events[-1].reason, events[-1].completion_tokens
        logprobs = None
        if self.tokens is not None:
            ids = {i for t in tokens for i in (t.token_id, *(top for top, _ in t.top_logprobs))}
            logprobs = self._logprobs(tokens, await self.tokens.texts(ids), choice)
            for key, values in logprobs.items():
                choice.logprobs.setdefault(key, []).extend(values)
        if not (text or choice.reason or (logprobs is not None and tokens)):
            return None
        choice.begun = True
        return self._choice(index, text, logprobs, choice.reason, first)

    def chunk(self, choices: list[dict[str, Any]], usage: bool | None) -> bytes:
        """Return an event; usage: True shows the counts so far, False a null, None nothing."""
        document = {**self.head, "object": self.chunk_kind, "choices": choices}
        if usage is not None:
            document["usage"] = self.usage if usage else None
        return sse(document)

    def whole(self) -> dict[str, Any]:
        choices = [
            self._choice(i, one.text, one.logprobs if self.tokens else None, one.reason)
            for i, one in enumerate(self.choices)
        ]
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage}

    def _choice(
        self, index: int, text: str, logprobs: Any, reason: str | None, first: bool | None = None
    ) -> dict[str, Any]:
        """first: whether it is the first of a stream's chunks; None where it is no chunk."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(
        self, tokens: Sequence[Token], texts: dict[int, str], choice: _Choice
    ) -> dict[str, list[Any]]:
        """What is said of each token, in lists."""
        lists: dict[str, list[Any]]
        lists = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            lists["tokens"].append(texts[token.token_id])
            lists["token_logprobs"].append(_finite(token.logprob))
            # likeliest first; the chosen one is always among them
            top = (*token.top_logprobs, (token.token_id, token.logprob))
            lists["top_logprobs"].append({texts[i]: _finite(p) for i, p in top})
            lists["text_offset"].append(choice.offset)
            choice.offset += len(texts[token.token_id])
        return lists


class ChatAnswer(Answer):
    """The same as /v1/chat/completions words it."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def _choice(
        self, index: int, text: str, logprobs: Any, reason: str | None, first: bool | None = None
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if first is not None:
            said = {"role": "assistant"} if first else {}
            said |= {"content": text} if text or first else {}
        key = "message" if first is None else "delta"
        return {"index": index, key: said, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(
        self, tokens: Sequence[Token], texts: dict[int, str], choice: _Choice
    ) -> dict[str, list[Any]]:
        def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
            text = texts[token_id]
            raw = list(text.encode("utf-8", "replace"))
            return {"token": text, "logprob": _finite(logprob), "bytes": raw}

        content = []
        for token in tokens:
            top = [entry(*one) for one in token.top_logprobs]
            content.append({**entry(token.token_id, token.logprob), "top_logprobs": top})
        return {"content": content}
