"""What the tests of engine and models share: listeners, prompts, how long to wait, and what
transformers' generate() says."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lillama.serve.engine.requests import Event, Finished, SamplingParams, Token

WAIT_S = 60.0
PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(20, 57)), [3, 250, 40], [9, 9], [60, 61, 62, 63]]


class Heard:
    """What a request was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        assert not self.ended.is_set(), "nothing follows Finished"
        self.events.append(event)
        if isinstance(event, Finished):
            self.ended.set()

    def finished(self) -> Finished:
        assert self.ended.wait(WAIT_S), "no end"
        last = self.events[-1]
        assert isinstance(last, Finished)
        return last

    @property
    def ids(self) -> list[int]:
        return [event.token_id for event in self.events if isinstance(event, Token)]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def greedy(count: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True, **changes)


def reference(path: Path, device: torch.device) -> Any:
    """transformers' model of a checkpoint, going on after the end token."""
    model: Any = AutoModelForCausalLM.from_pretrained(path).to(device).eval()
    model.generation_config.eos_token_id = None
    return model


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """The ids that generate() adds, greedy."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        use_cache=True,
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def uneven(model: Any) -> Any:
    """The model with norms that are not all 1."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model
