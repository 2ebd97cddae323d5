"""What the paper's published code wrote: two layouts, told apart by what lies in the folder.

Source: github.com/yaya-sy/lillama, commit 91bf898, src/lillama/distiller.py and src/utils.py.

* `rank_config.json` {matrix: R} and `checkpoints/<block>.pt`, what its distillation writes: the
  whole state of each distilled block. Everything else is the base model's.
* `config.json` with a key `ranks`, and safetensors: what its `save_lr_llm` writes, the whole model.

A .pt file is a pickle; it is read as tensors alone (`weights_only=True`), and a file that needs
more is refused.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lillama.checkpoint import check_ranks, read_headers
from lillama.compress.outside import REST
from lillama.errors import InputError

__all__ = ["Upstream", "is_in", "open_upstream", "some"]

NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """What FOLDER holds. `read(piece)`: upstream's tensors of one shard of ours by full name, None
    where the base model's are meant. `files`: what it was read from."""

    ranks: dict[str, int]
    read: Callable[[str], dict[str, Tensor] | None]
    files: list[Path]


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} must hold a JSON object, got {type(found).__name__}")
    return found


def open_upstream(folder: Path, block_path: str, num_blocks: int) -> Upstream:
    """Find out which layout it is, and that its files are there; reads no tensor.

    Args:
        folder: as in `lillama.upstream.import_upstream`. block_path, num_blocks: of the base model.

    Raises:
        InputError: neither layout, ranks that are none, files missing or surplus.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give what upstream's --output-folder named")
    ranks, config = folder / "rank_config.json", folder / "config.json"
    if ranks.is_file():
        return _open_blocks(folder, _json(ranks), block_path, num_blocks)
    if config.is_file() and "ranks" in _json(config):
        return _open_whole(folder, _json(config)["ranks"], block_path)
    raise InputError(
        f"{folder} holds no rank_config.json and no config.json with ranks; give the folder that "
        "upstream's --output-folder named, or that its save_lr_llm wrote"
    )


def _open_blocks(folder: Path, ranks: Any, block_path: str, num_blocks: int) -> Upstream:
    _check_ranks(folder / "rank_config.json", ranks)
    blocks = [i for i in range(num_blocks) if is_in(f"{block_path}.{i}.", ranks)]
    files = {f"block-{i}": folder / "checkpoints" / f"{block_path}.{i}.pt" for i in blocks}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise InputError(
            f"{folder / 'checkpoints'} lacks {some(missing)}, whose matrices rank_config.json "
            "names; upstream writes no file of a block whose loss was NaN: distil it again"
        )
    surplus = sorted(set((folder / "checkpoints").glob("*.pt")) - set(files.values()))
    if surplus:
        raise InputError(
            f"{folder / 'checkpoints'} has {some([f.name for f in surplus])}, of which "
            "rank_config.json names no matrix; the two are of different runs"
        )

    def read(piece: str) -> dict[str, Tensor] | None:
        if piece not in files:
            return None
        path = files[piece].stem
        return {f"{path}.{key}": tensor for key, tensor in _read_pt(files[piece]).items()}

    return Upstream(ranks=ranks, read=read, files=[folder / "rank_config.json", *files.values()])


def _open_whole(folder: Path, ranks: Any, block_path: str) -> Upstream:
    _check_ranks(folder / "config.json", ranks)
    headers = read_headers(folder)
    inside = re.compile(rf"{re.escape(block_path)}\.(\d+)\.")

    def piece_of(name: str) -> str:
        match = inside.match(name)
        return REST if match is None else f"block-{match[1]}"

    def read(piece: str) -> dict[str, Tensor] | None:
        found = {}
        for name, header in headers.items():
            if piece_of(name) == piece:
                with safe_open(header.file, "pt", backend="pread") as file:
                    found[name] = file.get_tensor(name)
        return found

    files = sorted({header.file for header in headers.values()})
    return Upstream(ranks=ranks, read=read, files=[folder / "config.json", *files])


def is_in(prefix: str, names: Iterable[str]) -> bool:
    """Whether one of the names begins with this."""
    return any(name.startswith(prefix) for name in names)


def _check_ranks(file: Path, ranks: Any) -> None:
    try:
        check_ranks(ranks)
    except InputError as error:
        text = str(error).replace("quantization_config has", "it has")
        raise InputError(f"{file}: {text}") from error


def some(names: list[str]) -> str:
    """The first few names, for a message."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _read_pt(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises whatever its bytes lead to
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise InputError(
            f"{file} is damaged or needs pickle, which can run code and is not used: {reason}"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise InputError(f"{file} must hold the tensors of one block by name; it is no state_dict")
    return found
