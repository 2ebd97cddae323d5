"""config.json of a local checkpoint folder."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from lillama.errors import InputError
from lillama.models.families import check_decoder, check_model_type

__all__ = ["dtype_of", "read_config"]


def read_config(path: Path) -> PretrainedConfig:
    """Read config.json.

    Raises:
        InputError: not a folder, no or broken config.json, unknown architecture.
    """
    if not path.is_dir():
        raise InputError(
            f"{path} is not a checkpoint folder; give the path of a local model, or the name of "
            "one of the Hub (ORG/NAME)"
        )
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"{path} is not a checkpoint: it has no config.json")
    try:
        model_type = json.loads(file.read_text("utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file} is not a JSON object: {error}") from error
    check_model_type(str(model_type))
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # a config class may fail on a bad value in any way
        text = " ".join(str(error).split())
        raise InputError(f"{file} is not a config of {model_type}: {text}") from error
    check_decoder(config)
    return config


def dtype_of(config: PretrainedConfig) -> torch.dtype:
    """Return the dtype that a config names; float32 when it names none."""
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
