"""One decode step of the serving engine, embedding to next token, low-rank and dense, beside one
step of transformers' model with its own cache (to which generate() adds its loop). Random weights;
tokens/s are batch / time of a step."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from benchmarks.decode_shapes import DECODES, DecodeShape
from benchmarks.rows import Variant, Work, compare
from lillama.integrations.mamba import fast_mamba
from lillama.modules import LowRankExperts, LowRankLinear
from lillama.modules.replace import replace_modules
from lillama.serve.attention import AttentionRunner
from lillama.serve.mamba import MambaRunner
from lillama.serve.runner import Runner

STEPS = 64  # room behind the prompt; a step longer than that looks at as many positions
TOLERANCE = 1e-3  # of the largest logit, fp32
KINDS: dict[str, Any] = {
    "llama": LlamaForCausalLM,
    "mamba": MambaForCausalLM,
    "mixtral": MixtralForCausalLM,
}


def _config(shape: DecodeShape) -> LlamaConfig | MambaConfig | MixtralConfig:
    sizes = dict(shape.sizes)
    if shape.family == "mamba":
        return MambaConfig(**sizes, tie_word_embeddings=False)
    kind = LlamaConfig if shape.family == "llama" else MixtralConfig
    return kind(**sizes, max_position_embeddings=shape.prompt + STEPS)


def _model(shape: DecodeShape, keep: float, dtype: torch.dtype, device: torch.device) -> Any:
    """keep: the share of the factorised matrices' parameters that is left; 1 is dense."""
    config = _config(shape)
    torch.manual_seed(0)
    kind = KINDS[shape.family]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = kind(config).eval()
            if keep < 1:
                _factorise(model, config, keep)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def _rank(rows: int, columns: int, keep: float) -> int:
    return max(8, round(keep * rows * columns / (rows + columns) / 8) * 8)


@torch.no_grad()
def _factorise(model: PreTrainedModel, config: Any, keep: float) -> None:
    hidden, inner = config.hidden_size, config.intermediate_size
    names = {}
    for i in range(config.num_hidden_layers):
        if isinstance(config, MambaConfig):
            names[f"backbone.layers.{i}.mixer.in_proj"] = _rank(2 * inner, hidden, keep)
            names[f"backbone.layers.{i}.mixer.out_proj"] = _rank(hidden, inner, keep)
            continue
        if isinstance(config, LlamaConfig):
            block = model.get_submodule(f"model.layers.{i}")
            for path, module in block.named_modules():
                if isinstance(module, torch.nn.Linear):
                    name = f"model.layers.{i}.{path}"
                    names[name] = _rank(module.out_features, module.in_features, keep)
            continue
        for expert in range(config.num_local_experts):
            for w in ("w1", "w2", "w3"):
                name = f"model.layers.{i}.block_sparse_moe.experts.{expert}.{w}"
                names[name] = _rank(inner, hidden, keep)
    for path in replace_modules(model, config, names, base_prefix=model.base_model_prefix):
        module = model.get_submodule(path)
        assert isinstance(module, LowRankLinear | LowRankExperts)
        for factor in module.parameters():
            factor.normal_(std=factor.shape[-1] ** -0.5)


def _prompt(shape: DecodeShape, batch: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    vocab, size = dict(shape.sizes)["vocab_size"], (batch, shape.prompt)
    return torch.randint(1, int(vocab), size, generator=generator, device=device)


@torch.inference_mode()
def _ours(model: PreTrainedModel, shape: DecodeShape) -> Callable[[], Tensor]:
    """A step of the engine for a batch whose rows had the same prompt -> logits [b, V]."""
    device = model.device
    runner: Runner
    if shape.family == "mamba":
        runner = MambaRunner(model, shape.batch, None)
    else:
        runner = AttentionRunner(model, shape.batch, shape.prompt + STEPS)
    *_, done = runner.prefill(_prompt(shape, 1, device)[0])
    assert done is not None
    for slot in range(shape.batch):
        runner.place(slot, done.state)
    ids = done.logits.argmax(-1).repeat(shape.batch)
    width = runner.shape_of(shape.batch)

    @torch.inference_mode()
    def call() -> Tensor:
        logits = runner.step(ids, width)
        ids.copy_(logits.argmax(-1))
        return logits

    return call


@torch.inference_mode()
def _theirs(model: PreTrainedModel, shape: DecodeShape) -> Callable[[], Tensor]:
    """The same by transformers' forward."""
    given: Any = model
    cache = DynamicCache(config=model.config)
    named = {"cache_params" if shape.family == "mamba" else "past_key_values": cache}
    prompt = _prompt(shape, 1, model.device).expand(shape.batch, -1)
    logits = given(prompt, **named, use_cache=True, logits_to_keep=1).logits[:, -1]
    ids = logits.argmax(-1)

    @torch.inference_mode()
    def call() -> Tensor:
        logits = given(ids[:, None], **named, use_cache=True).logits[:, -1]
        if shape.family != "mamba":
            cache.crop(-1)  # as many positions at every step
        ids.copy_(logits.argmax(-1))
        return logits

    return call


def _check(shape: DecodeShape, model: PreTrainedModel) -> None:
    """Ours against transformers' in fp32, where no expert is chosen by rounding."""
    single = copy.deepcopy(model).float()
    theirs = _theirs(single, shape)()
    found = _ours(single, shape)()
    error = (found - theirs).abs().amax() / theirs.abs().amax()
    assert float(error) < TOLERANCE, f"logits differ by {float(error):.1e} of the largest"


def _work(shape: DecodeShape, model: PreTrainedModel) -> Work:
    """Weights once, of the experts the share that so many rows choose on average, and the state."""
    config: Any = model.config
    size = model.dtype.itemsize
    batch, read, used = shape.batch, 0.0, 0.0
    for name, parameter in model.named_parameters():
        if name.endswith(("embeddings.weight", "embed_tokens.weight")):
            continue
        share = each = 1.0
        if ".experts." in name:
            each = config.num_experts_per_tok / config.num_local_experts
            share = 1 - (1 - each) ** batch
        read += share * parameter.numel()
        used += each * parameter.numel()
    layers = config.num_hidden_layers
    if shape.family == "mamba":
        state = 2 * 4 * layers * config.intermediate_size * config.state_size
    else:
        heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
        state = 2 * size * layers * heads * shape.prompt
    return Work(flop=2.0 * batch * used, bytes_moved=size * read + batch * state)


@pytest.mark.parametrize("shape", DECODES, ids=lambda s: s.name)
def bench_decode(benchmark, shape, dtype, device):
    # around all of it: entering at every call would be timed too
    with fast_mamba():
        _compare(benchmark, shape, dtype, device)


def _compare(benchmark, shape, dtype, device):
    variants = {}
    for name, keep in (*shape.keeps, ("dense", 1.0)):
        model = _model(shape, keep, dtype, device)
        ours = name if name == "ours" else f"ours_{name}"
        work = _work(shape, model)
        # transformers' first: ours lays out the weights anew
        variants[f"transformers_{name.replace('ours', 'low_rank')}"] = Variant(
            calls=[_theirs(copy.deepcopy(model), shape)], work=work, graph=False
        )
        variants[ours] = Variant(
            calls=[_ours(copy.deepcopy(model), shape)],
            check=lambda model=model: _check(shape, model),
            work=work,
        )
    row = compare(
        benchmark,
        variants,
        shape=shape,
        dtype=dtype,
        device=device,
        work=variants["ours"].work or Work(),
        rounds=10,
        warmup_rounds=1,
    )
    benchmark.extra_info["tokens_per_s"] = {
        mode: {name: round(1e6 * shape.batch / v["median_us"], 1) for name, v in found.items()}
        for mode, found in row["modes"].items()
    }
