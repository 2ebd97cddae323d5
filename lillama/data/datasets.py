"""Calibration text from datasets of the Hugging Face Hub, streamed: `--text hf:NAME` and presets.

    hf:NAME[@REVISION][:CONFIG[:SPLIT]][#FIELD]
    PRESET[@REVISION]

Which rows are read is fixed by the dataset's commit, the seed and the version of `datasets`: its
seeded shuffle puts the files in another order and draws rows from a buffer of SHUFFLE_BUFFER. Needs
lillama[data].
"""

import dataclasses
import importlib.metadata
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from lillama.data.documents import Document, chat_of, document_of
from lillama.errors import InputError
from lillama.models.hub import hub_errors

__all__ = ["SHUFFLE_BUFFER", "TEXT_PRESETS", "HubText", "find_texts", "recorded_texts"]

SHUFFLE_BUFFER = 10_000
_PIECE_CHARS = 64 * 1024
_FORM = "hf:NAME[@REVISION][:CONFIG[:SPLIT]][#FIELD]"
_SOURCE = re.compile(
    r"hf:(?P<dataset>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^:#@]+))?"
    r"(:(?P<config>[^:#@]*))?(:(?P<split>[^:#@]*))?(#(?P<field>[^#]+))?"
)
_CHATS = ("messages", "conversations")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubText:
    """A split of a dataset. `str()` is what `--text` takes, with the commit once it is known.

    config: None is the dataset's own default. field: None is text, messages or conversations, as in
    a jsonl row. is_running: rows are lines of one text, in their order; read whole, so a small one.
    eval_split: for measuring; None where that would be too long or there is none.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    field: str | None = None
    revision: str | None = None
    preset: str | None = None
    is_running: bool = False
    eval_split: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        if self.preset is not None:
            return self.preset + revision
        field = f"#{self.field}" if self.field else ""
        return f"hf:{self.dataset}{revision}:{self.config or ''}:{self.split}{field}"

    def recorded(self) -> dict[str, Any]:
        """For recipe.json: everything that decides which rows are read, but for the seed."""
        return {
            "text": str(self),
            "id": self.dataset,
            "revision": self.revision,
            "config": self.config,
            "split": self.split,
            "field": self.field,
            "shuffle_buffer": None if self.is_running else SHUFFLE_BUFFER,
        }

    def pinned(self) -> "HubText":
        """At the commit that its revision is now.

        Raises:
            InputError: lillama[data] is missing, here and not after a model was downloaded; or, as
            RunError, see `lillama.models.hub.hub_errors`.
        """
        self._package()
        if self.revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return self
        with hub_errors(self.dataset, self.revision, "dataset"):
            info = huggingface_hub.dataset_info(self.dataset, revision=self.revision)
        return dataclasses.replace(self, revision=info.sha)

    def documents(self, seed: int | None = None) -> Iterator[Document]:
        """Rows as they stream in, those without text left out.

        Args:
            seed: of the order; None is the dataset's own.

        Raises:
            InputError: no such config, split or field, or a row that cannot be used. RunError: the
            network failed.
        """
        stream = self._open()
        if self.is_running:
            pieces = list(self._pieces(stream))
            if seed is not None:
                random.Random(seed).shuffle(pieces)
            yield from pieces
            return
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        found = False
        for number, row in enumerate(self._rows(stream), start=1):
            document = self._document(row, number)
            if document is not None:
                found = True
                yield document
        if not found:
            raise InputError(f"--text {self} has no row with text; name another #FIELD or split")

    def _package(self) -> Any:
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError(
                f"--text {self} needs a package that is not installed (datasets); pip install "
                "'lillama[data]'"
            ) from error
        return datasets

    def _open(self) -> Any:
        datasets = self._package()
        with hub_errors(self.dataset, self.revision, "dataset"):
            try:
                return datasets.load_dataset(
                    self.dataset,
                    self.config,
                    split=self.split,
                    streaming=True,
                    revision=self.revision,
                )
            # what it says of a config or split that there is not, with those that there are
            except (ValueError, FileNotFoundError) as error:
                why = " ".join(str(error).split())[:400]
                raise InputError(f"--text {self} cannot be opened: {why}; give {_FORM}") from error

    def _rows(self, stream: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        # the errors of whoever uses the rows do not pass here
        rows = iter(stream)
        while True:
            with hub_errors(self.dataset, self.revision, "dataset"):
                row = next(rows, None)
            if row is None:
                return
            yield row

    def _value(self, row: dict[str, Any]) -> tuple[str, Any]:
        """The field that is read, and what is in it."""
        names = ("text", *_CHATS) if self.field is None else (self.field,)
        name = next((name for name in names if name in row), None)
        if name is None:
            raise InputError(
                f"--text {self}: a row has no {' or '.join(map(repr, names))}, its fields: "
                f"{', '.join(map(repr, row)) or 'none'}; name one at the end: #FIELD"
            )
        return name, row[name]

    def _document(self, row: dict[str, Any], number: int) -> Document | None:
        name, value = self._value(row)
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            return None
        where = f"{self}, row {number}"
        if isinstance(value, list) and name not in _CHATS:
            is_sharegpt = isinstance(value[0], dict) and "from" in value[0]
            key = _CHATS[is_sharegpt]
            return Document(where, messages=chat_of(value, f"{where}: {name!r}", key))
        return document_of({name: value}, where, name if isinstance(value, str) else "text")

    def _pieces(self, stream: Iterable[dict[str, Any]]) -> Iterator[Document]:
        """Rows joined to the text that they were cut from, in pieces that end at row ends."""
        lines: list[str] = []
        size = 0
        for row in self._rows(stream):
            line = str(self._value(row)[1] or "").rstrip("\n") + "\n"
            lines.append(line)
            size += len(line)
            if size >= _PIECE_CHARS:
                yield Document(str(self), text="".join(lines), is_piece=True)
                lines, size = [], 0
        if lines:
            yield Document(str(self), text="".join(lines), is_piece=True)


TEXT_PRESETS = {
    "wikitext2": HubText(
        preset="wikitext2",
        dataset="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        field="text",
        is_running=True,
        eval_split="test",
    ),
    "c4": HubText(preset="c4", dataset="allenai/c4", config="en", field="text"),
    "slimorca": HubText(preset="slimorca", dataset="Open-Orca/SlimOrca", field="conversations"),
    "ultrachat": HubText(
        preset="ultrachat",
        dataset="HuggingFaceH4/ultrachat_200k",
        split="train_sft",
        field="messages",
        eval_split="test_sft",
    ),
}


def find_texts(
    texts: str | Path | Iterable[str | Path], *, evaluation: bool = False
) -> tuple[Path | HubText, ...]:
    """What `--text` names: files, or datasets of the Hub at their commits.

    Args:
        texts: one or several. A file that is there wins over a preset of its name.
        evaluation: a preset is its split for measuring.

    Raises:
        InputError: not of the form, no such dataset or revision. RunError: no network.
    """
    given = [texts] if isinstance(texts, str | Path) else list(texts)
    return tuple(_find_text(str(text), evaluation) for text in given)


def _find_text(text: str, evaluation: bool) -> Path | HubText:
    path = Path(text)
    name, _, revision = text.partition("@")
    if path.exists():
        return path
    if name in TEXT_PRESETS:
        found = TEXT_PRESETS[name]
        if evaluation:
            if found.eval_split is None:
                raise InputError(
                    f"--text {name} is for calibration: all of it would be read; give a file or a "
                    f"smaller split ({_FORM})"
                )
            found = dataclasses.replace(found, split=found.eval_split)
        return dataclasses.replace(found, revision=revision or None).pinned()
    if not text.startswith("hf:"):
        return path
    match = _SOURCE.fullmatch(text)
    if match is None:
        raise InputError(f"--text {text} is not of the form {_FORM}")
    values: dict[str, Any] = {key: value for key, value in match.groupdict().items() if value}
    return HubText(**values).pinned()


def recorded_texts(texts: Iterable[Path | HubText]) -> dict[str, Any]:
    """What a recipe adds for datasets of the Hub; nothing where there is none."""
    found = [text.recorded() for text in texts if isinstance(text, HubText)]
    if not found:
        return {}
    return {"datasets": found, "datasets_version": importlib.metadata.version("datasets")}
