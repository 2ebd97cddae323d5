"""Opening models and tokenizers: what is refused, and in which dtype a model comes back."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lillama.errors import InputError
from lillama.integrations.loading import check_vocabulary, choose_device, load_model, load_tokenizer

CPU = torch.device("cpu")


def test_choose_device_auto_is_cuda_only_where_there_is_a_gpu():
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device("auto").type == wanted
    assert choose_device("cpu") == CPU


def test_choose_device_refuses_a_gpu_that_is_not_there():
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(InputError, match=f"cuda:{count} is not available: {count} CUDA devices"):
        choose_device(f"cuda:{count}")


def test_load_tokenizer_refuses_a_folder_without_one(mamba, tmp_path):
    copy = shutil.copytree(mamba, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="holds no tokenizer: none of tokenizer.json"):
        load_tokenizer(copy)


def test_load_tokenizer_refuses_a_broken_file(mamba, tmp_path):
    copy = shutil.copytree(mamba, tmp_path / "copy")
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="no tokenizer that can be read"):
        load_tokenizer(copy)


def test_check_vocabulary_names_the_first_token_beyond():
    check_vocabulary(torch.tensor([0, 299]), 300)
    with pytest.raises(InputError, match="gives token 300, the model has 300"):
        check_vocabulary(torch.tensor([0, 300]), 300)


def test_load_model_is_float32_on_a_cpu_unless_told(make_checkpoint):
    path = make_checkpoint("mixtral", dtype=torch.bfloat16)
    assert {p.dtype for p in load_model(path, CPU).parameters()} == {torch.float32}
    kept = load_model(path, CPU, "bfloat16")
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert not kept.training


def test_load_model_refuses_a_checkpoint_that_lacks_a_tensor(mixtral, tmp_path):
    copy = shutil.copytree(mixtral, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks tensors the model needs: model.norm.weight"):
        load_model(copy, CPU)
