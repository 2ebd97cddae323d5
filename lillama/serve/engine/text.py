"""Text from tokens as they come: whole characters only, and nothing of a stop string."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = ["TextStream"]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # how decoders show bytes that are no character yet
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class TextStream:
    """The text of one request, up to the first of the strings in `stop`; stopped: it was found.

    The joined pieces are tokenizer.decode(all ids, skip_special_tokens=True). (With byte fallback,
    a byte that belongs to no character makes that call spoil whole characters next to it; here they
    were given out and stay.) Only the ids since the last cut are decoded again for each token. A
    cut is where the text so far is whole and not empty: decoders drop the first token's leading
    space, so there must be text before the next one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        fast = isinstance(tokenizer, PreTrainedTokenizerFast)
        self._backend = tokenizer.backend_tokenizer if fast else None
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._cut = 0  # ids before it are context, their text was given out
        self._shown = ""  # the beginning of the text of _ids that was given out
        self.stopped = False
        self._held = ""  # whole characters that might begin a stop string

    def push(self, token_id: int) -> tuple[str, bool]:
        """Return the text that one more token adds, and whether a stop string ends it."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(_INCOMPLETE) and self._among_bytes(token_id):
            return "", False  # the next byte decides what the whole run of them is
        whole = text.removesuffix(_INCOMPLETE)
        piece = self._new(whole)
        self._shown = max(self._shown, whole, key=len)
        if whole == text:
            self._advance(text)
        return self._filtered(piece)

    def finish(self) -> tuple[str, bool]:
        """Return what was held back and is text after all, and whether a stop string ends it."""
        text, stopped = self._filtered(self._new(self._decode(self._ids)))
        text, self._held = text + self._held, ""
        return text, stopped

    def _decode(self, ids: list[int]) -> str:
        # cleaning up would take back a space that was given out
        if self._backend is not None:  # the same, 9x faster
            return str(self._backend.decode(ids, skip_special_tokens=True))
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(ids, **options))

    def _new(self, text: str) -> str:
        """Return what `text`, of all ids, adds to what was given out of it."""
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        if self._shown.startswith(text):
            return ""
        # a broken byte makes its decoder take back whole characters before it; they stay
        return self._decode(self._ids[self._cut :])

    def _among_bytes(self, token_id: int) -> bool:
        """Tell whether a token is one byte of a character, as <0xE2> in a vocabulary with byte
        fallback, or is not shown at all: special tokens do not end a run of bytes."""
        name = str(self._tokenizer.convert_ids_to_tokens(token_id))
        return bool(_BYTE_TOKEN.fullmatch(name)) or not self._decode([token_id])

    def _advance(self, text: str) -> None:
        """Forget the ids before the last cut, and cut here if what stays has text of its own."""
        rest = self._decode(self._ids[self._cut :]) if self._cut else ""
        if rest:
            self._ids, self._shown = self._ids[self._cut :], rest
        self._cut = len(self._ids) if text else 0

    def _filtered(self, piece: str) -> tuple[str, bool]:
        """Hold back what might begin a stop string; cut at the first one."""
        if not self._stop:
            return piece, False
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held, self.stopped = "", True
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self._stop)
        shown = text[: len(text) - keep]
        self._held = text[len(shown) :]
        return shown, False


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of `stop`, not all of it, that ends `text`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
