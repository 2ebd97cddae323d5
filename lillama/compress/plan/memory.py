"""How much host memory a compression will need, from shapes and options alone.

One teacher block is in memory as it is stored, then one student block in fp32; never both. The
largest of the phases of the largest block decides. The terms below are what the code of that phase
holds at once; only the temporaries of training are an estimate (see `_train_bytes`).
"""

import math
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lillama.checkpoint.format import TensorHeader, dtype_of
from lillama.compress.plan.matrix import Matrix, moment_side
from lillama.compress.plan.plan import Plan
from lillama.config import PlanConfig
from lillama.data.sequences import held_out_blocks

__all__ = [
    "FP32",
    "BlockSizes",
    "block_sizes",
    "calibration_rows",
    "peak_memory",
    "peak_memory_bytes",
    "resident_bytes",
    "sensitivity_rows",
]

FP32, FP64 = 4, 8


def calibration_rows(options: PlanConfig) -> tuple[int, int]:
    """Return how many sequences are trained on and kept for judging."""
    tokens, seq_len = options.num_tokens, options.seq_len
    return -(-tokens // seq_len), held_out_blocks(tokens, seq_len)


def sensitivity_rows(plan: Plan, options: PlanConfig) -> int:
    """Return the tokens that gradients are measured with, in whole sequences."""
    wanted = min(options.recipe.gradient_tokens(plan.config.hidden_size), options.num_tokens)
    return -(-wanted // options.seq_len) * options.seq_len


def peak_memory_bytes(device: torch.device) -> int:
    """Host peak of this process so far, or the device's when a GPU computes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes()


def resident_bytes() -> int:
    """The most memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of one block: bytes as stored of its stacked experts and of the rest, numbers of the
    rest and of the student's factors."""

    stacked_bytes: int
    other_bytes: int
    other_numbers: int
    student_numbers: int
    targets: tuple[Matrix, ...]


def block_sizes(plan: Plan, headers: Mapping[str, TensorHeader], index: int) -> BlockSizes:
    experts = plan.family.experts
    stacked = other = numbers = 0
    for name, header in headers.items():
        if not name.startswith(f"{plan.block_paths[index]}."):
            continue
        if experts is not None and experts.parse(name.removesuffix(".weight")):
            stacked += header.num_bytes
        else:
            other += header.num_bytes
            numbers += math.prod(header.shape)
    ranks = plan.ranks_of_block(index)
    targets = tuple(m for m in plan.matrices if m.block == index)
    factors: dict[tuple[str, str], list[tuple[Matrix, int]]] = {}
    replaced = dense = 0
    for matrix in targets:
        rank = ranks.get(matrix.name, 0)
        parsed = None if experts is None else experts.parse(matrix.name)
        if parsed is None and rank:
            replaced += matrix.N * matrix.K
            factors[matrix.name, ""] = [(matrix, rank)]
        elif parsed is not None and ranks:
            factors.setdefault((parsed[0], parsed[2]), []).append((matrix, rank))
            dense += 0 if rank else matrix.N * matrix.K
    # stacked factors are padded to the largest rank of their projection
    padded = sum(
        len(group) * max(rank for _, rank in group) * (group[0][0].N + group[0][0].K)
        for group in factors.values()
    )
    return BlockSizes(stacked, other, numbers, padded + dense + numbers - replaced, targets)


def _moment_bytes(plan: Plan, block: BlockSizes) -> int:
    experts = plan.family.experts
    total = 0
    for matrix in block.targets:
        parsed = None if experts is None else experts.parse(matrix.name)
        input_side = moment_side(matrix.N, matrix.K) == "input"
        if parsed is not None and parsed[2] == "up" and input_side:
            continue  # gate's serves both
        total += min(matrix.N, matrix.K) ** 2 * FP32
    return total


def _factorise_bytes(matrix: Matrix, stored: float) -> int:
    """The weight as stored and in fp64, its whitened copy, and five squares of the smaller side:
    moment, factor, product, vectors, workspace."""
    return (
        round(matrix.N * matrix.K * (stored + 2 * FP64)) + 5 * min(matrix.N, matrix.K) ** 2 * FP64
    )


def _batch_bytes(plan: Plan, options: PlanConfig, passes: int) -> int:
    """Activations of one batch through one block while nothing is kept for a backward pass."""
    config = plan.config
    rows = passes * options.recipe.batch_size * options.seq_len
    width, expert = _widths(plan)
    if plan.family.experts is not None:
        # one expert after the other, the busiest with twice its share
        experts = plan.family.num_experts(config)
        width += min(1.0, 2 * config.num_experts_per_tok / experts) * expert
    hidden = rows * config.hidden_size * FP32
    return round(8 * hidden + rows * width * 4 * FP32)


def _widths(plan: Plan) -> tuple[float, int]:
    """Numbers inside a block for one token at its widest, an MLP or a mixer: of what every token
    sees, and of one expert."""
    config, family = plan.config, plan.family
    inner = family.inner_width(config)
    mixer = getattr(config, family.expand) * config.hidden_size if family.expand else 0
    if family.experts is None:
        return max(inner, mixer), 0
    return max(family.shared_width(config), mixer), inner


def _kept_bytes(plan: Plan, rows: int, seq_len: int) -> int:
    """What autograd keeps of a block for so many tokens: about 12 tensors [rows, H] and 4 of the
    width inside, 2 more where it is not an expert's (their gradients on the way back) and a scan's
    own; where attention is computed step by step, 5 of its square as well."""
    config = plan.config
    width, expert = _widths(plan)
    numbers = 12 * config.hidden_size + (6 + plan.family.scan_kept) * round(width)
    if plan.family.experts is not None:
        numbers += 4 * config.num_experts_per_tok * expert
    if plan.attention == "eager" and hasattr(config, "num_attention_heads"):
        numbers += 5 * config.num_attention_heads * seq_len
    return rows * numbers * FP32


def _train_bytes(plan: Plan, options: PlanConfig, block: BlockSizes) -> int:
    """fp32 parameters, gradients, two AdamW moments and the best state; and what autograd keeps of
    a batch of both inputs."""
    rows = 2 * options.recipe.batch_size * options.seq_len
    return block.student_numbers * 5 * FP32 + _kept_bytes(plan, rows, options.seq_len)


def _sensitivity_bytes(
    plan: Plan, options: PlanConfig, headers: Mapping[str, TensorHeader]
) -> dict[str, int]:
    """Of the pass that weighs the matrices, its own streams among them: a border before each block
    and one gradient."""
    config, blocks = plan.config, len(plan.block_paths)
    first = 0 if plan.strategy == "global" else min(plan.blocks, default=blocks)
    recipe = options.recipe
    one = sensitivity_rows(plan, options) * config.hidden_size * FP32
    streams = min((blocks + 2) * one, options.activation_memory // one * one)
    batch = recipe.gradient_rows(options.seq_len, config.hidden_size) * options.seq_len
    kept = _kept_bytes(plan, batch, options.seq_len)
    logits = 4 * options.seq_len * config.vocab_size * FP32
    outside = 2 * config.vocab_size * config.hidden_size * FP32
    found = {"sensitivity": streams + outside + logits}
    for index in range(first, blocks):
        block = block_sizes(plan, headers, index)
        widened = block.stacked_bytes + block.other_numbers * FP32
        gradients = sum(min(m.N, m.K) ** 2 for m in block.targets) * FP32
        largest = max((m.N * m.K for m in block.targets), default=0)
        moments = _moment_bytes(plan, block) + gradients
        work = max((_factorise_bytes(m, plan.item_bytes) for m in block.targets), default=0)
        size = max(
            widened + moments + kept + 3 * largest * FP32,  # an expert's three matrices
            moments + gradients + work,
        )
        found["sensitivity"] = max(found["sensitivity"], streams + size)
    return found


def _head_bytes(plan: Plan, head: Matrix, options: PlanConfig) -> int:
    """Embeddings and dense head; the product of the factors and its gradient; the factors in fp64,
    then in fp32 with gradients, AdamW's moments and the best state; the predictions of both for one
    sequence, their logarithms and gradients; or its way to the pivot gauge, five of the factors in
    fp64."""
    matrix, factors = head.N * head.K, plan.ranks[head.name] * (head.N + head.K)
    logits = 8 * options.seq_len * head.N
    train = (4 * matrix + 5 * factors + logits) * FP32 + factors * FP64
    to_gauge = factors * (FP32 + 5 * FP64) if head.pivot else 0
    return max(train, to_gauge, _factorise_bytes(head, plan.item_bytes))


def _finetune_bytes(plan: Plan, options: PlanConfig) -> int:
    """Both models whole in fp32 (as a CPU computes); gradients, AdamW's moments and the best state
    of the smaller; what autograd keeps of a batch, with both models' predictions."""
    rows = options.recipe.batch_size * options.seq_len
    kept = plan.config.num_hidden_layers * _kept_bytes(plan, rows, options.seq_len)
    models = plan.params_before + 5 * plan.params_after
    return models * FP32 + kept + 6 * rows * plan.config.vocab_size * FP32


def peak_memory(
    plan: Plan, options: PlanConfig, headers: Mapping[str, TensorHeader], base_bytes: int
) -> dict[str, int]:
    """Bytes of host memory that each phase will need at its worst block, and their maximum "peak".

    On a GPU the phases' own terms lie there instead, and the host keeps the streams only.
    base_bytes is what the process holds before it starts (`resident_bytes`).
    """
    one = sum(calibration_rows(options)) * options.seq_len * plan.config.hidden_size * FP32
    streams = min(3 * one, options.activation_memory // one * one if one else 0)
    embeddings = plan.config.vocab_size * plan.config.hidden_size
    phases = {"embed": embeddings * (FP32 + round(dtype_of(plan.config).itemsize))}
    for index in range(max(plan.blocks, default=-1) + 1):
        block = block_sizes(plan, headers, index)
        stored = block.stacked_bytes + block.other_bytes
        widened = block.stacked_bytes + block.other_numbers * FP32
        compressed = index in plan.blocks
        whitened = compressed and options.recipe.init != "svd"
        moments = _moment_bytes(plan, block) if whitened else 0
        batch = _batch_bytes(plan, options, 1)
        largest = max((m.N * m.K for m in block.targets), default=0)
        found = {
            # gate and up are read apart and copied into one
            "load": stored + block.stacked_bytes * 2 // 3,
            "teacher": widened + moments + batch + 2 * largest * FP32,
        }
        if compressed:
            student = block.student_numbers * FP32
            work = max(_factorise_bytes(m, plan.item_bytes) for m in block.targets)
            found["factorise"] = student + moments + work
            found["train" if options.train else "judge"] = (
                _train_bytes(plan, options, block)
                if options.train
                else student + _batch_bytes(plan, options, 2)
            )
        for phase, size in found.items():
            phases[phase] = max(phases.get(phase, 0), size)
    if options.train and options.recipe.train_head and plan.head is not None:
        phases["head"] = _head_bytes(plan, plan.head, options)
    sized = {phase: base_bytes + streams + size for phase, size in phases.items()}
    if plan.strategy == "global" or options.recipe.init == "fisher":
        found = _sensitivity_bytes(plan, options, headers)
        sized |= {phase: base_bytes + size for phase, size in found.items()}
    if options.finetune:
        sized["finetune"] = base_bytes + _finetune_bytes(plan, options)
    return {**sized, "peak": max(sized.values())}
