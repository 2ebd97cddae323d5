"""Models with random weights, dense and factorised, that the serving engine decodes with: shared by
bench_decode.py and bench_generate.py."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from benchmarks.decode_shapes import DecodeShape
from benchmarks.rows import Work
from lillama.modules import LowRankExperts, LowRankLinear
from lillama.modules.replace import replace_modules

__all__ = ["STEPS", "model_of", "prompt_of", "ranks_of", "work_of"]

STEPS = 64  # room behind the prompt
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


def model_of(shape: DecodeShape, keep: float, dtype: torch.dtype, device: torch.device) -> Any:
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
                _factorise(model, keep)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def _rank(rows: int, columns: int, keep: float) -> int:
    return max(8, round(keep * rows * columns / (rows + columns) / 8) * 8)


def ranks_of(model: PreTrainedModel, keep: float) -> dict[str, int]:
    """{matrix hub name: rank} of what is factorised, of a dense model or of one that is."""
    config: Any = model.config
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
                if isinstance(module, torch.nn.Linear | LowRankLinear):
                    name = f"model.layers.{i}.{path}"
                    names[name] = _rank(module.out_features, module.in_features, keep)
            continue
        for expert in range(config.num_local_experts):
            for w in ("w1", "w2", "w3"):
                name = f"model.layers.{i}.block_sparse_moe.experts.{expert}.{w}"
                names[name] = _rank(inner, hidden, keep)
    return names


@torch.no_grad()
def _factorise(model: PreTrainedModel, keep: float) -> None:
    config, names = model.config, ranks_of(model, keep)
    for path in replace_modules(model, config, names, base_prefix=model.base_model_prefix):
        module = model.get_submodule(path)
        assert isinstance(module, LowRankLinear | LowRankExperts)
        for factor in module.parameters():
            factor.normal_(std=factor.shape[-1] ** -0.5)


def prompt_of(shape: DecodeShape, batch: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    vocab, size = dict(shape.sizes)["vocab_size"], (batch, shape.prompt)
    return torch.randint(1, int(vocab), size, generator=generator, device=device)


def work_of(shape: DecodeShape, model: PreTrainedModel, positions: int) -> Work:
    """Of a step: weights once, of the experts the share that so many rows choose on average, and
    the state, which of attention is so many positions."""
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
        state = 2 * size * layers * heads * positions
    return Work(flop=2.0 * batch * used, bytes_moved=size * read + batch * state)
