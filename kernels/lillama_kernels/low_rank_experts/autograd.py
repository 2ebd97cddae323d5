"""low_rank_experts on Triton as one op for autograd, torch.compile and CUDA graphs.

triton is imported when it runs.
"""

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from lillama_kernels.dispatch import trains, work_dtype
from lillama_kernels.reference import ExpertFactors
from lillama_kernels.tiles import EXPERTS_DECODE_MAX_TOKENS, experts_table_size

__all__ = ["run"]

NAMES = tuple(f"{name}_{letter}" for name in ExpertFactors._fields for letter in "ABW")


def run(hidden: Tensor, index: Tensor, weight: Tensor, factors: ExpertFactors) -> Tensor:
    """low_rank_experts on Triton; arguments are checked."""
    dtype = work_dtype(hidden)
    all_factors = [getattr(part, letter) for part in factors for letter in "ABW"]
    out, *_ = torch.ops.lillama.low_rank_experts(
        hidden.to(dtype),
        index,
        weight,
        [t.to(dtype) for t in all_factors if t is not None],
        [t is not None for t in all_factors],
        [rank for part in factors for rank in part.ranks],
        trains(hidden, weight, *all_factors),
    )
    return out.to(hidden.dtype)


def _rows_in_place(matrix: Tensor) -> Tensor:
    """A matrix whose rows are contiguous and begin at multiples of 8 elements."""
    in_place = matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0
    return matrix if in_place else matrix.contiguous()


def _layer(
    hidden: Tensor, index: Tensor, weight: Tensor, named: Mapping[str, Tensor], ranks: Sequence[int]
) -> Any:
    from lillama_kernels.low_rank_experts.launch import Layer, pack_ranks

    each = len(ranks) // 3
    packed = pack_ranks(*(tuple(ranks[i * each : (i + 1) * each]) for i in range(3)))
    factors = {name: tensor.contiguous() for name, tensor in named.items()}
    index = index.to(torch.int64).contiguous()
    return Layer(_rows_in_place(hidden), index, weight.contiguous(), factors, packed)


# given says which of NAMES the factors are: autograd takes no list with gaps.
@torch.library.custom_op("lillama::low_rank_experts", mutates_args=())
def _forward(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    factors: Sequence[Tensor],
    given: Sequence[bool],
    ranks: Sequence[int],
    save: bool,
) -> list[Tensor]:
    """out [M, H]; then, with save, what backward needs: z, z2, gate, up, table and row; empty
    without. ranks: of gate, up and down, E each."""
    from lillama_kernels.low_rank_experts.decode import low_rank_experts_decode
    from lillama_kernels.low_rank_experts.launch import low_rank_experts_forward

    named = dict(zip(compress(NAMES, given), factors, strict=True))
    nothing = _kept(hidden, 0, named, ranks)
    if index.numel() == 0:
        return [torch.zeros_like(hidden, memory_format=torch.contiguous_format), *nothing]
    layer = _layer(hidden, index, weight, named, ranks)
    if hidden.shape[0] <= EXPERTS_DECODE_MAX_TOKENS and not save:
        return [low_rank_experts_decode(layer), *nothing]
    out, saved, rows = low_rank_experts_forward(layer, save)
    return [out, *saved, rows.table, rows.row] if save else [out, *nothing]


def _kept(
    hidden: Tensor, places: int, named: Mapping[str, Tensor], ranks: Sequence[int]
) -> list[Tensor]:
    """z, z2, gate, up, table and row of so many (token, place) pairs, unset."""

    def rank(projection: str) -> int:
        return named[f"{projection}_B"].shape[2] if f"{projection}_B" in named else 0

    inner = named["gate_B" if "gate_B" in named else "gate_W"].shape[1]
    columns = (rank("gate") + rank("up"), rank("down"), inner, inner)
    sizes = (experts_table_size(places, len(ranks) // 3), places)
    return [
        *(hidden.new_empty((places, n)) for n in columns),
        *(hidden.new_empty(n, dtype=torch.int32) for n in sizes),
    ]


@_forward.register_fake
def _(hidden, index, weight, factors, given, ranks, save):
    named = dict(zip(compress(NAMES, given), factors, strict=True))
    places = index.numel() if save else 0
    return [hidden.new_empty(hidden.shape), *_kept(hidden, places, named, ranks)]


@torch.library.custom_op(
    "lillama::low_rank_experts_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor hidden, Tensor index, Tensor weight, Tensor[] factors, "
    "Tensor[] saved, bool[] given, int[] ranks, bool[] needs) -> Tensor[]",
)
def _backward(dout, hidden, index, weight, factors, saved, given, ranks, needs):
    """Gradients of hidden, weight and the factors in their order; empty where not needed."""
    from lillama_kernels.low_rank_experts.backward import low_rank_experts_backward
    from lillama_kernels.low_rank_experts.launch import Saved, rows_of

    named = dict(zip(compress(NAMES, given), factors, strict=True))
    inputs = {"hidden": hidden, "weight": weight, **named}
    needed = set(compress(inputs, needs))
    if index.numel() == 0:
        grads = {name: torch.zeros_like(inputs[name]) for name in needed}
    else:
        layer = _layer(hidden, index, weight, named, ranks)
        *kept, table, row = saved
        rows, dout = rows_of(layer, table, row), _rows_in_place(dout)
        grads = low_rank_experts_backward(layer, rows, Saved(*kept), dout, needed)
    return [grads[name] if name in needed else hidden.new_empty(0) for name in inputs]


@_backward.register_fake
def _(dout, hidden, index, weight, factors, saved, given, ranks, needs):
    inputs = zip((hidden, weight, *factors), needs, strict=True)
    return [t.new_empty(t.shape) if need else hidden.new_empty(0) for t, need in inputs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, index, weight, factors, ctx.given, ctx.ranks, ctx.saved = inputs
    ctx.set_materialize_grads(False)
    ctx.num_factors = len(factors)
    ctx.save_for_backward(hidden, index, weight, *factors, *output[1:])


def _autograd_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    if not ctx.saved:
        raise RuntimeError("lillama::low_rank_experts has no gradient without save=True")
    if grads[0] is None:
        return None, None, None, [None] * ctx.num_factors, None, None, None
    hidden, index, weight, *rest = ctx.saved_tensors
    factors, saved = rest[: ctx.num_factors], rest[ctx.num_factors :]
    needs_hidden, _, needs_weight, needs_factors, *_ = ctx.needs_input_grad
    needs = [needs_hidden, needs_weight, *needs_factors]
    found = torch.ops.lillama.low_rank_experts_backward(
        grads[0], hidden, index, weight, factors, saved, ctx.given, ctx.ranks, needs
    )
    wanted = (grad if need else None for grad, need in zip(found, needs, strict=True))
    dhidden, dweight, *dfactors = wanted
    return dhidden, None, dweight, dfactors, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
