"""The one writer of folders and files: at any moment the old one or the whole new one is there.

Who writes OUT claims it first, before any other work: `OUT.unfinished` beside it is made, locked
and marked with the command. All is written there, flushed to the disk, and takes the place of OUT
by a rename. What another command left unfinished is refused and never touched.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lillama.checkpoint.format import QUANT_METHOD
from lillama.checkpoint.journal import LOCK, locked
from lillama.errors import InputError, RunError

__all__ = [
    "Claim",
    "FolderWriter",
    "check_out",
    "differences",
    "disk_errors",
    "recover",
    "staging_of",
    "sync",
    "whole_file",
]

# In the staging folder: whose it is, the same half written, and where the old OUT waits while the
# new one takes its place
CLAIM, HALF, REPLACED = ".claim", ".claim-half", ".replaced"
_MARKS = {CLAIM, HALF, LOCK}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Tell what the disk refused, while `path` is written, as RunError."""
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


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two JSON documents, one short text each, five at most."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        parts = [differences(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in keys]
        return [text for part in parts for text in part][:5]
    return [] if old == new else [f"{path} was {json.dumps(old)}, is {json.dumps(new)}"]


def _is_ours(path: Path) -> bool:
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        return config["quantization_config"]["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_out(out: Path, overwrite: bool | None) -> None:
    """Raises InputError where OUT exists and may not be replaced; `overwrite` is None where the
    command has no such option."""
    if out.exists() or out.is_symlink():
        if not overwrite:
            option = "" if overwrite is None else " or pass --overwrite"
            raise InputError(f"{out} exists; choose another OUT{option}")
        empty = out.is_dir() and not any(out.iterdir())
        if out.is_symlink() or not (empty or _is_ours(out)):
            raise InputError(
                f"{out} is not a model compressed by lillama; --overwrite does not replace it"
            )


def _check_place(out: Path) -> None:
    if out.name in ("", ".."):
        raise InputError(f"{out} is not the name of a new folder; choose another OUT")
    if not out.parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist; create it first")


def staging_of(out: Path) -> Path:
    return out.with_name(out.name + ".unfinished")


def _put_back(out: Path) -> None:
    """Undo the first half of an exchange."""
    replaced = staging_of(out) / REPLACED
    if replaced.is_dir() and not out.exists():
        replaced.rename(out)


def _clean(out: Path) -> None:
    """Remove what only an unfinished run needs, the mark last: what a kill leaves is cleaned up by
    `recover`."""
    shutil.rmtree(out / REPLACED, ignore_errors=True)
    for file in (*out.glob("journal-*.jsonl"), out / LOCK, out / CLAIM):
        file.unlink(missing_ok=True)


def recover(out: Path) -> None:
    """Put the old OUT back, or tidy the new one up, where a kill cut the exchange of both short;
    every command does so first. Nothing is done while another process is at it."""
    if out.name in ("", ".."):
        return
    for folder, end in ((staging_of(out), _put_back), (out, _clean)):
        if (folder / CLAIM).is_file() and not folder.is_symlink():
            with contextlib.suppress(OSError, InputError), locked(folder, out):
                end(out)


class Claim:
    """`staging`, the folder `OUT.unfinished`, held by this process alone until the context is left.

    Unless `keeps` says so, it is removed then. A kill leaves it over, and the same command takes it
    up: with what is in it where it `resumes`, empty otherwise.

    Args:
        claim: whose it is, JSON: "command", and with `resumes` what else must be the same to go on
            from there.

    Raises (on construction):
        InputError: OUT has no name or its parent is missing, another run is writing it, or another
            command's unfinished run or something else is at the staging folder's name; nothing of
            these is touched.
        RunError: the disk is full.
    """

    def __init__(self, out: Path, claim: Mapping[str, object], *, resumes: bool = False) -> None:
        _check_place(out)
        self.out, self.staging = out, staging_of(out)
        self.claim = json.loads(json.dumps(claim))
        self.keeps = False
        self._held = contextlib.ExitStack()
        self._is_held = False
        try:
            with disk_errors(self.staging):
                self._enter(resumes)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def _enter(self, resumes: bool) -> None:
        if self._is_marked():
            with locked(self.staging, self.out):  # the reason to refuse it that comes first
                pass
        self._check_claim()
        self.staging.mkdir(exist_ok=True)
        self._held.enter_context(locked(self.staging, self.out))
        self._check_claim()  # nobody else can change it now
        self._is_held = True
        _put_back(self.out)
        if (self.staging / REPLACED).exists():
            self.keeps = True
            raise InputError(
                f"{self.staging / REPLACED} is what {self.out} was before it was replaced, and "
                f"{self.out} exists again; move one of the two away"
            )
        old = [path for path in self.staging.iterdir() if path.name not in _MARKS]
        self.keeps = resumes and bool(old)
        if not resumes:
            self._remove(old)
        if not (self.staging / CLAIM).exists():
            # at once or not at all: a kill leaves nothing that is taken for another's
            (self.staging / HALF).write_text(json.dumps(self.claim, indent=2) + "\n", "utf-8")
            sync(self.staging / HALF)
            (self.staging / HALF).rename(self.staging / CLAIM)

    def _is_marked(self) -> bool:
        """Whether the staging folder was made here, by whichever command: perhaps killed before it
        had written its claim."""
        if self.staging.is_symlink() or not self.staging.is_dir():
            return False
        names = {path.name for path in self.staging.iterdir()}
        return CLAIM in names or (LOCK in names and names <= _MARKS)

    def _check_claim(self) -> None:
        staging = self.staging
        problem = f"{staging} is in the way and is no unfinished run; move it away"
        if not staging.exists() and not staging.is_symlink():
            return
        if not self._is_marked():
            if staging.is_symlink() or not staging.is_dir() or any(staging.iterdir()):
                raise InputError(problem)
            return
        if not (staging / CLAIM).exists():
            return
        try:
            recorded = json.loads((staging / CLAIM).read_text("utf-8"))
            command = recorded.get("command")
        except (OSError, ValueError, AttributeError):
            raise InputError(problem) from None
        # of another command, its options say nothing
        changed = differences({"command": command}, {"command": self.claim.get("command")})
        changed = changed or differences(recorded, self.claim)
        if changed:
            raise InputError(
                f"{staging} is the unfinished run of another command ({'; '.join(changed)}); "
                "run that one again, delete the folder or choose another OUT"
            )

    @staticmethod
    def _remove(entries: list[Path]) -> None:
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _discard(self) -> None:
        # the claim goes last: what a kill leaves over is still known to be ours
        self._remove([path for path in self.staging.iterdir() if path.name not in _MARKS])
        shutil.rmtree(self.staging)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._held:
            held, self._is_held = self._is_held, False
            if held:
                with contextlib.suppress(OSError):  # the first error counts
                    _put_back(self.out)
                    if not self.keeps and not (self.staging / REPLACED).exists():
                        self._discard()


class FolderWriter(Claim):
    """A folder that is written whole: fill `staging`, then call `finish`.

    While a new OUT takes the place of an old one, the old one waits inside the staging folder: a
    kill at that moment loses nothing, the next command puts it back (`recover`).

    Args:
        overwrite: whether an OUT that lillama compressed may be replaced; see `check_out`.

    Raises (on construction):
        InputError, RunError: as `Claim`; OUT exists and may not be replaced.
    """

    def __init__(
        self,
        out: Path,
        claim: Mapping[str, object],
        *,
        overwrite: bool | None = False,
        resumes: bool = False,
    ) -> None:
        self.overwrite = overwrite
        _check_place(out)
        recover(out)
        check_out(out, overwrite)
        super().__init__(out, claim, resumes=resumes)

    def __enter__(self) -> "FolderWriter":
        return self

    def finish(self) -> None:
        """Flush everything to the disk and put the folder in the place of OUT.

        Raises:
            InputError: something that may not be replaced has come to OUT meanwhile. RunError: the
            disk is full or fails.
        """
        with disk_errors(self.out):
            for path in (*self.staging.rglob("*"), self.staging):
                sync(path)
            check_out(self.out, self.overwrite)
            try:
                if self.out.exists():
                    self.out.rename(self.staging / REPLACED)
                self.staging.rename(self.out)
            except BaseException:
                _put_back(self.out)
                raise
            self._is_held = False
            sync(self.out.parent)
            _clean(self.out)


@contextlib.contextmanager
def whole_file(out: Path, command: str, *, overwrite: bool = False) -> Iterator[Path]:
    """Claim OUT, a file; the context writes all of it at the path given, and it appears at the end.

    Raises:
        InputError: OUT exists and may not be replaced, or as `Claim`. RunError: the disk is full or
        fails.
    """

    def check() -> None:
        if not overwrite and (out.exists() or out.is_symlink()):
            raise InputError(f"{out} exists; choose another file")

    check()
    with Claim(out, {"command": command}) as claim:
        part = claim.staging / out.name
        yield part
        check()
        with disk_errors(out):
            sync(part)
            part.replace(out)
            sync(out.parent)
