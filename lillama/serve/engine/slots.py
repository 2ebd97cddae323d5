"""One decode step of all slots: model, sampling and the next step's input, on the device.

On a GPU a step is captured once for each size in a CUDA graph, so that a token costs one replay and
one read of ids. The eager step is the same function.
"""

import logging
from collections.abc import Sequence
from operator import ge
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lillama.serve.engine.requests import SamplingParams
from lillama.serve.engine.sampling import Rows, Sampled, Steps, sample, steps_of
from lillama.serve.models.runner import Prefilled, Runner

__all__ = ["Chosen", "Decoder", "buckets_of"]

logger = logging.getLogger(__name__)

# The steps that are captured: none, the first of Steps' fields, the first two, ... Each is a graph
# for every size. What a batch needs is rounded up to one of them, which gives the same tokens.
_CAPTURED = [Steps(*(field < count for field in range(4))) for count in range(5)]


class Chosen(NamedTuple):
    """A row's next token, read back: token_id is -1 where the model's logits are not finite."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def buckets_of(slots: int) -> list[int]:
    """Return 1, 2, 4, ... and slots: the batch sizes that steps run at."""
    return sorted({slots, *(2**i for i in range(slots.bit_length()) if 2**i < slots)})


class Decoder:
    """A runner's slots, all of them, with their sampling. Live requests must be in the first ones.
    capture: steps in CUDA graphs; None is on a GPU only."""

    def __init__(self, runner: Runner, slots: int, capture: bool | None = None) -> None:
        self.runner = runner
        self._buckets = buckets_of(slots)
        self._ids = torch.zeros(slots, dtype=torch.int64, device=runner.device)
        self._rows = Rows.empty(slots, runner.vocab_size, runner.device)
        self._parts = {size: self._rows.part(0, size) for size in self._buckets}
        self._capture = runner.device.type == "cuda" if capture is None else capture
        # by the size that a step was met, and captured, for: batch, shape, steps
        self._graphs: dict[tuple[int, int, Steps], Any] = {}
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
        """Choose one token for each of the first len(live) slots, which sample like that."""
        batch = next(size for size in self._buckets if size >= len(live))
        shape, steps = self.runner.shape_of(len(live)), steps_of(live)
        if self._capture:
            steps = next(more for more in _CAPTURED if all(map(ge, more, steps)))
            sampled = self._replayed(batch, shape, steps)
        else:
            sampled = self._step(batch, shape, steps)
        self.runner.advance(len(live))
        return _read(sampled, live)

    def _step(self, batch: int, shape: int, steps: Steps) -> Sampled:
        ids = self._ids[:batch]
        sampled = sample(self.runner.step(ids, shape), self._parts[batch], steps)
        ids.copy_(sampled.ids.clamp(min=0))
        return sampled

    def _replayed(self, *size: Any) -> Sampled:
        """Run the first step of a size eagerly, which compiles its kernels; capture the second,
        which computes nothing; replay that one and all later ones."""
        if size not in self._graphs:
            self._graphs[size] = None
            return self._step(*size)
        if self._graphs[size] is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    sampled = self._step(*size)
            except RuntimeError as error:
                logger.warning(
                    "a decode step cannot be captured in a CUDA graph and runs eagerly, slower: %s",
                    str(error).strip().splitlines()[0],
                )
                self._capture = False
                return self._step(*size)
            self._graphs[size] = graph, sampled
        graph, sampled = self._graphs[size]
        graph.replay()
        return sampled


def _read(sampled: Sampled, live: Sequence[SamplingParams]) -> list[Chosen]:
    """Bring what was chosen to the host: the one time that it waits for the device."""
    ids, *scores = (part.tolist() for part in sampled if part is not None)
    chosen = []
    for row, params in enumerate(live):  # a bucket has more rows than are live
        if params.logprobs is None:
            chosen.append(Chosen(ids[row]))
            continue
        logprobs, top_ids, top_logprobs = scores
        top = tuple(zip(top_ids[row], top_logprobs[row], strict=True))[: params.logprobs]
        chosen.append(Chosen(ids[row], logprobs[row], top))
    return chosen
