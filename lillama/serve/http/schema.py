"""The two requests that the HTTP server takes, as OpenAI's API words them, with vLLM's names for
what that lacks. Everything a client may send is accepted here, ignored by name or refused."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from lillama.errors import InputError
from lillama.serve.engine.requests import SamplingParams
from lillama.serve.http.errors import ApiError

__all__ = ["IGNORED", "NEUTRAL", "ChatRequest", "CompletionRequest", "Message", "StreamOptions"]

# Accepted and without effect on the text.
IGNORED = frozenset(
    "metadata parallel_tool_calls prompt_cache_key prompt_cache_retention safety_identifier "
    "service_tier store user".split()
)

# Known, not done here, and they would change the text: refused unless they say "off".
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    # of vLLM
    "bad_words": ([],),
    "guided_json": (),
    "min_tokens": (0,),
    "prompt_logprobs": (),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "use_beam_search": (False,),
}

TokenIds = list[int]


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    # False == 0 in Python, not in JSON
    return any(value == choice and type(value) is not bool for choice in choices) or (
        value is False and any(choice is False for choice in choices)
    )


def _prompts(value: Any) -> list[str | TokenIds]:
    """A prompt or a list of prompts -> a list. By hand: a union of lists would report every item
    of a long list."""
    wanted = "must be a string, token ids, or a list of strings or of token ids"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{wanted}, and not empty")
    if all(type(item) is int for item in value):
        value = [value]
    for item in value:
        ids = isinstance(item, list) and item and all(type(part) is int for part in item)
        if not (isinstance(item, str) or ids):
            raise ValueError(wanted)
    return value


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode: half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Prompts = Annotated[
    list[str | TokenIds],
    PlainValidator(_prompts),
    AfterValidator(lambda found: [_encodable(p) if isinstance(p, str) else p for p in found]),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class StreamOptions(_Strict):
    """What a stream says beside text; continuous_usage_stats is vLLM's: usage in every chunk."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis; ignored
    continuous_usage_stats: bool = False


class _Request(_Strict):
    model: Text | None = None
    max_tokens: int | None = None
    temperature: Number = 1.0
    top_p: Number = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    seed: int | None = None
    stop: Text | Annotated[list[Text], Field(fail_fast=True)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    # -1, as in vLLM, and 0 are off
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Number = 0.0
    repetition_penalty: Number = 1.0
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_done(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            # null is how typed clients say "not given"
            if value is None or name in IGNORED:
                continue
            if name in NEUTRAL and name not in cls.model_fields:
                if not _is_one_of(value, NEUTRAL[name]):
                    message = f"{name} is not supported by this server; leave it out"
                    raise ApiError(400, message, param=name, code="unsupported_field")
                continue
            kept[name] = value
        return kept

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            message = "stream_options is allowed only where stream is true"
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        return self

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    def params(self, max_new_tokens: int, choice: int) -> SamplingParams:
        """Of the choice-th of n answers to one prompt: a seed gives each another text.

        Raises:
            ApiError: a value out of range.
        """
        try:
            return SamplingParams(
                max_new_tokens=max_new_tokens,
                repetition_penalty=self.repetition_penalty,
                temperature=self.temperature,
                top_k=max(self.top_k, 0),
                top_p=self.top_p,
                min_p=self.min_p,
                seed=None if self.seed is None else self.seed + choice,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                logprobs=self.num_logprobs,
                ignore_eos=self.ignore_eos,
            )
        except InputError as error:
            name = str(error).partition(" ")[0]
            param = "max_tokens" if name == "max_new_tokens" else name
            message = str(error).replace(name, param, 1)
            raise ApiError(400, message, param=param, code="invalid_value") from error


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _echo_has_no_logprobs(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            message = "echo together with logprobs is not supported by this server"
            raise ApiError(400, message, param="logprobs", code="unsupported_field")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True, min_length=1)]
    name: Text | None = None

    def plain(self) -> dict[str, str]:
        """What a chat template takes."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _one_limit_and_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            message = "top_logprobs is allowed only where logprobs is true"
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")
        limits = (self.max_tokens, self.max_completion_tokens)
        if None not in limits and limits[0] != limits[1]:
            message = "max_tokens and max_completion_tokens differ; give one of them"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
