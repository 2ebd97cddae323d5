"""The student block: a copy of the teacher block with its targets factorised, and its way back to
the checkpoint."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lillama.checkpoint.gauge import rounded, to_pivot
from lillama.checkpoint.names import FACTOR_A, FACTOR_B, FACTOR_C, KEPT_DENSE, PIVOT_MASK
from lillama.checkpoint.pivots import permutation_of, pivot_rows
from lillama.checkpoint.shard_file import DTYPES, Entry
from lillama.compress.measure.moments import MomentCollector
from lillama.compress.measure.svd import Moment, plain_svd, shrunk, whitened_svd
from lillama.compress.plan.plan import Plan
from lillama.compress.teacher.blocks import TeacherBlocks
from lillama.config import Recipe
from lillama.errors import RunError
from lillama.modules.low_rank_experts import LowRankExperts
from lillama.modules.low_rank_linear import LowRankLinear
from lillama.modules.replace import replace_modules

__all__ = [
    "block_entries",
    "copied_entry",
    "empty_student",
    "fill_student",
    "fix_gauge",
    "load_student",
    "round_parameters",
    "stored_as",
    "student_structure",
]


# attribute of a module that is stored in the pivot gauge: {part: its pivot mask}
PIVOT_MASKS = "pivot_masks"


class _Fill(NamedTuple):
    """What factors are made with. gradients(hub name): the damped moment of a matrix's gradients,
    fp32, where the init weighs errors with it."""

    moments: MomentCollector
    recipe: Recipe
    gradients: Callable[[str], Tensor]


def _factors(weight: Tensor, rank: int, fill: _Fill, moment: Moment | None, name: str) -> tuple:
    if fill.recipe.init == "svd" or moment is None:
        return plain_svd(weight, rank)
    gradient = None
    if fill.recipe.init == "fisher":
        gradient = fill.gradients(name).to(weight.device, torch.float64)
    return whitened_svd(weight, shrunk(weight, moment, fill.recipe.shrinkage), rank, gradient)


@torch.no_grad()
def _fill_linear(
    new: LowRankLinear, name: str, path: str, teacher: TeacherBlocks, fill: _Fill
) -> None:
    weight = teacher.matrix(name).to(teacher.device)
    A, B = _factors(weight, new.rank, fill, fill.moments.pop(path), name)
    new.A.copy_(A)
    new.B.copy_(B)
    if new.bias is not None:
        new.bias.copy_(teacher.read(f"{name}.bias"))


@torch.no_grad()
def _fill_experts(
    new: LowRankExperts, hub: str, path: str, teacher: TeacherBlocks, fill: _Fill
) -> None:
    naming = teacher.family.experts
    assert naming is not None
    for expert in range(new.num_experts):
        # up before gate, whose moment it may share
        for projection in ("up", "gate", "down"):
            rank = new.ranks[projection][expert]
            moment = fill.moments.pop((path, expert, projection))
            name = f"{hub}.{expert}.{naming.hub_projection(projection)}"
            weight = teacher.read(f"{name}.weight").to(teacher.device)
            stored = new.stored(projection, expert)
            if rank == 0:
                stored[KEPT_DENSE].copy_(weight)
                continue
            A, B = _factors(weight, rank, fill, moment, name)
            stored[FACTOR_A].copy_(A)
            stored[FACTOR_B].copy_(B)


def student_structure(
    teacher: TeacherBlocks, index: int, block: nn.Module, plan: Plan
) -> nn.Module:
    """A copy of the teacher block with factors on the meta device and all else its own, in the
    dtype to compute in. Stacked experts that stay dense are shared with the teacher: they never
    train."""
    shared: dict[int, Any] = {id(p): p for p in block.parameters()}
    student = copy.deepcopy(block, shared)
    prefix = f"{teacher.block_paths[index]}."
    ranks = {name.removeprefix(prefix): rank for name, rank in plan.ranks_of_block(index).items()}
    replaced = replace_modules(
        student, plan.config, ranks, device="meta", dtype=teacher.dtype, family=plan.family
    )
    for old in replaced.values():
        # it holds the module it belongs to: in a cycle the dense weights would outlive the block
        old.__dict__.pop("forward", None)
    factorised = {
        f"{path}.{key}"
        for path, module in student.named_modules()
        if isinstance(module, LowRankExperts | LowRankLinear)
        for key, _ in module.named_parameters()
    }
    saved_one_to_one = set(_one_to_one(teacher, index).values())
    for name, parameter in list(student.named_parameters()):
        if name not in factorised and name in saved_one_to_one:
            path, _, key = name.rpartition(".")
            own = nn.Parameter(parameter.detach().to(teacher.dtype, copy=True))
            setattr(student.get_submodule(path), key, own)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in factorised or name in saved_one_to_one)
    return student.eval()


def empty_student(
    student: nn.Module, device: torch.device
) -> dict[str, LowRankExperts | LowRankLinear]:
    """Give the factorised modules of a `student_structure` memory, zeros; returns them by path."""
    found = {
        path: module
        for path, module in student.named_modules()
        if isinstance(module, LowRankExperts | LowRankLinear)
    }
    for module in found.values():
        module.to_empty(device=device)
        for parameter in module.parameters():
            parameter.data.zero_()
    return found


def fill_student(
    student: nn.Module,
    teacher: TeacherBlocks,
    index: int,
    moments: MomentCollector,
    recipe: Recipe,
    gradients: Callable[[str], Tensor],
) -> None:
    """Factorise the targets of a block into its `student_structure`. The dense weights are read one
    by one, and the moments taken out of `moments`, so that neither waits for the last;
    `gradients(hub name)` gives those of the gradients (init "fisher" only)."""
    prefix = teacher.block_paths[index]
    fill = _Fill(moments, recipe, gradients)
    for path, new in empty_student(student, teacher.device).items():
        if isinstance(new, LowRankExperts):
            assert teacher.family.experts is not None
            hub = f"{prefix}.{teacher.family.experts.hub}"
            _fill_experts(new, hub, path, teacher, fill)
        else:
            _fill_linear(new, f"{prefix}.{path}", path, teacher, fill)


@torch.no_grad()
def load_student(
    student: nn.Module, teacher: TeacherBlocks, index: int, plan: Plan, shard: Path
) -> None:
    """Fill a `student_structure` with the tensors that `block_entries` wrote to `shard`: the
    numbers a user will get."""
    empty_student(student, teacher.device)
    pivots = _pivots(student, teacher, index, plan)
    with safe_open(shard, "pt", backend="pread") as file:
        for name, part in pivots.items():
            keys = FACTOR_A, FACTOR_C, PIVOT_MASK
            part.set_pivot(*(file.get_tensor(f"{name}.{key}") for key in keys))
    values = _values(teacher, index, student, plan.ranks_of_block(index))
    with safe_open(shard, "pt", backend="pread") as file:
        for name, value in values.items():
            if isinstance(value, Tensor) and not name.endswith((f".{FACTOR_C}", f".{PIVOT_MASK}")):
                value.copy_(file.get_tensor(name))


def _one_to_one(teacher: TeacherBlocks, index: int) -> dict[str, str]:
    """{hub tensor name: parameter path in the block} for tensors that are stored as they are."""
    prefix = teacher.block_paths[index]
    names = teacher.hub_names(prefix)
    targets = [teacher.runtime[name] for name in names]
    return {
        name: target.removeprefix(f"{prefix}.")
        for name, target in zip(names, targets, strict=True)
        if targets.count(target) == 1
    }


class _Rows(NamedTuple):
    """Some rows of a tensor, cut out when they are written: of a block's experts all at once would
    take the memory of its factors again."""

    whole: Tensor
    rows: Tensor


class _Part(NamedTuple):
    """One factorised matrix of a student: a linear layer, or one projection of one expert."""

    module: LowRankLinear | LowRankExperts
    key: tuple[str, int] | None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A [R, K] and B [N, R], the module's own."""
        if isinstance(self.module, LowRankLinear):
            return self.module.A, self.module.B
        assert self.key is not None
        stored = self.module.stored(*self.key)
        return stored[FACTOR_A], stored[FACTOR_B]

    @property
    def pivot_mask(self) -> Tensor | None:
        """[N] uint8 where it is stored in the pivot gauge."""
        return self.module.__dict__.get(PIVOT_MASKS, {}).get(self.key)

    def set_pivot(self, A: Tensor, C: Tensor, pivot_mask: Tensor) -> None:
        own_A, own_B = self.factors
        pivot_mask = pivot_mask.to(own_A.device)
        own_A.copy_(A)
        own_B.copy_(pivot_rows(C.to(own_A.device), permutation_of(pivot_mask, len(own_A))))
        self.module.__dict__.setdefault(PIVOT_MASKS, {})[self.key] = pivot_mask

    def stored(self) -> dict[str, Tensor | _Rows]:
        """As the checkpoint has it, without the matrix's name."""
        (A, B), mask = self.factors, self.pivot_mask
        if mask is None:
            return {FACTOR_A: A.detach(), FACTOR_B: B.detach()}
        rows = (mask == 0).nonzero().flatten()
        return {FACTOR_A: A.detach(), FACTOR_C: _Rows(B.detach(), rows), PIVOT_MASK: mask}


def _pivots(student: nn.Module, teacher: TeacherBlocks, index: int, plan: Plan) -> dict[str, _Part]:
    """What is stored in the pivot gauge, by hub name."""
    prefix = f"{teacher.block_paths[index]}."
    experts = teacher.family.experts
    found = {}
    for matrix in plan.matrices:
        if matrix.block == index and matrix.pivot and matrix.name in plan.ranks:
            path, key = matrix.name.removeprefix(prefix), None
            if experts is not None and (parsed := experts.parse(path)) is not None:
                path, key = parsed[0], (parsed[2], parsed[1])
            module = student.get_submodule(path)
            assert isinstance(module, LowRankLinear | LowRankExperts)
            found[matrix.name] = _Part(module, key)
    return found


@torch.no_grad()
def fix_gauge(
    student: nn.Module, teacher: TeacherBlocks, index: int, plan: Plan, dtype: torch.dtype
) -> float | None:
    """Bring trained factors into the gauge they are stored in, rounded as the checkpoint will have
    them, so that later blocks see what a user will run; the largest number of any C, None where
    the gauge is plain."""
    largest = None
    for part in _pivots(student, teacher, index, plan).values():
        found = rounded(to_pivot(*part.factors), dtype)
        part.set_pivot(found.A, found.C, found.pivot_mask)
        largest = max(largest or 0.0, found.largest)
    return largest


@torch.no_grad()
def round_parameters(student: nn.Module, dtype: torch.dtype) -> None:
    """Round to the dtype the checkpoint will have, so that later blocks see what a user will
    run."""
    for parameter in student.parameters():
        if parameter.requires_grad:  # the others are the teacher's
            parameter.copy_(parameter.to(dtype))


def stored_as(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as the checkpoint stores it, on the CPU; integers stay integers.

    Raises:
        RunError: a value is too large for the dtype.
    """
    stored = value.to("cpu", dtype if value.is_floating_point() else value.dtype)
    if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
        raise RunError(
            f"{name} reaches {float(value.abs().max()):.3g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; use --dtype bfloat16 or float32"
        )
    return stored


def _values(
    teacher: TeacherBlocks, index: int, student: nn.Module, ranks: Mapping[str, int]
) -> dict[str, Tensor | _Rows | str]:
    """{checkpoint name: the student's tensor that it stores, or the teacher's hub name where the
    student has none of its own}."""
    prefix = teacher.block_paths[index]
    one_to_one = _one_to_one(teacher, index)
    parameters = dict(student.named_parameters())
    experts = teacher.family.experts
    values: dict[str, Tensor | _Rows | str] = {}
    for name in teacher.hub_names(prefix):
        matrix = name.removesuffix(".weight")
        parsed = None if experts is None else experts.parse(matrix.removeprefix(f"{prefix}."))
        module = None if parsed is None else student.get_submodule(parsed[0])
        if parsed is not None and isinstance(module, LowRankExperts):
            part = _Part(module, (parsed[2], parsed[1]))
            if matrix in ranks:
                values.update({f"{matrix}.{key}": value for key, value in part.stored().items()})
            else:
                dense = module.stored(parsed[2], parsed[1])[KEPT_DENSE]
                values[f"{matrix}.{KEPT_DENSE}"] = dense.detach()
        elif matrix in ranks:
            low_rank = student.get_submodule(one_to_one[name].removesuffix(".weight"))
            assert isinstance(low_rank, LowRankLinear)
            part = _Part(low_rank, None)
            values.update({f"{matrix}.{key}": value for key, value in part.stored().items()})
        elif one_to_one.get(name) in parameters:
            values[name] = parameters[one_to_one[name]].detach()
        else:
            values[name] = name
    return values


def copied_entry(teacher: TeacherBlocks, name: str, dtype: torch.dtype | None) -> Entry:
    """A tensor of the teacher as it is, or in `dtype`; read when it is written."""
    header = teacher.headers[name]
    own = DTYPES[header.dtype]
    wanted = own if dtype is None or not own.is_floating_point else dtype
    return Entry(name, wanted, header.shape, lambda: stored_as(name, teacher.read(name), wanted))


def block_entries(
    teacher: TeacherBlocks,
    index: int,
    student: nn.Module | None,
    ranks: Mapping[str, int],
    dtype: torch.dtype | None,
) -> list[Entry]:
    """Everything of one block under its checkpoint names, made one by one while it is written.

    Without a student the teacher's tensors pass through; `dtype` None keeps each tensor's own
    dtype.
    """
    names = teacher.hub_names(teacher.block_paths[index])
    if student is None:
        return [copied_entry(teacher, name, dtype) for name in names]
    entries = []
    for name, value in _values(teacher, index, student, ranks).items():
        if isinstance(value, str):
            entries.append(copied_entry(teacher, value, dtype))
            continue
        source = name if name in teacher.headers else f"{name.rpartition('.')[0]}.weight"
        wanted = DTYPES[teacher.headers[source].dtype] if dtype is None else dtype
        whole, rows = value if isinstance(value, _Rows) else (value, None)
        wanted = wanted if whole.is_floating_point() else whole.dtype
        shape = tuple(whole.shape) if rows is None else (len(rows), whole.shape[1])

        def make(
            name: str = name,
            whole: Tensor = whole,
            rows: Tensor | None = rows,
            wanted: torch.dtype = wanted,
        ) -> Tensor:
            return stored_as(name, whole if rows is None else whole[rows], wanted)

        entries.append(Entry(name, wanted, shape, make))
    return entries
