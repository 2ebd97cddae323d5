"""The tokenizer behind the server: one thread of its own, since a long text takes a while and a
tokenizer serves one caller at a time."""

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jinja2

from lillama.serve.http_errors import ApiError

__all__ = ["Tokens"]


class Tokens:
    """Text to token ids and back.

    Args:
        tokenizer: of transformers; used by nobody else.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_chat_template = bool(tokenizer.chat_template)
        self._texts: dict[int, str] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; special: with the beginning-of-text token, where the model has one."""
        return await self._run(self._encode, text, special)

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
        return await self._run(self._encode_chat, messages)

    async def decode(self, token_ids: Sequence[int]) -> str:
        return await self._run(self.tokenizer.decode, token_ids)

    async def texts(self, token_ids: Iterable[int]) -> dict[int, str]:
        """What each token is by itself."""
        missing = [token_id for token_id in token_ids if token_id not in self._texts]
        if missing:
            self._texts.update(await self._run(self._decode_each, missing))
        return self._texts

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            message = f"the model's chat template refuses these messages: {error}"
            raise ApiError(400, message, param="messages", code="invalid_value") from error
        # the template wrote the special tokens
        return self._encode(str(text), special=False)

    def _decode_each(self, token_ids: Sequence[int]) -> dict[int, str]:
        return {token_id: str(self.tokenizer.decode([token_id])) for token_id in token_ids}
