"""Generate for many requests at once: a thread that admits, prefills, steps, and tells.

A request takes a slot, its prompt is computed in chunks between the steps of the others, and from
then on it gets a token at every step until it ends; the last live slot then moves into its place.
Requests join and leave at any step. Nothing here grows with the number of requests served.
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lillama.checkpoint.format import read_config
from lillama.errors import InputError, RunError
from lillama.integrations.loading import choose_device, load_model, load_tokenizer
from lillama.serve.engine.requests import Busy, Event, Finished, FinishReason, SamplingParams, Token
from lillama.serve.engine.slots import Chosen, Decoder
from lillama.serve.engine.text import TextStream
from lillama.serve.models import AttentionRunner, MambaRunner
from lillama.serve.models.runner import PREFILL_CHUNK, Prefilled

__all__ = ["LocalEngine", "Request"]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    """A request in the queue or in the batch."""

    prompt: list[int]
    params: SamplingParams
    on_event: Callable[[Event], None]
    text: TextStream
    tokens: int = 0
    cancelled: bool = False
    done: bool = False
    broken: bool = False
    ids: torch.Tensor | None = None
    prefill: Iterator[Prefilled | None] | None = None

    def cancel(self) -> None:
        """Leave at the next step; Finished("cancelled") follows. No effect when done."""
        self.cancelled = True


class LocalEngine:
    """Generates for many requests at once on a thread of its own, from a checkpoint folder, dense
    or compressed.

    Args:
        model: of a Mamba-1, or of a model type in `lillama.serve.models.MODEL_TYPES`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: as `lillama.integrations.loading.load_model`.
        max_batch: requests that generate at once.
        max_length: tokens of prompt and output together; None is what the model has positions for,
            at most 4096, or 2^20 (Mamba). The attribute is what came of it.
        max_queue: requests that wait at most.

    Raises:
        InputError: a folder, device or model that cannot be used.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_batch: int = 8,
        max_length: int | None = None,
        max_queue: int = 64,
    ) -> None:
        limits = {"max_batch": max_batch, "max_length": max_length, "max_queue": max_queue}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        path = Path(model)
        self.tokenizer = load_tokenizer(path)
        config = read_config(path)
        kind = MambaRunner if config.model_type == "mamba" else AttentionRunner
        kind.check(config, max_length)  # before the weights are read
        loaded = load_model(path, choose_device(device), dtype)
        self._runner = kind(loaded, max_batch, max_length)
        self.max_length = self._runner.max_length
        # the tokens that end a text, as generate() takes them
        eos: Any = getattr(loaded.generation_config, "eos_token_id", None)
        self._eos = {eos} if isinstance(eos, int) else set(eos or ())
        self._decoder = Decoder(self._runner, max_batch)
        self._max_batch, self._max_queue = max_batch, max_queue
        self._waiting: deque[Request] = deque()
        self._live: list[Request] = []
        self._changed = threading.Condition()
        self._stop_at: float | None = None
        self._thread: threading.Thread | None = None
        names = ("prompt_tokens", "generated_tokens", "requests", "errors", "steps")
        self._totals = dict.fromkeys(names, 0)

    # What callers use, from any thread
    def start(self) -> None:
        """Start the thread; RunError where it was started before."""
        if self._thread is not None:
            raise RunError("the engine was started before; make a new one")
        self._thread = threading.Thread(target=self._run, name="lillama-engine", daemon=True)
        self._thread.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, work for at most drain_s seconds on what was accepted, cancel the
        rest, and end the thread. Safe to call twice."""
        with self._changed:
            self._stop_at = time.monotonic() + drain_s
            self._changed.notify_all()
        if self._thread is None:
            self._end_all("cancelled", None)
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, on_event: Callable[[Event], None]
    ) -> Request:
        """Queue a request. on_event is called on the engine's thread with every Token and once,
        last, with Finished; it must return quickly.

        Raises:
            Busy: the queue is full or the engine stops.
            InputError: an empty prompt, unknown ids, or prompt and output longer than max_length.
        """
        prompt = [int(token_id) for token_id in prompt_ids]
        self._check(prompt, params)
        request = Request(prompt, params, on_event, TextStream(self.tokenizer, params.stop))
        with self._changed:
            if self._stop_at is not None:
                raise Busy("the engine is stopping; send the request elsewhere")
            if self._num_waiting() >= self._max_queue:
                raise Busy(f"{self._max_queue} requests wait already; try again later")
            self._waiting.append(request)
            self._totals["requests"] += 1
            self._changed.notify_all()
        return request

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        if not prompt:
            raise InputError("the prompt is empty; it must hold at least one token")
        size = self._runner.vocab_size
        for token_id in (min(prompt), max(prompt)):
            if not 0 <= token_id < size:
                raise InputError(f"token {token_id} is not in the model's vocabulary of {size}")
        if len(prompt) + params.max_new_tokens > self.max_length:
            raise InputError(
                f"prompt ({len(prompt)} tokens) and max_new_tokens ({params.max_new_tokens}) "
                f"exceed the {self.max_length} tokens of a request; shorten one of them"
            )

    @property
    def stopped(self) -> bool:
        """Whether it takes no more requests: after stop(), or because its thread has died."""
        return self._stop_at is not None

    def stats(self) -> Mapping[str, float]:
        """Count running and waiting requests now, max_batch, and since the start prompt_tokens,
        generated_tokens, requests, errors and steps."""
        with self._changed:
            waiting = self._num_waiting()
            running = len(self._live) + len(self._waiting) - waiting
        counts = {"running": running, "waiting": waiting, "max_batch": self._max_batch}
        return counts | self._totals

    def _num_waiting(self) -> int:
        """Count the queue without its first request where that is being computed."""
        return sum(request.prefill is None for request in self._waiting)

    # The thread
    @torch.inference_mode()
    def _run(self) -> None:
        error = None
        try:
            if self._runner.device.type == "cuda":
                torch.cuda.set_device(self._runner.device)  # captures and kernels go there
            while self._wait():
                self._drop_cancelled()
                self._admit()
                if self._live:
                    self._step()
        except BaseException as failure:  # a bug of ours: nobody may wait for ever
            error = _line(failure)
            logger.exception("the engine ends")
        with self._changed:
            if self._stop_at is None:
                self._stop_at = time.monotonic()
        self._end_all("error" if error else "cancelled", error)

    def _wait(self) -> bool:
        """Wait until there is something to do; False when it is time to end."""
        with self._changed:
            while not (self._live or self._waiting):
                if self._stop_at is not None:
                    return False
                self._changed.wait()
            return self._stop_at is None or time.monotonic() < self._stop_at

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [request for request in self._waiting if request.cancelled]
            for request in dropped:
                self._waiting.remove(request)
        for request in (*dropped, *(one for one in self._live if one.cancelled)):
            self._finish(request, "cancelled")
        self._compact()

    def _admit(self) -> None:
        """Compute prompts, at most a chunk's worth of tokens before the next step."""
        budget = PREFILL_CHUNK
        while budget > 0 and self._waiting and len(self._live) < self._max_batch:
            request = self._waiting[0]  # where it stays until it is live, or failed
            try:
                budget -= self._prefill(request)
            except Exception as error:
                logger.warning("a prompt failed: %s", _line(error))
                with self._changed:
                    if request in self._waiting:
                        self._waiting.remove(request)
                self._finish(request, "error", _line(error))

    def _prefill(self, request: Request) -> int:
        """Compute one chunk; after the last the request is live. Returns the chunk's tokens."""
        if request.ids is None or request.prefill is None:
            request.ids = torch.tensor(request.prompt, device=self._runner.device)
            request.prefill = self._runner.prefill(request.ids)
        prefilled = next(request.prefill)
        if prefilled is None:
            return PREFILL_CHUNK
        params = request.params
        seed = secrets.randbits(63) if params.seed is None else params.seed
        chosen = self._decoder.begin(len(self._live), request.ids, prefilled, params, seed)
        with self._changed:
            self._live.append(self._waiting.popleft())
            request.ids = request.prefill = None
        self._totals["prompt_tokens"] += len(request.prompt)
        self._accept(request, chosen)
        self._compact()
        return (len(request.prompt) - 1) % PREFILL_CHUNK + 1

    def _step(self) -> None:
        self._totals["steps"] += 1
        try:
            chosen = self._decoder.step([request.params for request in self._live])
        except Exception as error:
            logger.exception("a decode step failed; its %d requests end", len(self._live))
            for request in self._live:
                self._finish(request, "error", _line(error))
            self._live.clear()
            return
        for request, one in zip(self._live, chosen, strict=True):
            self._accept(request, one)
        self._compact()

    def _compact(self) -> None:
        """Fill the places of those that are done with the last ones."""
        for slot in reversed(range(len(self._live))):
            if self._live[slot].done:
                if self._live[slot].broken:
                    self._runner.clear(slot)
                last = self._live.pop()
                if slot < len(self._live):
                    self._decoder.move(len(self._live), slot)
                    self._live[slot] = last

    # One request
    def _accept(self, request: Request, chosen: Chosen) -> None:
        """Tell a request its next token, or its end. What fails here is this request's alone."""
        try:
            if chosen.token_id < 0:
                request.broken = True
                self._finish(request, "error", "the model's logits are not finite")
                return
            if chosen.token_id in self._eos and not request.params.ignore_eos:
                self._finish(request, "stop")
                return
            request.tokens += 1
            self._totals["generated_tokens"] += 1
            piece, stopped = request.text.push(chosen.token_id)
            request.on_event(Token(chosen.token_id, piece, chosen.logprob, chosen.top))
            if stopped:
                self._finish(request, "stop")
            elif request.tokens == request.params.max_new_tokens:
                self._finish(request, "length")
        except Exception as error:
            logger.warning("a request failed: %s", _line(error))
            self._finish(request, "error", _line(error))

    def _finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """Tell a request that it is done, once."""
        if request.done:
            return
        request.done = True
        request.ids = request.prefill = None
        text = ""
        try:
            if not request.text.stopped:
                text, stopped = request.text.finish()
                reason = "stop" if stopped and reason == "length" else reason
            self._totals["errors"] += reason == "error"
            request.on_event(Finished(reason, text, len(request.prompt), request.tokens, error))
        except Exception:
            logger.exception("a request's listener failed")

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        with self._changed:
            left = [*self._live, *self._waiting]
            self._waiting.clear()
            self._live.clear()
        for request in left:
            self._finish(request, reason, error)


def _line(error: BaseException) -> str:
    """Return an exception as one line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
