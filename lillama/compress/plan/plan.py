"""What a compression would do, from config.json and the shards' headers alone: instant at any
size."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from lillama.checkpoint.format import (
    TensorHeader,
    check_unquantized,
    compression_of,
    dtype_of,
    hub_headers,
    read_config,
    read_headers,
)
from lillama.checkpoint.remote import remote_headers
from lillama.compress.plan.allocate import RankRules, allocate, max_removable
from lillama.compress.plan.budget import active_params, active_saved, of_active, token_share
from lillama.compress.plan.matrix import Matrix
from lillama.compress.plan.targets import find_matrices
from lillama.config import Gauge, PlanConfig, Strategy
from lillama.errors import InputError
from lillama.models.detection import family_for
from lillama.models.families import FAMILIES, Family
from lillama.models.skeleton import block_list, named_blocks, skeleton

__all__ = ["Plan", "make_plan"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Ranks for one model and what they cost and save."""

    config: PretrainedConfig
    family: Family
    strategy: Strategy
    matrices: tuple[Matrix, ...]
    ranks: dict[str, int]
    params_before: int
    # what the whole model counts in the budget, see `Matrix.counts`
    budget_total: int
    active_params_before: int
    bytes_before: int
    item_bytes: float
    block_paths: tuple[str, ...]
    attention: str
    max_reduction: float
    ranks_are_final: bool = True
    gauge: Gauge = "plain"
    # of the dense model's tensors; None without weights
    headers: Mapping[str, TensorHeader] | None = None

    @property
    def params_after(self) -> int:
        saved = (m.params_saved(self.ranks[m.name]) for m in self.matrices if m.name in self.ranks)
        return self.params_before - sum(saved)

    @property
    def active_params_after(self) -> int:
        """Parameters that one token uses."""
        after = self.active_params_before
        return round(after - active_saved(self.family, self.config, self.matrices, self.ranks))

    @property
    def reduction(self) -> float:
        return 1 - self.params_after / self.params_before

    @property
    def target_weights_reduction(self) -> float:
        """Share of the target matrices' own parameters removed."""
        targets = sum(m.N * m.K for m in self.matrices)
        return (self.params_before - self.params_after) / targets

    @property
    def bytes_after(self) -> int:
        chosen = [m for m in self.matrices if m.name in self.ranks]
        saved = sum(m.params_saved(self.ranks[m.name]) for m in chosen)
        marks = sum(m.mark_bytes for m in chosen)
        return self.bytes_before - round(saved * self.item_bytes) + marks

    @property
    def blocks(self) -> list[int]:
        """Indices of the blocks that hold at least one factorised matrix."""
        outside = set(self.outside)
        return sorted({m.block for m in self.matrices if m.name in self.ranks} - outside)

    @property
    def outside(self) -> tuple[int, int]:
        """`Matrix.block` of the embeddings and of the head."""
        return -1, len(self.block_paths)

    @property
    def embedding(self) -> Matrix | None:
        """The token embeddings where they are factorised."""
        return next((m for m in self.matrices if m.block < 0 and m.name in self.ranks), None)

    @property
    def head(self) -> Matrix | None:
        """The output head where it is factorised."""
        last = self.outside[1]
        return next((m for m in self.matrices if m.block == last and m.name in self.ranks), None)

    def ranks_of_block(self, block: int) -> dict[str, int]:
        return {
            m.name: self.ranks[m.name]
            for m in self.matrices
            if m.block == block and m.name in self.ranks
        }

    def flops_per_token(self, matrix: Matrix, rank: int | None) -> float:
        """FLOPs of one matrix for one token, experts weighted by the share of tokens they see."""
        numbers = matrix.N * matrix.K if rank is None else matrix.numbers(rank)
        return 2 * numbers * float(token_share(self.family, self.config, matrix.name))

    def as_json(self) -> dict:
        """The document of `lillama plan --json`; `matrices` lists the factorised ones."""
        before = after = 0.0
        rows = []
        for matrix in self.matrices:
            rank = self.ranks.get(matrix.name)
            dense, now = self.flops_per_token(matrix, None), self.flops_per_token(matrix, rank)
            before, after = before + dense, after + now
            if rank is None:
                continue
            numbers = matrix.numbers(rank)
            rows.append(
                {
                    "name": matrix.name,
                    "shape": [matrix.N, matrix.K],
                    "rank": rank,
                    "break_even_rank": matrix.break_even_rank,
                    "params_before": matrix.N * matrix.K,
                    "params_after": numbers,
                    "bytes_before": round(matrix.N * matrix.K * self.item_bytes),
                    "bytes_after": round(numbers * self.item_bytes) + matrix.mark_bytes,
                    "flops_per_token_before": dense,
                    "flops_per_token_after": now,
                }
            )
        return {
            "strategy": self.strategy,
            # the ranks of "global" are known only to a run; these are of the same size
            "gauge": self.gauge,
            "ranks_are_final": self.ranks_are_final,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "active_params_before": self.active_params_before,
            "active_params_after": self.active_params_after,
            "reduction": self.reduction,
            "target_weights_reduction": self.target_weights_reduction,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "max_reduction": self.max_reduction,
            "target_flops_per_token_before": before,
            "target_flops_per_token_after": after,
            "dense_targets": len(self.matrices) - len(rows),
            "matrices": rows,
        }


def _headers(
    path: Path, model: PreTrainedModel, family: Family, needs_weights: bool
) -> dict[str, TensorHeader] | None:
    """Without what the model's own code leaves out of old checkpoints. None for a folder with only
    config.json, where that will do."""
    headers = remote_headers(path)
    if headers is None:
        if not (needs_weights or any(path.glob("*.safetensors*")) or any(path.glob("*.bin"))):
            return None
        headers = read_headers(path)
    check_unquantized(headers)
    headers = hub_headers(headers, family, block_list(model)[0])
    ignored = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ()) or "$^")
    # these patterns are for tensors that the model has not: GPT-2's fit its biases as well
    own = model.state_dict().keys()
    return {n: header for n, header in headers.items() if n in own or not ignored.search(n)}


def _bytes_before(
    path: Path, model: PreTrainedModel, params: int, headers: Mapping[str, TensorHeader] | None
) -> tuple[int, int]:
    """Of all tensors and of buffers among them, from the headers; a folder with only config.json is
    counted in the config's dtype."""
    if headers is not None:
        buffers = {name for name, _ in model.named_buffers()}
        sizes = {name: header.num_bytes for name, header in headers.items()}
        return sum(sizes.values()), sum(size for name, size in sizes.items() if name in buffers)
    logger.warning("%s holds no weights; bytes are counted in the config's dtype", path)
    return params * dtype_of(model.config).itemsize, 0


def _tell_found(family: Family) -> None:
    """Say of a family that is not declared what was found in the model."""
    if family.model_type in FAMILIES:
        return
    logger.warning(
        "model_type %r is not tested; factorised by default: %s; on request: %s; embeddings %s, "
        "head %s%s",
        family.model_type, ", ".join(family.default_targets),
        ", ".join(sorted(set(family.targets) - set(family.default_targets))) or "nothing more",
        family.embedding, family.head, "".join(f"; {text}" for text in family.left_out),
    )  # fmt: skip


def _check_vocabulary_targets(options: PlanConfig) -> None:
    if options.recipe.init != "fisher":
        raise InputError(
            f"--targets with embeddings or the output head need a preset that measures gradients "
            f"(default or fast), got --preset {options.preset}"
        )


def make_plan(options: PlanConfig, *, needs_weights: bool = False) -> Plan:
    """Choose the ranks. With `needs_weights` a folder with only config.json is refused.

    Raises:
        InputError: MODEL cannot be compressed (no checkpoint, unknown architecture, truncated,
            compressed already) or the reduction cannot be reached.
    """
    path = Path(options.model)
    config = read_config(path)
    if compression_of(config) is not None:
        raise InputError(f"{path} is itself compressed by lillama; give the dense base model")
    model = skeleton(config)
    family = family_for(config, model)
    _tell_found(family)
    strategy = options.strategy or options.recipe.strategy or family.paper_strategy
    gauge = options.gauge or options.recipe.gauge
    matrices = find_matrices(
        model,
        family,
        options.targets,
        gauge,
        vocabulary=options.recipe.vocabulary and strategy == "global",
        by_worth=options.recipe.init == "fisher" and strategy == "global",
    )
    if any(m.name in family.vocabulary.values() for m in matrices):
        _check_vocabulary_targets(options)
    params = budget_total = sum(parameter.numel() for parameter in model.parameters())
    what = "the model's parameters"
    if options.budget == "active":
        matrices, budget_total = of_active(matrices, model, family, options.targets)
        what = "the parameters that a token uses"
    rules = RankRules.for_hidden_size(config.hidden_size)
    headers = _headers(path, model, family, needs_weights)
    bytes_before, buffer_bytes = _bytes_before(path, model, params, headers)
    return Plan(
        config=config,
        family=family,
        strategy=strategy,
        matrices=matrices,
        ranks=allocate(matrices, budget_total, options.reduction, strategy, rules, what),
        params_before=params,
        budget_total=budget_total,
        active_params_before=round(active_params(model, family)),
        bytes_before=bytes_before,
        item_bytes=(bytes_before - buffer_bytes) / params,
        block_paths=tuple(named_blocks(model)),
        attention=str(model.config._attn_implementation),
        max_reduction=max_removable(matrices, strategy, rules) / budget_total,
        ranks_are_final=strategy != "global",
        gauge=gauge,
        headers=headers,
    )
