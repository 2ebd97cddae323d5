"""Calls of every op that between them launch every committed tile: what compile_gate.py compiles.

Numbers are never looked at: tensors are unset, on the CPU, and as small as the tables allow. Sizes
are multiples of 16, as in real models, or odd where rows are to load element by element.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lillama_kernels as ops
from lillama_kernels.dispatch import DTYPES

__all__ = ["calls"]

NUM_EXPERTS = 8
Call = Callable[[], Any]


def _forward(function: Callable[..., Any], *tensors: Any, **options: Any) -> None:
    with torch.no_grad():
        function(*tensors, impl="triton", **options)


def _train(function: Callable[..., Any], *tensors: Any, **options: Any) -> None:
    """Forward, and backward to every floating tensor."""
    given = [t.requires_grad_() if _floats(t) else t for t in tensors]
    options = {n: t.requires_grad_() if _floats(t) else t for n, t in options.items()}
    output = function(*given, impl="triton", **options)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    leaves = [t for t in (*given, *options.values()) if _floats(t)]
    torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs], allow_unused=True)


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _linears(dtype: torch.dtype) -> Iterator[Call]:
    new = partial(torch.empty, dtype=dtype)
    order = torch.arange(64)
    for rows in (16, 32, 64):
        # K in one, two and four parts
        for k in (256, 512, 1024, 4096):
            x, A, B = new(rows, k), new(16, k), new(64, 16)
            yield partial(_forward, ops.low_rank_linear, x, A, B, new(64))
            yield partial(_forward, ops.pivot_low_rank_linear, x, A, new(48, 16), order, new(64))
        x, A, B = new(rows, 256), new(16, 256), new(64, 16)
        biases = [new(64), None, None]  # as q/k/v
        yield partial(_forward, ops.low_rank_linears, x, [A] * 3, [B] * 3, biases)
    for rows in (16, 32, 64):
        x, A = new(rows, 4097), new(15, 4097)
        yield partial(_forward, ops.low_rank_linear, x, A, new(65, 15), new(65))
        yield partial(_forward, ops.pivot_low_rank_linear, x, A, new(49, 15), order, new(64))
        x, A = x[:, :65], A[:, :65]  # K in one part
        yield partial(_forward, ops.pivot_low_rank_linear, x, A, new(49, 15), order, new(64))
    for k, n, r in ((64, 64, 16), (65, 63, 15)):
        x, A, order = new(80, k), new(r, k), torch.arange(n)
        yield partial(_train, ops.low_rank_linear, x, A, new(n, r), new(n))
        yield partial(_train, ops.pivot_low_rank_linear, x, A, new(n - r, r), order, new(n))


def _losses(dtype: torch.dtype) -> Iterator[Call]:
    mask = torch.ones(16, dtype=torch.bool)
    both = ops.distill_loss_and_grad
    for i in range(12):
        width = 16 << i  # 16384 is the last that fits; 32768 is read twice
        student, teacher = (torch.empty(16, width, dtype=dtype) for _ in range(2))
        yield partial(_forward, both, student, teacher, mask)
        if i % 3 == 0:
            yield partial(_forward, ops.distill_loss, student, teacher)
            yield partial(_forward, both, student[:, 1:], teacher[:, 1:], mask)
        if width in (4096, 32768):
            yield partial(_forward, both, student, teacher, mask, form="nmse")
        if width in (4096, 16384):
            yield partial(_forward, both, student, teacher.bfloat16(), mask)
    student, teacher = (torch.empty(16, 4096, dtype=dtype) for _ in range(2))
    yield partial(_train, lambda s, **given: ops.distill_loss(s, teacher, mask, **given), student)


def _experts_call(
    run: Callable[..., None], rows: int, ranks: Sequence[int], dtype: torch.dtype, top_k: int = 2
) -> Call:
    """One call of a layer whose projections all have these ranks."""
    new = partial(torch.empty, dtype=dtype)
    hidden, inner, num_dense = 64, 128, ranks.count(0)
    tensors = [new(rows, hidden), torch.empty(rows, top_k)]
    for k, n in ((hidden, inner), (hidden, inner), (inner, hidden)):
        tensors += [new(len(ranks), 16, k), new(len(ranks), n, 16), new(num_dense, n, k)]
    index = torch.zeros(rows, top_k, dtype=torch.int64)

    def call(x: Tensor, weight: Tensor, *factors: Tensor, impl: Any) -> Tensor:
        parts = [factors[i : i + 3] for i in (0, 3, 6)]
        projections = [
            ops.ProjectionFactors(tuple(ranks), A, B, W if num_dense else None) for A, B, W in parts
        ]
        return ops.low_rank_experts(x, index, weight, ops.ExpertFactors(*projections), impl=impl)

    return partial(run, call, *tensors)


def _experts(dtype: torch.dtype) -> Iterator[Call]:
    low_rank, mixed = [16] * NUM_EXPERTS, [16] * (NUM_EXPERTS - 1) + [0]
    # tiles of 16 and 32 rows in fp32, of 16 to 128 in bf16; fp16, which is like it, takes the last
    sizes = {torch.float32: (64, 128), torch.float16: (512,), torch.bfloat16: (64, 128, 256, 512)}
    for ranks in (low_rank, mixed):
        for rows in (1, 16):  # as many slots as places, and as experts
            yield _experts_call(_forward, rows, ranks, dtype)
        for rows in sizes[dtype] if dtype == torch.bfloat16 or ranks is low_rank else (512,):
            yield _experts_call(_train, rows, ranks, dtype)
        yield _experts_call(_forward, 512, ranks, dtype)
    yield _experts_call(_forward, 2048, low_rank, dtype)  # counted in several blocks
    if dtype == torch.bfloat16:
        for ranks in ([16] * 64, [16] * 63 + [0]):
            for run, rows in ((_forward, 1), (_forward, 16), (_forward, 1024), (_train, 1024)):
                yield _experts_call(run, rows, ranks, dtype, top_k=8)


def _over_time(dtype: torch.dtype) -> Iterator[Call]:
    batch, channels, size, steps = 1, 64, 16, 64
    new = partial(torch.empty, dtype=dtype)
    A, D, bias = torch.empty(channels, size), torch.empty(channels), torch.empty(channels)
    state = torch.empty(batch, channels, size)
    scan = partial(ops.selective_scan, delta_softplus=True)
    for last in (False, True):  # channels are neighbours, as in transformers, or steps
        x, z = (
            new(batch, channels, steps) if last else new(batch, steps, channels).transpose(1, 2)
            for _ in range(2)
        )
        B, C = (new(batch, size, steps) for _ in range(2))
        given = (x, new(batch, channels, steps), A, B, C, D, z)
        more = {"delta_bias": bias, "initial_state": state}
        yield partial(_forward, scan, *given, **more)
        yield partial(_train, scan, *given, **more)
        conv = partial(ops.causal_conv1d, activation="silu", initial_state=new(batch, channels, 3))
        yield partial(_train, conv, x, new(channels, 4), new(channels))
    step = new(batch, channels)
    given = (step, step, A, new(batch, size), new(batch, size), D, step)
    update = partial(ops.selective_state_update, dt_bias=bias, dt_softplus=True)
    yield partial(_forward, update, state, *given)
    update = partial(ops.causal_conv1d_update, activation="silu")
    past = torch.empty(batch, channels, 4)
    yield partial(_forward, update, step[..., None], past, new(channels, 4), new(channels))


def _mixers(dtype: torch.dtype) -> Iterator[Call]:
    """Steps of a mixer with the ranks and states of Mamba-2.8B, and K in one part, two and four."""
    for hidden, channels in ((256, 256), (1024, 1024), (4096, 5120)):
        new, rank, state, dt_rank = partial(torch.empty, dtype=dtype), 16, 16, 160
        weights = ops.MixerWeights(
            in_A=new(rank, hidden), in_B=new(2 * channels, rank), in_bias=None,
            conv=new(channels, 4), conv_bias=new(channels),
            x_proj=new(dt_rank + 2 * state, channels), dt=new(channels, dt_rank),
            dt_bias=torch.empty(channels), A_log=torch.empty(channels, state),
            D=torch.empty(channels), out_A=new(rank, channels), out_B=new(hidden, rank),
            out_bias=None,
        )  # fmt: skip
        states = torch.empty(1, channels, 4), torch.empty(1, channels, state)
        yield partial(_forward, ops.mamba_mixer_step, new(1, hidden), *states, weights)


def calls() -> Iterator[Call]:
    """Functions that run an op each, within `dispatch.compiling_for`."""
    for dtype in DTYPES:
        yield from _linears(dtype)
        yield from _losses(dtype)
        yield from _experts(dtype)
        yield from _over_time(dtype)
        yield from _mixers(dtype)
