"""Write a checkpoint folder: at any moment either the old state or the whole new one is there."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lillama.checkpoint.format import QUANT_METHOD, TensorHeader, read_shard_headers
from lillama.checkpoint.journal import Journal, locked
from lillama.checkpoint.shard_file import Entry, file_sha256, write_shard
from lillama.errors import InputError, RunError

__all__ = ["CheckpointWriter", "check_out", "check_space", "differences", "disk_errors", "sync"]


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise RunError(
                f"the disk is full while writing {path}; free space and run again"
            ) from error
        raise RunError(f"cannot write {path}: {error}") from error


def sync(path: Path) -> None:
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


def check_out(out: Path, overwrite: bool) -> None:
    """Raises InputError where OUT exists and may not be replaced."""
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise InputError(f"{out} exists; choose another OUT or pass --overwrite")
        empty = out.is_dir() and not any(out.iterdir())
        if out.is_symlink() or not (empty or _is_ours(out)):
            raise InputError(
                f"{out} is not a model compressed by lillama; --overwrite does not replace it"
            )


class CheckpointWriter:
    """Writes OUT so that at any moment either the old state or the whole new one is there.

    Files go to `OUT.unfinished` beside OUT, are flushed to disk and entered into its journal with
    their checksums, and the folder is renamed in `finish`. What a run leaves unfinished, however it
    ended, is taken up by the same command (same recipe): `done` gives the pieces that are there.
    While a new OUT takes the place of an old one, the old one waits inside the staging folder: a
    kill at that moment loses nothing, the next run puts it back.

    Use as a context manager: leaving it by an exception keeps what is finished, and removes the
    folder where nothing is.

    Args:
        pieces: names of the shards, in their order in the checkpoint.
        worker: 0 for the process that owns the folder; others only add shards to it, after it was
            made.

    Raises (on construction):
        InputError: OUT exists and may not be replaced, its parent is missing, another run is
            writing it, another command's unfinished run is in the way, or the journal or a
            finished shard is damaged.
        RunError: the disk is full.
    """

    def __init__(
        self,
        out: Path,
        recipe: Mapping[str, object],
        pieces: Sequence[str],
        *,
        overwrite: bool = False,
        worker: int = 0,
    ) -> None:
        if out.name in ("", ".."):
            raise InputError(f"{out} is not the name of a new folder; choose another OUT")
        self.out = out
        self.staging = out.with_name(out.name + ".unfinished")
        self.recipe = json.loads(json.dumps(recipe))
        self.pieces = list(pieces)
        self.worker = worker
        self._held = contextlib.ExitStack()
        self._made = False  # the staging folder is of this run
        if worker:
            self.journal = Journal(self.staging, worker)
            return
        if not out.parent.is_dir():
            raise InputError(f"the folder {out.parent} does not exist; create it first")
        if self.staging.is_dir() and not self.staging.is_symlink():
            self._check_holder()
        self._put_back()
        check_out(out, overwrite)
        try:
            with disk_errors(self.staging):
                resumed = self._enter_staging()
                self.journal = Journal(self.staging)
            if resumed:
                self._verify()
        except BaseException:
            self._held.close()
            if self._made:
                with contextlib.suppress(OSError, RunError):
                    self._discard()
            raise

    def _check_holder(self) -> None:
        """Refuse a folder that another process is writing, before anything in it is looked at."""
        if (self.staging / ".lock").exists():
            with disk_errors(self.staging), locked(self.staging, self.out):
                pass

    def _enter_staging(self) -> bool:
        """Make or take over the staging folder and hold it; whether it was there."""
        there = self.staging.exists() or self.staging.is_symlink()
        fresh = not there or self._check_recipe()
        if not there:
            self.staging.mkdir()
            self._made = True
        self._held.enter_context(locked(self.staging, self.out))
        if fresh:
            # at once or not at all: a kill leaves nothing that is taken for a recipe
            half = self.staging / ".recipe"
            half.write_text(json.dumps(self.recipe, indent=2) + "\n", "utf-8")
            sync(half)
            half.rename(self.staging / "recipe.json")
        return there

    @property
    def _replaced(self) -> Path:
        """Where the old OUT waits while the new one takes its place."""
        return self.staging / ".replaced"

    def _put_back(self) -> None:
        """Undo the first half of an exchange that was cut short."""
        if self._replaced.is_dir() and not self.staging.is_symlink() and not self.out.exists():
            with disk_errors(self.out):
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

    def _check_recipe(self) -> bool:
        """Raises InputError unless the staging folder is an unfinished run of this command; True
        where it was killed before its recipe was there."""
        problem = f"{self.staging} is in the way and is no unfinished run; move it away"
        if self.staging.is_symlink() or not self.staging.is_dir():
            raise InputError(problem)
        recipe = self.staging / "recipe.json"
        if not recipe.exists():
            if {path.name for path in self.staging.iterdir()} - {".lock", ".recipe"}:
                raise InputError(problem)
            return True
        try:
            recorded = json.loads(recipe.read_text("utf-8"))
        except (OSError, ValueError):
            raise InputError(problem) from None
        changed = differences(recorded, self.recipe)
        if changed:
            raise InputError(
                f"{self.staging} is the unfinished run of another command ({'; '.join(changed)}); "
                "run that one again, delete the folder or choose another OUT"
            )
        return False

    def _verify(self) -> None:
        """Compare every finished file with its checksum and remove what never was finished."""
        named = {"recipe.json", ".lock", ".replaced"}
        for record in self.journal.records:
            if "file" not in record or self.journal.last(file=record["file"]) is not record:
                continue
            file = self.staging / record["file"]
            if record["kind"] == "step" and record is not self._newest_step(record["piece"]):
                continue  # newer ones replaced it
            if record["kind"] != "shard" and self.done(record["piece"]) is not None:
                continue
            named.add(record["file"])
            with disk_errors(file):
                found = file_sha256(file) if file.is_file() else "nothing"
            if found != record["sha256"]:
                state = "is missing" if found == "nothing" else "does not have its checksum"
                raise InputError(
                    f"{file} of the unfinished run {state}; the finished work cannot be trusted: "
                    f"delete {self.staging} to begin again"
                )
        for entry in self.staging.iterdir():
            if entry.name not in named and not entry.name.startswith("journal-"):
                with disk_errors(entry):
                    entry.unlink()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._held:
            unfinished = error is not None and not self.worker and self.staging.is_dir()
            if unfinished and not self.journal.records:
                with contextlib.suppress(OSError, RunError):  # the first error counts
                    self._discard()
            elif unfinished:
                with contextlib.suppress(OSError, RunError):
                    self._put_back()

    def reload(self) -> None:
        """Read the journals again, for what other workers wrote."""
        self.journal = Journal(self.staging, self.worker)

    def done(self, piece: str) -> dict[str, Any] | None:
        """The record that `add_shard` was given for a finished piece; None while it is not."""
        return self.journal.last(kind="shard", piece=piece)

    def file_of(self, piece: str) -> Path:
        """Where the shard of a piece lies while OUT is unfinished."""
        number = self.pieces.index(piece) + 1
        return self.staging / f"model-{number:05d}-of-{len(self.pieces):05d}.safetensors"

    def add_shard(self, piece: str, entries: Iterable[Entry], **record: object) -> None:
        """Write the shard of one piece, flush it to disk and enter it into the journal."""
        self._write("shard", piece, self.file_of(piece), entries, record)

    def add_step(self, piece: str, step: int, entries: Iterable[Entry], **record: object) -> None:
        """Keep the state of a piece that is being worked on; the one before it is removed."""
        before = self._newest_step(piece)
        file = self.staging / f"step-{piece}-{step}.safetensors"
        self._write("step", piece, file, entries, {**record, "step": step})
        if before is not None and before["file"] != file.name:
            (self.staging / before["file"]).unlink(missing_ok=True)

    def add_gradients(self, piece: str, entries: Iterable[Entry]) -> None:
        """Keep what a piece's factors will be made with, until the piece is finished."""
        self._write("gradients", piece, self.gradients_of(piece), entries, {})

    def gradients_of(self, piece: str) -> Path:
        return self.staging / f"gradients-{piece}.safetensors"

    def note(self, kind: str, **record: object) -> None:
        """Enter something that is no file into the journal."""
        with disk_errors(self.staging):
            self.journal.append({"kind": kind, **record})

    def step_of(self, piece: str) -> dict[str, Any] | None:
        """The record of the last `add_step` of a piece that is not finished; its `file` is a name
        in `staging`."""
        return None if self.done(piece) else self._newest_step(piece)

    def _newest_step(self, piece: str) -> dict[str, Any] | None:
        """The furthest, whichever worker wrote it."""
        records = [
            r for r in self.journal.records if (r["kind"], r.get("piece")) == ("step", piece)
        ]
        return max(records, key=lambda record: record["step"], default=None)

    def _write(
        self,
        kind: str,
        piece: str,
        file: Path,
        entries: Iterable[Entry],
        record: Mapping[str, object],
    ) -> None:
        with disk_errors(file):
            digest = write_shard(file, entries)
            sync(self.staging)
            entry = {"kind": kind, "piece": piece, "file": file.name, "sha256": digest}
            self.journal.append({**record, **entry})
        if kind == "shard":
            for old in self.staging.glob(f"step-{piece}-*.safetensors"):
                old.unlink()
            self.gradients_of(piece).unlink(missing_ok=True)

    @property
    def headers(self) -> dict[str, TensorHeader]:
        """Every tensor written so far."""
        found: dict[str, TensorHeader] = {}
        for piece in self.pieces:
            if self.done(piece):
                found.update(read_shard_headers(self.file_of(piece)))
        return found

    def _write_json(self, name: str, value: object) -> None:
        with disk_errors(self.staging / name):
            (self.staging / name).write_text(json.dumps(value, indent=2) + "\n", "utf-8")

    def finish(
        self,
        config: Mapping[str, object],
        *,
        report: Mapping[str, object],
        model_card: str,
        copies: Iterable[Path] = (),
    ) -> None:
        """Write the JSON files and the card, copy `copies`, and put OUT in place."""
        headers = self.headers
        total = sum(header.num_bytes for header in headers.values())
        with disk_errors(self.staging):
            for file in copies:
                shutil.copyfile(file, self.staging / file.name)
            (self.staging / "README.md").write_text(model_card, "utf-8")
        weight_map = {name: headers[name].file.name for name in sorted(headers)}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        self._write_json("model.safetensors.index.json", index)
        self._write_json("report.json", report)
        self._write_json("config.json", config)
        with disk_errors(self.out):
            for file in self.staging.iterdir():
                sync(file)
            sync(self.staging)
            self._put_in_place()

    def _put_in_place(self) -> None:
        try:
            if self.out.exists():
                self.out.rename(self._replaced)
            self.staging.rename(self.out)
        except BaseException:
            self._put_back()
            raise
        sync(self.out.parent)
        shutil.rmtree(self.out / self._replaced.name, ignore_errors=True)
        for file in (*self.out.glob("journal-*.jsonl"), self.out / ".lock"):
            file.unlink(missing_ok=True)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two JSON documents, one short text each, five at most."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        parts = [differences(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in keys]
        return [text for part in parts for text in part][:5]
    return [] if old == new else [f"{path} was {json.dumps(old)}, is {json.dumps(new)}"]


def check_space(out: Path, needed_bytes: int) -> None:
    """Raises RunError when the disk of OUT has less than `needed_bytes` free."""
    free = shutil.disk_usage(out.parent).free
    if free < needed_bytes:
        gib = 2**30
        raise RunError(
            f"the disk of {out} has {free / gib:.2f} GiB free, the result needs "
            f"{needed_bytes / gib:.2f} GiB; free space or choose another OUT"
        )
