"""Whole answers by our engine and by transformers' generate: prompts in, greedy tokens out, and
when each of them was there.

Both give every token to the host as soon as it is chosen, so the host's clock times them.
"""

import gc
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from lillama.serve.engine.requests import SamplingParams
from lillama.serve.engine.slots import Decoder
from lillama.serve.models import AttentionRunner, MambaRunner, Runner

__all__ = ["Answer", "Cache", "Once", "assert_same", "ours", "theirs"]

Cache = Literal["static", "own"]
# Of the largest logit, fp32: tokens nearer than that may be chosen either way
TOLERANCE = 1e-3


class Answer(NamedTuple):
    """tokens[b][i] of each row; stamps_s[i]: from the start until all rows had token i."""

    tokens: list[list[int]]
    stamps_s: list[float]


Answering = Callable[[], Answer]


def ours(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Answering:
    """Prompts [b, T] one after the other, then steps of all, captured on a GPU: as the engine does
    for requests that arrive together. The model's weights are laid out anew in place."""
    batch, length = prompts.shape
    runner: Runner = (
        MambaRunner(model, batch, None)
        if model.config.model_type == "mamba"
        else AttentionRunner(model, batch, length + new_tokens)
    )
    decoder = Decoder(runner, batch)
    greedy = SamplingParams(max_new_tokens=new_tokens)

    @torch.inference_mode()
    def answer() -> Answer:
        start = time.perf_counter()
        chosen = []
        for slot, prompt in enumerate(prompts):
            *_, done = runner.prefill(prompt)
            assert done is not None
            chosen.append(decoder.begin(slot, prompt, done, greedy, seed=0))
        columns, stamps_s = [chosen], [time.perf_counter() - start]
        while len(columns) < new_tokens:
            columns.append(decoder.step([greedy] * batch))
            stamps_s.append(time.perf_counter() - start)
        tokens = [[one.token_id for one in row] for row in zip(*columns, strict=True)]
        return Answer(tokens, stamps_s)

    return answer


class _Stamps(BaseStreamer):
    """When generate gave each column of tokens to the host; the prompts come first."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def theirs(
    model: PreTrainedModel, prompts: Tensor, new_tokens: int, cache: Cache, compiled: bool
) -> Answering:
    """transformers' generate with a static cache, whose steps it compiles where asked (on a GPU
    only), or with the cache that the model makes by itself."""
    generator: Any = model
    generator.generation_config.eos_token_id = None  # on to the last token
    given: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}

    def answer() -> Answer:
        stamps = _Stamps()
        start = time.perf_counter()
        output = generator.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            disable_compile=not compiled,
            streamer=stamps,
            **given,
        )
        tokens = output[:, prompts.shape[1] :].tolist()
        return Answer(tokens, [at - start for at in stamps.at[1:]])

    return answer


# What is made of them
class Once:
    """A variant's call: answers, and keeps the times and the peak memory of every answer.

    Args:
        build: makes the answering at the first call, whose memory is counted too.
        device: of the model.
        weights_bytes: of the model, which was there before.
    """

    def __init__(
        self, build: Callable[[], Answering], device: torch.device, weights_bytes: int
    ) -> None:
        self._build, self._device, self._held = build, device, weights_bytes
        self._answer: Answering | None = None
        self.stamps_s: list[list[float]] = []
        self.peaks_bytes: list[int] = []  # none on a CPU

    def __call__(self) -> float:
        """The mean seconds of a token after the first."""
        cuda, first = self._device.type == "cuda", self._answer is None
        before = torch.cuda.memory_allocated(self._device) if cuda else 0
        if self._answer is None:
            self._answer = self._build()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        stamps_s = self._answer().stamps_s
        if cuda and first:
            gc.collect()
            self._held += torch.cuda.memory_allocated(self._device) - before
        elif cuda:
            peak = torch.cuda.max_memory_allocated(self._device) - before
            self.peaks_bytes.append(self._held + peak)
        self.stamps_s.append(stamps_s)
        return (stamps_s[-1] - stamps_s[0]) / (len(stamps_s) - 1)


@torch.inference_mode()
def assert_same(found: Answer, wanted: Answer, model: PreTrainedModel, prompts: Tensor) -> None:
    """Every row's tokens are the same, up to one that the model ranks within TOLERANCE of its
    first: beyond it the two continue different texts.

    Raises:
        AssertionError: row, place and how far below the first.
    """
    given: Any = model
    for row, (mine, right) in enumerate(zip(found.tokens, wanted.tokens, strict=True)):
        assert len(mine) == len(right), f"row {row} has {len(mine)} tokens, not {len(right)}"
        differ = (i for i, pair in enumerate(zip(mine, right, strict=True)) if pair[0] != pair[1])
        place = next(differ, None)
        if place is None:
            continue
        text = torch.cat([prompts[row], prompts.new_tensor(right[:place])])
        logits = given(text[None], use_cache=False).logits[0, -1].float()
        below = float((logits.amax() - logits[mine[place]]) / logits.abs().amax())
        assert below < TOLERANCE, (
            f"row {row} has token {mine[place]} at place {place}, transformers {right[place]}: "
            f"{below:.1e} of the largest logit below the first"
        )
