"""One decode step of all slots: model, sampling and the next step's input, on the device.

On a GPU a step is captured once for each size in a CUDA graph, so that a token costs one replay and
one read of ids. The eager step is the same function.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lillama.serve.engine.requests import SamplingParams
from lillama.serve.engine.sampling import Rows, Sampled, Steps, sample, steps_of
from lillama.serve.models.runner import Prefilled, Runner

__all__ = ["Chosen", "Decoder", "buckets_of"]

logger = logging.getLogger(__name__)

# The steps that are captured: each is a graph for every size. What a batch needs is rounded up to
# one of them, which gives the same tokens.
_CAPTURED = (
    Steps(),
    Steps(draw=True),
    Steps(draw=True, filters=True),
    Steps(penalty=True, draw=True, filters=True),
    Steps(penalty=True, draw=True, filters=True, logprobs=True),
)


class Chosen(NamedTuple):
    """A row's next token, read back: token_id is -1 where the model's logits are not finite."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class _Size(NamedTuple):
    """What a captured step was captured for."""

    batch: int
    shape: int
    steps: Steps


def buckets_of(slots: int) -> list[int]:
    """1, 2, 4, ... and slots: the batch sizes that steps run at."""
    return sorted({slots, *(2**i for i in range(slots.bit_length()) if 2**i < slots)})


class Decoder:
    """A runner's slots with their sampling. Live requests must be in the first ones.

    Args:
        runner: of the model.
        slots: as many as the runner has.
        capture: capture steps in CUDA graphs; None is on a GPU only.
    """

    def __init__(self, runner: Runner, slots: int, capture: bool | None = None) -> None:
        self.runner = runner
        self._buckets = buckets_of(slots)
        self._ids = torch.zeros(slots, dtype=torch.int64, device=runner.device)
        self._rows = Rows.empty(slots, runner.vocab_size, runner.device)
        self._parts = {size: self._rows.part(0, size) for size in self._buckets}
        self._capture = runner.device.type == "cuda" if capture is None else capture
        self._graphs: dict[_Size, tuple[Any, Sampled]] = {}
        self._seen: set[_Size] = set()
        self._pool: Any = None

    def begin(
        self, slot: int, prompt: Tensor, prefilled: Prefilled, params: SamplingParams, seed: int
    ) -> Chosen:
        """Put a computed prompt [T] into a slot and choose its first token."""
        self.runner.place(slot, prefilled.state)
        self._rows.write(slot, params, prompt, seed)
        sampled = sample(prefilled.logits, self._rows.part(slot, slot + 1), steps_of([params]))
        self._ids[slot : slot + 1] = sampled.ids.clamp(min=0)
        return _read(sampled, [params])[0]

    def move(self, source: int, target: int) -> None:
        """Copy a slot over another."""
        self.runner.move(source, target)
        self._rows.move(source, target)
        self._ids[target] = self._ids[source]

    def step(self, live: Sequence[SamplingParams]) -> list[Chosen]:
        """One token for each of the first len(live) slots, which sample like that."""
        batch = next(size for size in self._buckets if size >= len(live))
        steps = _covering(steps_of(live)) if self._capture else steps_of(live)
        size = _Size(batch, self.runner.shape_of(len(live)), steps)
        sampled = self._replayed(size) if self._capture else self._step(size)
        self.runner.advance(len(live))
        return _read(sampled, live)

    def _step(self, size: _Size) -> Sampled:
        ids = self._ids[: size.batch]
        logits = self.runner.step(ids, size.shape)
        sampled = sample(logits, self._parts[size.batch], size.steps)
        ids.copy_(sampled.ids.clamp(min=0))
        return sampled

    def _replayed(self, size: _Size) -> Sampled:
        """The first step of a size runs eagerly, which compiles its kernels; the second is
        captured, which computes nothing; that one and all later ones are replays."""
        if size not in self._seen:
            self._seen.add(size)
            return self._step(size)
        if size not in self._graphs:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    sampled = self._step(size)
            except RuntimeError as error:
                logger.warning(
                    "a decode step cannot be captured in a CUDA graph and runs eagerly, slower: %s",
                    str(error).strip().splitlines()[0],
                )
                self._capture = False
                return self._step(size)
            self._graphs[size] = graph, sampled
        graph, sampled = self._graphs[size]
        graph.replay()
        return sampled


def _covering(steps: Steps) -> Steps:
    """The first captured steps that do all of these."""
    return next(
        more
        for more in _CAPTURED
        if all(has >= needs for has, needs in zip(more, steps, strict=True))
    )


def _read(sampled: Sampled, live: Sequence[SamplingParams]) -> list[Chosen]:
    """To the host: the one time that it waits for the device."""
    ids = sampled.ids.tolist()
    if sampled.logprobs is None or sampled.top_ids is None or sampled.top_logprobs is None:
        return [Chosen(token_id) for token_id, _ in zip(ids, live, strict=False)]
    rows = zip(
        ids,
        sampled.logprobs.tolist(),
        sampled.top_ids.tolist(),
        sampled.top_logprobs.tolist(),
        live,
        strict=False,  # a bucket has more rows than are live
    )
    chosen = []
    for token_id, logprob, top_ids, top_logprobs, params in rows:
        if params.logprobs is None:
            chosen.append(Chosen(token_id))
            continue
        top = tuple(zip(top_ids, top_logprobs, strict=True))[: params.logprobs]
        chosen.append(Chosen(token_id, logprob, top))
    return chosen
