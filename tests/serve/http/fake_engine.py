"""An Engine without a model: deterministic text, ragged timing, failures on request; and a process
that serves it, for tests that need one of their own and for benchmarks/load.py.

    python -m tests.serve.http.fake_engine --port 0 [--step-s 0.01] [--max-batch 8] ...
"""

import argparse
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lillama.config import ServeConfig
from lillama.errors import InputError
from lillama.serve.engine.requests import Busy, Event, Finished, SamplingParams, Token

# Tokens of the tests' tokenizer with a meaning here, as the single characters that they are.
FAILS, REFUSES, ENDS = "~", "^", "$"


@dataclass
class FakeCompletion:
    prompt: list[int]
    params: SamplingParams
    on_event: Callable[[Event], None]
    made: int = 0
    cancelled: bool = False
    done: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled = True


class FakeEngine:
    """Continues a prompt with token (sum of prompt + position) of its words. A prompt that holds
    `fails` fails after 3 tokens; `refuses` at once; `ends` stops after 5.

    Args:
        tokenizer: names the tokens.
        step_s: mean seconds of a step; a step gives each running request one token.
        seed: of the steps' lengths, between 0 and 2 step_s.
    """

    def __init__(
        self,
        tokenizer: Any,
        step_s: float = 0.0,
        max_batch: int = 8,
        max_queue: int = 64,
        max_length: int = 512,
        seed: int = 0,
    ) -> None:
        self.max_length = max_length
        self.max_batch, self.max_queue, self.step_s = max_batch, max_queue, step_s
        self.random = random.Random(seed)
        words = " cat sat on the mat while old dogs ran".split(" ")[1:]
        self.words = [(tokenizer.encode(" " + word)[0], " " + word) for word in words]
        self.special = {
            name: tokenizer.encode(sign, add_special_tokens=False)[0]
            for name, sign in (("fails", FAILS), ("refuses", REFUSES), ("ends", ENDS))
        }
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)
        self.waiting: deque[FakeCompletion] = deque()
        self.running: list[FakeCompletion] = []
        self.submitted: list[FakeCompletion] = []
        self.keep_submitted = True
        self.finished: dict[str, int] = {}
        self.totals = dict.fromkeys(
            ("prompt_tokens", "generated_tokens", "requests", "errors", "steps"), 0
        )
        self.stopped = False
        self.paused = False
        self.deadline_s = 0.0
        self.thread = threading.Thread(target=self.loop, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self, drain_s: float = 0.0) -> None:
        with self.work:
            self.stopped = True
            self.deadline_s = time.monotonic() + drain_s
            self.work.notify_all()
        self.thread.join()

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_event: Callable[[Event], None],
    ) -> FakeCompletion:
        if not prompt_ids:
            raise InputError("the prompt is empty")
        if min(prompt_ids) < 0 or max(prompt_ids) >= 300:
            raise InputError("the prompt has token ids that the model does not have")
        if len(prompt_ids) + params.max_new_tokens > self.max_length:
            raise InputError("too long")
        completion = FakeCompletion(list(prompt_ids), params, on_event)
        with self.work:
            if self.stopped:
                raise Busy("the engine is stopping")
            if len(self.waiting) >= self.max_queue:
                raise Busy(f"the queue is full: {self.max_queue} requests wait")
            self.waiting.append(completion)
            self.totals["requests"] += 1
            if self.keep_submitted:
                self.submitted.append(completion)
            self.work.notify_all()
        return completion

    def stats(self) -> dict[str, float]:
        with self.lock:
            counts = {"running": len(self.running), "waiting": len(self.waiting)}
            return {**counts, "max_batch": self.max_batch, **self.totals}

    def loop(self) -> None:
        while True:
            with self.work:
                while not self.stopped and (self.paused or not (self.waiting or self.running)):
                    self.work.wait(0.01 if self.paused else None)
                expired = self.stopped and time.monotonic() >= self.deadline_s
                if self.stopped and (expired or not (self.waiting or self.running)):
                    left = [*self.running, *self.waiting]
                    self.running, self.waiting = [], deque()
                    break
                while self.waiting and len(self.running) < self.max_batch:
                    self.running.append(self.waiting.popleft())
                    self.totals["prompt_tokens"] += len(self.running[-1].prompt)
                self.totals["steps"] += 1
                step = list(self.running)
            if self.step_s:
                time.sleep(self.step_s * 2 * self.random.random())
            over = [completion for completion in step if self.advance(completion)]
            with self.work:
                self.running = [c for c in self.running if not any(c is o for o in over)]
        for completion in left:
            self.end(completion, "cancelled")

    def advance(self, completion: FakeCompletion) -> bool:
        """One token; True when that was the last."""
        if completion.cancelled:
            return self.end(completion, "cancelled")
        if completion.made == 3 and self.special["fails"] in completion.prompt:
            time.sleep(0.05)  # so that what came before is on its way
            return self.end(completion, "error", error="out of imaginary memory")
        if self.special["refuses"] in completion.prompt:
            return self.end(completion, "error", error="no such luck")
        at_end = completion.made == 5 and self.special["ends"] in completion.prompt
        if at_end and not completion.params.ignore_eos:
            return self.end(completion, "stop")
        token_id, text = self.word(completion, completion.made)
        if any(stop in text for stop in completion.params.stop):
            return self.end(completion, "stop")
        logprobs = completion.params.logprobs
        logprob = None if logprobs is None else -0.5 * (completion.made + 1)
        top = tuple(
            (self.word(completion, completion.made + i)[0], -0.5 * (completion.made + 1) - i)
            for i in range(logprobs or 0)
        )
        completion.made += 1
        self.totals["generated_tokens"] += 1
        completion.on_event(Token(token_id, text, logprob, top))
        if completion.made == completion.params.max_new_tokens:
            return self.end(completion, "length")
        return False

    def word(self, completion: FakeCompletion, position: int) -> tuple[int, str]:
        seed = completion.params.seed or 0
        return self.words[(sum(completion.prompt) + seed + position) % len(self.words)]

    def end(self, completion: FakeCompletion, reason: Any, error: str | None = None) -> bool:
        self.finished[reason] = self.finished.get(reason, 0) + 1
        self.totals["errors"] += reason == "error"
        completion.on_event(Finished(reason, "", len(completion.prompt), completion.made, error))
        completion.done.set()
        return True


def serve_fake(step_s: float) -> None:
    """The command line with `lillama serve` on a FakeEngine; sys.argv as a user gives it."""
    import lillama.serve.http.server as module
    from lillama.cli.app import main
    from lillama.integrations.loading import load_tokenizer

    def fake(path: Path, *, max_length: int | None, **options: Any) -> FakeEngine:
        assert (options.pop("device"), options.pop("dtype")) == ("auto", "auto")
        return FakeEngine(load_tokenizer(path), step_s, max_length=max_length or 512, **options)

    module.LocalEngine = fake  # type: ignore[assignment]
    main()


def main() -> None:
    from lillama.serve.http import bind, make_server
    from tests.conftest import make_tokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--step-s", type=float, default=0.01)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--max-connections", type=int, default=512)
    parser.add_argument("--drain-s", type=float, default=30.0)
    options = parser.parse_args()
    config = ServeConfig(
        model=Path("fake"),
        port=options.port,
        max_connections=options.max_connections,
        drain_s=options.drain_s,
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    engine = FakeEngine(tokenizer, options.step_s, options.max_batch, options.max_queue)
    engine.keep_submitted = False
    engine.start()
    with bind(config.host, config.port) as listener:

        def ready(url: str) -> None:
            sys.stdout.write(url + "\n")
            sys.stdout.flush()

        server = make_server(engine, tokenizer, config, [], ready)
        server.run(sockets=[listener])
    engine.stop()
    sys.stderr.write(f"finished: {engine.finished}\n")


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message comes first') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

if __name__ == "__main__":
    main()
