"""A compressed checkpoint for tools that do not know its format, or in the other gauge.

Format "dense" multiplies the factors out: W = B A, in the pivot gauge with the identity written
out; in fp32, rounded once to the dtype of the factors. The result is an ordinary checkpoint of the
base model's size. Formats "plain" and "pivot" change the gauge and keep the product.
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lillama.checkpoint.card import card_metadata, card_text
from lillama.checkpoint.folder import FolderWriter, disk_errors
from lillama.checkpoint.format import (
    FACTOR_SUFFIXES,
    TensorHeader,
    check_factors,
    compression_of,
    factor_shapes,
    read_config,
    read_headers,
    read_shard_headers,
    sentinel,
)
from lillama.checkpoint.gauge import pivot_tensors, plain_tensors
from lillama.checkpoint.pivots import is_permutation, order_of, wrong_marks
from lillama.checkpoint.remote import find_model
from lillama.checkpoint.shard_file import DTYPES, Entry, entries_of, write_shard
from lillama.checkpoint.writer import check_space
from lillama.config import ExportConfig
from lillama.errors import InputError, RunError
from lillama.integrations.loading import count_params
from lillama.integrations.transformers import dense_shapes, kept_dense
from lillama.models.dense_linear import is_transposed
from lillama.models.detection import family_for
from lillama.models.families import Family
from lillama.models.hub import model_name
from lillama.models.skeleton import skeleton
from lillama.version import __version__

__all__ = ["export"]

INDEX = "model.safetensors.index.json"


@dataclass
class _Source:
    """What is read: `shapes` {matrix: (N, K)} of every factorised matrix and every `lr_W`;
    `transposed`: the matrices that a dense checkpoint holds as [K, N]."""

    path: Path
    family: Family
    ranks: dict[str, int]
    gauge: str
    headers: dict[str, TensorHeader]
    shapes: dict[str, tuple[int, int]]
    sentinel: str
    transposed: set[str]
    _open: dict[Path, Any] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        file = self.headers[name].file
        if file not in self._open:
            self._open[file] = safe_open(file, "pt", backend="pread")
        return self._open[file].get_tensor(name)

    def copy(self, name: str, new_name: str | None = None) -> Entry:
        header = self.headers[name]
        dtype = DTYPES[header.dtype]
        return Entry(new_name or name, dtype, header.shape, lambda: self.read(name))

    def is_embedding(self, matrix: str) -> bool:
        return matrix == self.family.embedding

    def parts(self, matrix: str, gauge: str) -> dict[str, tuple[int, ...]]:
        """{end of the name: shape} of what a gauge stores of a matrix."""
        shape, rank = self.shapes[matrix], self.ranks[matrix]
        return factor_shapes(shape, rank, gauge, self.is_embedding(matrix))

    def first(self, matrix: str) -> str:
        """The tensor that stands for all that is stored of a matrix: of its dtype, in its shard."""
        return f"{matrix}.{next(iter(self.parts(matrix, self.gauge)))}"

    def dtype(self, matrix: str) -> torch.dtype:
        return DTYPES[self.headers[self.first(matrix)].dtype]

    def factors(self, matrix: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [R, K] and B [N, R], in whichever gauge they are stored."""
        stored = {
            key: self.read(f"{matrix}.{key}").to(dtype)
            for key in self.parts(matrix, self.gauge)
            if key != "lr_pivots"
        }
        if self.gauge == "pivot":
            stored["lr_pivots"] = self.marks(matrix)
        return plain_tensors(stored)

    def marks(self, matrix: str) -> Tensor:
        name, rank = f"{matrix}.lr_pivots", self.ranks[matrix]
        marks = self.read(name)
        if not is_permutation(order_of(marks, rank)):
            raise InputError(wrong_marks(name, rank, len(marks)))
        return marks

    def product(self, matrix: str) -> Tensor:
        """B A from fp32 products, in the dtype of the factors, as a dense checkpoint holds it; what
        the pivot gauge stores as it is comes out so."""
        A, B = self.factors(matrix, torch.float32)
        dense = _finite(matrix, (B @ A).to(self.dtype(matrix)))
        return dense.mT.contiguous() if matrix in self.transposed else dense


def _finite(matrix: str, value: Tensor) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise RunError(
            f"{matrix} becomes NaN or infinite in {str(value.dtype).removeprefix('torch.')}; its "
            "factors are damaged or too large for it"
        )
    return value


def _open_source(path: Path, format: str) -> _Source:
    config = read_config(path)
    values = compression_of(config)
    if values is None:
        raise InputError(f"{path} is not compressed by lillama; there is nothing to export")
    model = skeleton(config)
    family, ranks = family_for(config, model), values["ranks"]
    gauge = values.get("gauge", "plain")
    if format == gauge:
        raise InputError(f"{path} is in the {gauge} gauge already; choose another --format")
    headers = read_headers(path)
    shapes = dense_shapes(model, family, [*ranks, *kept_dense(model, family, ranks)])
    check_factors(
        {name: header.shape for name, header in headers.items()},
        ranks,
        shapes,
        gauge,
        family.embedding,
        values["sentinel"],
    )
    transposed = {name for name, module in model.named_modules() if is_transposed(module)}
    return _Source(path, family, ranks, gauge, headers, shapes, values["sentinel"], transposed)


def _pivot_entries(source: _Source, matrix: str, part: Path) -> list[Entry]:
    """Factors in the pivot gauge wait in the file `part`: made once, although a shard's tensors are
    not written in the order they are made in."""
    A, B = source.factors(matrix, torch.float64)
    is_embedding = source.is_embedding(matrix)
    tensors, _ = pivot_tensors(A, B, source.dtype(matrix), is_embedding=is_embedding)
    write_shard(part, entries_of({key: _finite(matrix, value) for key, value in tensors.items()}))
    shapes = {key: (DTYPES[h.dtype], h.shape) for key, h in read_shard_headers(part).items()}

    def read(key: str) -> Tensor:
        with safe_open(part, "pt", backend="pread") as file:
            return file.get_tensor(key)

    return [
        Entry(f"{matrix}.{key}", dtype, shape, lambda key=key: read(key))
        for key, (dtype, shape) in shapes.items()
    ]


def _converted(source: _Source, matrix: str, format: str, part: Path) -> list[Entry]:
    """What takes the place of a matrix's factors."""
    dtype, (N, K) = source.dtype(matrix), source.shapes[matrix]
    if format == "dense":
        shape = (K, N) if matrix in source.transposed else (N, K)
        return [Entry(f"{matrix}.weight", dtype, shape, lambda: source.product(matrix))]
    if format == "pivot":
        return _pivot_entries(source, matrix, part)
    return [
        source.copy(name)
        if (name := f"{matrix}.{key}") == source.first(matrix)
        else Entry(name, dtype, shape, lambda at=at: source.factors(matrix, dtype)[at].contiguous())
        for at, (key, shape) in enumerate(source.parts(matrix, format).items())
    ]


def _entries(source: _Source, file: Path, format: str, parts: Path) -> list[Entry]:
    """The tensors of a new shard: what the old one `file` held, a matrix where its first factor
    was."""
    entries = []
    for name, header in source.headers.items():
        if header.file != file or name == source.sentinel:
            continue
        matrix, _, suffix = name.rpartition(".")
        factorised = matrix in source.ranks and f".{suffix}" in FACTOR_SUFFIXES
        if suffix == "lr_W" and format == "dense":
            entries.append(source.copy(name, f"{matrix}.weight"))
        elif not factorised:
            entries.append(source.copy(name))
        elif name == source.first(matrix):
            part = parts / f".part-{len(entries)}.safetensors"
            entries += _converted(source, matrix, format, part)
    return entries


def _new_bytes(source: _Source, format: str) -> int:
    """Bytes of the result's tensors."""
    total = 0
    for name, header in source.headers.items():
        matrix, _, suffix = name.rpartition(".")
        if matrix in source.ranks and name == source.first(matrix):
            dense = {"weight": source.shapes[matrix]}
            parts = dense if format == "dense" else source.parts(matrix, format)
            for key, shape in parts.items():
                dtype = torch.uint8 if key == "lr_pivots" else source.dtype(matrix)
                total += math.prod(shape) * dtype.itemsize
        elif matrix not in source.ranks and name != source.sentinel:
            total += header.num_bytes
        elif suffix == "bias":
            total += header.num_bytes
    return total


def _write_shards(source: _Source, staging: Path, format: str) -> int:
    """Write every shard and their index; returns the bytes of the tensors without the sentinel."""
    names: dict[str, str] = {}
    num_bytes = 0
    files = sorted({header.file for header in source.headers.values()})
    for file in files:
        entries = _entries(source, file, format, staging)
        num_bytes += sum(entry.num_bytes for entry in entries)
        if format != "dense" and file == files[0]:
            name, shape = sentinel(source.family, source.ranks)
            entries.append(
                Entry(name, torch.float32, shape, lambda shape=shape: torch.zeros(shape))
            )
        if not entries:
            continue  # held nothing but parts of matrices that another shard begins
        write_shard(staging / file.name, entries)
        names.update({entry.name: file.name for entry in entries})
        for part in staging.glob(".part-*"):
            part.unlink()
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(names.items()))}
    if list(staging.glob("*.safetensors")) != [staging / "model.safetensors"]:
        (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return num_bytes


def _config_json(source: _Source, format: str, reduction: float) -> dict[str, Any]:
    values = json.loads((source.path / "config.json").read_text("utf-8"))
    if format == "dense":
        del values["quantization_config"]
    else:
        values["quantization_config"] |= {
            "gauge": format,
            "sentinel": sentinel(source.family, source.ranks)[0],
            "reduction": reduction,
            "producer": {"name": "lillama", "version": __version__},
        }
    return values


def _card(source: _Source, format: str, base_path: Path, hub_id: str | None) -> str:
    base = card_text(hub_id or base_path.name)
    if format == "dense":
        return f"""{card_metadata(base_path, "low-rank", hub_id=hub_id)}
# {card_text(model_name(source.path))}, multiplied out

{base} was compressed with lillama: weight matrices became low-rank factors. `lillama export`
({__version__}) multiplied these out again, so this is an ordinary checkpoint of the size of
{base}; it computes what the compressed model does, up to rounding. `recipe.json` says how the
compressed model was made.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```
"""
    old = source.path / "README.md"
    text = old.read_text("utf-8").rstrip() + "\n" if old.is_file() else f"# {source.path.name}\n"
    return (
        f"{text}\nConverted to the {format} gauge by `lillama export` ({__version__}): the same "
        "products, other\nfactors; the sizes above are those before it.\n"
    )


def _copies(path: Path) -> Iterable[Path]:
    """Tokenizer, generation_config.json, recipe.json and whatever else lies beside the weights."""
    written = {"config.json", "README.md", "report.html", INDEX}
    for file in sorted(path.iterdir()):
        hidden = file.name.startswith(".")
        if file.is_file() and file.suffix != ".safetensors" and not hidden:
            if file.name not in written:
                yield file


@torch.no_grad()
def export(model: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Write a compressed checkpoint in another format. Same as `lillama export`.

    One tensor at a time is in memory (in fp32, or fp64 for "pivot"), whatever the model's size.

    Args:
        model: folder of a model compressed by lillama.
        out: folder to create; it appears when all is done.
        options: `format`: "dense" multiplies the factors out, into a checkpoint in the base model's
            hub names that needs no lillama; "plain" and "pivot" change the gauge.

    Returns:
        `format`, `matrices` (how many were converted), `params, bytes_before, bytes_after`.

    Raises:
        InputError: arguments or a checkpoint that cannot be used. RunError: the run failed (disk
            full, a product that overflows); nothing was written.
    """
    config = ExportConfig(model=find_model(model), out=Path(out), **options)
    source = _open_source(config.model, config.format)
    with FolderWriter(config.out, {"command": "export"}, overwrite=None) as folder:
        check_space(config.out, _new_bytes(source, config.format))
        return _export(source, config, folder)


def _export(source: _Source, config: ExportConfig, folder: FolderWriter) -> dict[str, Any]:
    model_config = read_config(source.path)
    values: Mapping[str, Any] = compression_of(model_config) or {}
    before = count_params(model_config)
    params = before
    if config.format != "dense":
        params = count_params(model_config, source.ranks, config.format)
    base = Path(str(values.get("base_model") or "the base model"))
    # only a model of the Hub has a revision
    hub_id = str(base) if values.get("base_revision") else None
    with disk_errors(config.out):
        num_bytes = _write_shards(source, folder.staging, config.format)
        for file in _copies(source.path):
            shutil.copyfile(file, folder.staging / file.name)
        texts = {
            "README.md": _card(source, config.format, base, hub_id),
            "config.json": json.dumps(
                _config_json(source, config.format, 1 - params / before), indent=2
            )
            + "\n",
        }
        for name, text in texts.items():
            (folder.staging / name).write_text(text, "utf-8")
    folder.finish()
    return {
        "format": config.format,
        "matrices": len(source.ranks),
        "params": params,
        "bytes_before": sum(h.num_bytes for n, h in source.headers.items() if n != source.sentinel),
        "bytes_after": num_bytes,
    }
