"""The routes: OpenAI's completions and chat completions over the engine."""

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Coroutine
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from lillama.config import ServeConfig
from lillama.models.hub import model_name
from lillama.serve.engine import LocalEngine
from lillama.serve.engine.requests import Event
from lillama.serve.http.answer import Answer, ChatAnswer, sse
from lillama.serve.http.errors import ApiError, error_response, explain_validation
from lillama.serve.http.gate import Gate
from lillama.serve.http.job import Disconnected, Job
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

# For each prompt its token ids, and how long its answers may get
Inputs = list[tuple[list[int], int]]
Preparation = Coroutine[Any, Any, Inputs]
Body = CompletionRequest | ChatRequest
Events = list[tuple[int, Event]]


class Service:
    """What the routes share: a started engine, a tokenizer of transformers, limits and names."""

    def __init__(self, engine: LocalEngine, tokenizer: Any, config: ServeConfig) -> None:
        self.engine, self.config = engine, config
        self.tokens, self.metrics = Tokens(tokenizer), Metrics(engine)
        self.name = config.served_name or model_name(config.model)
        self.created = int(time.time())

    def check(self, model: str | None, choices: int) -> None:
        if model is not None and model != self.name:
            message = f"the model {model!r} does not exist here; this server has {self.name!r}"
            raise ApiError(404, message, "model_not_found", "model")
        limit = self.config.max_choices
        if choices > limit:
            message = f"n times the number of prompts is {choices}; at most {limit} are allowed"
            raise ApiError(400, message, "invalid_value", "n")

    def max_new_tokens(self, prompt_tokens: int, asked: int | None, param: str, usual: int) -> int:
        """Raises ApiError where prompt and answer do not fit in the model."""
        limit = self.engine.max_length
        left = limit - prompt_tokens
        wanted = min(usual, left) if asked is None else asked
        if left < 1 or wanted > left:
            message = (
                f"this model's maximum context length is {limit} tokens; the {param} has "
                f"{prompt_tokens} and {'some' if asked is None else asked} were asked for on top; "
                "shorten one of them"
            )
            raise ApiError(400, message, "context_length_exceeded", param)
        return wanted

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self.check(body.model, len(body.prompt) * body.n)
        return await self._run(request, body, self._completion_inputs(body), Answer)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self.check(body.model, body.n)
        return await self._run(request, body, self._chat_inputs(body), ChatAnswer)

    async def _completion_inputs(self, body: CompletionRequest) -> Inputs:
        inputs = []
        for prompt in body.prompt:
            ids = await self.tokens.encode(prompt) if isinstance(prompt, str) else prompt
            limit = self.max_new_tokens(len(ids), body.max_tokens, "prompt", COMPLETION_TOKENS)
            inputs.append((ids, limit))
        return inputs

    async def _chat_inputs(self, body: ChatRequest) -> Inputs:
        ids = await self.tokens.encode_chat([message.plain() for message in body.messages])
        return [(ids, self.max_new_tokens(len(ids), body.limit, "messages", CHAT_TOKENS))]

    async def _echo(self, body: CompletionRequest) -> list[str]:
        """Return for each choice the prompt to begin it with."""
        texts = [
            prompt if isinstance(prompt, str) else await self.tokens.decode(prompt)
            for prompt in body.prompt
        ]
        return [text for text in texts for _ in range(body.n)]

    async def _run(
        self, request: Request, body: Body, preparation: Preparation, kind: type[Answer]
    ) -> Response:
        job = Job(self.engine, self.metrics, request.receive, self.config.request_timeout_s)
        try:
            inputs = await job.guard(preparation)
            asked = [(ids, body.params(limit, i)) for ids, limit in inputs for i in range(body.n)]
            names = None if body.num_logprobs is None else self.tokens
            answer = kind(self.name, len(asked), sum(len(ids) for ids, _ in inputs), names)
            job.submit(asked)
            if isinstance(body, CompletionRequest) and body.echo:
                # not before: now the engine has checked the ids
                answer.echo = await job.guard(self._echo(body))
            events = job.events()
            if body.stream:
                # the first events come before the status: a failure until then has its own
                first = await anext(events)
                return EventStream(job, _chunks(answer, first, events, body.stream_options))
            async for batch in events:
                await answer.add(batch)
        except BaseException:
            job.close()
            raise
        job.close()
        return JSONResponse(answer.whole())


async def _chunks(
    answer: Answer, first: Events, rest: AsyncIterator[Events], options: StreamOptions | None
) -> AsyncIterator[bytes]:
    options = options or StreamOptions()
    always = options.continuous_usage_stats
    usage = always if always or options.include_usage else None
    for choice in await answer.add(first):
        yield answer.chunk([choice], usage)
    async for batch in rest:
        for choice in await answer.add(batch):
            yield answer.chunk([choice], usage)
    if options.include_usage:
        yield answer.chunk([], True)
    yield b"data: [DONE]\n\n"


class EventStream(Response):
    """A job's events as server-sent events; an error after they have begun is the last one."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, chunks: AsyncIterator[bytes]) -> None:
        # x-accel-buffering: nginx would collect the whole answer
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.job, self.chunks = job, chunks

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for body in self.chunks:
                    await write(body)
            except ApiError as error:
                await write(sse(error.document()))
            await write(b"", False)
        except Disconnected:
            pass
        finally:
            self.job.close()


def read_page() -> tuple[bytes, dict[str, str]]:
    """Return the page, and headers whose Content-Security-Policy lets run what is written in it and
    nothing else."""
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
    return page.encode(), {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


async def answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, Disconnected):
        return Response(status_code=499)  # nobody sees it
    if isinstance(error, RequestValidationError):
        return error_response(explain_validation(error.errors()))
    if isinstance(error, HTTPException):
        path = f"{request.method} {request.url.path}"
        message = str(error.detail) if error.status_code == 400 else f"no route for {path[:100]}"
        return error_response(ApiError(error.status_code, message), **(error.headers or {}))
    if isinstance(error, ApiError):
        return error_response(error)
    # raised again by starlette once this is sent, and logged by the gate
    return error_response(ApiError(500, "internal error", "internal_error"))


def create_app(service: Service, keys: list[str]) -> Gate:
    """Return the ASGI application, its Gate outside."""
    kinds = (ApiError, Disconnected, RequestValidationError, HTTPException, Exception)
    named: Any = {"title": "lillama", "version": __version__, "docs_url": None, "redoc_url": None}
    app = FastAPI(exception_handlers=dict.fromkeys(kinds, answer_error), **named)
    gate = Gate(app, service.config, service.metrics, keys)
    page, page_headers = read_page()
    app.post("/v1/completions")(service.completions)
    app.post("/v1/chat/completions")(service.chat)

    @app.get("/v1/models")
    async def models() -> Response:
        # max_model_len is vLLM's; has_chat_template is ours
        card = {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "lillama",
            "max_model_len": service.engine.max_length,
            "has_chat_template": service.tokens.has_chat_template,
        }
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/health")
    async def health() -> Response:
        state = "draining" if gate.draining else "stopped" if service.engine.stopped else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def web() -> Response:
        return Response(page, headers=page_headers, media_type="text/html")

    return gate


async def drain(gate: Gate, service: Service) -> None:
    """Refuse what is new, let what was accepted go on for at most --drain-s, end the engine."""

    async def wait(seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        while gate.active and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)

    gate.draining = True
    logger.info("draining: %d requests", gate.active)
    await wait(service.config.drain_s)
    await asyncio.to_thread(service.engine.stop, 0.0)
    await wait(1)  # what was cut off still gets its error
    service.tokens.close()
