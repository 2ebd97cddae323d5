"""Every op in plain PyTorch: the specification, the oracle of the tests, and the CPU path.

mamba/reference.py has those of a Mamba block.

Letters (the same in every file of the project):
    B batch, T tokens per sequence, M = B*T rows, K in_features, N out_features, R rank, E experts,
    k experts per token, H hidden_size, I intermediate_size. For the scan: D channels, S state size.

Nothing here checks its arguments; the public function of the same name does that at the border.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ExpertFactors",
    "LossForm",
    "PivotExpertFactors",
    "PivotProjectionFactors",
    "ProjectionFactors",
    "Reduction",
    "distill_loss",
    "distill_loss_and_grad",
    "distill_loss_rows",
    "low_rank_experts",
    "low_rank_linear",
    "low_rank_linears",
    "pivot_low_rank_linear",
    "reduce_rows",
]

# The smallest norm that divides, F.cosine_similarity's
NORM_EPS = 1e-8
LOSS_FLOOR = math.log1p(math.exp(-1.0))  # form "l1_cosine" when student equals teacher

LossForm = Literal["l1_cosine", "nmse"]
Reduction = Literal["mean", "sum", "none"]


def low_rank_linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x A^T B^T + bias. x [..., K], A [R, K], B [N, R], bias [N] -> y [..., N]."""
    return F.linear(F.linear(x, A), B, bias)


def low_rank_linears(
    x: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """y_i = x A_i^T B_i^T + bias_i for one x."""
    pairs = zip(As, Bs, biases, strict=True)
    return [low_rank_linear(x, A, B, bias) for A, B, bias in pairs]


def pivot_low_rank_linear(
    x: Tensor, A: Tensor, C: Tensor, order: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = [z, z C^T][order] + bias with z = x A^T: R of the N outputs are z itself.

    x [..., K], A [R, K], C [N - R, R], order [N] integers, bias [N] -> y [..., N].
    """
    z = F.linear(x, A)
    y = torch.cat([z, F.linear(z, C)], -1).index_select(-1, order)
    # under autocast the bias has another dtype than the products
    return y if bias is None else y + bias.to(y.dtype)


# x [m, K] -> [m, N] of one expert's projection
Product = Callable[[Tensor], Tensor]


def _groups(x: Tensor, W: Tensor | None, first: Tensor | None, second: Tensor | None) -> bool:
    """Whether grouped_mm takes the rows and both stacks of factors under torch.compile, where it
    wants bf16 with rows of whole 16 bytes."""
    if W is not None or first is None or second is None or second.shape[1] == 0:
        return False
    aligned = all(size % 8 == 0 for size in (*first.shape[1:], second.shape[1]))
    return aligned and {x.dtype, first.dtype, second.dtype} == {torch.bfloat16}


class ProjectionFactors(NamedTuple):
    """One projection (gate, up or down) of every expert, padded with zeros to the largest rank.

    ranks[e] is the rank of expert e, or 0 where the expert keeps its dense weight. A [E, R, K] and
    B [E, N, R] are None when no expert is factorised; W [number of zeros in ranks, N, K] is None
    when none is dense.
    """

    ranks: tuple[int, ...]
    A: Tensor | None
    B: Tensor | None
    W: Tensor | None

    def by_expert(self) -> list[Product]:
        """Each expert's x [m, K] -> x W_e^T [m, N]; padding is not computed. Indexing the stacks
        one expert at a time would give each a gradient of the whole stack's size; this gives all of
        them one."""
        dense = iter(() if self.W is None else self.W.unbind(0))
        As = () if self.A is None else self.A.unbind(0)
        Bs = () if self.B is None else self.B.unbind(0)
        found: list[Product] = []
        for expert, rank in enumerate(self.ranks):
            if rank == 0:
                found.append(partial(F.linear, weight=next(dense)))
                continue
            A, B = As[expert], Bs[expert]
            if rank < A.shape[0]:
                A, B = A[:rank], B[:, :rank]
            found.append(partial(low_rank_linear, A=A, B=B))
        return found

    def can_group(self, x: Tensor) -> bool:
        """Whether apply_grouped runs under torch.compile."""
        return _groups(x, self.W, self.A, self.B)

    def apply_grouped(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Rows sorted by expert, offsets [E] int32 cumulative counts: static shapes for
        torch.compile."""
        assert self.A is not None and self.B is not None
        z = F.grouped_mm(x, self.A.transpose(-2, -1), offs=offsets)
        return F.grouped_mm(z, self.B.transpose(-2, -1), offs=offsets)


class PivotProjectionFactors(NamedTuple):
    """As `ProjectionFactors`, in the pivot gauge: W_e = cat([A, C A])[order].

    A [E, R, K] and C [E, Q, R] are padded with zeros to the largest rank and to Q = N - the
    smallest rank > 0; order [E, N] integers are columns of [z, z C^T] without padding. These three
    are None when no expert is factorised; W [number of zeros in ranks, N, K] is None when none is
    dense.
    """

    ranks: tuple[int, ...]
    A: Tensor | None
    C: Tensor | None
    order: Tensor | None
    W: Tensor | None

    def by_expert(self) -> list[Product]:
        """See `ProjectionFactors.by_expert`."""
        dense = iter(() if self.W is None else self.W.unbind(0))
        As = () if self.A is None else self.A.unbind(0)
        Cs = () if self.C is None else self.C.unbind(0)
        orders = () if self.order is None else self.order.unbind(0)
        found: list[Product] = []
        for expert, rank in enumerate(self.ranks):
            if rank == 0:
                found.append(partial(F.linear, weight=next(dense)))
                continue
            order = orders[expert]
            A, C = As[expert][:rank], Cs[expert][: order.shape[0] - rank, :rank]
            found.append(partial(pivot_low_rank_linear, A=A, C=C, order=order))
        return found

    def can_group(self, x: Tensor) -> bool:
        """See `ProjectionFactors.can_group`."""
        return _groups(x, self.W, self.A, self.C)

    def apply_grouped(self, x: Tensor, offsets: Tensor) -> Tensor:
        """See `ProjectionFactors.apply_grouped`; each row gathers its expert's outputs."""
        assert self.A is not None and self.C is not None and self.order is not None
        z = F.grouped_mm(x, self.A.transpose(-2, -1), offs=offsets)
        both = torch.cat([z, F.grouped_mm(z, self.C.transpose(-2, -1), offs=offsets)], -1)
        # z is padded, so what follows it lies further right
        pairs = zip(self.order.long().unbind(0), self.ranks, strict=True)
        shifted = [torch.where(o < rank, o, o + (z.shape[-1] - rank)) for o, rank in pairs]
        rows = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
        expert = torch.searchsorted(offsets, rows, right=True).clamp_max(len(self.ranks) - 1)
        return both.gather(-1, torch.stack(shifted)[expert])


class ExpertFactors(NamedTuple):
    """The three projections of a gated expert: down(silu(gate(x)) * up(x))."""

    gate: ProjectionFactors
    up: ProjectionFactors
    down: ProjectionFactors


class PivotExpertFactors(NamedTuple):
    """The same in the pivot gauge."""

    gate: PivotProjectionFactors
    up: PivotProjectionFactors
    down: PivotProjectionFactors


def low_rank_experts(
    hidden: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    factors: ExpertFactors | PivotExpertFactors,
) -> Tensor:
    """out_m = sum_k w_mk down_e(silu(gate_e(x_m)) * up_e(x_m)), e = topk_index[m, k].

    hidden [M, H], topk_index [M, k] int64, topk_weight [M, k] -> [M, H]. Rows are sorted by
    expert, so each expert's factors are read once. An index >= E (an expert of another process, or
    padding) contributes zero.
    """
    num_experts, k = len(factors.gate.ranks), topk_index.shape[1]
    flat = topk_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    rows = order // k
    x = hidden[rows]
    compiling = torch.compiler.is_compiling()
    if compiling and all(p.can_group(x) for p in factors):
        experts = torch.arange(num_experts, device=flat.device)
        counts = (flat[:, None] == experts).sum(0)
        offsets = counts.cumsum(0).to(torch.int32)
        # grouped_mm leaves rows past the last offset unwritten, in its gradients too; the first
        # where keeps those out of hidden's gradient, the second out of the result
        counted = (flat[order] < num_experts)[:, None]
        x = torch.where(counted, x, torch.zeros_like(x))
        gate, up = (p.apply_grouped(x, offsets) for p in factors[:2])
        y = factors.down.apply_grouped(F.silu(gate) * up, offsets)
        y = torch.where(counted, y, torch.zeros_like(y))
    elif compiling and all(p.W is None for p in factors):
        # every expert over every row, the rows of others zero: E / k times the work, but static
        # shapes for what grouped_mm refuses
        y = torch.zeros_like(x)
        products = zip(*(projection.by_expert() for projection in factors), strict=True)
        for expert, (gate, up, down) in enumerate(products):
            rows_e = torch.where((flat[order] == expert)[:, None], x, torch.zeros_like(x))
            y = y + down(F.silu(gate(rows_e)) * up(rows_e))
    else:
        parts, start = [], 0
        gates, ups, downs = (projection.by_expert() for projection in factors)
        for expert, count in enumerate(torch.bincount(flat, minlength=num_experts).tolist()):
            rows_e = x[start : start + count]
            start += count
            if count == 0:
                continue
            if expert >= num_experts:
                parts.append(torch.zeros_like(rows_e))
                continue
            gated = F.silu(gates[expert](rows_e)) * ups[expert](rows_e)
            parts.append(downs[expert](gated))
        y = torch.cat(parts) if parts else x
    y = y * topk_weight.reshape(-1)[order, None].to(y.dtype)
    # back to token order, then a sum over k in a fixed order: deterministic, unlike index_add on a
    # GPU
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return y[inverse].view(*topk_index.shape, hidden.shape[1]).sum(1).to(hidden.dtype)


def distill_loss_rows(
    student: Tensor, teacher: Tensor, mask: Tensor | None, form: LossForm
) -> Tensor:
    """Loss of each token [...], 0 where masked; a [..., H] the student, y the teacher.

    Statistics in fp32 (fp64 for fp64); norms are not smaller than 1e-8 where they divide.
    """
    work = torch.promote_types(student.dtype, torch.float32)
    a, y = student.to(work), teacher.to(work)
    if mask is not None:  # a masked row may hold anything, NaN included
        a, y = (t.masked_fill(~mask[..., None], 0.0) for t in (a, y))
    if form == "l1_cosine":
        loss = (a - y).abs().mean(-1) - F.logsigmoid(F.cosine_similarity(a, y, dim=-1))
    else:
        loss = (a - y).square().sum(-1) / y.norm(dim=-1).clamp_min(NORM_EPS).square()
    return loss if mask is None else torch.where(mask, loss, torch.zeros_like(loss))


def reduce_rows(rows: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """rows, which are 0 where masked ("none"), their sum, or the mean of those that count."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.mean() if mask is None else rows.sum() / mask.sum()


def distill_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    form: LossForm = "l1_cosine",
) -> Tensor:
    """student, teacher [..., H]; mask [...] (True counts) -> a scalar, or [...] with "none".

    The default form (arXiv 2412.16719) has its floor at -log sigmoid(1) = 0.3133, not at 0.
    """
    rows = distill_loss_rows(student, teacher, mask, form)
    return reduce_rows(rows, mask, reduction)


def distill_loss_and_grad(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    form: LossForm = "l1_cosine",
) -> tuple[Tensor, Tensor]:
    """The loss ("mean" or "sum") and its gradient in the student, outside autograd."""

    def loss_of(student: Tensor) -> Tensor:
        return distill_loss(student, teacher, mask, reduction, form)

    with torch.no_grad():  # of the outer level; torch.compile traces no torch.autograd.grad
        grad, loss = torch.func.grad_and_value(loss_of)(student.detach())
    return loss, grad
