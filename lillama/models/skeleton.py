"""A model on the meta device, and where its blocks are: all that is known before weights are
read."""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lillama.errors import InputError
from lillama.models.config_json import dtype_of

__all__ = ["block_list", "block_of", "named_blocks", "skeleton"]


def skeleton(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the meta device: shapes and modules, no memory."""
    config = copy.deepcopy(config)  # the model keeps and edits the object it is given
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype or dtype_of(config)).eval()


def named_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return every block by its path, in the order they run."""
    path, blocks = block_list(model)
    return {f"{path}.{index}": block for index, block in enumerate(blocks)}


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
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    found = [
        (name, child)
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList)
        and len(child) == getattr(model.config, "num_hidden_layers", 0)
        and all(isinstance(block, GradientCheckpointingLayer) for block in child)
    ]
    if len(found) != 1:
        names = " and ".join(name for name, _ in found) or "none"
        raise InputError(
            f"blocks of model_type {model.config.model_type!r} were not found: "
            f"{type(decoder).__name__} must hold one list of num_hidden_layers layers, it has "
            f"{names}; lillama/models/skeleton.py says what is looked for"
        )
    return f"{path}.{found[0][0]}" if path else found[0][0], found[0][1]
