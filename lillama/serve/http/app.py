"""The routes: OpenAI's completions and chat completions over any Engine."""

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lillama.config_serve import ServeConfig
from lillama.hub import model_name
from lillama.serve.engine.requests import Engine, Event
from lillama.serve.http.answer import Answer, ChatAnswer, CompletionAnswer, sse
from lillama.serve.http.errors import ApiError, error_body, explain_validation
from lillama.serve.http.gate import Gate
from lillama.serve.http.job import Disconnected, EngineStopped, Job
from lillama.serve.http.metrics import CONTENT_TYPE, Metrics
from lillama.serve.http.schema import ChatRequest, CompletionRequest, StreamOptions
from lillama.serve.http.tokens import Tokens
from lillama.version import __version__

__all__ = ["Service", "create_app", "drain"]

logger = logging.getLogger(__name__)

# How long an answer may get where the client does not say: OpenAI's for completions; a chat may use
# what is left of the model's length, but a model that forgets to end does not run for a million
# tokens.
COMPLETION_TOKENS = 16
CHAT_TOKENS = 4096


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


def _error_response(error: ApiError) -> Response:
    return Response(error_body(error), error.status, error.headers, "application/json")


@dataclass
class _Inputs:
    """For each prompt its token ids, and how long its answers may get."""

    prompts: list[list[int]] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)


class Service:
    """What the routes share.

    Args:
        engine: started.
        tokenizer: of transformers.
        config: limits and names.
    """

    def __init__(self, engine: Engine, tokenizer: Any, config: ServeConfig) -> None:
        self.engine = engine
        self.tokens = Tokens(tokenizer)
        self.config = config
        self.metrics = Metrics(engine)
        self.name = config.served_name or model_name(config.model)
        self.created = int(time.time())
        self.engine_stopped = False

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            message = f"the model {name!r} does not exist here; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_choices(self, choices: int) -> None:
        limit = self.config.max_choices
        if choices > limit:
            message = f"n times the number of prompts is {choices}; at most {limit} are allowed"
            raise ApiError(400, message, param="n", code="invalid_value")

    def max_new_tokens(self, prompt_tokens: int, asked: int | None, param: str, usual: int) -> int:
        """Raises ApiError where prompt and answer do not fit in the model."""
        limit = self.engine.max_length
        left = limit - prompt_tokens
        wanted = min(usual, left) if asked is None else asked
        if left < 1 or wanted > left:
            raise ApiError(
                400,
                f"this model's maximum context length is {limit} tokens; the {param} has "
                f"{prompt_tokens} and {'some' if asked is None else asked} were asked for on top; "
                "shorten one of them",
                param=param,
                code="context_length_exceeded",
            )
        return wanted

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        self.check_choices(len(body.prompt) * body.n)
        return await self._run(body, self._completion_inputs(body), CompletionAnswer, request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self.check_model(body.model)
        self.check_choices(body.n)
        return await self._run(body, self._chat_inputs(body), ChatAnswer, request)

    async def _completion_inputs(self, body: CompletionRequest) -> _Inputs:
        inputs = _Inputs()
        for prompt in body.prompt:
            ids = await self.tokens.encode(prompt) if isinstance(prompt, str) else prompt
            inputs.prompts.append(ids)
            inputs.limits.append(
                self.max_new_tokens(len(ids), body.max_tokens, "prompt", COMPLETION_TOKENS)
            )
        return inputs

    async def _echo(self, body: CompletionRequest) -> list[str]:
        """For each choice the prompt to begin it with."""
        texts = [
            prompt if isinstance(prompt, str) else await self.tokens.decode(prompt)
            for prompt in body.prompt
        ]
        return [text for text in texts for _ in range(body.n)]

    async def _chat_inputs(self, body: ChatRequest) -> _Inputs:
        ids = await self.tokens.encode_chat([message.plain() for message in body.messages])
        limit = self.max_new_tokens(len(ids), body.limit, "messages", CHAT_TOKENS)
        return _Inputs([ids], [limit])

    async def _run(
        self,
        body: CompletionRequest | ChatRequest,
        preparation: Coroutine[Any, Any, _Inputs],
        kind: type[Answer],
        request: Request,
    ) -> Response:
        job = Job(self.engine, self.metrics, request.receive, self.config.request_timeout_s)
        try:
            inputs = await job.guard(preparation)
            asked = [
                (ids, body.params(limit, choice))
                for ids, limit in zip(inputs.prompts, inputs.limits, strict=True)
                for choice in range(body.n)
            ]
            names = None if body.num_logprobs is None else self.tokens
            prompt_tokens = sum(map(len, inputs.prompts))
            answer = kind(self.name, len(asked), prompt_tokens, names)
            job.submit(asked)
            self.engine_stopped = False
            if isinstance(body, CompletionRequest) and body.echo:
                # not before: now the engine has checked the ids
                answer.echo = await job.guard(self._echo(body))
            events = job.events()
            if body.stream:
                # the first events come before the status: a failure until then has its own
                first = await anext(events)
                return EventStream(job, answer, first, events, body.stream_options)
            async for batch in events:
                await answer.add(batch)
            whole = await answer.whole()
        except EngineStopped:
            self.engine_stopped = True
            raise ApiError(503, "the engine has stopped", code="engine_stopped") from None
        except BaseException:
            job.close()
            raise
        job.close()
        return JsonResponse(whole)


class EventStream(Response):
    """A job's events as server-sent events."""

    def __init__(
        self,
        job: Job,
        answer: Answer,
        first: list[tuple[int, Event]],
        events: AsyncIterator[list[tuple[int, Event]]],
        options: StreamOptions | None,
    ) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"  # nginx would collect the whole answer
        self.job = job
        self.answer = answer
        self.first = first
        self.events = events
        self.options = options or StreamOptions()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for body in self._chunks():
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            except ApiError as error:
                body = sse(error.document())
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except Disconnected:
            pass
        finally:
            self.job.close()

    async def _chunks(self) -> AsyncIterator[bytes]:
        usage = None
        if self.options.include_usage or self.options.continuous_usage_stats:
            usage = self.options.continuous_usage_stats
        for choice in await self.answer.add(self.first):
            yield self.answer.chunk([choice], usage)
        async for batch in self.events:
            for choice in await self.answer.add(batch):
                yield self.answer.chunk([choice], usage)
        if self.options.include_usage:
            yield self.answer.chunk([], True)
        yield b"data: [DONE]\n\n"


def read_page() -> tuple[bytes, str]:
    """The page, and the Content-Security-Policy that lets run what is written in it and nothing
    else."""
    page = files("lillama.serve.http").joinpath("web.html").read_text("utf-8")

    def sources(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found]
        return " ".join(f"'sha256-{digest.decode('ascii')}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page.encode(), policy


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: Any) -> Response:
        return _error_response(error)

    @app.exception_handler(Exception)
    async def hide(request: Request, error: Any) -> Response:
        # raised again by starlette once this is sent, and logged by the gate
        return _error_response(ApiError(500, "internal error", code="internal_error"))

    @app.exception_handler(Disconnected)
    async def forget(request: Request, error: Any) -> Response:
        return Response(status_code=499)  # nobody sees it

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: Any) -> Response:
        return _error_response(explain_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: Any) -> Response:
        path = f"{request.method} {request.url.path}"
        message = str(error.detail) if error.status_code == 400 else f"no route for {path[:100]}"
        return _error_response(ApiError(error.status_code, message, headers=error.headers))


def create_app(service: Service, api_keys: Sequence[str]) -> Gate:
    """The ASGI application, its Gate outside."""
    app = FastAPI(title="lillama", version=__version__, docs_url=None, redoc_url=None)
    _answer_errors(app)
    gate = Gate(app, service.config, service.metrics, api_keys)
    page, policy = read_page()
    engine = service.engine

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.completions(body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await service.chat(body, request)

    @app.get("/v1/models")
    async def models() -> Response:
        # max_model_len is vLLM's; has_chat_template is ours
        card = {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "lillama",
            "max_model_len": engine.max_length,
            "has_chat_template": service.tokens.has_chat_template,
        }
        return JsonResponse({"object": "list", "data": [card]})

    @app.get("/health")
    async def health() -> Response:
        state = "draining" if gate.draining else "stopped" if service.engine_stopped else "ok"
        return JsonResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def web() -> Response:
        headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return Response(page, headers=headers, media_type="text/html")

    return gate


async def drain(gate: Gate, service: Service) -> None:
    """Refuse what is new, let what was accepted go on for at most --drain-s, end the engine."""
    gate.draining = True
    logger.info("draining: %d requests", gate.active)
    deadline_s = time.monotonic() + service.config.drain_s
    while gate.active and time.monotonic() < deadline_s:
        await asyncio.sleep(0.02)
    await asyncio.to_thread(service.engine.stop, 0.0)
    # what was cut off still gets its error
    deadline_s = time.monotonic() + 1
    while gate.active and time.monotonic() < deadline_s:
        await asyncio.sleep(0.02)
    service.tokens.close()
