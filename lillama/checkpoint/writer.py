"""Write a checkpoint shard by shard, so that an interrupted run can be taken up."""

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lillama.checkpoint.folder import FolderWriter, differences, disk_errors, staging_of, sync
from lillama.checkpoint.format import TensorHeader, read_shard_headers
from lillama.checkpoint.journal import Journal
from lillama.checkpoint.shard_file import Entry, file_sha256, write_shard
from lillama.errors import InputError, RunError

__all__ = ["CheckpointWriter", "check_space"]


class CheckpointWriter:
    """Writes the checkpoint OUT shard by shard, and takes up what an interrupted run finished.

    Files go to a `FolderWriter`'s staging folder, are flushed to disk and entered into its journal
    with their checksums; `finish` puts it in place. What a run leaves unfinished, however it ended,
    is taken up by the same command (same recipe): `done` gives the shards that are there.

    Use as a context manager: leaving it by an exception keeps what is finished, and removes the
    folder where nothing is.

    Args:
        shards: names of the shards, in their order in the checkpoint.
        worker: 0 for the process that owns the folder; others only add shards to it, after it was
            made.
        folder: where OUT was claimed before; otherwise it is claimed here, with the recipe's
            command and options.

    Raises (on construction):
        InputError: see `FolderWriter`; another command's unfinished run is in the way, or the
            journal or a finished shard is damaged.
        RunError: the disk is full.
    """

    def __init__(
        self,
        out: Path,
        recipe: Mapping[str, object],
        shards: Sequence[str],
        *,
        overwrite: bool = False,
        worker: int = 0,
        folder: FolderWriter | None = None,
    ) -> None:
        self.recipe = json.loads(json.dumps(recipe))
        self.shards = list(shards)
        self.worker = worker
        self._owned = contextlib.ExitStack()
        self.folder = folder
        if worker:
            self.staging = staging_of(out)
            self.journal = Journal(self.staging, worker)
            return
        if self.folder is None:
            claim = {key: recipe[key] for key in ("command", "options") if key in recipe}
            self.folder = FolderWriter(out, claim, overwrite=overwrite, resumes=True)
            self._owned.enter_context(self.folder)
        self.staging = self.folder.staging
        try:
            with disk_errors(self.staging):
                self._take_up()
                self.journal = Journal(self.staging)
            self._verify()
        except BaseException:
            self._owned.close()
            raise

    def _take_up(self) -> None:
        """Raises InputError unless the staging folder is new, or an unfinished run of this very
        recipe."""
        recipe = self.staging / "recipe.json"
        if recipe.exists() or any(self.staging.glob("journal-*")):
            try:
                changed = differences(json.loads(recipe.read_text("utf-8")), self.recipe)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"{recipe} of the unfinished run cannot be read; the finished work cannot be "
                    f"trusted: delete {self.staging} to begin again"
                ) from error
            if changed:
                raise InputError(
                    f"{self.staging} is the unfinished run of another command "
                    f"({'; '.join(changed)}); run that one again, delete the folder or choose "
                    "another OUT"
                )
            return
        # at once or not at all: a kill leaves nothing that is taken for a recipe
        half = self.staging / ".recipe"
        half.write_text(json.dumps(self.recipe, indent=2) + "\n", "utf-8")
        sync(half)
        half.rename(recipe)

    def _verify(self) -> None:
        """Compare every finished file with its checksum and remove what never was finished."""
        named = {"recipe.json"}
        for record in self.journal.records:
            if "file" not in record or self.journal.last(file=record["file"]) is not record:
                continue
            file = self.staging / record["file"]
            if record["kind"] == "step" and record is not self._newest_step(record["shard"]):
                continue  # newer ones replaced it
            if record["kind"] != "shard" and self.done(record["shard"]) is not None:
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
            is_ours = entry.name.startswith(("journal-", "."))
            if entry.name not in named and not is_ours:
                with disk_errors(entry):
                    entry.unlink()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.folder is not None:
            # of any process
            journals = self.staging.glob("journal-*.jsonl")
            self.folder.keeps = any(file.stat().st_size for file in journals)
        self._owned.__exit__(None, None, None)

    def reload(self) -> None:
        """Read the journals again, for what other workers wrote."""
        self.journal = Journal(self.staging, self.worker)

    def done(self, shard: str) -> dict[str, Any] | None:
        """The record that `add_shard` was given for a finished shard; None while it is not."""
        return self.journal.last(kind="shard", shard=shard)

    def file_of(self, shard: str) -> Path:
        """Where the shard of a shard lies while OUT is unfinished."""
        number = self.shards.index(shard) + 1
        return self.staging / f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"

    def add_shard(self, shard: str, entries: Iterable[Entry], **record: object) -> None:
        """Write the shard of one shard, flush it to disk and enter it into the journal."""
        self._write("shard", shard, self.file_of(shard), entries, record)

    def add_step(self, shard: str, step: int, entries: Iterable[Entry], **record: object) -> None:
        """Keep the state of a shard that is being worked on; the one before it is removed."""
        before = self._newest_step(shard)
        file = self.staging / f"step-{shard}-{step}.safetensors"
        self._write("step", shard, file, entries, {**record, "step": step})
        if before is not None and before["file"] != file.name:
            (self.staging / before["file"]).unlink(missing_ok=True)

    def add_gradients(self, shard: str, entries: Iterable[Entry]) -> None:
        """Keep what a shard's factors will be made with, until the shard is finished."""
        self._write("gradients", shard, self.gradients_of(shard), entries, {})

    def gradients_of(self, shard: str) -> Path:
        return self.staging / f"gradients-{shard}.safetensors"

    def note(self, kind: str, **record: object) -> None:
        """Enter something that is no file into the journal."""
        with disk_errors(self.staging):
            self.journal.append({"kind": kind, **record})

    def step_of(self, shard: str) -> dict[str, Any] | None:
        """The record of the last `add_step` of a shard that is not finished; its `file` is a name
        in `staging`."""
        return None if self.done(shard) else self._newest_step(shard)

    def _newest_step(self, shard: str) -> dict[str, Any] | None:
        """The furthest, whichever worker wrote it."""
        records = [
            r for r in self.journal.records if (r["kind"], r.get("shard")) == ("step", shard)
        ]
        return max(records, key=lambda record: record["step"], default=None)

    def _write(
        self,
        kind: str,
        shard: str,
        file: Path,
        entries: Iterable[Entry],
        record: Mapping[str, object],
    ) -> None:
        with disk_errors(file):
            digest = write_shard(file, entries)
            sync(self.staging)
            entry = {"kind": kind, "shard": shard, "file": file.name, "sha256": digest}
            self.journal.append({**record, **entry})
        if kind == "shard":
            for old in self.staging.glob(f"step-{shard}-*.safetensors"):
                old.unlink()
            self.gradients_of(shard).unlink(missing_ok=True)

    @property
    def headers(self) -> dict[str, TensorHeader]:
        """Every tensor written so far."""
        found: dict[str, TensorHeader] = {}
        for shard in self.shards:
            if self.done(shard):
                found.update(read_shard_headers(self.file_of(shard)))
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
        assert self.folder is not None
        self.folder.finish()


def check_space(out: Path, needed_bytes: int, what: str = "result", detail: str = "") -> None:
    """Raises RunError when the disk of OUT has less than the `needed_bytes` of `what` free."""
    free = shutil.disk_usage(out.parent).free
    if free < needed_bytes:
        gib = 2**30
        raise RunError(
            f"the disk of {out} has {free / gib:.2f} GiB free, the {what} needs "
            f"{needed_bytes / gib:.2f} GiB{detail}; free space or choose another OUT"
        )
