"""The student block: a copy of the teacher block with its targets factorised, and its way back to
the checkpoint."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lillama.compress.blocks import TeacherBlocks
from lillama.compress.calibrate import GramCollector
from lillama.compress.factorize import blend_gram, plain_svd, whitened_svd
from lillama.compress.plan import Plan
from lillama.config import Recipe
from lillama.errors import RunError
from lillama.families import PROJECTIONS
from lillama.modules.low_rank_experts import LowRankExperts
from lillama.modules.low_rank_linear import LowRankLinear
from lillama.modules.replace import copy_dense_experts, dense_expert, replace_modules

__all__ = ["block_tensors", "make_student", "round_parameters", "stored_as"]


def _factors(
    weight: Tensor,
    rank: int,
    recipe: Recipe,
    gram: tuple[Tensor, float, Tensor | None, float] | None,
) -> tuple[Tensor, Tensor]:
    if recipe.init == "svd" or gram is None:
        return plain_svd(weight, rank)
    return whitened_svd(weight, blend_gram(*gram, recipe.shrinkage), rank)


@torch.no_grad()
def _fill_linear(
    new: LowRankLinear, old: nn.Linear, path: str, grams: GramCollector, recipe: Recipe
) -> None:
    gram = (grams.grams[path], grams.counts[path], None, 0) if path in grams.grams else None
    A, B = _factors(old.weight, new.rank, recipe, gram)
    new.lr_A.copy_(A)
    new.lr_B.copy_(B)
    if new.bias is not None:
        new.bias.copy_(old.bias)


@torch.no_grad()
def _fill_experts(
    new: LowRankExperts, old: nn.Module, path: str, grams: GramCollector, recipe: Recipe
) -> None:
    copy_dense_experts(new, old)
    for projection in PROJECTIONS:
        kind = "down" if projection == "down" else "gate"
        all_experts, all_tokens = grams.shared(path, kind) if grams.grams else (None, 0)
        for expert, rank in enumerate(new.ranks[projection]):
            if rank == 0:
                continue
            key = (path, expert, kind)
            gram = None
            if key in grams.grams:
                gram = (grams.grams[key], grams.counts[key], all_experts, all_tokens)
            A, B = _factors(dense_expert(old, projection, expert), rank, recipe, gram)
            stored = new.stored(projection, expert)
            stored["lr_A"].copy_(A)
            stored["lr_B"].copy_(B)


def make_student(
    teacher: TeacherBlocks,
    index: int,
    block: nn.Module,
    plan: Plan,
    grams: GramCollector,
    recipe: Recipe,
) -> nn.Module:
    """Copy the loaded teacher block and factorise its targets; every parameter that can be saved
    may train."""
    student = copy.deepcopy(block)
    prefix = f"{teacher.block_path}.{index}."
    ranks = {name.removeprefix(prefix): rank for name, rank in plan.ranks_of_block(index).items()}
    for path, old in replace_modules(student, plan.config, ranks).items():
        new = student.get_submodule(path)
        if isinstance(new, LowRankExperts):
            _fill_experts(new, old, path, grams, recipe)
        elif isinstance(new, LowRankLinear) and isinstance(old, nn.Linear):
            _fill_linear(new, old, path, grams, recipe)
    factorised = {
        name
        for path, module in student.named_modules()
        if isinstance(module, LowRankExperts | LowRankLinear)
        for name in (f"{path}.{key}" for key, _ in module.named_parameters())
    }
    saved_one_to_one = set(_one_to_one(teacher, index).values())
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in factorised or name in saved_one_to_one)
    return student.eval()


def _one_to_one(teacher: TeacherBlocks, index: int) -> dict[str, str]:
    """{hub tensor name: parameter path in the block} for tensors that are stored as they are."""
    prefix = f"{teacher.block_path}.{index}"
    names = teacher.hub_names(prefix)
    targets = [teacher.runtime[name] for name in names]
    return {
        name: target.removeprefix(f"{prefix}.")
        for name, target in zip(names, targets, strict=True)
        if targets.count(target) == 1
    }


@torch.no_grad()
def round_parameters(student: nn.Module, dtype: torch.dtype) -> None:
    """Round to the dtype the checkpoint will have, so that later blocks see what a user will
    run."""
    for parameter in student.parameters():
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


@torch.no_grad()
def block_tensors(
    teacher: TeacherBlocks,
    index: int,
    student: nn.Module | None,
    ranks: Mapping[str, int],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Everything of one block under its checkpoint names, on the CPU.

    Without a student the teacher's tensors pass through; `dtype` None keeps each tensor's own
    dtype.
    """
    prefix = f"{teacher.block_path}.{index}"
    one_to_one = _one_to_one(teacher, index)
    experts = teacher.family.experts
    tensors: dict[str, Tensor] = {}

    def add(name: str, value: Tensor, source: Tensor) -> None:
        tensors[name] = stored_as(name, value, source.dtype if dtype is None else dtype)

    for name in teacher.hub_names(prefix):
        source = teacher.read(name)
        matrix = name.removesuffix(".weight")
        parsed = None if experts is None else experts.parse(matrix.removeprefix(f"{prefix}."))
        if student is None:
            add(name, source, source)
        elif parsed is not None:
            module = student.get_submodule(parsed[0])
            if isinstance(module, LowRankExperts):
                for key, value in module.stored(parsed[2], parsed[1]).items():
                    add(f"{matrix}.{key}", value, source)
            else:
                add(name, source, source)
        elif matrix in ranks:
            module = student.get_submodule(one_to_one[name].removesuffix(".weight"))
            assert isinstance(module, LowRankLinear)
            add(f"{matrix}.lr_A", module.lr_A, source)
            add(f"{matrix}.lr_B", module.lr_B, source)
        elif name in one_to_one:
            add(name, student.get_parameter(one_to_one[name]), source)
        else:
            add(name, source, source)
    return tensors
