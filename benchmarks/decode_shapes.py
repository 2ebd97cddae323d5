"""Whole models that the serving engine decodes with: bench_decode.py and bench_generate.py."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from benchmarks.shapes import (
    MAMBA_2_8B_HIDDEN,
    MAMBA_2_8B_STATE,
    MAMBA_2_8B_TIME_STEP_RANK,
    MIXTRAL_8X7B_EXPERTS,
    MIXTRAL_8X7B_HIDDEN,
    MIXTRAL_8X7B_INTERMEDIATE,
    MIXTRAL_8X7B_TOP_K,
    Shape,
)

__all__ = ["DECODES", "GENERATIONS", "DecodeShape"]

Family = Literal["llama", "mamba", "mixtral"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeShape(Shape):
    """A step of `batch` requests after prompts of so many tokens. sizes: of the config. keeps: the
    compressed models by name, "ours" is one, with the share of their factorised matrices'
    parameters that is left."""

    family: Family
    batch: int
    prompt: int
    sizes: tuple[tuple[str, int], ...]
    keeps: tuple[tuple[str, float], ...]


# Models like the small teachers, and published ones; Mixtral and Llama cut to 8 layers, which fit
# beside the dense ones. The shares are those of 40% of the whole model ("ours") and of 20%; for
# Mixtral-8x7B that of rank 1024, for Mamba-2.8B of ranks 1024 and 848. Of Llamas: half and three
# quarters of every block's matrices.
DECODE_TINY = {
    "llama": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
    "mamba": {"hidden_size": 192, "state_size": 16, "num_hidden_layers": 6, "vocab_size": 2048},
    "mixtral": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 2048,
    },
}
DECODE_LARGE = {
    # meta-llama/Meta-Llama-3-8B config.json
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "mamba": {
        "hidden_size": MAMBA_2_8B_HIDDEN,
        "state_size": MAMBA_2_8B_STATE,
        "time_step_rank": MAMBA_2_8B_TIME_STEP_RANK,
        "num_hidden_layers": 64,
        "vocab_size": 50280,
    },
    "mixtral": {
        "hidden_size": MIXTRAL_8X7B_HIDDEN,
        "intermediate_size": MIXTRAL_8X7B_INTERMEDIATE,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": MIXTRAL_8X7B_EXPERTS,
        "num_experts_per_tok": MIXTRAL_8X7B_TOP_K,
        "vocab_size": 32000,
    },
}
DECODE_KEEPS = {
    "tiny-llama": (("ours", 0.5), ("20", 0.75)),
    "tiny-mamba": (("ours", 0.37), ("20", 0.69)),
    "tiny-mixtral": (("ours", 0.5), ("20", 0.75)),
    "mamba-2.8b": (("ours", 0.5),),
    "mixtral-8x7b": (("ours", 0.3214),),
    "llama-3-8b": (("ours", 0.5),),
}


def _decodes() -> list[DecodeShape]:
    found = []
    for name, keeps in DECODE_KEEPS.items():
        tiny = name.startswith("tiny")
        family = next(family for family in get_args(Family) if family in name)
        sizes = (DECODE_TINY if tiny else DECODE_LARGE)[family]
        for prompt in (128, 2048):
            for batch in (1, 4) if tiny else (1, 4, 16, 64):
                found.append(
                    DecodeShape(
                        name=f"{name}-B{batch}-P{prompt}",
                        needs_gpu=not tiny,
                        full=prompt == 2048 and batch == 4,
                        family=family,
                        batch=batch,
                        prompt=prompt,
                        sizes=tuple(sizes.items()),
                        keeps=keeps,
                    )
                )
    return found


DECODES = _decodes()

# Of whole answers every model is there with about 40% and 20% fewer parameters. Mixtral-8x7B has
# 45.1 of its 46.7 billion in experts, Mamba-2.8B 2.52 of 2.77 billion in in_proj and out_proj,
# Llama-3-8B 6.98 of 8.03 billion in the blocks' matrices.
GENERATE_KEEPS = {
    "mamba-2.8b": (("ours", 0.56), ("20", 0.78)),
    "mixtral-8x7b": (("ours", 0.586), ("20", 0.793)),
    "llama-3-8b": (("ours", 0.54), ("20", 0.77)),
}
GENERATIONS = [
    replace(shape, keeps=GENERATE_KEEPS.get(shape.name.partition("-B")[0], shape.keeps))
    for shape in DECODES
]
