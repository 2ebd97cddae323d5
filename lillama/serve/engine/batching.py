"""Generate for many requests at once: a thread that admits, prefills, steps, and tells.

A request takes a slot, its prompt is computed in chunks between the steps of the others, and from
then on it gets a token at every step until it ends; the last live slot then moves into its place.
Requests join and leave at any step. Nothing here grows with the number of requests served.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lillama.checkpoint import read_config
from lillama.errors import InputError, RunError
from lillama.loading import choose_device, load_model, load_tokenizer
from lillama.serve.engine.requests import Busy, Event, Finished, FinishReason, SamplingParams, Token
from lillama.serve.engine.slots import Chosen, Decoder
from lillama.serve.engine.text import TextStream
from lillama.serve.models import AttentionRunner, MambaRunner
from lillama.serve.models.runner import PREFILL_CHUNK, Prefilled

__all__ = ["LocalEngine"]

logger = logging.getLogger(__name__)

_seeds = random.SystemRandom()


class _Request:
    """A request in the queue or in the batch; what submit returns."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        on_event: Callable[[Event], None],
        text: TextStream,
    ) -> None:
        self.prompt, self.params, self.on_event, self.text = prompt, params, on_event, text
        self.tokens = 0
        self.cancelled = self.done = self.broken = False
        self.ids: torch.Tensor | None = None
        self.prefill: Iterator[Prefilled | None] | None = None

    def cancel(self) -> None:
        self.cancelled = True


class LocalEngine:
    """The `Engine` of a checkpoint folder, dense or compressed (see lillama.serve.engine.requests).

    Args:
        model: local checkpoint folder of a Mamba-1, or of a model type in
            `lillama.serve.models.attention.MODEL_TYPES`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: as `lillama.loading.load_model`.
        max_batch: requests that generate at once, at least 1.
        max_length: tokens of prompt and output together; None is what the model has positions for,
            at most 4096, or 2^20 (Mamba).
        max_queue: requests that wait at most.

    Attributes:
        tokenizer: the checkpoint's.
        max_length: as resolved.

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
        runner = kind(loaded, max_batch, max_length)
        self.max_length = runner.max_length
        self._vocab_size = runner.vocab_size
        self._eos = _eos_of(loaded)
        self._decoder = Decoder(runner, max_batch)
        self._max_batch, self._max_queue = max_batch, max_queue
        self._waiting: deque[_Request] = deque()
        self._joining: _Request | None = None
        self._live: list[_Request] = []
        self._changed = threading.Condition()
        self._stop_at: float | None = None
        self._thread: threading.Thread | None = None
        names = ("prompt_tokens", "generated_tokens", "requests", "errors", "steps")
        self._totals = dict.fromkeys(names, 0)

    # What callers use, from any thread
    def start(self) -> None:
        """Raises RunError when it was started before."""
        if self._thread is not None:
            raise RunError("the engine was started before; make a new one")
        self._thread = threading.Thread(target=self._run, name="lillama-engine", daemon=True)
        self._thread.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """As `Engine.stop`; safe to call twice."""
        with self._changed:
            self._stop_at = time.monotonic() + drain_s
            self._changed.notify_all()
        if self._thread is None:
            self._end_all("cancelled", None)
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_event: Callable[[Event], None],
    ) -> _Request:
        """As `Engine.submit`."""
        prompt = [int(token_id) for token_id in prompt_ids]
        self._check(prompt, params)
        request = _Request(prompt, params, on_event, TextStream(self.tokenizer, params.stop))
        with self._changed:
            if self._stop_at is not None:
                raise Busy("the engine is stopping; send the request elsewhere")
            if len(self._waiting) >= self._max_queue:
                raise Busy(f"{self._max_queue} requests wait already; try again later")
            self._waiting.append(request)
            self._totals["requests"] += 1
            self._changed.notify_all()
        return request

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        if not prompt:
            raise InputError("the prompt is empty; it must hold at least one token")
        for token_id in (min(prompt), max(prompt)):
            if not 0 <= token_id < self._vocab_size:
                raise InputError(
                    f"token {token_id} is not in the model's vocabulary of {self._vocab_size}"
                )
        if len(prompt) + params.max_new_tokens > self.max_length:
            raise InputError(
                f"prompt ({len(prompt)} tokens) and max_new_tokens ({params.max_new_tokens}) "
                f"exceed the {self.max_length} tokens of a request; shorten one of them"
            )

    def stats(self) -> Mapping[str, float]:
        """As `Engine.stats`."""
        joining = self._joining is not None
        return {
            "running": len(self._live) + joining,
            "waiting": len(self._waiting),
            "max_batch": self._max_batch,
            **self._totals,
        }

    # The thread
    @torch.inference_mode()
    def _run(self) -> None:
        error = None
        try:
            device = self._decoder.runner.device
            if device.type == "cuda":
                torch.cuda.set_device(device)  # of this thread: captures and kernels go there
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
        """Until there is something to do; False when it is time to end."""
        with self._changed:
            while not (self._live or self._joining or self._waiting):
                if self._stop_at is not None:
                    return False
                self._changed.wait()
            return self._stop_at is None or time.monotonic() < self._stop_at

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [request for request in self._waiting if request.cancelled]
            for request in dropped:
                self._waiting.remove(request)
        if self._joining is not None and self._joining.cancelled:
            dropped.append(self._joining)
            self._joining = None
        dropped += [request for request in self._live if request.cancelled]
        for request in dropped:
            self._finish(request, "cancelled")
        self._compact()

    def _admit(self) -> None:
        """Compute prompts, at most a chunk's worth of tokens before the next step."""
        budget = PREFILL_CHUNK
        while budget > 0 and len(self._live) < self._max_batch:
            if self._joining is None:
                with self._changed:
                    if not self._waiting:
                        return
                    self._joining = self._waiting.popleft()
            request = self._joining
            try:
                budget -= self._prefill(request)
            except Exception as error:
                logger.warning("a prompt failed: %s", _line(error))
                self._joining = None
                self._finish(request, "error", _line(error))

    def _prefill(self, request: _Request) -> int:
        """One chunk; after the last the request is live. Returns the chunk's tokens."""
        runner = self._decoder.runner
        if request.prefill is None:
            request.ids = torch.tensor(request.prompt, device=runner.device)
            request.prefill = runner.prefill(request.ids)
        prefilled = next(request.prefill)
        if prefilled is None:
            return PREFILL_CHUNK
        assert request.ids is not None
        params = request.params
        seed = _seeds.getrandbits(63) if params.seed is None else params.seed
        slot = len(self._live)
        chosen = self._decoder.begin(slot, request.ids, prefilled, params, seed)
        request.ids = request.prefill = self._joining = None
        self._live.append(request)
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
                    self._decoder.runner.clear(slot)
                last = self._live.pop()
                if slot < len(self._live):
                    self._decoder.move(len(self._live), slot)
                    self._live[slot] = last

    # One request
    def _accept(self, request: _Request, chosen: Chosen) -> None:
        """Its next token, or its end. What fails here is this request's alone."""
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

    def _finish(self, request: _Request, reason: FinishReason, error: str | None = None) -> None:
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
            lengths = len(request.prompt), request.tokens
            request.on_event(Finished(reason, text, *lengths, error))
        except Exception:
            logger.exception("a request's listener failed")

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        with self._changed:
            left = [*self._live, *([self._joining] if self._joining else []), *self._waiting]
            self._waiting.clear()
        self._live, self._joining = [], None
        for request in left:
            self._finish(request, reason, error)


def _line(error: BaseException) -> str:
    """An exception as one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _eos_of(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text, as generate() takes them."""
    config: Any = model.generation_config
    found = None if config is None else config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list | tuple) else [found])
