"""Whole models with random weights, dense and factorised, that bench_generate.py answers with."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.rows import Work
from benchmarks.shapes import Shape
from benchmarks.synthetic import SHAPES
from lillama.compress.plan.targets import find_matrices
from lillama.models.families import family_of
from lillama.modules.replace import replace_modules

__all__ = ["GENERATIONS", "STEPS", "DecodeShape", "model_of", "prompt_of", "work_of"]

STEPS = 64  # room behind the prompt
Family = Literal["llama", "mamba", "mixtral"]
CONFIGS = {"llama": LlamaConfig, "mamba": SHAPES["mamba-2.8b"][0]}
CONFIGS["mixtral"] = SHAPES["mixtral-8x7b"][0]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeShape(Shape):
    """`batch` requests with prompts of so many tokens. sizes: of the config. keeps: the compressed
    models by name, "ours" is one, with the share of their factorised matrices' parameters that is
    left."""

    family: Family
    batch: int
    prompt: int
    sizes: tuple[tuple[str, int], ...]
    keeps: tuple[tuple[str, float], ...]


_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}
_TINY = {"hidden_size": 128, "vocab_size": 2048, **_HEADS}
_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
# meta-llama/Meta-Llama-3-8B config.json
_LLAMA_3 = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
_LLAMA_3 |= {"num_attention_heads": 32, "num_key_value_heads": 8}
# Models like the small teachers, and published ones; Mixtral and Llama cut to 8 layers, which fit
# beside the dense ones. Each is there with about 40% ("ours") and 20% fewer parameters of the whole
# model: Mixtral-8x7B has 45.1 of its 46.7 billion in experts, Mamba-2.8B 2.52 of 2.77 billion in
# in_proj and out_proj, Llama-3-8B 6.98 of 8.03 billion in the blocks' matrices.
_MODELS: dict[str, tuple[Family, dict[str, int], float, float]] = {
    "tiny-llama": ("llama", {**_TINY, "intermediate_size": 512}, 0.5, 0.75),
    "tiny-mamba": (
        "mamba",
        {"hidden_size": 192, "state_size": 16, "num_hidden_layers": 6, "vocab_size": 2048},
        *(0.37, 0.69),
    ),
    "tiny-mixtral": ("mixtral", {**_TINY, "intermediate_size": 256, **_EXPERTS}, 0.5, 0.75),
    "mamba-2.8b": ("mamba", {**SHAPES["mamba-2.8b"][1], "num_hidden_layers": 64}, 0.56, 0.78),
    "mixtral-8x7b": (
        "mixtral",
        {**SHAPES["mixtral-8x7b"][1], "num_hidden_layers": 8},
        *(0.586, 0.793),
    ),
    "llama-3-8b": ("llama", {**_LLAMA_3, "num_hidden_layers": 8}, 0.54, 0.77),
}
GENERATIONS = [
    DecodeShape(
        name=f"{name}-B{batch}-P{prompt}",
        needs_gpu=not name.startswith("tiny"),
        full=prompt == 2048 and batch == 4,
        family=family,
        batch=batch,
        prompt=prompt,
        sizes=tuple(sizes.items()),
        keeps=(("ours", keep_40), ("20", keep_20)),
    )
    for name, (family, sizes, keep_40, keep_20) in _MODELS.items()
    for prompt in (128, 2048)
    for batch in ((1, 4) if name.startswith("tiny") else (1, 4, 16, 64))
]


def model_of(shape: DecodeShape, keep: float, dtype: torch.dtype, device: torch.device) -> Any:
    """keep: the share of the factorised matrices' parameters that is left; 1 is dense."""
    config: Any = CONFIGS[shape.family](**dict(shape.sizes), tie_word_embeddings=False)
    if shape.family != "mamba":
        config.max_position_embeddings = shape.prompt + STEPS
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config).eval()
            if keep < 1:
                _factorise(model, keep)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


@torch.no_grad()
def _factorise(model: PreTrainedModel, keep: float) -> None:
    config, prefix = model.config, model.base_model_prefix
    matrices = find_matrices(model, family_of(config.model_type), None)
    ranks = {m.name: max(8, round(m.rank_at(keep) / 8) * 8) for m in matrices}
    for path in replace_modules(model, config, ranks, base_prefix=prefix):
        for factor in model.get_submodule(path).parameters():
            factor.normal_(std=factor.shape[-1] ** -0.5)


def prompt_of(shape: DecodeShape, batch: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    vocab, size = dict(shape.sizes)["vocab_size"], (batch, shape.prompt)
    return torch.randint(1, int(vocab), size, generator=generator, device=device)


def work_of(shape: DecodeShape, model: PreTrainedModel, positions: int) -> Work:
    """Of a step: weights once, of the experts the share that so many rows choose on average, and
    the state, which of attention is so many positions."""
    config: Any = model.config
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
    size, layers = model.dtype.itemsize, config.num_hidden_layers
    if shape.family == "mamba":  # read and written, in fp32
        state = 2 * 4 * layers * config.intermediate_size * config.state_size
    else:
        heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
        state = 2 * size * layers * heads * positions
    return Work(flop=2.0 * batch * used, bytes_moved=size * read + batch * state)
