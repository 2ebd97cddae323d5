"""From a model's name on the Hub to the files that are needed of it, and no others.

config.json, tokenizer and the index of shards come first: what cannot be used is refused before its
weights are downloaded.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import NotASafetensorsRepoError

from lillama.checkpoint.folder import recover
from lillama.checkpoint.format import (
    SHARD_INDEX,
    SINGLE_SHARD,
    TensorHeader,
    compression_of,
    read_config,
)
from lillama.errors import InputError, RunError
from lillama.models.hub import HubModel, download, hub_errors, hub_model, is_hub_id, literal

__all__ = ["fetch_weights", "find_model", "remote_headers"]

logger = logging.getLogger(__name__)

# What a checkpoint has beside its weights. Patterns by name: a repository may hold the same weights
# several times (.bin, .pt, consolidated.safetensors, onnx/).
SMALL_FILES = (
    *("config.json", "generation_config.json", "recipe.json", "report.json", "README.md"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", SHARD_INDEX),
)


def find_model(model: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model; downloads what is missing of one of the Hub.

    Args:
        model: a folder, or ORG/NAME or ORG/NAME@REVISION. What is neither is given back as a path,
            which `read_config` refuses.
        weights: False leaves them for `fetch_weights`.

    Raises:
        InputError, RunError: see `hub_errors`; a model that cannot be used is refused before its
        weights are downloaded.
    """
    path = Path(model)
    recover(path)
    hub_id, _, revision = str(model).partition("@")
    if path.exists() or not is_hub_id(hub_id):
        return path
    found = download(hub_id, revision or None, SMALL_FILES)
    if not (found / "config.json").is_file():
        raise InputError(
            f"{hub_id} has no config.json at {found.name[:12]}: it is no model that transformers "
            "reads (GGUF files and adapters are none); give the repository of the model itself"
        )
    if weights:
        fetch_weights(found)
    return found


def _shard_names(path: Path) -> list[str]:
    index = path / SHARD_INDEX
    if not index.is_file():
        return [SINGLE_SHARD]
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return sorted(map(str, names))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not an index of shards: {error!r}") from error


def _missing_shards(path: Path) -> list[str]:
    return [name for name in _shard_names(path) if not (path / name).is_file()]


def fetch_weights(path: Path) -> None:
    """Download what is missing of the safetensors of a folder of the Hub's cache; nothing is done
    about any other folder.

    Raises:
        InputError: the model has none, is quantized, or of an unknown architecture. RunError: see
        `hub_errors`; too little room on the disk.
    """
    found = hub_model(path)
    if found is None or not (missing := _missing_shards(path)):
        return
    compression_of(read_config(path))
    is_reached = _check_room(found, missing)
    download(found.hub_id, found.commit, missing)
    missing = _missing_shards(path)
    if missing and not is_reached:  # huggingface_hub 1 then gives back a folder that is not whole
        raise RunError(
            f"{found.hub_id} is not whole in the cache {constants.HF_HUB_CACHE} (no {missing[0]}), "
            "and the Hub cannot be reached; connect, or give a local path"
        )
    if missing:
        raise InputError(
            f"{found.hub_id} has no {missing[0]} at {found.commit[:12]}; only safetensors are "
            "read: look for a revision or a repository that has them (an old one may have an open "
            "pull request with them: --revision refs/pr/N)"
        )


def _check_room(model: HubModel, names: Sequence[str]) -> bool:
    """Refuse a download that the disk has no room for; False where the Hub cannot be reached."""
    try:
        files = huggingface_hub.snapshot_download(
            model.hub_id,
            revision=model.commit,
            allow_patterns=[literal(name) for name in names],
            dry_run=True,
        )
    except Exception as error:  # by version and by what is wrong; the download itself tells it
        logger.info("cannot ask how large %s is: %r", model.hub_id, error)
        return False
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise RunError(
            f"{model.hub_id} needs {needed / 1e9:.1f} GB more on the disk of {cache}, which has "
            f"{free / 1e9:.1f} GB free; free space, or put the cache elsewhere: `export "
            "HF_HOME=FOLDER`"
        )
    return True


def remote_headers(path: Path) -> dict[str, TensorHeader] | None:
    """As `read_headers`, over the network: a few KB a shard, no weights. None where the weights are
    on the disk, or the folder is not of the Hub's cache.

    Raises:
        InputError, RunError: as `fetch_weights`.
    """
    found = hub_model(path)
    if found is None or not _missing_shards(path):
        return None
    with hub_errors(found.hub_id, found.commit):
        try:
            metadata = huggingface_hub.get_safetensors_metadata(found.hub_id, revision=found.commit)
        except NotASafetensorsRepoError as error:
            raise InputError(
                f"{found.hub_id} has no safetensors at {found.commit[:12]}; only these are read"
            ) from error
    return {
        name: TensorHeader(
            path / file,
            tensor.dtype,
            tuple(tensor.shape),
            tensor.data_offsets[1] - tensor.data_offsets[0],
        )
        for file, shard in metadata.files_metadata.items()
        for name, tensor in shard.tensors.items()
    }
