"""Fixtures shared by all tests: the device, tiny random models and checkpoints, a tokenizer."""

import argparse
import importlib.util
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Triton binds its functions to its interpreter when it is imported, and torch may import it: before
# pytest reads its options. A worker of xdist sees no options here; it has the environment of the
# process that started it. `pytest_configure` holds what was read here against the option.
if "PYTEST_XDIST_WORKER" not in os.environ:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    if parser.parse_known_args()[0].device == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from lillama_kernels.dispatch import interpreting
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import lillama
from lillama.checkpoint.sentinel import sentinel
from lillama.integrations.mamba import fast_mamba
from lillama.integrations.transformers import LillamaConfig, attach_quantizer
from lillama.models.detection import family_for
from lillama.models.families import PROJECTIONS
from lillama.modules.low_rank_experts import LowRankExperts, PivotLowRankExperts
from lillama.modules.low_rank_linear import PivotLowRankLinear
from lillama.modules.replace import dense_expert, replace_modules
from tests import interpreter
from tests.pivot_orders import choose_pivots

WORDS = (
    "the cat sat on a mat while old dogs ran past some green hills and nobody saw them go".split()
)
END = "<|endoftext|>"

# Tiny tensors: a second thread only waits, up to 100 times longer when the machine is busy.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", choices=["cpu", "cuda"], help="where the tests compute"
    )
    parser.addoption(
        "--sanitize",
        action="store_true",
        help="check every load and store of Triton's interpreter for bounds and races",
    )


def pytest_configure(config: pytest.Config) -> None:
    device, strict = config.getoption("--device"), config.getoption("--sanitize")
    if interpreting() != (device == "cpu"):
        raise pytest.UsageError(
            f"--device={device} came too late to choose between GPU and interpreter; "
            "write it on the command line as --device=..."
        )
    if device == "cpu":
        interpreter.install()
    if strict and device != "cpu":
        raise pytest.UsageError("--sanitize needs the interpreter; leave --device=cuda out")
    if strict:
        interpreter.sanitize()


def pytest_report_header() -> list[str]:
    if importlib.util.find_spec("vllm") is None:
        return ["not collected: tests/vllm, which needs vLLM (make test-vllm)"]
    return []


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


def sentences(count: int, seed: int = 0) -> str:
    """`count` lines of pseudo-random words: learnable, deterministic, no download."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(count):
        picks = torch.randint(len(WORDS), (9,), generator=generator).tolist()
        lines.append(" ".join(WORDS[i] for i in picks) + ".")
    return "\n".join(lines) + "\n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 pieces; END is bos, eos and pad."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([sentences(200)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=512
    )


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """The command line sets the package's logger up for a process of its own."""
    package = logging.getLogger("lillama")
    saved = package.handlers, package.level, package.propagate
    yield
    package.handlers, package.level, package.propagate = saved


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20,000 tokens of plain text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sentences(1500, seed=1), "utf-8")
    return path


@pytest.fixture(scope="session")
def short_text(text_file: Path) -> Path:
    """40 of its lines: enough to be judged on."""
    path = text_file.with_name("short.txt")
    path.write_text("\n".join(text_file.read_text("utf-8").splitlines()[:40]), "utf-8")
    return path


def mixtral_config(**changes: object) -> MixtralConfig:
    values = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return MixtralConfig(**{**values, **changes})


def mamba_config(**changes: object) -> MambaConfig:
    values = {
        "vocab_size": 300,
        "hidden_size": 32,
        "state_size": 8,
        "num_hidden_layers": 2,
        "time_step_rank": 4,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return MambaConfig(**{**values, **changes})


DEEPSEEK: dict[str, object] = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "moe_intermediate_size": 32, "num_key_value_heads": 4},
    **{"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
}

# What a tiny model of the other families has that is not in `family_config`
FAMILY_CHANGES: dict[str, dict[str, object]] = {
    # a window shorter than the tests' texts
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gpt2": {"n_inner": 64},
    "cohere": {"logit_scale": 2.0},
    "glm4": {"head_dim": 8},
    # key heads so wide that there is a rank between 8 and what saves nothing
    "starcoder2": {"sliding_window": 8, "use_bias": True, "num_key_value_heads": 4},
    # the first block is dense; queries through one matrix, or through two
    "deepseek_v2": {**DEEPSEEK, "q_lora_rank": None, "norm_topk_prob": False},
    "deepseek_v3": {**DEEPSEEK, "q_lora_rank": 16, "n_group": 2, "topk_group": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    # the first block is dense
    "qwen2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]},
        **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    },
    "qwen3_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]},
        **{"moe_intermediate_size": 32, "head_dim": 8},
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # a mixer and experts, then attention and one MLP
    "jamba": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
        **{"expert_layer_period": 2, "expert_layer_offset": 0, "mamba_proj_bias": True},
        **{"attn_layer_period": 2, "attn_layer_offset": 1},
    },
    # not declared
    "stablelm": {"use_qkv_bias": True},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
}


def family_config(model_type: str, **changes: object) -> PretrainedConfig:
    values = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **FAMILY_CHANGES.get(model_type, {}),
        **changes,
    }
    return AutoConfig.for_model(model_type, **values)


def falcon_mamba_config(**changes: object) -> PretrainedConfig:
    """Embeddings and head are two matrices, as in the published one; with biases, unlike it."""
    values = {
        "vocab_size": 300,
        "hidden_size": 32,
        "state_size": 8,
        "num_hidden_layers": 2,
        "time_step_rank": 4,
        "use_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model("falcon_mamba", **{**values, **changes})


def mamba2_config(**changes: object) -> PretrainedConfig:
    values = {
        "vocab_size": 300,
        "hidden_size": 32,
        "state_size": 8,
        "head_dim": 16,
        "num_heads": 4,
        "n_groups": 2,
        "num_hidden_layers": 2,
        "use_bias": True,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model("mamba2", **{**values, **changes})


def config_of(kind: str, changes: dict[str, object]) -> PretrainedConfig:
    makers = {"mixtral": mixtral_config, "mamba": mamba_config}
    makers |= {"falcon_mamba": falcon_mamba_config, "mamba2": mamba2_config}
    return makers[kind](**changes) if kind in makers else family_config(kind, **changes)


def random_model(config: PretrainedConfig, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """Random weights, scaled up so that every matrix matters."""
    torch.manual_seed(seed)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrices = ("proj", "fc1", "fc2", "dense", "query_key_value", "c_attn", "c_fc")
            if parameter.ndim >= 2 and any(part in name for part in matrices):
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    for parameter in model.parameters():
        # not model.to: from_pretrained keeps buffers such as the rotary frequencies in fp32
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture(scope="session")
def make_model():
    """make_model(model type, dtype=..., seed=..., **config changes) -> a tiny random dense
    model in eval mode, on the CPU."""

    def make(
        kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
    ) -> PreTrainedModel:
        config = config_of(kind, changes)
        model = random_model(config, dtype, seed)
        model.config.dtype = dtype
        return model

    return make


@pytest.fixture(scope="session")
def make_low_rank(make_model):
    """make_low_rank(model type, {hub name: rank}, dtype=..., gauge=..., **config changes) -> a tiny
    model compressed in memory: random factors, biases and dense experts kept, fit for
    save_pretrained."""

    @torch.no_grad()
    def make(
        kind: str,
        ranks: dict[str, int],
        dtype: torch.dtype = torch.float32,
        gauge: str = "plain",
        **changes: object,
    ) -> PreTrainedModel:
        model = make_model(kind, dtype, **changes)
        prefix = model.base_model_prefix
        replaced = replace_modules(
            model, model.config, ranks, base_prefix=prefix, pivot=gauge == "pivot"
        )
        for path, old in replaced.items():
            new = model.get_submodule(path)
            if isinstance(new, PivotLowRankLinear | PivotLowRankExperts):
                choose_pivots(new)
            if isinstance(new, LowRankExperts):
                stored = []
                for name, number in itertools.product(PROJECTIONS, range(new.num_experts)):
                    stored.append(new.stored(name, number))
                    if "lr_W" in stored[-1]:
                        stored[-1]["lr_W"].copy_(dense_expert(old, name, number))
            else:
                stored = [dict(new.named_parameters())]
                if getattr(new, "bias", None) is not None:
                    new.bias.copy_(old.bias)
            for tensors in stored:
                for key in sorted(tensors.keys() & {"lr_A", "lr_B", "lr_C"}):
                    tensors[key].normal_(std=tensors[key].shape[-1] ** -0.5)
        name, _ = sentinel(family_for(model.config), ranks)
        attach_quantizer(model, LillamaConfig(ranks=ranks, gauge=gauge, sentinel=name))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast):
    """make_checkpoint(model type, dtype=..., edit=..., **config changes) -> folder.

    `edit(model)` may change the weights before they are saved.
    """

    def make(kind: str, dtype: torch.dtype = torch.float32, edit=None, **changes: object) -> Path:
        config = config_of(kind, changes)
        model = random_model(config, dtype)
        if edit is not None:
            edit(model)
        path = tmp_path_factory.mktemp("checkpoints") / kind
        model.config.dtype = dtype
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def mixtral(make_checkpoint) -> Path:
    """A tiny random Mixtral in fp32; do not change the folder."""
    return make_checkpoint("mixtral")


@pytest.fixture(scope="session")
def mamba(make_checkpoint) -> Path:
    """A tiny random Mamba with tied embeddings in fp32; do not change the folder."""
    return make_checkpoint("mamba")


@pytest.fixture(autouse=True)
def _fast_mamba():
    """Every test runs Mamba on our scan: transformers' own is too slow for a test."""
    with fast_mamba():
        yield


assert lillama.__version__  # importing it registers the format with transformers
