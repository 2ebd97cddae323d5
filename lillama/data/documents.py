"""Text, jsonl and chat files in, documents out.

A plain text file is read in pieces of about 64 KiB that end at line ends, so a large one is never
in memory whole. Where a document lies is told with it: `DocumentIndex` holds that in place of its
text.
"""

import itertools
import json
import os
import re
import stat
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lillama.errors import InputError

__all__ = [
    "Document",
    "DocumentIndex",
    "Place",
    "chat_of",
    "document_of",
    "read_documents",
    "samples",
]

_PIECE_BYTES = 64 * 1024
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class Place(NamedTuple):
    """The bytes of a file that are a document: its line `line`, or with 0 some plain text."""

    path: Path
    start: int
    num_bytes: int
    line: int = 0


@dataclass(frozen=True, slots=True)
class Document:
    """A jsonl row (where: FILE:LINE; text or messages) or a piece of a text file (where: FILE).
    place: where it can be read again; None for what comes once, as from a pipe or the network."""

    where: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    is_piece: bool = False
    place: Place | None = None


class DocumentIndex:
    """Documents by number, in the order they were added. Those with a place are not held but read
    again, so that there may be more of them than fit into memory."""

    def __init__(self, text_key: str = "text") -> None:
        self.text_key = text_key
        self._paths: list[Path] = []
        self._numbers: dict[Path, int] = {}
        self._held: list[Document] = []
        # four numbers each: path (or -1), start (or the place in `_held`), bytes, line
        self._places = array("q")

    def __len__(self) -> int:
        return len(self._places) // 4

    def add(self, document: Document) -> None:
        place = document.place
        if place is None:
            self._places.extend((-1, len(self._held), 0, 0))
            self._held.append(document)
        else:
            number = self._numbers.setdefault(place.path, len(self._paths))
            if number == len(self._paths):
                self._paths.append(place.path)
            self._places.extend((number, *place[1:]))

    def read(self, number: int) -> Document:
        """Document `number`.

        Raises:
            InputError: its file is not what it was.
        """
        file, start, num_bytes, line = self._places[4 * number : 4 * number + 4]
        if file < 0:
            return self._held[start]
        path = self._paths[file]
        try:
            with path.open("rb") as stream:
                stream.seek(start)
                raw = stream.read(num_bytes)
        except OSError as error:
            raise InputError(f"text file {path}: {error.strerror}; check the path") from error
        if len(raw) != num_bytes:
            raise InputError(f"text file {path} was changed while it was read; run again")
        text = _decode(raw, path, start)
        if line:
            return _row(text.strip(), f"{path}:{line}", self.text_key)
        return Document(str(path), text=text, is_piece=True)


def read_documents(path: Path | str, *, text_key: str = "text") -> Iterator[Document]:
    """Read a file lazily; a byte order mark is dropped, line ends stay as they are.

    `.jsonl`, `.json`: one JSON object a line, its text under `text_key`, or else a chat under
    `messages` or `conversations` (ShareGPT); rows without text are skipped. Any other suffix:
    plain UTF-8 text; the pieces joined are the file's text.

    Raises:
        InputError: file missing, a folder, without text, not UTF-8; a row that cannot be used.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"text file {path} is a folder; give the files in it one by one")
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"text file {path}: {error.strerror}; check the path") from error
    is_rows = path.suffix.lower() in (".jsonl", ".json")
    has_text = False
    with file:
        # a pipe cannot be read again
        has_places = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        for document in _rows(file, path, text_key) if is_rows else _pieces(file, path):
            if not has_places:
                document = replace(document, place=None)
            has_text = has_text or document.text is None or not document.text.isspace()
            yield document
    if not has_text:
        raise InputError(f"text file {path} is empty or only white space; give a file with text")


def samples(documents: Iterable[Document], max_chars: int) -> Iterator[Document]:
    """Rows as they are; plain text split at blank lines, whatever pieces it came in, of which no
    more is kept than `max_chars` need."""
    groups = itertools.groupby(documents, key=lambda d: (d.where, d.is_piece))
    for (where, is_piece), group in groups:
        yield from _paragraphs(where, group, max_chars) if is_piece else group


def _paragraphs(where: str, pieces: Iterable[Document], max_chars: int) -> Iterator[Document]:
    for is_blank, run in itertools.groupby(_lines(pieces), key=lambda line: line[0].isspace()):
        if is_blank:
            continue
        lines: list[str] = []
        place, num_chars, is_cut = None, 0, False
        for line, found in run:
            place = place if lines else found
            is_cut = num_chars >= max_chars
            lines += [] if is_cut else [line]
            num_chars += len(line)
        text = "".join(lines)
        text = text if is_cut else text.rstrip("\r\n")
        place = place and place._replace(num_bytes=len(text.encode()))
        yield Document(where, text=text, is_piece=True, place=place)


def _lines(pieces: Iterable[Document]) -> Iterator[tuple[str, Place | None]]:
    """Lines with their ends, of which a piece may hold a part, and where each begins."""
    for piece in pieces:
        text, place = piece.text or "", piece.place
        lines = re.findall(r"[^\n]*\n|[^\n]+", text)
        if place is None:
            yield from zip(lines, itertools.repeat(None))
            continue
        start = place.start + place.num_bytes - len(text.encode())  # behind a byte order mark
        for line in lines:
            yield line, place._replace(start=start)
            start += len(line.encode())


def _decode(raw: bytes, path: Path, offset: int) -> str:
    """UTF-8 to text; `raw` begins at byte `offset` of the file."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = f"byte 0x{raw[error.start]:02x} at offset {offset + error.start}"
        raise InputError(f"text file {path} is not UTF-8: {at}; convert it to UTF-8") from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _pieces(file: BinaryIO, path: Path) -> Iterator[Document]:
    buffer, offset = b"", 0
    while buffer := buffer + file.read(_PIECE_BYTES - len(buffer)):
        cut = len(buffer) if len(buffer) < _PIECE_BYTES else _cut(buffer)
        if text := _decode(buffer[:cut], path, offset):
            place = Place(path, offset, cut)
            yield Document(str(path), text=text, is_piece=True, place=place)
        buffer, offset = buffer[cut:], offset + cut


def _cut(buffer: bytes) -> int:
    """After the last line end, else before the last space, else between two characters."""
    line_end = buffer.rfind(b"\n") + 1
    space = buffer.rfind(b" ")
    if line_end or space > 0:
        return line_end or space
    cut = len(buffer) - 1
    # 0b10xxxxxx continues a character; a character has at most 4 bytes
    while cut > max(1, len(buffer) - 4) and buffer[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _rows(file: BinaryIO, path: Path, text_key: str) -> Iterator[Document]:
    offset = 0
    for number, raw in enumerate(file, start=1):
        line = _decode(raw, path, offset).strip()
        place = Place(path, offset, len(raw), number)
        offset += len(raw)
        if line:
            document = _row(line, f"{path}:{number}", text_key)
            if document.text is None or document.text.strip():
                yield replace(document, place=place)


def _row(line: str, where: str, text_key: str) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); give one JSON object per line") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} is a JSON {type(row).__name__}; give one JSON object per line")
    return document_of(row, where, text_key)


def document_of(row: dict[str, Any], where: str, text_key: str = "text") -> Document:
    """A row with its text under `text_key`, or else a chat under `messages` or `conversations`.

    Raises:
        InputError: it has none of them, or something else than a string or a chat there.
    """
    if text_key in row:
        return Document(where, text=_string(row[text_key], f"{where}: {text_key!r}"))
    for key in ("messages", "conversations"):
        if key in row:
            return Document(where, messages=chat_of(row[key], f"{where}: {key!r}", key))
    keys = ", ".join(repr(key) for key in row) or "none"
    raise InputError(
        f"{where} has no key {text_key!r}, its keys: {keys}; give {text_key!r} with a string, or "
        "'messages' or 'conversations' with a chat"
    )


def _string(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} must be a string, got {type(value).__name__}; repair the line")
    # JSON can spell "\ud800", which no UTF-8 text can hold
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{what} holds half a surrogate pair, no valid text; repair the line")
    return value


def chat_of(turns: Any, what: str, key: str) -> list[dict[str, Any]]:
    """Chat messages with role and content, from these or from ShareGPT's `conversations`."""
    is_list = isinstance(turns, list) and len(turns) > 0
    if not is_list or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"{what} must be a list of objects, not empty; got {str(turns)[:60]!r}")
    role_key, content_key = ("role", "content") if key == "messages" else ("from", "value")
    messages = []
    for turn in turns:
        role = _string(turn.get(role_key), f"{what}: {role_key!r}")
        content = _string(turn.get(content_key), f"{what}: {content_key!r}")
        if key == "conversations":
            if role not in _SHAREGPT_ROLES:
                raise InputError(f"{what}: 'from' must be human, gpt or system, got {role!r}")
            turn = {"role": _SHAREGPT_ROLES[role], "content": content}
        messages.append(turn)
    return messages
