"""low_rank_experts beside the dense layer in transformers, and beside the factors in cuBLAS: a loop
over the experts, eager and compiled, and grouped_mm."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lillama_kernels import low_rank_experts, reference
from lillama_kernels.testing import expert_factors
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.rows import Variant, Work, compare, variant
from benchmarks.shapes import EXPERTS, ExpertsShape
from benchmarks.timing import step

# Weights alone are larger than any cache; the sets differ in tokens and routing
INPUT_SETS = 4
PROJECTIONS = ("gate", "up", "down")


@functools.lru_cache(maxsize=1)
def _factors(
    shape: ExpertsShape, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], MixtralExperts]:
    """The factors and the dense layer, drawn where they are used: 450 million numbers and more."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        random = torch.randn(size, generator=generator, device=device, dtype=dtype)
        return random.mul_(size[-1] ** -0.5)

    e, h, i, r = shape.num_experts, shape.hidden_size, shape.intermediate_size, shape.rank
    sizes = {"gate": (h, i), "up": (h, i), "down": (i, h)}
    factors = {f"{name}_A": normal(e, r, k) for name, (k, _) in sizes.items()}
    factors |= {f"{name}_B": normal(e, n, r) for name, (_, n) in sizes.items()}
    config = MixtralConfig(
        hidden_size=h,
        intermediate_size=i,
        num_local_experts=e,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(normal(e, 2 * i, h))
    experts.down_proj = torch.nn.Parameter(normal(e, h, i))
    return factors, experts


def _routing(
    shape: ExpertsShape, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [M, H], topk_index and topk_weight [M, k]."""
    generator = torch.Generator(device).manual_seed(seed)
    given = {"generator": generator, "device": device}
    scores = torch.randn((shape.rows, shape.num_experts), **given)
    if shape.skewed:  # one expert first for nearly all tokens, the others ever rarer
        scores -= 1.5 * torch.arange(shape.num_experts, device=device)
    weight, index = scores.softmax(-1).topk(shape.top_k)
    hidden = torch.randn((shape.rows, shape.hidden_size), **given).to(dtype)
    return hidden, index, (weight / weight.sum(-1, keepdim=True)).to(dtype)


def _loop(
    hidden: Tensor, index: Tensor, weight: Tensor, factors: dict[str, Tensor], expert_of
) -> Tensor:
    """One expert after the other, as PyTorch users write it; waits for the GPU at each."""
    out = torch.zeros_like(hidden)
    for expert in range(factors["gate_A"].shape[0]):
        token, place = torch.where(index == expert)
        y = expert_of(
            hidden[token], *(factors[f"{p}_{m}"][expert] for p in PROJECTIONS for m in "AB")
        )
        out = out.index_add(0, token, y * weight[token, place, None])
    return out


def _expert(x: Tensor, gate_A, gate_B, up_A, up_B, down_A, down_B) -> Tensor:
    gate = F.linear(F.linear(x, gate_A), gate_B)
    up = F.linear(F.linear(x, up_A), up_B)
    return F.linear(F.linear(F.silu(gate) * up, down_A), down_B)


def _grouped(hidden: Tensor, index: Tensor, weight: Tensor, factors: dict[str, Tensor]) -> Tensor:
    """torch's grouped_mm of the factors, as transformers' experts use it for dense ones."""
    flat = index.flatten()
    order = flat.argsort(stable=True)
    counts = torch.histc(
        flat.float(), bins=factors["gate_A"].shape[0], min=0, max=len(factors["gate_A"]) - 1
    )
    offsets = counts.cumsum(0).to(torch.int32)

    def project(x: Tensor, name: str) -> Tensor:
        for letter in "AB":
            x = F.grouped_mm(x, factors[f"{name}_{letter}"].transpose(-2, -1), offs=offsets)
        return x

    x = hidden[order // index.shape[1]]
    y = project(F.silu(project(x, "gate")) * project(x, "up"), "down")
    y = y * weight.flatten()[order, None]
    out = torch.empty_like(y)
    out[order] = y
    return out.view(*index.shape, -1).sum(1)


ROWS = [pytest.param(s, False, id=f"{s.name}-forward") for s in EXPERTS]
ROWS += [
    pytest.param(s, True, id=f"{s.name}-training", marks=[] if s.train else pytest.mark.full)
    for s in EXPERTS
    if s.rows >= 512
]


def _work(shape: ExpertsShape, weights: int, size: int, used: float, backward: bool) -> Work:
    """weights: of one expert. Those of the experts in use and the tokens once; training reads the
    weights again and writes the gradient of all, reads the tokens and the output's gradient and
    writes the tokens'."""
    flop = 2.0 * shape.rows * shape.top_k * weights
    tokens = shape.rows * shape.hidden_size
    if not backward:
        return Work(flop=flop, bytes_moved=size * (used * weights + 2 * tokens))
    moved = (2 * used + shape.num_experts) * weights + 5 * tokens
    return Work(flop=3 * flop, bytes_moved=size * moved)


class _Row:
    """What one row compares: the same factors, tokens and routing for every variant."""

    def __init__(
        self, shape: ExpertsShape, backward: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        one_rank = dataclasses.replace(
            shape, name="", rows=0, skewed=False, train=False, full=False, needs_gpu=False
        )
        self.factors, self.experts = _factors(one_rank, dtype, device)
        self.config: Any = self.experts.config
        num_sets = 1 if device.type == "cpu" or backward else INPUT_SETS
        self.routings = [_routing(shape, dtype, device, seed) for seed in range(num_sets)]
        self.ranks = {name: (shape.rank,) * shape.num_experts for name in PROJECTIONS}
        self.backward = backward
        # experts that a call reads, on average
        self.used = sum(int(index.unique().numel()) for _, index, _ in self.routings) / num_sets

    def ours(self, hidden, index, weight, tensors) -> Tensor:
        return low_rank_experts(hidden, index, weight, expert_factors(tensors, self.ranks))

    def truth(self, hidden, index, weight, tensors) -> Tensor:
        factors = expert_factors(tensors, self.ranks)
        return reference.low_rank_experts(hidden, index, weight, factors)

    def timed(self, function, *more, thorough: bool = False, graph: bool = True) -> Variant:
        """function(hidden, index, weight, factors, *more) of every routing, the first checked."""

        def of(function, index: Tensor, *more):
            def call(hidden: Tensor, topk_weight: Tensor, **tensors: Tensor) -> Tensor:
                return function(hidden, index, topk_weight, tensors, *more)

            return call

        sets = [{"hidden": h, "topk_weight": w, **self.factors} for h, _, w in self.routings]
        calls = [of(function, index, *more) for _, index, _ in self.routings]
        oracle = of(self.truth, self.routings[0][1])
        first = variant(calls[0], oracle, sets[:1], self.backward, thorough)
        later = [
            step(call, given, self.backward)
            for call, given in zip(calls[1:], sets[1:], strict=True)
        ]
        return dataclasses.replace(first, calls=[*first.calls, *later], graph=graph)

    def dense(self, implementation: str, work: Work) -> Variant:
        """transformers' layer, whose weights are not the factors' products: it is not checked."""

        def of(index: Tensor):
            def run(hidden: Tensor, topk_weight: Tensor, **weights: Tensor) -> Tensor:
                self.config._experts_implementation = implementation
                given = (hidden, index, topk_weight)
                return torch.func.functional_call(self.experts, weights, given)

            return run

        weights = dict(self.experts.named_parameters())
        calls = [
            step(of(index), {"hidden": h, "topk_weight": w, **weights}, self.backward)
            for h, index, w in self.routings
        ]
        return Variant(calls=calls, work=work)


@pytest.mark.parametrize(("shape", "backward"), ROWS)
def bench_low_rank_experts(benchmark, shape, backward, dtype, device):
    row = _Row(shape, backward, dtype, device)
    h, i = shape.hidden_size, shape.intermediate_size
    size = torch.finfo(dtype).bits // 8
    work = _work(shape, 3 * shape.rank * (h + i), size, row.used, backward)
    dense_work = _work(shape, 3 * h * i, size, row.used, backward)
    variants = {
        "ours": row.timed(row.ours, thorough=not backward or shape.rows <= 1024),
        "cublas_loop": row.timed(_loop, _expert, graph=False),
        "dense": row.dense("grouped_mm", dense_work),
    }
    if device.type == "cuda":
        variants["grouped_mm"] = row.timed(_grouped)
        torch.compiler.reset()
        compiled = torch.compile(_expert, dynamic=True)
        variants["compiled_loop"] = row.timed(_loop, compiled, graph=False)
        if shape.rows <= 64:  # it copies the weights of every (token, place)
            variants["dense_batched"] = row.dense("batched_mm", dense_work)
    compare(benchmark, variants, shape=shape, dtype=dtype, device=device, work=work, rounds=10)
