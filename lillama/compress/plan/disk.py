"""How much of the disk of OUT a compression will need, from shapes and options alone.

The result is only a part of it: gradients wait there from the measurement until their block is
done, each file is removed with its block's shard; the state of a block in training is saved, a new
one before the old one is removed; and activations lie there that memory has no room for. Text that
the model writes for itself is not counted.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from lillama.checkpoint.format import TensorHeader
from lillama.compress.plan.memory import FP32, block_sizes, calibration_rows, sensitivity_rows
from lillama.compress.plan.plan import Plan
from lillama.config import PlanConfig
from lillama.models.skeleton import block_of

__all__ = ["disk_text", "measures", "peak_disk"]


@dataclass(frozen=True)
class _Disk:
    """Bytes: of the shard of each block and of what is outside them; of the gradients of each block
    and of the vocabulary's; of one saved state of each block."""

    shards: list[int]
    rest: int
    gradients: list[int]
    vocabulary: int
    steps: list[int]


def _shards(
    plan: Plan, headers: Mapping[str, TensorHeader], item_bytes: float
) -> tuple[list[int], int]:
    places = {path: index for index, path in enumerate(plan.block_paths)}
    numbers = [0.0] * (len(places) + 1)  # the last one: outside the blocks
    for name, header in headers.items():
        index = block_of(name, places)
        numbers[len(places) if index is None else index] += math.prod(header.shape)
    marks = [0] * len(numbers)
    for matrix in plan.matrices:
        if (rank := plan.ranks.get(matrix.name)) is not None:
            index = matrix.block if matrix.block >= 0 else len(places)
            numbers[index] -= matrix.params_saved(rank)
            marks[index] += matrix.mark_bytes
    *found, rest = (round(n * item_bytes) + m for n, m in zip(numbers, marks, strict=True))
    return found, rest


def _disk(
    plan: Plan, options: PlanConfig, headers: Mapping[str, TensorHeader], item_bytes: float
) -> _Disk:
    shards, rest = _shards(plan, headers, item_bytes)
    blocks = range(len(shards))
    gradients, vocabulary = [0] * len(shards), 0
    if options.recipe.init == "fisher":
        # of every matrix that may get a rank
        for matrix in plan.matrices:
            if plan.strategy != "global" and matrix.name not in plan.ranks:
                continue
            square = min(matrix.N, matrix.K) ** 2 * FP32
            if matrix.block in blocks:
                gradients[matrix.block] += square
            else:  # with the moment of its inputs
                vocabulary += 2 * square
    # the student, its best state and AdamW's two moments
    steps = [
        4 * block_sizes(plan, headers, i).student_numbers * FP32
        if options.train and i in plan.blocks
        else 0
        for i in blocks
    ]
    return _Disk(shards, rest, gradients, vocabulary, steps)


def _beyond(size: int, count: int, budget: int) -> int:
    """Bytes of `count` streams of a size that a budget of memory, taken first by the first, does
    not hold."""
    held = count if size == 0 else min(count, budget // size)
    return (count - held) * size


def _stream_bytes(plan: Plan, options: PlanConfig, value_bytes: int) -> int:
    """Of the hidden states of the training and of the held-out tokens, three of each."""
    row = options.seq_len * plan.config.hidden_size * value_bytes
    budget, found = options.activation_memory, 0
    sizes = [count * row for count in calibration_rows(options)]
    for size in 3 * sizes:
        if size <= budget:
            budget -= size
        else:
            found += size
    return found


def _while_measuring(
    plan: Plan, options: PlanConfig, disk: _Disk, value_bytes: int
) -> Iterator[dict[str, int]]:
    """What lies on the disk at each moment: the states before every block first, then one less
    after each block down, and its gradients."""
    blocks = len(disk.shards)
    one = sensitivity_rows(plan, options) * plan.config.hidden_size * value_bytes
    budget = options.activation_memory
    yield {"activations": _beyond(one, blocks + 2, budget)}
    gradients = 0
    for index in reversed(range(blocks)):
        gradients += disk.gradients[index]
        yield {"activations": _beyond(one, index + 1, budget), "gradients": gradients}
    yield {"gradients": gradients + disk.vocabulary}


def _while_training(
    plan: Plan,
    disk: _Disk,
    done: Collection[int],
    activations: int,
    world_size: int,
) -> Iterator[dict[str, int]]:
    """As `_while_measuring`, block after block and then what is outside them."""
    written = sum(disk.shards[i] for i in done) + (disk.rest if plan.embedding is not None else 0)
    left = [i for i in range(len(disk.shards)) if i not in done]
    gradients = disk.vocabulary + sum(disk.gradients[i] for i in left)
    for index in left:
        common = {"activations": world_size * activations, "gradients": gradients}
        # each process has a block in work
        step = world_size * disk.steps[index]
        yield {**common, "result": written, "steps": 2 * step}
        yield {**common, "result": written + disk.shards[index], "steps": step}
        written += disk.shards[index]
        gradients -= disk.gradients[index]
    yield {"result": sum(disk.shards) + disk.rest, "gradients": disk.vocabulary}


def measures(plan: Plan, options: PlanConfig) -> bool:
    """Whether gradients are measured before the first block."""
    return plan.strategy == "global" or options.recipe.init == "fisher"


def peak_disk(
    plan: Plan,
    options: PlanConfig,
    headers: Mapping[str, TensorHeader],
    *,
    dtype: torch.dtype | None = None,
    value_bytes: int = FP32,
    world_size: int = 1,
    done: Collection[int] | None = None,
) -> dict[str, int]:
    """Bytes of disk at the worst moment of a run, "peak", and each part at its own worst: "result",
    "gradients", "steps" (saved states of training), "activations" beyond memory.

    Args:
        dtype: of the result; None is the model's own. value_bytes: of an activation's number.
        done: blocks that an interrupted run finished, which has measured; None before that.
    """
    item_bytes = plan.item_bytes if dtype is None else dtype.itemsize
    disk = _disk(plan, options, headers, item_bytes)
    streams = _stream_bytes(plan, options, value_bytes)
    moments = list(_while_training(plan, disk, done or (), streams, world_size))
    if measures(plan, options) and done is None:
        moments += _while_measuring(plan, options, disk, value_bytes)
    if options.finetune:  # the blocks' checkpoint is there until the whole model's is
        moments.append({"result": 2 * (sum(disk.shards) + disk.rest)})
    parts = ("result", "gradients", "steps", "activations")
    found = {part: max(moment.get(part, 0) for moment in moments) for part in parts}
    return {**found, "peak": max(sum(moment.values()) for moment in moments)}


def disk_text(found: Mapping[str, int]) -> str:
    """What `peak_disk` found, in words."""
    gib = {part: f"{size / 2**30:.2f} GiB" for part, size in found.items()}
    return (
        f"{gib['peak']} at its peak; at their largest: result {gib['result']}, gradients "
        f"{gib['gradients']}, saved states of training {gib['steps']}, activations beyond "
        f"--activation-memory {gib['activations']}"
    )
