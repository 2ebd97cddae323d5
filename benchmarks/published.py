"""The published recipe's own loop (arXiv 2412.16719 and its code), written again from its
description, as the baseline of ours.

Every batch runs once through the teacher's blocks; every compressed block is run on the teacher's
input and on the student's own, each with a loss that is read back and a backward pass of its own,
and stepped with an AdamW of its own: all blocks train at the same time. Experts are a loop over
pairs of nn.Linear. Factors start from the plain SVD; the rate is constant. Two of its bugs are left
out, because they would only harm it: the teacher does not run with dropout, and the last step is
kept, not the one with the lowest loss of a single batch.
"""

import copy
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lillama.compress.measure.svd import plain_svd
from lillama.compress.plan.plan import make_plan
from lillama.config import PlanConfig
from lillama.models.skeleton import block_list
from lillama.modules.replace import dense_expert

__all__ = ["PublishedExperts", "published_loop"]

HUB = {"gate": "w1", "up": "w3", "down": "w2"}


class PublishedExperts(nn.Module):
    """Mixtral's experts as the published code replaces them: each weight one nn.Linear, or two.

    weights: {(projection, expert): [W] or [A, B]}.
    """

    def __init__(self, weights: dict[tuple[str, int], list[Tensor]], num_experts: int) -> None:
        super().__init__()

        def layers(projection: str, expert: int) -> nn.Sequential:
            found = []
            for weight in weights[projection, expert]:
                layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
                layer.weight = nn.Parameter(weight.detach().clone())
                found.append(layer)
            return nn.Sequential(*found)

        self.projections = nn.ModuleList(
            nn.ModuleList(layers(name, expert) for name in HUB) for expert in range(num_experts)
        )

    def forward(self, hidden: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert, (gate, up, down) in enumerate(self.projections):  # type: ignore[misc]
            rows, place = torch.where(topk_index == expert)
            x = hidden[rows]
            y = down(F.silu(gate(x)) * up(x)) * topk_weight[rows, place, None]
            out.index_add_(0, rows, y.to(out.dtype))
        return out


def _experts(block: Any, ranks: dict[str, int], prefix: str) -> PublishedExperts:
    experts = block.mlp.experts
    number = experts.down_proj.shape[0]
    weights = {}
    for expert in range(number):
        for projection in HUB:
            weight = dense_expert(experts, projection, expert).detach()
            rank = ranks.get(f"{prefix}.block_sparse_moe.experts.{expert}.{HUB[projection]}")
            found = [weight] if rank is None else list(plain_svd(weight, rank))
            weights[projection, expert] = [factor.to(weight.dtype) for factor in found]
    return PublishedExperts(weights, number)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    loss = (output - target).abs().mean(-1)
    return (loss - F.logsigmoid(F.cosine_similarity(output, target, dim=-1))).mean()


def published_loop(
    path: Path,
    input_ids: Tensor,
    *,
    reduction: float,
    learning_rate: float = 8.6e-5,
    batch_size: int = 8,
) -> tuple[PreTrainedModel, float]:
    """Compress a small Mixtral in fp32 with the tokens [n, T], in their order.

    Returns:
        The compressed model, dense where nothing was factorised, and the seconds of the loop alone.
    """
    plan = make_plan(PlanConfig(model=path, reduction=reduction, preset="paper"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    block_path, blocks = block_list(model)
    model.requires_grad_(False)
    teachers: list[Any] = list(blocks[: plan.blocks[-1] + 1])
    students: dict[int, Any] = {}
    for index in plan.blocks:
        student = copy.deepcopy(teachers[index])
        ranks = plan.ranks_of_block(index)
        student.mlp.experts = _experts(student, ranks, f"{block_path}.{index}")
        students[index] = student.requires_grad_(True)
    for index, teacher in enumerate(teachers):  # dense, and in the same loop
        teacher.mlp.experts = _experts(teacher, {}, f"{block_path}.{index}").requires_grad_(False)
    optimizers = {
        index: torch.optim.AdamW(student.parameters(), lr=learning_rate)
        for index, student in students.items()
    }
    decoder: Any = model.get_decoder()
    rotary, embeddings = decoder.rotary_emb, decoder.get_input_embeddings()
    positions = torch.arange(input_ids.shape[1])[None]
    started = time.perf_counter()
    for ids in input_ids.split(batch_size):
        with torch.no_grad():
            hidden = embeddings(ids)
            kwargs = {"position_embeddings": rotary(hidden, positions), "attention_mask": None}
        own = hidden
        for index, teacher in enumerate(teachers):
            with torch.no_grad():
                target = _first(teacher(hidden, **kwargs))
            student = students.get(index)
            if student is None:
                with torch.no_grad():
                    own = target if own is hidden else _first(teacher(own, **kwargs))
            else:
                for given in (hidden, own):
                    output = _first(student(given, **kwargs))
                    loss = _loss(output, target)
                    loss.item()
                    loss.backward()
                own = output.detach()
                optimizers[index].step()
                optimizers[index].zero_grad(set_to_none=True)
            hidden = target
    seconds = time.perf_counter() - started
    for index, student in students.items():
        blocks[index] = student.requires_grad_(False)
    return model, seconds


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
