"""Tiny compressed checkpoints written by hand, what transformers says of them, and vLLM in a
process of its own. Run by `make test-vllm`; without vLLM nothing here is collected."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lillama.checkpoint.format import saved_sentinel, sentinel
from lillama.checkpoint.gauge import pivot_tensors
from lillama.integrations.transformers import LillamaConfig
from lillama.models.families import FAMILIES

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

PROMPTS = [[7, 23, 5, 150, 9, 31], list(range(40, 57)), [200, 3, 3, 90]]
NEW_TOKENS = 16
COMMON = {
    "vocab_size": 272,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ATTENTION = {
    **COMMON,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    # far from uniform, so that rounding does not change the largest logit
    "initializer_range": 0.2,
}
EXPERTS = "model.layers.{}.block_sparse_moe.experts.{}.{}"


def llama_ranks() -> dict[str, int]:
    """Uneven ranks inside q, k, v and gate, up; k of layer 0 and gate of layer 1 stay dense. Rank
    50 of some is more than half of 64 outputs and 128 inputs are worth: multiplied out at TP 2."""
    leaves = [("self_attn", leaf) for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
    leaves += [("mlp", leaf) for leaf in ("gate_proj", "up_proj", "down_proj")]
    names = [f"model.layers.{i}.{part}.{leaf}" for i in range(2) for part, leaf in leaves]
    dense = {"model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj"}
    return {name: 20 + 10 * (i % 4) for i, name in enumerate(names) if name not in dense}


def mixtral_ranks() -> dict[str, int]:
    """Ragged, no multiples of 8; expert 1 keeps a dense w3 and expert 2 is dense, in layer 0."""
    names = [
        EXPERTS.format(i, e, w) for i in range(2) for e in range(4) for w in ("w1", "w2", "w3")
    ]
    dense = {EXPERTS.format(0, 1, "w3"), *(EXPERTS.format(0, 2, w) for w in ("w1", "w2", "w3"))}
    return {name: 20 + 5 * (i % 4) for i, name in enumerate(names) if name not in dense}


def mamba_ranks() -> dict[str, int]:
    return {
        f"backbone.layers.{i}.mixer.{leaf}": rank + 5 * i
        for i in range(2)
        for leaf, rank in (("in_proj", 40), ("x_proj", 6), ("out_proj", 30))
    }


def gpt_neox_ranks() -> dict[str, int]:
    """Without q, k and v, whose outputs vLLM puts in another order."""
    leaves = ("attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    return {f"gpt_neox.layers.{i}.{leaf}": 30 + 5 * i for i in range(2) for leaf in leaves}


def vocabulary_ranks(kind: str) -> dict[str, int]:
    """Embeddings and head, no multiples of 8, of 272 tokens that vLLM pads to 320. Rank 80 is more
    than 160 rows and 128 columns are worth: multiplied out at TP 2, there rank 45 is not."""
    if kind == "mixtral":
        return {"model.embed_tokens": 80, "lm_head": 45}
    if kind == "gpt_neox":
        return {"gpt_neox.embed_in": 80, "embed_out": 45}
    return {"backbone.embeddings": 45, "lm_head": 80}


def ranks_of(kind: str) -> dict[str, int]:
    """Of the layers of a kind; "+vocabulary" adds embeddings and head."""
    kind, _, more = kind.partition("+")
    makers = {"llama": llama_ranks, "mixtral": mixtral_ranks, "mamba": mamba_ranks}
    ranks = {**makers, "gpt_neox": gpt_neox_ranks}[kind]()
    return ranks | vocabulary_ranks(kind) if more else ranks


def dense_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "mamba":
        # with tied embeddings each token only repeats itself
        config = MambaConfig(**COMMON, state_size=16, time_step_rank=8, tie_word_embeddings=False)
        model = MambaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "proj.weight" in name:
                    parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
                elif "embeddings" in name or "lm_head" in name:
                    parameter.normal_()
        return model
    if kind == "mixtral":
        return MixtralForCausalLM(
            MixtralConfig(**ATTENTION, num_local_experts=4, num_experts_per_tok=2)
        )
    if kind == "gpt_neox":
        sizes = {key: ATTENTION[key] for key in ATTENTION if "key_value" not in key}
        return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, tie_word_embeddings=False))
    model = LlamaForCausalLM(LlamaConfig(**ATTENTION, attention_bias=True, mlp_bias=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def factorised(
    tensors: dict[str, Tensor], ranks: Mapping[str, int], gauge: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The compressed checkpoint's tensors and those of the dense model that it stands for."""
    stored, dense = dict(tensors), dict(tensors)
    blocks = {n.partition(".experts.")[0] for n in ranks if ".experts." in n}
    embeddings = {"model.embed_tokens", "backbone.embeddings", "gpt_neox.embed_in"}
    for name in list(tensors):
        matrix = name.removesuffix(".weight")
        if matrix in ranks:
            U, S, Vh = torch.linalg.svd(stored.pop(name), full_matrices=False)
            R, root = ranks[matrix], S[: ranks[matrix]].sqrt()
            A, B = (root[:, None] * Vh[:R]).contiguous(), (U[:, :R] * root).contiguous()
            dense[name] = B @ A
            parts = {"lr_A": A, "lr_B": B}
            if gauge == "pivot":
                is_embedding = matrix in embeddings
                parts, _ = pivot_tensors(A, B, torch.float32, is_embedding=is_embedding)
            stored |= {f"{matrix}.{key}": value for key, value in parts.items()}
        elif ".experts." in name and name.partition(".experts.")[0] in blocks:
            stored[f"{matrix}.lr_W"] = stored.pop(name)
    return stored, dense


def write_sentinel(stored: dict[str, Tensor], kind: str, as_saved: bool) -> str:
    """As `compress` names it, or as save_pretrained of transformers does; returns the name."""
    find = saved_sentinel if as_saved else sentinel
    name, shape = find(FAMILIES[kind.partition("+")[0]], ranks_of(kind))
    stored[name] = torch.zeros(shape)
    return name


@pytest.fixture(scope="session")
def make_served(tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """make_served(kind, gauge, edit=, as_saved=) -> (compressed folder, dense folder), fp32, one
    for the same arguments.

    `edit(tensors)` may damage the compressed one.
    """

    @functools.cache
    def make(
        kind: str,
        gauge: str = "plain",
        edit: Callable[[dict[str, Tensor]], None] | None = None,
        as_saved: bool = False,
    ) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(kind)
        dense_model(kind.partition("+")[0]).save_pretrained(root / "dense")
        tensors = load_file(root / "dense" / "model.safetensors")
        config = json.loads((root / "dense" / "config.json").read_text())
        ranks = ranks_of(kind)
        stored, dense = factorised(tensors, ranks, gauge)
        name = write_sentinel(stored, kind, as_saved)
        if edit is not None:
            edit(stored)
        config["quantization_config"] = LillamaConfig(
            ranks=ranks, gauge=gauge, sentinel=name
        ).to_dict()
        (root / "served").mkdir()
        (root / "served" / "config.json").write_text(json.dumps(config))
        for folder, content in (("served", stored), ("dense", dense)):
            save_file(content, root / folder / "model.safetensors", metadata={"format": "pt"})
        return root / "served", root / "dense"

    return make


@torch.no_grad()
def _transformers_tokens(folder: Path) -> list[list[int]]:
    """Greedy continuations by transformers (and lillama, if the folder is compressed)."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # goes on to the end
    tokens = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=2,
        )
        tokens.append(output[0, len(prompt) :].tolist())
    return tokens


@pytest.fixture(scope="session")
def transformers_tokens() -> Callable[[Path], list[list[int]]]:
    return functools.cache(_transformers_tokens)


def _run_vllm(
    folder: Path, environment: Mapping[str, str] | None = None, **options: Any
) -> tuple[list[list[int]] | None, str]:
    processes = options.get("tensor_parallel_size", 1)
    variables = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # mamba_on_cpu, for the workers
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # one core each; on one NUMA node vLLM asks for this
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(processes))),
        **(environment or {}),
    }
    variables.pop("TRITON_INTERPRET", None)  # set by the conftest of the other tests
    request = {"prompts": PROMPTS, "max_tokens": NEW_TOKENS, "options": options}
    script = Path(__file__).with_name("serve_tokens.py")
    result = subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(request)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = result.stdout + result.stderr
    if result.returncode:
        return None, output
    lines = [line for line in output.splitlines() if line.startswith("TOKENS ")]
    assert len(lines) == 1, output[-6000:]
    return json.loads(lines[0].removeprefix("TOKENS ")), output


@pytest.fixture(scope="session")
def run_vllm() -> Callable[..., tuple[list[list[int]] | None, str]]:
    """run_vllm(folder, environment=, **options of vllm.LLM) -> tokens, None if it failed, and what
    it wrote; in a process of its own."""
    return _run_vllm
