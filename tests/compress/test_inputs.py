"""The base model as people keep it: one file or shards, in every dtype of weights; quantized ones
are refused by what is in the shards, whatever config.json says."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lillama
from lillama.errors import InputError

OPTIONS: dict[str, Any] = {
    **{"reduction": 0.2, "tokens": 300, "seq_len": 32, "train": False, "preset": "whitened"}
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_single_file_and_shards_give_the_same_in_every_dtype(
    kind, dtype, make_checkpoint, tokenizer, text_file, tmp_path, device
):
    single = make_checkpoint(kind, dtype)
    assert [file.name for file in single.glob("*.safetensors")] == ["model.safetensors"]
    shards = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(single).save_pretrained(shards, max_shard_size="20KB")
    tokenizer.save_pretrained(shards)
    assert len(list(shards.glob("*.safetensors"))) > 1
    found = []
    for model in (single, shards):
        out = tmp_path / f"{model.name}-out"
        lillama.compress(model, out, text=text_file, device=str(device), **OPTIONS)
        found.append(tensors_of(out))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    factors = {tensor.dtype for name, tensor in ours.items() if ".lr_" in name}
    assert factors == {dtype}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in ours.values())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("command", ["plan", "compress", "generate"])
def test_quantized_weights_are_refused(command, dtype, mixtral, text_file, tmp_path):
    model = shutil.copytree(mixtral, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    calls = {
        "plan": lambda: lillama.plan(model, 0.2),
        "compress": lambda: lillama.compress(model, tmp_path / "out", text=text_file, **OPTIONS),
        "generate": lambda: lillama.generate(model, "the"),
    }
    with pytest.raises(InputError, match=f"{name} in model.safetensors is of dtype .*bf16, fp16"):
        calls[command]()
    assert not (tmp_path / "out").exists()
