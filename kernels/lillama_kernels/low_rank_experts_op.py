"""low_rank_experts on Triton as one op for autograd, torch.compile and CUDA graphs.

triton is imported when it runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lillama_kernels.impl import work_dtype
from lillama_kernels.launch import EXPERTS_DECODE_MAX_TOKENS, experts_table_size
from lillama_kernels.reference import ExpertFactors

__all__ = ["run"]

NAMES = tuple(f"{name}_{letter}" for name in ExpertFactors._fields for letter in "ABW")


def run(hidden: Tensor, index: Tensor, weight: Tensor, factors: ExpertFactors) -> Tensor:
    """low_rank_experts on Triton; arguments are checked."""
    dtype = work_dtype(hidden)
    given = [getattr(part, letter) for part in factors for letter in "ABW"]
    trains = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, *given)
    )
    out, *_ = torch.ops.lillama.low_rank_experts(
        hidden.to(dtype),
        index,
        weight,
        *(None if t is None else t.to(dtype) for t in given),
        [rank for part in factors for rank in part.ranks],
        trains,
    )
    return out.to(hidden.dtype)


def _layer(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    factors: Sequence[Tensor | None],
    ranks: Sequence[int],
) -> Any:
    from lillama_kernels.launch_triton import unit_stride
    from lillama_kernels.low_rank_experts_launch import Layer, pack_ranks

    hidden = unit_stride(hidden)
    if hidden.stride(0) % 8:
        hidden = hidden.contiguous()
    named = {n: t.contiguous() for n, t in zip(NAMES, factors, strict=True) if t is not None}
    each = len(ranks) // 3
    packed = pack_ranks(*(tuple(ranks[i * each : (i + 1) * each]) for i in range(3)))
    index = index.to(torch.int64).contiguous()
    return Layer(hidden, index, weight.contiguous(), named, packed)


@torch.library.custom_op("lillama::low_rank_experts", mutates_args=())
def _forward(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_A: Tensor | None,
    gate_B: Tensor | None,
    gate_W: Tensor | None,
    up_A: Tensor | None,
    up_B: Tensor | None,
    up_W: Tensor | None,
    down_A: Tensor | None,
    down_B: Tensor | None,
    down_W: Tensor | None,
    ranks: Sequence[int],
    save: bool,
) -> list[Tensor]:
    """out [M, H]; then, with save, what backward needs: z, z2, gate, up, table and row; empty
    without. ranks: of gate, up and down, E each."""
    from lillama_kernels.low_rank_experts_decode_launch import low_rank_experts_decode
    from lillama_kernels.low_rank_experts_launch import low_rank_experts_forward

    factors = gate_A, gate_B, gate_W, up_A, up_B, up_W, down_A, down_B, down_W
    nothing = _kept(hidden, 0, factors, ranks)
    if index.numel() == 0:
        return [torch.zeros_like(hidden, memory_format=torch.contiguous_format), *nothing]
    layer = _layer(hidden, index, weight, factors, ranks)
    if hidden.shape[0] <= EXPERTS_DECODE_MAX_TOKENS and not save:
        return [low_rank_experts_decode(layer), *nothing]
    out, saved, rows = low_rank_experts_forward(layer, save)
    return [out, *saved, rows.table, rows.row] if save else [out, *nothing]


def _kept(
    hidden: Tensor,
    places: int,
    factors: Sequence[Tensor | None],
    ranks: Sequence[int],
) -> list[Tensor]:
    """z, z2, gate, up, table and row of so many (token, place) pairs, unset."""
    _, gate_B, gate_W, _, up_B, _, _, down_B, _ = factors

    def width(B: Tensor | None) -> int:
        return 0 if B is None else B.shape[2]

    one = gate_B if gate_W is None else gate_W
    assert one is not None
    columns = [width(gate_B) + width(up_B), width(down_B), one.shape[1], one.shape[1]]
    kept = [hidden.new_empty((places, n)) for n in columns]
    size = experts_table_size(places, len(ranks) // 3)
    return kept + [hidden.new_empty(n, dtype=torch.int32) for n in (size, places)]


@_forward.register_fake
def _(hidden, index, weight, gate_A, gate_B, gate_W, up_A, up_B, up_W, down_A, down_B, down_W,
      ranks, save):  # fmt: skip
    factors = gate_A, gate_B, gate_W, up_A, up_B, up_W, down_A, down_B, down_W
    places = index.numel() if save else 0
    return [hidden.new_empty(hidden.shape), *_kept(hidden, places, factors, ranks)]


@torch.library.custom_op("lillama::low_rank_experts_backward", mutates_args=())
def _backward(
    dout: Tensor,
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_A: Tensor | None,
    gate_B: Tensor | None,
    gate_W: Tensor | None,
    up_A: Tensor | None,
    up_B: Tensor | None,
    up_W: Tensor | None,
    down_A: Tensor | None,
    down_B: Tensor | None,
    down_W: Tensor | None,
    saved: Sequence[Tensor],
    ranks: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of hidden, weight and the factors in their order; empty where not needed."""
    from lillama_kernels.launch_triton import unit_stride
    from lillama_kernels.low_rank_experts_grad_launch import low_rank_experts_backward
    from lillama_kernels.low_rank_experts_launch import Saved, rows_of

    factors = gate_A, gate_B, gate_W, up_A, up_B, up_W, down_A, down_B, down_W
    named = dict(zip(("hidden", "weight", *NAMES), (hidden, weight, *factors), strict=True))
    needed = {name for name, need in zip(named, needs, strict=True) if need}
    grads: dict[str, Tensor] = {}
    if index.numel() == 0:
        grads = {n: torch.zeros_like(t) for n, t in named.items() if n in needed and t is not None}
    else:
        layer = _layer(hidden, index, weight, factors, ranks)
        dout = unit_stride(dout)
        if dout.stride(0) % 8:
            dout = dout.contiguous()
        *kept, table, row = saved
        rows = rows_of(layer, table, row)
        grads = low_rank_experts_backward(layer, rows, Saved(*kept), dout, needed)
    return [
        grads[name] if name in needed and name in grads else hidden.new_empty(0) for name in named
    ]


@_backward.register_fake
def _(dout, hidden, index, weight, gate_A, gate_B, gate_W, up_A, up_B, up_W, down_A, down_B,
      down_W, saved, ranks, needs):  # fmt: skip
    given = (hidden, weight, gate_A, gate_B, gate_W, up_A, up_B, up_W, down_A, down_B, down_W)
    wanted = [need and t is not None for need, t in zip(needs, given, strict=True)]
    return [
        t.new_empty(t.shape) if want else hidden.new_empty(0)
        for want, t in zip(wanted, given, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.ranks, ctx.saved = inputs
    ctx.set_materialize_grads(False)
    ctx.given = [t is not None for t in tensors]
    ctx.save_for_backward(*(t for t in tensors if t is not None), *output[1:])


def _autograd_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    if not ctx.saved:
        raise RuntimeError("lillama::low_rank_experts has no gradient without save=True")
    flags = (None,) * 2
    dout = grads[0]
    if dout is None:
        return (*(None for _ in ctx.given), *flags)
    num_given = sum(ctx.given)
    remaining = iter(ctx.saved_tensors[:num_given])
    tensors = [next(remaining) if given else None for given in ctx.given]
    # all but the index
    needs = [bool(need) for i, need in enumerate(ctx.needs_input_grad[: len(tensors)]) if i != 1]
    found = torch.ops.lillama.low_rank_experts_backward(
        dout, *tensors, list(ctx.saved_tensors[num_given:]), ctx.ranks, needs
    )
    results = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    return (results[0], None, *results[1:], *flags)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
