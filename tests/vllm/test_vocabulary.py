"""Embeddings and head in vLLM without its engine: which rows each process has, and what is
refused. test_parity.py has the tokens."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lillama.integrations.transformers import LillamaConfig

with warnings.catch_warnings():
    # those of vLLM and PyTorch about themselves, while they are imported
    warnings.simplefilter("ignore")
    from lillama.integrations.vllm import quantization, vocabulary

NAME = "model.embed_tokens"
# 20 tokens, padded to 24, in 3 parts of 8: the last has 4 of its own
V, H, PADDED, PROCESSES = 20, 16, 24, 3
ROWS = PADDED // PROCESSES


def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rank, H, generator=generator),
        torch.randn(V, rank, generator=generator),
    )


def made(process: int, rank: int = 4, sentinel: str = f"{NAME}.weight") -> tuple[Any, Any]:
    """The method and the layer of one process, before loading."""
    layer: Any = nn.Module()
    layer.org_vocab_size, layer.embedding_dim, layer.tp_size = V, H, PROCESSES
    layer.shard_indices = SimpleNamespace(
        org_vocab_start_index=process * ROWS, org_vocab_end_index=min((process + 1) * ROWS, V)
    )
    method = vocabulary.LowRankVocabularyMethod(NAME, rank, sentinel)
    method.create_weights(layer, H, [ROWS], H, PADDED, torch.float32)
    return method, layer


def load(layer: Any, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)


@pytest.mark.parametrize("rank", [4, 8], ids=["factors", "multiplied-out"])
def test_each_process_has_the_rows_of_its_tokens(rank):
    A, B = factors(rank)
    table, x = F.pad(B @ A, (0, 0, 0, PADDED - V)), torch.randn(5, H)
    for process in range(PROCESSES):
        method, layer = made(process, rank)
        load(layer, lr_A=A, lr_B=B, weight=torch.zeros(1))
        method.process_weights_after_loading(layer)
        # 8 (16 + 8) numbers are more than 16 x 8
        names = {"lr_W"} if rank == 8 else {"lr_A", "lr_B"}
        assert {name for name, _ in layer.named_parameters()} == names
        own = table[process * ROWS : (process + 1) * ROWS]
        torch.testing.assert_close(method.embedding(layer, torch.arange(ROWS)), own)
        torch.testing.assert_close(method.apply(layer, x), x @ own.mT)
        bias = torch.randn(ROWS)
        torch.testing.assert_close(method.apply(layer, x, bias), x @ own.mT + bias)


def test_a_damaged_vocabulary_is_refused():
    A, B = factors(4)
    for process in range(PROCESSES):
        method, layer = made(process)
        load(layer, lr_A=A)
        with pytest.raises(ValueError, match=f"the checkpoint lacks {NAME}.lr_B, or holds NaN"):
            method.process_weights_after_loading(layer)
    _, layer = made(0)
    with pytest.raises(ValueError, match=rf"lr_B is \[40, 4\], wanted \[{V}, 4\]: it does not fit"):
        load(layer, lr_B=B.repeat(2, 1))
    with pytest.raises(ValueError, match=r"lr_A is \[3, 16\], wanted \[4, 16\]: it does not fit"):
        load(layer, lr_A=A[:3])
    _, layer = made(0, sentinel="another.weight")
    with pytest.raises(ValueError, match=f"{NAME} has a rank in config.json and a .weight in the"):
        load(layer, weight=torch.zeros(V, H))


def test_a_tied_vocabulary_is_refused_and_says_what_to_do(monkeypatch):
    text = SimpleNamespace(tie_word_embeddings=True)
    current = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=text))
    monkeypatch.setattr(quantization, "get_current_vllm_config", lambda: current)
    values = LillamaConfig(ranks={NAME: 4}).to_dict()
    config = quantization.LillamaVllmConfig.from_config(values)
    layer = object.__new__(quantization.VocabParallelEmbedding)
    assert config.get_quant_method(layer, "lm_head") is None
    with pytest.raises(ValueError, match="serve what `lillama export --format dense` makes"):
        config.get_quant_method(layer, NAME)
    text.tie_word_embeddings = False
    assert config.get_quant_method(layer, NAME).rank == 4


@pytest.mark.parametrize(
    ("names", "sentinel"),
    [
        (["lm_head"], "lm_head.weight"),
        (["lm_head", "model.layers.0.block_sparse_moe.experts.0.w1"],
         "model.layers.0.mlp.experts.down_proj"),
        (["lm_head", NAME, "model.layers.0.block_sparse_moe.experts.0.w1"], f"{NAME}.weight"),
        (["lm_head", "backbone.layers.0.mixer.in_proj"], "backbone.layers.0.mixer.in_proj.weight"),
    ],
    ids=["head", "head-experts", "all", "head-linear"],
)  # fmt: skip
def test_the_sentinel_is_the_one_that_compress_writes(names, sentinel):
    config = quantization.LillamaVllmConfig(LillamaConfig(ranks=dict.fromkeys(names, 4)).to_dict())
    assert config.sentinel == sentinel
    assert config.embedding == (NAME if NAME in names else None)
    (pattern,) = config.get_checkpoint_weight_mapper().orig_to_new_regex
    assert pattern.fullmatch(sentinel)
