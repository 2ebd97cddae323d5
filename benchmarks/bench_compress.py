"""One training step of a student block, from its inputs to updated factors: ours, beside the step
of the published recipe.

The published loop (arXiv 2412.16719) runs the student on the teacher's inputs and on the student's
own one after the other, each with a backward pass of its own, reads both losses back, and steps an
unfused AdamW; its experts are pairs of nn.Linear in a loop. Ours runs both inputs as one batch.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lillama_kernels import distill_loss
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.published import PublishedExperts
from benchmarks.rows import Variant, Work, compare
from benchmarks.shapes import COMPRESS_STEPS, CompressStepShape
from benchmarks.timing import modes_of
from lillama.compress.teacher.activations import stored
from lillama.compress.train.distill import Stream, batch_loss
from lillama.modules import LowRankExperts


def _published_experts(source: LowRankExperts) -> PublishedExperts:
    weights = {}
    for expert in range(source.num_experts):
        for projection in ("gate", "up", "down"):
            factors = source.stored(projection, expert)
            weights[projection, expert] = [factors["lr_A"], factors["lr_B"]]
    return PublishedExperts(weights, source.num_experts)


def _block(shape: CompressStepShape, device: torch.device) -> tuple[nn.Module, dict]:
    """A student block with random weights in fp32, and its keyword arguments."""
    config = MixtralConfig(
        vocab_size=8,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 4,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        num_hidden_layers=1,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        block = model.get_decoder().layers[0]
        dense = block.mlp.experts
        assert isinstance(dense, MixtralExperts)
        ranks = {name: [shape.rank] * shape.num_experts for name in ("gate", "up", "down")}
        experts = LowRankExperts(
            config, shape.num_experts, shape.hidden_size, shape.intermediate_size, ranks
        )
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        block.mlp.experts = experts
        positions = torch.arange(shape.seq_len)[None]
        probe = torch.zeros(1, shape.seq_len, shape.hidden_size)
        rotary = model.get_decoder().rotary_emb(probe, positions)
    return block.eval(), {"position_embeddings": rotary, "attention_mask": None}


def _ours(block: nn.Module, stream: Stream, device: torch.device) -> Callable[[], None]:
    parameters = list(block.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    rows = torch.arange(len(stream.target))
    # as in training: read back once in many steps
    worst = torch.zeros((), device=device)

    def step() -> None:
        nonlocal worst
        loss = batch_loss(block, stream, rows, "joint", "l1_cosine", device)
        worst = torch.maximum(worst, loss.detach())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _published(block: nn.Module, stream: Stream, device: torch.device) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-4)
    rows = torch.arange(len(stream.target))

    def step() -> None:
        target = stream.target.read(rows).to(device)
        for store in (stream.teacher, stream.student):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = block(store.read(rows).to(device), **stream.kwargs(rows))
            out = out[0] if isinstance(out, tuple) else out
            loss = (out - target).abs().mean(-1)
            loss = (loss - F.logsigmoid(F.cosine_similarity(out, target, dim=-1))).mean()
            loss.item()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _same_gradients(shape: CompressStepShape, device: torch.device, stream: Stream) -> None:
    """Both loops descend along the same gradient of the input's norm weight."""
    found = []
    for published in (False, True):
        block, _ = _block(shape, device)
        if published:
            block.mlp.experts = _published_experts(block.mlp.experts)  # type: ignore[union-attr]
        rows = torch.arange(len(stream.target))
        if published:
            for store in (stream.teacher, stream.student):
                out = block(store.read(rows).to(device), **stream.kwargs(rows))
                out = out[0] if isinstance(out, tuple) else out
                distill_loss(out, stream.target.read(rows).to(device), None).backward()
        else:
            batch_loss(block, stream, rows, "joint", "l1_cosine", device).backward()
        found.append(block.get_parameter("post_attention_layernorm.weight").grad)
    # a GPU computes ours in bf16
    close = {"rtol": 1e-3, "atol": 1e-6} if device.type == "cpu" else {"rtol": 0.1, "atol": 1e-3}
    torch.testing.assert_close(found[0], found[1], **close)


@pytest.mark.parametrize("shape", COMPRESS_STEPS, ids=lambda s: s.name)
def bench_compress_step(benchmark, shape, device):
    block, kwargs = _block(shape, device)
    generator = torch.Generator().manual_seed(2)
    size = (shape.batch, shape.seq_len, shape.hidden_size)
    teacher, student, target = (torch.randn(size, generator=generator) for _ in range(3))
    stream = Stream(stored(teacher), stored(student), stored(target), None, lambda rows: kwargs)
    published = copy.deepcopy(block)
    published.mlp.experts = _published_experts(published.mlp.experts)  # type: ignore[union-attr]
    rows = 2 * shape.batch * shape.seq_len
    used = shape.top_k * 3 * shape.rank * (shape.hidden_size + shape.intermediate_size)
    attention = int(2.5 * shape.hidden_size**2)
    numbers = sum(parameter.numel() for parameter in block.parameters())
    # forward and twice that backward; parameters, gradients and moments in fp32 once each way
    work = Work(flop=6.0 * rows * (used + attention), bytes_moved=4.0 * 7 * numbers)
    ours = Variant(
        calls=[_ours(block, stream, device)],
        check=lambda: _same_gradients(shape, device, stream),
        graph=False,
    )
    row = compare(
        benchmark,
        {
            "ours": ours,
            "published": Variant(calls=[_published(published, stream, device)], graph=False),
        },
        shape=shape,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        device=device,
        work=work,
        rounds=8,
        warmup_rounds=1,
        sample_s=0.0,
        # the optimizer's steps and the expert loop wait for the GPU
        modes=[mode for mode in modes_of(device) if mode.name != "graph"],
    )
    seconds = next(iter(row["modes"].values()))["ours"]["median_us"] / 1e6
    benchmark.extra_info["tokens_per_s"] = round(shape.batch * shape.seq_len / seconds, 1)
