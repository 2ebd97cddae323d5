"""Write a checkpoint with the block shapes of a real model, random weights and as many layers as
asked for: for runs whose memory and time depend on shapes alone. One tensor is in memory at a time.

    python -m benchmarks.synthetic mixtral-8x7b OUT --layers 4      # about 12 GB
    python -m benchmarks.synthetic mamba-2.8b OUT --layers 8

Quality measured on such a model means nothing.
"""

import argparse
import functools
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MambaConfig, MixtralConfig, PretrainedConfig

from lillama.checkpoint.format import SINGLE_SHARD
from lillama.checkpoint.shard_file import Entry, write_shard

__all__ = ["SHAPES", "hub_tensors", "write_checkpoint"]

_EIGHT = {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8}
_MINI = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
# The published config.json of mistralai/Mixtral-8x7B-v0.1 and state-spaces/mamba-2.8b-hf, and what
# is to try out what measures these
SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, int]]] = {
    "mixtral-8x7b": (
        MixtralConfig,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, **_EIGHT}
        | {"vocab_size": 32000},
    ),
    "mamba-2.8b": (
        MambaConfig,
        {"hidden_size": 2560, "state_size": 16, "time_step_rank": 160, "vocab_size": 50280},
    ),
    "mixtral-mini": (
        MixtralConfig,
        {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, **_MINI}
        | {"vocab_size": 1024},
    ),
}
TOKENIZER = Path(__file__).parents[1] / "examples" / "teachers" / "mixtral"


def hub_tensors(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the hub stores them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.state_dict().items():
        if config.model_type == "mixtral" and ".mlp.experts." in name:
            block = name.partition(".mlp.")[0]
            width, hidden = config.intermediate_size, config.hidden_size
            for expert in range(config.num_local_experts):
                prefix = f"{block}.block_sparse_moe.experts.{expert}"
                shapes |= {f"{prefix}.{w}.weight": (width, hidden) for w in ("w1", "w3")}
                shapes[f"{prefix}.w2.weight"] = (hidden, width)
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shapes[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tuple(parameter.shape)
    return shapes


def _value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Weights whose products keep the size of their inputs; norms and Mamba's decays as they
    start."""
    if "norm" in name or name.endswith(".D"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith("A_log"):
        return torch.arange(1, shape[1] + 1).log().expand(shape).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    fan_in = shape[-1] if len(shape) > 1 else 100
    std = 1.0 if "embed" in name else fan_in**-0.5
    value = torch.empty(shape, dtype=torch.bfloat16)
    return value.normal_(std=std, generator=generator)


def write_checkpoint(name: str, out: Path, layers: int) -> int:
    """Write `layers` blocks of SHAPES[name] to the new folder `out` in bf16; returns its bytes."""
    config_class, values = SHAPES[name]
    config: Any = config_class(**values, num_hidden_layers=layers)  # pyright: ignore[reportCallIssue]
    config.bos_token_id = config.eos_token_id = 0
    config.dtype = torch.bfloat16
    config.architectures = [
        "MixtralForCausalLM" if name.startswith("mixtral") else "MambaForCausalLM"
    ]
    out.mkdir(parents=True)
    entries = [
        Entry(tensor, torch.bfloat16, shape, functools.partial(_value, tensor, shape, seed))
        for seed, (tensor, shape) in enumerate(hub_tensors(config).items())
    ]
    write_shard(out / SINGLE_SHARD, entries)
    config.save_pretrained(out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, out / file)
    return sum(entry.num_bytes for entry in entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, required=True)
    arguments = parser.parse_args()
    total = write_checkpoint(arguments.shapes, arguments.out, arguments.layers)
    print(f"{arguments.out}: {total:,} bytes")


if __name__ == "__main__":
    main()
