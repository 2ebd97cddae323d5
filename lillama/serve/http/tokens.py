"""The tokenizer behind the server, on threads of its own: a tokenizer serves one caller at a time,
and 2 MB of text take it seconds. Long texts have a second one, so that they wait for each other and
short ones do not wait for them."""

import asyncio
import copy
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jinja2

from lillama.serve.http.errors import ApiError

__all__ = ["Tokens"]


# Characters; so many take some 50 ms.
LONG_TEXT = 50_000


class _Lane:
    """A tokenizer and its thread."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def run(self, function: Any, *arguments: Any) -> Any:
        """function(tokenizer, *arguments), after what was asked before."""
        return await asyncio.get_running_loop().run_in_executor(
            self.thread, function, self.tokenizer, *arguments
        )


class Tokens:
    """Text to token ids and back.

    Args:
        tokenizer: of transformers; used by nobody else.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.has_chat_template = bool(tokenizer.chat_template)
        self._texts: dict[int, str] = {}
        self._short, self._long = _Lane(tokenizer), _Lane(copy.deepcopy(tokenizer))

    async def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; special: with the beginning-of-text token, where the model has one."""
        lane = self._long if len(text) > LONG_TEXT else self._short
        return await lane.run(_encode, text, special)

    async def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a chat up to where the assistant speaks.

        Raises:
            ApiError: the model has no chat template, or its template refuses these messages.
        """
        if not self.has_chat_template:
            raise ApiError(
                400,
                "this model has no chat template; use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        text = await self._short.run(_render, messages)
        # the template wrote the special tokens
        return await self.encode(text, special=False)

    async def decode(self, token_ids: Sequence[int]) -> str:
        lane = self._long if len(token_ids) > LONG_TEXT else self._short
        return await lane.run(_decode, token_ids)

    async def texts(self, token_ids: Iterable[int]) -> dict[int, str]:
        """What each token is by itself."""
        missing = [token_id for token_id in token_ids if token_id not in self._texts]
        if missing:
            self._texts.update(await self._short.run(_decode_each, missing))
        return self._texts

    def close(self) -> None:
        for lane in (self._short, self._long):
            lane.thread.shutdown(wait=False, cancel_futures=True)


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(token_ids))


def _decode_each(tokenizer: Any, token_ids: Sequence[int]) -> dict[int, str]:
    return {token_id: str(tokenizer.decode([token_id])) for token_id in token_ids}


def _render(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except jinja2.TemplateError as error:
        message = f"the model's chat template refuses these messages: {error}"
        raise ApiError(400, message, param="messages", code="invalid_value") from error
