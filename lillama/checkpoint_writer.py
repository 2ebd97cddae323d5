"""Write a checkpoint folder: at any moment either the old state or the whole new one is there."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lillama.checkpoint import QUANT_METHOD
from lillama.errors import InputError, RunError

__all__ = ["CheckpointWriter", "check_space"]


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code == errno.ENOSPC or "No space left" in str(error):
            raise RunError(
                f"the disk is full while writing {path}; free space and run again"
            ) from error
        raise RunError(f"cannot write {path}: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_ours(path: Path) -> bool:
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        return config["quantization_config"]["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


class CheckpointWriter:
    """Writes OUT so that at any moment either the old state or the whole new one is there.

    Files go to `OUT.unfinished` beside OUT, are flushed to disk, and the folder is renamed in
    `finish`. A folder left by a killed run is taken over by the very same command (same recipe)
    and refused to any other. While a new OUT takes the place of an old one, the old one waits
    inside the staging folder: a kill at that moment loses nothing, the next run puts it back.

    Use as a context manager: leaving it by an exception removes the unfinished folder.

    Raises (on construction):
        InputError: OUT exists and may not be replaced, its parent is missing, or another command's
            unfinished run is in the way.
        RunError: the disk is full.
    """

    def __init__(self, out: Path, recipe: Mapping[str, object], *, overwrite: bool = False) -> None:
        if out.name in ("", ".."):
            raise InputError(f"{out} is not the name of a new folder; choose another OUT")
        self.out = out
        self.staging = out.with_name(out.name + ".unfinished")
        self.recipe = dict(recipe)
        self._shards: list[tuple[Path, dict[str, int]]] = []
        if not out.parent.is_dir():
            raise InputError(f"the folder {out.parent} does not exist; create it first")
        self._put_back()
        if out.exists() or out.is_symlink():
            if not overwrite:
                raise InputError(f"{out} exists; choose another OUT or pass --overwrite")
            empty = out.is_dir() and not any(out.iterdir())
            if out.is_symlink() or not (empty or _is_ours(out)):
                raise InputError(
                    f"{out} is not a model compressed by lillama; --overwrite does not replace it"
                )
        if self.staging.exists() or self.staging.is_symlink():
            self._take_over()
        with _disk_errors(self.staging):
            self.staging.mkdir()
        try:
            self._write_json("recipe.json", self.recipe)
            self._file_mode = (self.staging / "recipe.json").stat().st_mode & 0o777
        except BaseException:
            self._discard()
            raise

    @property
    def _replaced(self) -> Path:
        """Where the old OUT waits while the new one takes its place."""
        return self.staging / ".replaced"

    def _put_back(self) -> None:
        """Undo the first half of an exchange that was cut short."""
        if self._replaced.is_dir() and not self.staging.is_symlink() and not self.out.exists():
            with _disk_errors(self.out):
                self._replaced.rename(self.out)

    def _discard(self) -> None:
        self._put_back()
        # the recipe goes last: what a kill leaves over is still known to be ours
        for entry in self.staging.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != "recipe.json":
                entry.unlink()
        shutil.rmtree(self.staging)

    def _take_over(self) -> None:
        problem = f"{self.staging} is in the way and is no unfinished run; move it away"
        if self.staging.is_symlink() or not self.staging.is_dir():
            raise InputError(problem)
        recipe = self.staging / "recipe.json"
        try:
            recorded = json.loads(recipe.read_text("utf-8"))
        except (OSError, ValueError):
            # a kill before the recipe was complete leaves at most that file: nobody's work
            if any(path != recipe for path in self.staging.iterdir()):
                raise InputError(problem) from None
        else:
            if recorded != json.loads(json.dumps(self.recipe)):
                raise InputError(
                    f"{self.staging} is the unfinished run of another command; "
                    "delete it or choose another OUT"
                )
        with _disk_errors(self.staging):
            self._discard()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None and self.staging.is_dir():
            with contextlib.suppress(OSError, RunError):  # the first error counts
                self._discard()

    def add_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard of CPU tensors and flush it to disk."""
        file = self.staging / f"shard-{len(self._shards):05d}.safetensors"
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        with _disk_errors(file):
            save_file(contiguous, file, metadata={"format": "pt"})
            file.chmod(self._file_mode)  # safetensors leaves 0600; follow the user's umask instead
            _sync(file)
        sizes = {name: tensor.nbytes for name, tensor in contiguous.items()}
        self._shards.append((file, sizes))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors written so far."""
        return sum(sum(sizes.values()) for _, sizes in self._shards)

    def _write_json(self, name: str, value: object) -> None:
        with _disk_errors(self.staging / name):
            (self.staging / name).write_text(json.dumps(value, indent=2) + "\n", "utf-8")

    def finish(
        self,
        config: Mapping[str, object],
        *,
        report: Mapping[str, object],
        model_card: str,
        copies: Iterable[Path] = (),
    ) -> None:
        """Name the shards, write the JSON files and the card, copy `copies`, and put OUT in
        place."""
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        total = self.total_bytes
        with _disk_errors(self.staging):
            for number, (file, sizes) in enumerate(self._shards, start=1):
                name = f"model-{number:05d}-of-{count:05d}.safetensors"
                file.rename(self.staging / name)
                weight_map.update(dict.fromkeys(sizes, name))
            for file in copies:
                shutil.copyfile(file, self.staging / file.name)
            (self.staging / "README.md").write_text(model_card, "utf-8")
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self._write_json("model.safetensors.index.json", index)
        self._write_json("report.json", report)
        self._write_json("config.json", config)
        with _disk_errors(self.out):
            for file in self.staging.iterdir():
                _sync(file)
            _sync(self.staging)
            self._put_in_place()

    def _put_in_place(self) -> None:
        try:
            if self.out.exists():
                self.out.rename(self._replaced)
            self.staging.rename(self.out)
        except BaseException:
            self._put_back()
            raise
        _sync(self.out.parent)
        shutil.rmtree(self.out / self._replaced.name, ignore_errors=True)


def check_space(out: Path, needed_bytes: int) -> None:
    """Raises RunError when the disk of OUT has less than `needed_bytes` free."""
    free = shutil.disk_usage(out.parent).free
    if free < needed_bytes:
        gib = 2**30
        raise RunError(
            f"the disk of {out} has {free / gib:.2f} GiB free, the result needs "
            f"{needed_bytes / gib:.2f} GiB; free space or choose another OUT"
        )
