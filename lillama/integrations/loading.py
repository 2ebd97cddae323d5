"""Open a model or tokenizer that is already on disk, dense or compressed, with errors a user can
act on."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lillama.checkpoint.compression import check_unquantized, compression_of
from lillama.checkpoint.headers import read_headers
from lillama.errors import InputError
from lillama.integrations.transformers import register
from lillama.models.config_json import dtype_of, read_config

__all__ = [
    "check_vocabulary",
    "choose_device",
    "load_model",
    "load_tokenizer",
]

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA when there is a GPU, else the CPU.

    Raises:
        InputError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(
                f"--device {name} is not available: {count} CUDA devices found; use cpu"
            )
    return device


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Raises InputError when the folder is no checkpoint or holds no tokenizer."""
    read_config(path)
    # without any, transformers makes an empty tokenizer
    if not any((path / name).is_file() for name in VOCABULARY_FILES):
        raise InputError(f"{path} holds no tokenizer: none of {', '.join(VOCABULARY_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{path} holds no tokenizer that can be read: {first}") from error


def check_vocabulary(token_ids: torch.Tensor, vocab_size: int) -> None:
    """Raises InputError when the tokenizer gave a token that the model does not have."""
    largest = int(token_ids.max())
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer gives token {largest}, the model has {vocab_size}; "
            "they do not belong together"
        )


def load_model(path: Path, device: torch.device, dtype: str = "auto") -> PreTrainedModel:
    """A causal language model in eval mode.

    dtype "auto": the checkpoint's on a GPU, float32 on a CPU (where bf16 products are slower or
    missing).

    Raises:
        InputError: no checkpoint, truncated, unknown architecture, or factors that do not fit.
    """
    config = read_config(path)
    compression = compression_of(config)
    headers = read_headers(path)
    if compression is None:
        check_unquantized(headers)
    register()
    wanted = torch.float32 if device.type == "cpu" else dtype_of(config)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=wanted if dtype == "auto" else getattr(torch, dtype),
        output_loading_info=True,
    )
    model, info = loaded
    # transformers fills what is missing with random numbers and goes on
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"{path} lacks tensors the model needs: {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        )
    return model.to(device).eval()
