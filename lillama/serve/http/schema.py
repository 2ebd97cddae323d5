"""The two requests that the HTTP server takes, as OpenAI's API words them, with vLLM's names for
what that lacks. Everything a client may send is accepted here, ignored by name or refused."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
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
    **dict.fromkeys(("audio", "prediction", "verbosity", "web_search_options"), ()),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), (0,)),
    **dict.fromkeys(("function_call", "tool_choice"), ("none", "auto")),
    **dict.fromkeys(("functions", "tools"), ([],)),
    "best_of": (1,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    # of vLLM
    **dict.fromkeys(("bad_words", "stop_token_ids"), ([],)),
    **dict.fromkeys(("guided_json", "prompt_logprobs", "structured_outputs"), ()),
    "min_tokens": (0,),
    "use_beam_search": (False,),
}

# Fields that SamplingParams has under the same name
SAME = ("repetition_penalty", "temperature", "top_p", "min_p", "ignore_eos")


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    # False == 0 in Python, not in JSON
    return any(value == c and isinstance(value, bool) == isinstance(c, bool) for c in choices)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode: half of a surrogate pair") from None
    return text


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(part) is int for part in value)


def _prompts(value: Any) -> list[str | list[int]]:
    """Turn a prompt or a list of prompts into a list. By hand: a union of lists would report every
    item of a long list."""
    wanted = "must be a string, token ids, or a list of strings or of token ids"
    prompts = [value] if isinstance(value, str) or _are_ids(value) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"{wanted}, and not empty")
    for prompt in prompts:
        if isinstance(prompt, str):
            _encodable(prompt)
        elif not _are_ids(prompt):
            raise ValueError(wanted)
    return prompts


_STRING = {"type": "string"}
_STRINGS = {"type": "array", "items": _STRING}
_IDS = {"type": "array", "items": {"type": "integer"}}
_PROMPTS = {"anyOf": [_STRING, _IDS, _STRINGS, {"type": "array", "items": _IDS}]}

Text = Annotated[str, AfterValidator(_encodable)]
Prompts = Annotated[list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPTS)]
Number = Annotated[float, Field(allow_inf_nan=False)]
NumLogprobs = Annotated[int, Field(ge=0, le=20)]


def _refuse(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code, param)


class _Strict(BaseModel, strict=True, extra="forbid", hide_input_in_errors=True):
    pass


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
            if name not in NEUTRAL or name in cls.model_fields:
                kept[name] = value
            elif not _is_one_of(value, NEUTRAL[name]):
                message = f"{name} is not supported by this server; leave it out"
                raise _refuse(name, message, "unsupported_field")
        return kept

    @model_validator(mode="after")
    def _what_goes_together(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            message = "stream_options is allowed only where stream is true"
            raise _refuse("stream_options", message)
        return self

    @property
    def num_logprobs(self) -> int | None: ...

    def params(self, max_new_tokens: int, choice: int) -> SamplingParams:
        """Return those of the choice-th of n answers to one prompt: a seed gives each another text.
        ApiError where a value is out of range."""
        try:
            return SamplingParams(
                max_new_tokens=max_new_tokens,
                top_k=max(self.top_k, 0),
                seed=None if self.seed is None else self.seed + choice,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                logprobs=self.num_logprobs,
                **{name: getattr(self, name) for name in SAME},
            )
        except InputError as error:
            name = str(error).partition(" ")[0]
            param = "max_tokens" if name == "max_new_tokens" else name
            raise _refuse(param, str(error).replace(name, param, 1)) from error


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool = False
    logprobs: NumLogprobs | None = None

    @model_validator(mode="after")
    def _echo_has_no_logprobs(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            message = "echo together with logprobs is not supported by this server"
            raise _refuse("logprobs", message, "unsupported_field")
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
        """Return what a chat template takes."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: NumLogprobs | None = None

    @model_validator(mode="after")
    def _one_limit_and_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            message = "top_logprobs is allowed only where logprobs is true"
            raise _refuse("top_logprobs", message)
        if None not in (self.max_tokens, self.limit) and self.max_tokens != self.limit:
            message = "max_tokens and max_completion_tokens differ; give one of them"
            raise _refuse("max_tokens", message)
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
