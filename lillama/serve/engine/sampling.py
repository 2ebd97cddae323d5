"""The next token of every row of a batch, chosen on the device: nothing is read back.

A row draws by the Gumbel-max trick, argmax(logits / temperature + noise), which samples from the
softmax (Maddison et al. 2014, arXiv 1411.0030). The noise is a hash of (seed, step, token) and not
a generator's state: a request draws the same tokens whatever else is in the batch, and a CUDA graph
may replay the draw. Shapes are fixed: B rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lillama.serve.engine.requests import SamplingParams

__all__ = ["Rows", "Sampled", "Steps", "sample", "steps_of"]

MAX_LOGPROBS = 20  # what SamplingParams allows

# 64-bit constants of the splitmix64 generator (Steele et al. 2014), as signed numbers
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_NOISE_BITS = 40


class Steps(NamedTuple):
    """What a batch needs beyond argmax; what no row needs is not computed."""

    draw: bool = False
    filters: bool = False
    penalty: bool = False
    logprobs: bool = False


def steps_of(params: Sequence[SamplingParams]) -> Steps:
    """Return the steps that at least one of these requests needs."""
    drawn = [p for p in params if p.temperature > 0]
    return Steps(
        draw=bool(drawn),
        filters=any(p.top_k or p.top_p < 1 or p.min_p for p in drawn),
        penalty=any(p.repetition_penalty != 1 for p in params),
        logprobs=any(p.logprobs is not None for p in params),
    )


class Rows(NamedTuple):
    """How each slot samples, on the device.

    numbers [B, 4] fp32: temperature, top_p, min_p, repetition penalty. counters [B, 3] int64: seed,
    tokens drawn so far, top_k. seen [B, V] bool: tokens of prompt and output, kept only where the
    penalty is not 1.
    """

    numbers: Tensor
    counters: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, slots: int, vocab_size: int, device: torch.device) -> "Rows":
        numbers = torch.tensor([0.0, 1.0, 0.0, 1.0], device=device).repeat(slots, 1)
        counters = torch.zeros(slots, 3, dtype=torch.int64, device=device)
        return cls(numbers, counters, torch.zeros(slots, vocab_size, dtype=torch.bool).to(device))

    def part(self, start: int, stop: int) -> "Rows":
        return Rows(*(tensor[start:stop] for tensor in self))

    def write(self, slot: int, params: SamplingParams, prompt: Tensor, seed: int) -> None:
        """Begin a request in a slot; prompt [T] int64 on the device."""
        p = params
        numbers = [p.temperature, p.top_p, p.min_p, p.repetition_penalty]
        self.numbers[slot] = torch.tensor(numbers)
        self.counters[slot] = torch.tensor([seed, 0, p.top_k])
        if p.repetition_penalty != 1:
            self.seen[slot] = False
            self.seen[slot].index_fill_(0, prompt, True)

    def move(self, source: int, target: int) -> None:
        for tensor in self:
            tensor[target] = tensor[source]


class Sampled(NamedTuple):
    """ids [B] int64, -1 where the logits are not finite. With Steps.logprobs, of the model's own
    distribution: logprobs [B] fp32, top_ids and top_logprobs [B, min(20, V)], likeliest first."""

    ids: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


def sample(logits: Tensor, rows: Rows, steps: Steps) -> Sampled:
    """Choose one token a row of logits [B, V], computed in fp32, and count it in rows.counters and
    rows.seen, in place. steps: at least what the rows need; more gives the same tokens, slower."""
    scores = raw = logits.float()
    if steps.penalty:
        penalty = rows.numbers[:, 3:]
        changed = torch.where(raw > 0, raw / penalty, raw * penalty)
        scores = torch.where(rows.seen, changed, raw)
    best, ids = scores.max(dim=-1)
    if steps.draw:
        ids = _drawn(scores - best[:, None], rows, steps.filters)
        rows.counters[:, 1] += 1
    if steps.penalty:
        rows.seen.scatter_(1, ids[:, None], True)
    found = torch.where(best.isfinite(), ids, -1)
    if not steps.logprobs:
        return Sampled(found)
    logprobs = torch.log_softmax(raw, dim=-1)
    top = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[1]), dim=-1)
    return Sampled(found, logprobs.gather(1, ids[:, None])[:, 0], top.indices, top.values)


def _drawn(scores: Tensor, rows: Rows, filters: bool) -> Tensor:
    """scores [B, V], 0 the largest of each row, so that no temperature overflows -> ids [B]."""
    temperature = rows.numbers[:, :1]
    greedy = temperature == 0
    scaled = scores / torch.where(greedy, 1.0, temperature)
    noise = _gumbel(rows.counters[:, 0], rows.counters[:, 1], scores.shape[1])
    noisy = scaled + noise.masked_fill_(greedy, 0.0)
    if filters:
        noisy = noisy.masked_fill(scaled < _smallest_kept(scaled, rows)[:, None], -math.inf)
    return noisy.argmax(dim=-1)


def _smallest_kept(scaled: Tensor, rows: Rows) -> Tensor:
    """[B]: the lowest score that top_k, then top_p, then min_p leave; tokens equal to it stay."""
    top_p, min_p, top_k = rows.numbers[:, 1:2], rows.numbers[:, 2], rows.counters[:, 2:]
    vocab = scaled.shape[1]
    ordered = scaled.sort(dim=-1, descending=True).values
    last = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab) - 1
    kept = ordered >= ordered.gather(1, last)
    probs = ordered.masked_fill(~kept, -math.inf).softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # of all likelier tokens
    kept &= (before < top_p) | (top_p >= 1)
    lowest = ordered.masked_fill(~kept, math.inf).amin(dim=-1)
    # the likeliest has score 0, so that its share is exp(0)
    return torch.maximum(lowest, min_p.log())


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser: every bit of int64 x flips half the bits of the result."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ _shifted(x, shift)) * multiplier
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros coming in: PyTorch's shift of int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _gumbel(seeds: Tensor, counts: Tensor, vocab_size: int) -> Tensor:
    """seeds, counts [B] int64 -> standard Gumbel noise [B, V] fp32."""
    key = _mixed(_mixed(seeds) + counts * _GOLDEN)
    tokens = torch.arange(1, vocab_size + 1, device=seeds.device) * _GOLDEN
    bits = _shifted(_mixed(key[:, None] + tokens), 64 - _NOISE_BITS)
    # A token wins with a small -log1p(-u), so u must be fine near 0, as fp32 is; u = 1 would be
    # a noise of -inf, which no token could win with.
    uniform = ((bits.float() + 0.5) * 2.0**-_NOISE_BITS).clamp_(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))
