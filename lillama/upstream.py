"""A model that the paper's published code compressed, as a checkpoint of ours.

There a factorised layer is nn.Sequential(Linear(K, R), Linear(R, N)), so `<matrix>.0.weight` [R, K]
is our `lr_A` and `<matrix>.1.weight` [N, R] our `lr_B`. Its factorised layers have no biases: where
the base model has one, zeros are written, and the model computes what it computed there.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lillama.checkpoint import (
    FORMAT_VERSION,
    QUANT_METHOD,
    compression_of,
    read_config,
    sentinel,
)
from lillama.checkpoint_writer import CheckpointWriter, check_space
from lillama.compress.blocks import TeacherBlocks
from lillama.compress.describe import card_metadata, card_text
from lillama.compress.outside import HEAD, REST
from lillama.compress.pipeline import COPIED_FILES
from lillama.compress.run import pieces_of
from lillama.compress.student import copied_entry
from lillama.errors import InputError
from lillama.families_generic import family_for
from lillama.integrations.transformers import dense_shapes, kept_dense
from lillama.loading import check_text_model, count_params
from lillama.modules.replace import replace_modules
from lillama.shard_file import Entry, entries_of, file_sha256
from lillama.skeleton import skeleton
from lillama.upstream_files import Upstream, is_in, open_upstream, some
from lillama.version import __version__

__all__ = ["import_upstream"]

logger = logging.getLogger(__name__)

# a buffer that transformers once saved with every block, and computes today
COMPUTED = "rotary_emb.inv_freq"


@dataclass(frozen=True, kw_only=True)
class _Base:
    """The dense model, and what becomes of its matrices. `dense`: matrices without factors beside
    experts that have some, stored as `lr_W`."""

    path: Path
    teacher: TeacherBlocks
    ranks: dict[str, int]
    dense: frozenset[str]

    @property
    def num_blocks(self) -> int:
        return len(self.teacher.blocks)

    @property
    def num_bytes(self) -> int:
        return sum(header.num_bytes for header in self.teacher.headers.values())

    def names_of(self, piece: str) -> list[str]:
        """The base's tensors that belong to a shard."""
        path = self.teacher.block_path
        if piece != REST:
            return self.teacher.hub_names(f"{path}.{piece.removeprefix('block-')}")
        return [n for n, run in self.teacher.runtime.items() if not run.startswith(f"{path}.")]

    def wanted(self, piece: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes that upstream's tensors of a shard must have."""
        found: dict[str, tuple[int, ...]] = {}
        for name in self.names_of(piece):
            shape = self.teacher.headers[name].shape
            matrix, _, kind = name.rpartition(".")
            rank = self.ranks.get(matrix)
            if rank is None:
                found[name] = shape
            elif kind == "weight":
                N, K = self.teacher.shape(matrix)
                found |= {f"{matrix}.0.weight": (rank, K), f"{matrix}.1.weight": (N, rank)}
        return found


def _open_base(path: Path) -> tuple[PretrainedConfig, TeacherBlocks]:
    config = read_config(path)
    if compression_of(config) is not None:
        raise InputError(f"--base {path} is compressed itself; give the dense model")
    check_text_model(path, config)
    family = family_for(config)
    return config, TeacherBlocks(path, config, family, torch.device("cpu"), torch.float32)


def _kept_dense(
    path: Path, config: PretrainedConfig, teacher: TeacherBlocks, ranks: Mapping[str, int]
) -> frozenset[str]:
    """Checks that every name of `ranks` is a matrix of the base model's blocks and its rank fits;
    returns what stays dense beside them."""
    model = skeleton(config)
    try:
        outside = [name for name in ranks if not name.startswith(f"{teacher.block_path}.")]
        if outside:
            raise ValueError(f"{outside[0]} is in no block")
        shapes = dense_shapes(model, teacher.family, ranks)
        for name, shape in shapes.items():
            if ranks[name] > min(shape):
                raise ValueError(f"{name} [{shape[0]}, {shape[1]}] cannot have rank {ranks[name]}")
        dense = frozenset(kept_dense(model, teacher.family, ranks))
        prefix = model.base_model_prefix
        replace_modules(
            model, config, ranks, base_prefix=prefix, device="meta", family=teacher.family
        )
    except ValueError as error:
        text = str(error).replace("quantization_config names ", "")
        raise InputError(f"the ranks do not fit --base {path}: {text}") from error
    teacher.check_names(ranks)
    return dense


def _check(piece: str, found: Mapping[str, Tensor], base: _Base) -> None:
    """Raises InputError unless these are the tensors that a shard needs, all finite."""
    wanted = base.wanted(piece)
    names = [name for name in found if not name.endswith(COMPUTED)]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "surplus": [name for name in names if name not in wanted],
        "mis-shaped": [
            f"{name} {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in found and tuple(found[name].shape) != shape
        ],
        "not floating-point": [n for n in names if not found[n].is_floating_point()],
    }
    texts = [f"{problem}: {some(items)}" for problem, items in problems.items() if items]
    if texts:
        raise InputError(
            f"upstream's tensors do not fit its ranks and --base {base.path}; {'; '.join(texts)}"
        )
    for name in names:
        if not bool(torch.isfinite(found[name]).all()):
            raise InputError(f"{name} holds NaN or infinity; its block must be distilled again")


def _entries(piece: str, found: dict[str, Tensor] | None, base: _Base) -> list[Entry]:
    """The tensors of a shard in our names; the base's own where upstream has none."""
    entries = []
    for name in base.names_of(piece):
        matrix, _, kind = name.rpartition(".")
        if matrix in base.ranks and found is not None:
            A = found[f"{matrix}.0.weight"]
            if kind == "weight":
                factors = {"lr_A": A, "lr_B": found[f"{matrix}.1.weight"]}
                entries += entries_of({f"{matrix}.{key}": part for key, part in factors.items()})
            else:
                logger.warning("%s is zero: upstream's factorised layers have no bias", name)
                zeros = torch.zeros(base.teacher.headers[name].shape, dtype=A.dtype)
                entries += entries_of({name: zeros})
            continue
        new_name = f"{matrix}.lr_W" if matrix in base.dense else name
        if found is not None:
            entries += entries_of({new_name: found[name]})
        else:
            entries.append(copied_entry(base.teacher, name, None)._replace(name=new_name))
    if piece == REST:
        name, shape = sentinel(base.teacher.family, base.ranks)
        entries += entries_of({name: torch.zeros(shape)})
    return entries


def _config_json(base: _Base, reduction: float) -> dict[str, Any]:
    values = json.loads((base.path / "config.json").read_text("utf-8"))
    values["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "ranks": base.ranks,
        "gauge": "plain",
        "sentinel": sentinel(base.teacher.family, base.ranks)[0],
        "reduction": reduction,
        "base_model": str(base.path),
        "base_revision": None,
        "recipe": "upstream",
        "tokens": None,
        "producer": {"name": "lillama", "version": __version__},
    }
    return values


def _card(base: Path, report: Mapping[str, Any]) -> str:
    return f"""{card_metadata(base, "lillama", "low-rank")}
# {card_text(base.name)}, {report["reduction"]:.1%} smaller

Compressed with the code that the Lillama paper published (arXiv 2412.16719); its factors were
written in this format by `lillama import-upstream` ({__version__}).

```python
import lillama  # registers the format
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

`recipe.json` has the checksums of the files it was made from. Quality was not measured here: run
`lillama eval` against the base model on text that neither has seen.
"""


@torch.no_grad()
def import_upstream(folder: str | Path, out: str | Path, *, base: str | Path) -> dict[str, Any]:
    """Write a model compressed by the paper's published code as a checkpoint of lillama. Same as
    `lillama import-upstream`.

    Everything is read and checked before OUT is begun; one block at a time is in memory. Tensors
    keep their dtypes.

    Args:
        folder: what upstream's `--output-folder` named (`rank_config.json` and `checkpoints/`), or
            what its `save_lr_llm` wrote.
        out: folder to create.
        base: the dense model that was compressed, a local checkpoint folder: its configuration,
            its tokenizer, and the tensors that FOLDER does not have.

    Returns:
        `matrices, blocks` (how many have factors), `zero_biases, params_before, params_after,
        reduction, bytes_after`.

    Raises:
        InputError: FOLDER or the base cannot be used: tensors that are missing, surplus, mis-shaped
            or not finite, a file that needs pickle; nothing was written. RunError: the disk is
            full.
    """
    source, target = Path(folder), Path(out)
    path = Path(base)
    config, teacher = _open_base(path)
    upstream = open_upstream(source, teacher.block_path, len(teacher.blocks))
    dense = _kept_dense(path, config, teacher, upstream.ranks)
    model = _Base(path=path, teacher=teacher, ranks=upstream.ranks, dense=dense)
    # its code knows no shard of its own for what is behind the blocks: all is in the rest
    pieces = [piece for piece in pieces_of(model.num_blocks) if piece != HEAD]
    for piece in pieces:
        found = upstream.read(piece)
        if found is not None:
            _check(piece, found, model)
    recipe = {
        "command": "import-upstream",
        "options": {"folder": str(source), "base": str(path)},
        "sha256": {str(f.relative_to(source)): file_sha256(f) for f in upstream.files},
        "versions": {"lillama": __version__, "torch": torch.__version__},
    }
    before = count_params(config)
    after = count_params(config, upstream.ranks)
    report: dict[str, Any] = {
        "matrices": len(upstream.ranks),
        "blocks": sum(is_in(f"{teacher.block_path}.{i}.", upstream.ranks)
                      for i in range(model.num_blocks)),
        "zero_biases": sum(f"{name}.bias" in teacher.headers for name in upstream.ranks),
        "params_before": before,
        "params_after": after,
        "reduction": 1 - after / before,
    }  # fmt: skip
    _write(target, recipe, pieces, upstream, model, report)
    return report


def _write(
    out: Path,
    recipe: dict[str, Any],
    pieces: list[str],
    upstream: Upstream,
    base: _Base,
    report: dict[str, Any],
) -> None:
    """Every shard, then the rest of OUT. Adds `bytes_after` to the report."""
    path = base.path
    with CheckpointWriter(out, recipe, pieces) as writer:
        check_space(out, round(base.num_bytes * (1 - report["reduction"])))
        for piece in pieces:
            if writer.done(piece) is None:
                writer.add_shard(piece, _entries(piece, upstream.read(piece), base))
        sizes = {name: header.num_bytes for name, header in writer.headers.items()}
        skipped = sentinel(base.teacher.family, base.ranks)[0]
        report["bytes_after"] = sum(size for name, size in sizes.items() if name != skipped)
        writer.finish(
            _config_json(base, report["reduction"]),
            report=report,
            model_card=_card(path, report),
            copies=[file for name in COPIED_FILES if (file := path / name).is_file()],
        )
