"""How factors are spelt, on disk and in a model: nothing else in lillama knows it.

A compressed model is a sharded safetensors checkpoint in the model's own hub names. The weight
`<name>.weight` of a factorised matrix is replaced by `<name>.lr_A` [R, K] and `<name>.lr_B` [N, R];
`config.json` carries the ranks. Token embeddings [V, H] are stored as any matrix with N = V and
K = H. In gauge "pivot" `<name>.lr_C` [N - R, R] and the pivot mask `<name>.lr_pivots` [N] (uint8)
take the place of `.lr_B`: the rows of B where it is 1 are those of the identity, the others those
of C (see `pivots.py`). Of the embeddings, whose outputs are the columns of their table, `.lr_C`
[H - R, R] and `.lr_pivots` [H] take the place of `.lr_A` in the same way. Inside a stacked experts
module that is only partly factorised, a matrix that stays dense is `<name>.lr_W` [N, K] (as
`.weight` transformers would try to stack it).
"""

from collections.abc import Sequence

__all__ = [
    "FACTOR_A",
    "FACTOR_B",
    "FACTOR_C",
    "FACTOR_SUFFIXES",
    "GAUGES",
    "KEPT_DENSE",
    "PERMUTATION",
    "PIVOT_MASK",
    "STACKED",
    "factor_shapes",
    "stacked_name",
    "stacked_place",
    "stacked_shape",
]

FACTOR_A, FACTOR_B, FACTOR_C = "lr_A", "lr_B", "lr_C"
PIVOT_MASK = "lr_pivots"
# in an experts module
KEPT_DENSE = "lr_W"
FACTOR_SUFFIXES = tuple(f".{key}" for key in (FACTOR_A, FACTOR_B, FACTOR_C, PIVOT_MASK, KEPT_DENSE))
GAUGES = ("plain", "pivot")
# a module's buffer, where a checkpoint has the mask
PERMUTATION = "lr_order"
# {gauge: what stacked experts hold of each projection, as the operations take it}
STACKED = {
    "plain": (FACTOR_A, FACTOR_B, KEPT_DENSE),
    "pivot": (FACTOR_A, FACTOR_C, PERMUTATION, KEPT_DENSE),
}


def factor_shapes(
    shape: tuple[int, int], rank: int, gauge: str, is_embedding: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return {end of the name: shape} of what is stored of a matrix [N, K] with a rank.
    is_embedding: it is the table [V, H] of the token embeddings, of which the pivot gauge takes
    columns."""
    N, K = shape
    if gauge != "pivot":
        return {FACTOR_A: (rank, K), FACTOR_B: (N, rank)}
    if is_embedding:
        return {FACTOR_B: (N, rank), FACTOR_C: (K - rank, rank), PIVOT_MASK: (K,)}
    return {FACTOR_A: (rank, K), FACTOR_C: (N - rank, rank), PIVOT_MASK: (N,)}


def stacked_name(projection: str, key: str) -> str:
    """Return what a stacked experts module calls a tensor of one projection, of all experts."""
    return f"{projection}_{key.removeprefix('lr_')}"


def stacked_shape(key: str, shape: tuple[int, int], ranks: Sequence[int]) -> tuple | None:
    """Return the shape of the stack of all experts' tensors of one projection [N, K], padded to the
    largest rank; None where no expert has one."""
    (N, K), E, R, num_dense = shape, len(ranks), max(ranks), ranks.count(0)
    if key == KEPT_DENSE:
        return (num_dense, N, K) if num_dense else None
    if R == 0:
        return None
    rest = N - min(filter(None, ranks))
    shapes = {FACTOR_A: (E, R, K), FACTOR_B: (E, N, R), FACTOR_C: (E, rest, R), PERMUTATION: (E, N)}
    return shapes[key]


def stacked_place(key: str, ranks: Sequence[int], expert: int, N: int) -> tuple | None:
    """Return the index of one expert's tensor in that stack; None where it has none."""
    rank = ranks[expert]
    if key == KEPT_DENSE:
        return None if rank else (ranks[:expert].count(0),)
    if rank == 0:
        return None
    places = {
        FACTOR_A: (expert, slice(rank)),
        FACTOR_B: (expert, slice(None), slice(rank)),
        FACTOR_C: (expert, slice(N - rank), slice(rank)),
    }
    return places.get(key, (expert,))
