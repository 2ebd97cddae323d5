"""`quantization_config` of config.json: what of a model is factorised, and how."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from lillama.checkpoint.headers import TensorHeader
from lillama.checkpoint.names import GAUGES
from lillama.checkpoint.sentinel import check_sentinel
from lillama.errors import InputError

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "check_compression",
    "check_unquantized",
    "compression_of",
]

QUANT_METHOD = "lillama"
# 1 stored the permutation of a pivot gauge's outputs as int32, 2 did not name the sentinel
FORMAT_VERSION = 3
# How tensors end whose integers are packed weights, and what belongs to them: GPTQ and AWQ;
# compressed-tensors; bitsandbytes; MXFP4. Integers elsewhere are buffers, such as old models' masks
_PACKED = re.compile(
    r"(^|\.)(weight|qweight|qzeros|weight_packed|weight_zero_point|absmax|quant_map|SCB|\w+_blocks"
    r"|\w+_scales)$"
)
_UNQUANTIZED = (
    "give the original checkpoint in bf16, fp16 or fp32, which is usually of the same name without "
    "-GPTQ, -AWQ, -FP8, -INT4, -bnb-4bit or the like (its model card names it as base_model)"
)


def compression_of(config: PretrainedConfig) -> dict | None:
    """Return the `quantization_config` of a model compressed by lillama as a dict, None for a dense
    one.

    Raises:
        InputError: the model is quantized by something else; see `check_compression`.
    """
    found: Any = getattr(config, "quantization_config", None)
    if found is None and getattr(config, "compression_config", None) is not None:
        found = {"quant_method": "compressed-tensors"}  # as its first versions wrote it
    if found is None:
        return None
    values = found.to_dict() if hasattr(found, "to_dict") else found
    if not isinstance(values, dict):
        raise InputError(f"quantization_config must be an object, got {values!r}")
    if values.get("quant_method") != QUANT_METHOD:
        raise InputError(
            f"the model is quantized with {values.get('quant_method')!r}, and compressing works on "
            f"plain weights; {_UNQUANTIZED}"
        )
    check_compression(values)
    return values


def check_compression(values: Mapping[str, Any]) -> None:
    """Look at what every reader needs of a `quantization_config`.

    Raises:
        InputError: its format version or gauge is unknown, `ranks` is not {matrix name: R} with at
            least one entry and each R > 0, or there is no sentinel.
    """
    if values.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"format_version must be {FORMAT_VERSION}, got {values.get('format_version')!r}; "
            "the checkpoint was written by another version of lillama: compress again, or use it"
        )
    if values.get("gauge", "plain") not in GAUGES:
        raise InputError(
            f"gauge must be one of {', '.join(GAUGES)}, got {values['gauge']!r}; "
            "the checkpoint was written by another version of lillama"
        )
    ranks = values.get("ranks")
    if not isinstance(ranks, dict) or not ranks:
        raise InputError("quantization_config has no ranks; nothing says what is factorised")
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise InputError(f"the rank of {name} must be a positive integer, got {rank!r}")
    check_sentinel(values.get("sentinel"))


def check_unquantized(headers: Mapping[str, TensorHeader]) -> None:
    """Look whether every weight of a dense model is a float of 16 bits or more.

    Raises:
        InputError: float8 or smaller, or packed integers, whatever config.json says.
    """
    for name, header in headers.items():
        is_small = re.fullmatch(r"F[468](_\w+)?", header.dtype)
        is_packed = header.dtype.lstrip("UI").isdigit() and _PACKED.search(name)
        if is_small or is_packed:
            raise InputError(
                f"{name} in {header.file.name} is of dtype {header.dtype}: the weights are "
                f"quantized; {_UNQUANTIZED}"
            )
