"""Embeddings and head in vLLM without its engine: which rows each process has, and what is
refused. test_parity.py has the tokens."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lillama.checkpoint.gauge import pivot_tensors
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


def made(
    process: int,
    rank: int = 4,
    sentinel: str = f"{NAME}.weight",
    gauge: str = "plain",
    is_embedding: bool = True,
) -> tuple[Any, Any]:
    """The method and the layer of one process, before loading."""
    layer: Any = nn.Module()
    layer.org_vocab_size, layer.embedding_dim, layer.tp_size = V, H, PROCESSES
    layer.shard_indices = SimpleNamespace(
        org_vocab_start_index=process * ROWS, org_vocab_end_index=min((process + 1) * ROWS, V)
    )
    method = vocabulary.LowRankVocabularyMethod(
        NAME, rank, sentinel, gauge, is_embedding=is_embedding
    )
    method.create_weights(layer, H, [ROWS], H, PADDED, torch.float32)
    return method, layer


def load(layer: Any, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)


@pytest.mark.parametrize("is_embedding", [True, False], ids=["embeddings", "head"])
@pytest.mark.parametrize("gauge", ["plain", "pivot"])
@pytest.mark.parametrize("rank", [4, 8], ids=["factors", "multiplied-out"])
def test_each_process_has_the_rows_of_its_tokens(rank, gauge, is_embedding):
    A, B = factors(rank)
    table, x = F.pad(B @ A, (0, 0, 0, PADDED - V)), torch.randn(5, H)
    stored = {"lr_A": A, "lr_B": B}
    if gauge == "pivot":
        stored, _ = pivot_tensors(A, B, torch.float32, is_embedding=is_embedding)
    for process in range(PROCESSES):
        method, layer = made(process, rank, gauge=gauge, is_embedding=is_embedding)
        load(layer, **stored, weight=torch.zeros(1))
        method.process_weights_after_loading(layer)
        # 8 (16 + 8) numbers are more than 16 x 8
        names = {"lr_W"} if rank == 8 else {"lr_A", "lr_B"}
        assert {name for name, _ in layer.named_parameters()} == names
        own = table[process * ROWS : (process + 1) * ROWS]
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(method.embedding(layer, torch.arange(ROWS)), own, **close)
        torch.testing.assert_close(method.apply(layer, x), x @ own.mT, **close)
        bias = torch.randn(ROWS)
        torch.testing.assert_close(method.apply(layer, x, bias), x @ own.mT + bias, **close)


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


@pytest.mark.parametrize("is_embedding", [True, False], ids=["embeddings", "head"])
def test_a_damaged_vocabulary_in_the_pivot_gauge_is_refused(is_embedding):
    stored, _ = pivot_tensors(*factors(4), torch.float32, is_embedding=is_embedding)
    outputs = H if is_embedding else V
    for broken in (None, torch.zeros(outputs, dtype=torch.uint8)):
        method, layer = made(0, gauge="pivot", is_embedding=is_embedding)
        given = {**stored, "lr_pivots": broken}
        load(layer, **{name: tensor for name, tensor in given.items() if tensor is not None})
        with pytest.raises(ValueError, match=f"the checkpoint lacks {NAME}.lr_pivots, or holds"):
            method.process_weights_after_loading(layer)
    method, layer = made(0, gauge="pivot", is_embedding=is_embedding)
    with pytest.raises(ValueError, match=rf"lr_C is \[4, 4\], wanted \[{outputs - 4}, 4\]"):
        load(layer, lr_C=torch.zeros(4, 4))


def test_a_tied_vocabulary_is_refused_and_says_what_to_do(monkeypatch):
    text = SimpleNamespace(tie_word_embeddings=True)
    current = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=text))
    monkeypatch.setattr(quantization, "get_current_vllm_config", lambda: current)
    values = LillamaConfig(ranks={NAME: 4}, sentinel="a").to_dict()
    config = quantization.LillamaVllmConfig.from_config(values)
    layer = object.__new__(quantization.VocabParallelEmbedding)
    assert config.get_quant_method(layer, "lm_head") is None
    with pytest.raises(ValueError, match="serve what `lillama export --format dense` makes"):
        config.get_quant_method(layer, NAME)
    text.tie_word_embeddings = False
    method = config.get_quant_method(layer, NAME)
    assert method.rank == 4 and method.is_embedding and method.gauge == "plain"
    values = LillamaConfig(ranks={"lm_head": 4}, sentinel="a", gauge="pivot").to_dict()
    head = object.__new__(quantization.ParallelLMHead)
    method = quantization.LillamaVllmConfig.from_config(values).get_quant_method(head, "lm_head")
    assert method.rank == 4 and not method.is_embedding and method.gauge == "pivot"


@pytest.mark.parametrize("name", ["embed_out", "lm_head", NAME])
def test_the_sentinel_is_the_one_that_the_config_names(name):
    sentinel = "gpt_neox.layers.0.attention.dense.weight"
    values = LillamaConfig(ranks={name: 4}, sentinel=sentinel).to_dict()
    config = quantization.LillamaVllmConfig(values)
    assert config.sentinel == sentinel
    assert config.embedding == (NAME if name == NAME else None)
    (pattern,) = config.get_checkpoint_weight_mapper().orig_to_new_regex
    assert pattern.fullmatch(sentinel) and not pattern.fullmatch(f"{name}.weight")
    del values["sentinel"]
    with pytest.raises(ValueError, match="must name the sentinel, got None; compress again"):
        quantization.LillamaVllmConfig(values)
