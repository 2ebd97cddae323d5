"""A model on the meta device, and where its blocks are: all that is known before weights are
read."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from lillama.checkpoint import dtype_of
from lillama.errors import InputError
from lillama.families import is_speech

__all__ = ["auto_class", "block_list", "block_of", "named_blocks", "skeleton"]


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that a model of this config is loaded by."""
    return AutoModelForSpeechSeq2Seq if is_speech(config) else AutoModelForCausalLM


def skeleton(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the meta device: shapes and modules, no memory."""
    config = copy.deepcopy(config)  # the model keeps and edits the object it is given
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=dtype or dtype_of(config)).eval()


def named_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every block by its path, in the order they run: an encoder's first, where there is one."""
    lists = [block_list(model)]
    if is_speech(model.config):
        lists.insert(0, _list_in(model, model.get_encoder(), model.config.encoder_layers))
    return {f"{path}.{i}": block for path, blocks in lists for i, block in enumerate(blocks)}


def block_of(name: str, places: Mapping[str, int]) -> int | None:
    """The number of the block that a tensor belongs to, None outside; `places`: {path: number} of
    `named_blocks`, all of one depth."""
    depth = next(iter(places)).count(".") + 1
    return places.get(".".join(name.split(".")[:depth]))


def block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder blocks: the one list of `num_hidden_layers` checkpointed layers
    that the decoder holds, whatever its name.

    Raises:
        InputError: there is none, or more than one.
    """
    count = "decoder_layers" if is_speech(model.config) else "num_hidden_layers"
    return _list_in(model, model.get_decoder(), getattr(model.config, count, 0))


def _list_in(model: PreTrainedModel, owner: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    path = next(name for name, module in model.named_modules() if module is owner)
    found = [
        (name, child)
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList)
        and len(child) == count
        and all(isinstance(block, GradientCheckpointingLayer) for block in child)
    ]
    if len(found) != 1:
        names = " and ".join(name for name, _ in found) or "none"
        raise InputError(
            f"blocks of model_type {model.config.model_type!r} were not found: "
            f"{type(owner).__name__} must hold one list of num_hidden_layers layers, it has "
            f"{names}; lillama/skeleton.py says what is looked for"
        )
    return f"{path}.{found[0][0]}" if path else found[0][0], found[0][1]
