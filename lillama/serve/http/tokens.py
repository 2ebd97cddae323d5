"""The tokenizer behind the server, on threads of its own: a tokenizer serves one caller at a time,
and 2 MB of text take it seconds. Long texts have a second one, so that they wait for each other and
short ones do not wait for them."""

import asyncio
import copy
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jinja2

from lillama.serve.http.errors import ApiError

__all__ = ["Tokens"]

# Characters; so many take some 50 ms.
LONG_TEXT = 50_000

T = TypeVar("T")


class Tokens:
    """Text to token ids and back, by a tokenizer of transformers that nobody else uses."""

    def __init__(self, tokenizer: Any) -> None:
        self.has_chat_template = bool(tokenizer.chat_template)
        self._texts: dict[int, str] = {}
        self._lanes = [
            (made, ThreadPoolExecutor(1, thread_name_prefix="tokenizer"))
            for made in (tokenizer, copy.deepcopy(tokenizer))
        ]

    async def _run(self, size: int, work: Callable[[Any], T]) -> T:
        """Return work(tokenizer), done after what was asked before."""
        tokenizer, thread = self._lanes[size > LONG_TEXT]
        return await asyncio.get_running_loop().run_in_executor(thread, work, tokenizer)

    async def encode(self, text: str, special: bool = True) -> list[int]:
        """Return token ids; special: with the beginning-of-text token, where the model has one."""
        options = {"add_special_tokens": special}
        return await self._run(len(text), lambda t: list(t(text, **options)["input_ids"]))

    async def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the token ids of a chat up to where the assistant speaks; ApiError where the model
        has no chat template, or its template refuses these messages."""
        if not self.has_chat_template:
            message = "this model has no chat template; use /v1/completions"
            raise ApiError(400, message, "no_chat_template", "messages")
        options = {"tokenize": False, "add_generation_prompt": True}
        try:
            text = await self._run(0, lambda t: t.apply_chat_template(messages, **options))
        except jinja2.TemplateError as error:
            message = f"the model's chat template refuses these messages: {error}"
            raise ApiError(400, message, "invalid_value", "messages") from error
        # the template wrote the special tokens
        return await self.encode(text, special=False)

    async def decode(self, token_ids: Sequence[int]) -> str:
        return await self._run(len(token_ids), lambda t: str(t.decode(token_ids)))

    async def texts(self, token_ids: Iterable[int]) -> dict[int, str]:
        """Return what each token is by itself."""
        missing = [token_id for token_id in token_ids if token_id not in self._texts]
        if missing:
            self._texts |= await self._run(0, lambda t: {i: str(t.decode([i])) for i in missing})
        return self._texts

    def close(self) -> None:
        for _, thread in self._lanes:
            thread.shutdown(wait=False, cancel_futures=True)
