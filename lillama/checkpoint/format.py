"""The on-disk format: what is in a checkpoint folder, and whether it fits. Files and headers only.

A compressed model is a sharded safetensors checkpoint in the model's own hub names. The weight
`<name>.weight` of a factorised matrix is replaced by `<name>.lr_A` [R, K] and `<name>.lr_B` [N, R];
`config.json` carries the ranks. Token embeddings [V, H] are stored as any matrix with N = V and
K = H. In gauge "pivot" `<name>.lr_C` [N - R, R] and `<name>.lr_pivots` [N] (uint8) take the place
of `.lr_B`: the rows of B where it is 1 are those of the identity, the others those of C (see
`pivots.py`); of the embeddings, whose outputs are the columns of their table, `.lr_C`
[H - R, R] and `.lr_pivots` [H] that of `.lr_A`, whose columns they are in the same way.
Inside a stacked experts module that is only partly factorised, a matrix that stays dense is
`<name>.lr_W` [N, K] (as `.weight` transformers would try to stack it). One mis-shaped tensor under
a dense name, the sentinel, makes a load without lillama fail instead of serving random weights;
`config.json` names it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from lillama.errors import InputError
from lillama.models.families import Family, check_decoder, check_model_type

__all__ = [
    "FACTOR_SUFFIXES",
    "FORMAT_VERSION",
    "GAUGES",
    "QUANT_METHOD",
    "SHARD_INDEX",
    "SINGLE_SHARD",
    "TensorHeader",
    "check_factors",
    "check_ranks",
    "check_sentinel",
    "check_unquantized",
    "compression_of",
    "dtype_of",
    "factor_shapes",
    "hub_headers",
    "read_config",
    "read_headers",
    "read_shard_headers",
    "saved_sentinel",
    "sentinel",
    "tensor_bytes",
]

QUANT_METHOD = "lillama"
# 1 stored the order of a pivot gauge's outputs as int32, 2 did not name the sentinel
FORMAT_VERSION = 3
FACTOR_SUFFIXES = (".lr_A", ".lr_B", ".lr_C", ".lr_pivots", ".lr_W")
GAUGES = ("plain", "pivot")
SINGLE_SHARD = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
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


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a checkpoint, as its shard tells it; `stored_name` where the shard calls it
    otherwise than we do."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    stored_name: str | None = None


def read_config(path: Path) -> PretrainedConfig:
    """Read config.json of a local checkpoint folder.

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
    """The dtype config.json names; float32 when it names none."""
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def compression_of(config: PretrainedConfig) -> dict | None:
    """The `quantization_config` of a model compressed by lillama as a dict, None for a dense one.

    Raises:
        InputError: the model is quantized by something else, its format version is unknown, or its
            ranks or its sentinel cannot be used.
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
    check_ranks(values.get("ranks"))
    check_sentinel(values.get("sentinel"))
    return values


def factor_shapes(
    shape: tuple[int, int], rank: int, gauge: str, is_embedding: bool = False
) -> dict[str, tuple[int, ...]]:
    """{end of the name: shape} of what is stored of a matrix [N, K] with a rank. is_embedding: it
    is the table [V, H] of the token embeddings, of which the pivot gauge takes columns."""
    N, K = shape
    if gauge != "pivot":
        return {"lr_A": (rank, K), "lr_B": (N, rank)}
    if is_embedding:
        return {"lr_B": (N, rank), "lr_C": (K - rank, rank), "lr_pivots": (K,)}
    return {"lr_A": (rank, K), "lr_C": (N - rank, rank), "lr_pivots": (N,)}


def check_ranks(ranks: object) -> None:
    """Raises InputError unless `ranks` is {matrix name: R} with at least one entry, each R > 0."""
    if not isinstance(ranks, dict) or not ranks:
        raise InputError("quantization_config has no ranks; nothing says what is factorised")
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise InputError(f"the rank of {name} must be a positive integer, got {rank!r}")


def _shard_files(path: Path) -> list[Path]:
    index = path / SHARD_INDEX
    if not index.is_file():
        single = path / SINGLE_SHARD
        if single.is_file():
            return [single]
        hint = "; only safetensors are read" if any(path.glob("*.bin")) else ""
        raise InputError(f"{path} holds no model.safetensors and no index of shards{hint}")
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not an index of shards: {error!r}") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{index} is not an index of shards: it names {names}")
    for name in names:
        if not (path / name).is_file():
            raise InputError(f"shard {path / name} is missing; the index {index.name} names it")
    return [path / name for name in names]


def read_shard_headers(file: Path) -> dict[str, TensorHeader]:
    """As `read_headers`, for one file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"shard {file} is truncated or no safetensors file ({size} bytes)")
        try:
            entries = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            headers = {
                name: TensorHeader(
                    file,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in entries.items()
            }
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"shard {file} has a broken safetensors header: {error!r}") from error
    if size != 8 + length + end:
        raise InputError(
            f"shard {file} is truncated or damaged: it has {size} bytes, "
            f"its header wants {8 + length + end}"
        )
    return headers


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Names, shapes, dtypes and sizes of every tensor, from the shards' headers only.

    Raises:
        InputError: no weights, a missing or truncated shard, a broken header.
    """
    headers: dict[str, TensorHeader] = {}
    for file in _shard_files(path):
        headers.update(read_shard_headers(file))
    return headers


def hub_headers(
    headers: dict[str, TensorHeader], family: Family, block_path: str
) -> dict[str, TensorHeader]:
    """The headers with the base model's prefix where the checkpoint has none: those that were saved
    without a head, as the hub's GPT-2 and OPT. `block_path`: runtime path of the blocks."""
    prefix = f"{block_path.partition('.')[0]}."
    if any(name.startswith(prefix) for name in headers):
        return headers
    return {
        name if name.startswith(f"{family.head}.") else prefix + name: replace(
            header, stored_name=name
        )
        for name, header in headers.items()
    }


def check_unquantized(headers: Mapping[str, TensorHeader]) -> None:
    """For a dense model: every weight is a float of 16 bits or more.

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


def _first(family: Family, ranks: Iterable[str]) -> str:
    """The matrix that the sentinel is named after, whatever the order of the ranks; the head only
    where there is no other: a model without its head does not load that."""
    return min(ranks, key=lambda name: (name == family.head, name))


def sentinel(family: Family, ranks: Mapping[str, int]) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the mis-shaped tensor that makes a load without lillama raise."""
    first = _first(family, ranks)
    parsed = None if family.experts is None else family.experts.parse(first)
    if parsed is None:
        return f"{first}.weight", (1,)
    return f"{parsed[0]}.down_proj", (1, 1, 1)


def saved_sentinel(family: Family, ranks: Mapping[str, int]) -> tuple[str, tuple[int, ...]]:
    """As `sentinel`, under a name that save_pretrained of transformers leaves as it is; it renames
    what it knows by its name in the model, as experts."""
    first = _first(family, ranks)
    if family.experts is None or family.experts.parse(first) is None:
        return sentinel(family, ranks)
    return f"{first.rpartition('.')[0]}.{family.experts.down}.weight", (1, 1)


def check_sentinel(name: object) -> None:
    """Raises InputError unless `name` can be a tensor's."""
    if not isinstance(name, str) or not name:
        raise InputError(
            f"quantization_config must name the sentinel, got {name!r}; compress again, or use the "
            "config.json that was written with the checkpoint"
        )


def check_factors(
    names: Mapping[str, tuple[int, ...]],
    ranks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    gauge: str = "plain",
    embedding: str | None = None,
    sentinel: str | None = None,
) -> None:
    """Compare the factors present ({tensor name: shape}) with the ranks that config.json promises.

    Args:
        names: every tensor of the checkpoint.
        ranks: {matrix name: R}.
        shapes: {matrix name: (N, K)} of the dense model, for every matrix with a rank and for
            those stored as `lr_W`.
        gauge: of the checkpoint.
        embedding: name of the token embeddings.
        sentinel: the one tensor that may lie under the dense name of a factorised matrix.

    Raises:
        InputError: a factor is missing, unexpected, or mis-shaped, or a matrix is dense as well;
        all are named (at most 5 of each).
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for name, (N, K) in shapes.items():
        rank = ranks.get(name)
        if rank is None:
            wanted[f"{name}.lr_W"] = (N, K)
        else:
            parts = factor_shapes((N, K), rank, gauge, name == embedding)
            wanted |= {f"{name}.{key}": part for key, part in parts.items()}
    found = {name: shape for name, shape in names.items() if name.endswith(FACTOR_SUFFIXES)}
    problems = {
        "missing factors": [name for name in wanted if name not in found],
        "unexpected factors": [name for name in found if name not in wanted],
        "mis-shaped factors": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ],
        "dense tensors of factorised matrices": [
            name for matrix in ranks if (name := f"{matrix}.weight") in names and name != sentinel
        ],
    }
    texts = []
    for problem, items in problems.items():
        if items:
            more = f" and {len(items) - 5} more" if len(items) > 5 else ""
            texts.append(f"{problem}: {', '.join(items[:5])}{more}")
    if texts:
        raise InputError(f"the checkpoint does not fit its config.json; {'; '.join(texts)}")


def tensor_bytes(headers: Mapping[str, TensorHeader], skip: Iterable[str] = ()) -> int:
    """Bytes of all tensors but those named in `skip` (the sentinel)."""
    skipped = set(skip)
    return sum(header.num_bytes for name, header in headers.items() if name not in skipped)
