"""Documents in, blocks of token ids out.

The one thing to know: a plain text file comes in pieces of about 64 KiB that are tokenised one by
one, so a seeded sample comes from all over a large file without tokenising the whole of it. Of the
text only where it lies is held: what the sample needs is read again. The same texts, tokenizer and
seed give the same blocks on every machine.
Letters: n blocks, T = seq_len.
"""

import dataclasses
import hashlib
import itertools
import logging
import math
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lillama.data.datasets import HubText
from lillama.data.documents import Document, DocumentIndex, read_documents, samples
from lillama.errors import InputError

__all__ = [
    "Document",
    "EvaluationText",
    "TokenBlocks",
    "calibration_blocks",
    "evaluation_blocks",
    "held_out_blocks",
    "read_documents",
]

logger = logging.getLogger(__name__)

_Texts = Sequence[Path | str | HubText]
# Documents per tokenizer call: enough to keep its threads busy, few enough to stop early.
_BATCH_SIZE = 16
# A padded sample keeps seq_len tokens; text beyond this length per token is not even tokenised.
_MAX_CHARS_PER_TOKEN = 128


@dataclass(frozen=True, slots=True, eq=False)
class TokenBlocks:
    """input_ids: [n, T], int64. mask: [n, T], bool, True = real token; None when all are real."""

    input_ids: Tensor
    mask: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, T)"""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    def joined(self, other: "TokenBlocks") -> "TokenBlocks":
        """These rows, then those of `other`, which are as long."""
        parts, mask = (self, other), None
        if self.mask is not None or other.mask is not None:
            whole = (torch.ones_like(p.input_ids, dtype=torch.bool) for p in parts)
            pairs = zip(parts, whole, strict=True)
            mask = torch.cat([w if p.mask is None else p.mask for p, w in pairs])
        return TokenBlocks(torch.cat([part.input_ids for part in parts]), mask)

    @property
    def num_tokens(self) -> int:
        """Real tokens; padding is not counted."""
        return self.input_ids.numel() if self.mask is None else int(self.mask.sum())

    @property
    def sha256(self) -> str:
        """Hex digest of shape, ids and mask; the same on every machine."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        digest.update(self.input_ids.cpu().numpy().astype("<i8").tobytes())
        if self.mask is not None:
            digest.update(self.mask.cpu().numpy().astype("|u1").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationText:
    """All the text, in order.

    input_ids: [n, T], int64; n may be 0.
    tail: [1, t], int64, 2 <= t < T, what follows the last full block; None if that is 0 or 1 token.
    num_bytes: UTF-8 bytes of the text. num_tokens: all tokens, also a last one in no block.
    """

    input_ids: Tensor
    tail: Tensor | None
    num_bytes: int
    num_tokens: int


def _all_documents(
    paths: _Texts,
    tokenizer: Any,
    read_hub: Callable[[HubText], Iterator[Document]],
) -> Iterator[Document]:
    # the same text twice would put held-out text among the training text
    names = {str(path) if isinstance(path, HubText) else Path(path).resolve() for path in paths}
    if len(names) < len(paths):
        raise InputError(f"a text file is given twice: {', '.join(map(str, paths))}; give it once")
    is_told = bool(tokenizer.chat_template)
    for path in paths:
        is_hub = isinstance(path, HubText)
        for document in read_hub(path) if is_hub else read_documents(path):
            if document.messages is not None and not is_told:
                is_told = True
                logger.warning(
                    "%s is a chat, but the tokenizer has no chat template: messages are joined by "
                    "empty lines, without roles (an instruct model's tokenizer has a template)",
                    document.where,
                )
            yield document


def _enough(
    documents: Iterable[Document], tokenizer: Any, tokens: float, longest: float
) -> Iterator[Document]:
    """The first documents that hold so many tokens, each counted up to `longest`; a stream of the
    Hub may have no end. No more of their text is kept than counts."""
    found = 0.0
    # as the blocks are made: longer text is cut
    chars = None if longest == math.inf else int(longest) * _MAX_CHARS_PER_TOKEN
    for document, text, row in _encoded(documents, tokenizer, special=False, max_chars=chars):
        is_chat = document.messages is not None
        yield document if is_chat else dataclasses.replace(document, text=text)
        found += min(len(row), longest) if len(row) >= 2 else 0
        if found >= tokens:
            return


def _render(document: Document, tokenizer: Any) -> str:
    if document.messages is None:
        return document.text or ""
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in document.messages)
    try:
        return str(tokenizer.apply_chat_template(document.messages, tokenize=False))
    except Exception as error:  # a template is a program: it can raise anything
        why = " ".join(str(error).split())
        raise InputError(f"{document.where}: the chat template refuses this row: {why}") from error


def _encode(texts: list[str], tokenizer: Any, special: bool) -> list[list[int]]:
    # verbose=False: no warning about text longer than the model's context, it is cut later
    options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, **options)["input_ids"]


def _encoded(
    documents: Iterable[Document], tokenizer: Any, special: bool, max_chars: int | None = None
) -> Iterator[tuple[Document, str, list[int]]]:
    """Each document with its text and ids; tokenised in batches, as far as the caller iterates."""
    documents = iter(documents)
    while batch := list(itertools.islice(documents, _BATCH_SIZE)):
        texts = [_render(document, tokenizer)[:max_chars] for document in batch]
        yield from zip(batch, texts, _encode(texts, tokenizer, special), strict=True)


def _bos(tokenizer: Any) -> list[int]:
    """The ids the tokenizer puts before a text by itself: one or none."""
    plain, special = (_encode(["a"], tokenizer, special)[0] for special in (False, True))
    starts = range(len(special) - len(plain) + 1)
    return next((special[:i] for i in starts if special[i : i + len(plain)] == plain), [])


def _stream(documents: Iterable[Document], tokenizer: Any) -> Iterator[tuple[list[int], int]]:
    """Each document's ids, special tokens included, and the UTF-8 bytes of its text.

    eos stands between two documents unless both are plain text; bos before each row, and before
    plain text only at the start. What a chat template has written is not written again.
    """
    bos, eos = _bos(tokenizer), tokenizer.eos_token_id
    previous: Document | None = None
    last: int | None = None
    for document, text, row in _encoded(documents, tokenizer, special=False):
        ids: list[int] = []
        if row:
            is_boundary = previous and not (previous.is_piece and document.is_piece)
            if is_boundary and eos is not None and last != eos:
                ids.append(eos)
            if (previous is None or not document.is_piece) and row[: len(bos)] != bos:
                ids += bos
            ids += row
            previous, last = document, row[-1]
        yield ids, len(text.encode())


def held_out_blocks(tokens: int, seq_len: int) -> int:
    """Return how many sequences are kept for judging: a fortieth of those to calibrate on, 8 to
    32."""
    return min(32, max(8, -(-tokens // seq_len) // 40))


def calibration_blocks(
    paths: _Texts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seq_len: int,
    held_out_blocks: int,
    seed: int = 0,
    packing: bool = True,
) -> tuple[TokenBlocks, TokenBlocks]:
    """Draw (training, held-out) blocks, seeded, from all over the texts.

    Args:
        paths: files, or datasets of the Hub, of which no more is read than may be needed.
        tokens: training tokens; packed: ceil(tokens / T) blocks, padded: at least so many real.
        held_out_blocks: further blocks from all over the text, overlapping no training block.
        packing: one stream cut into blocks. Otherwise a block is a sample (a row, or a paragraph
            of plain text) of at least 2 tokens, cut at T or padded (pad token, else eos, else 0).

    Raises:
        InputError: a number out of range, an unusable file (`read_documents`), too little text.
    """
    _at_least("--tokens", tokens, 1)
    _at_least("--seq-len", seq_len, 2)
    _at_least("held_out_blocks", held_out_blocks, 0)

    def read_hub(text: HubText) -> Iterator[Document]:
        # padded, every sample counts up to seq_len, and the last of the training ones may run over
        spare, longest = (1, math.inf) if packing else (seq_len, seq_len)
        wanted = tokens + (held_out_blocks + 1) * seq_len + spare
        found = text.documents(seed)
        return found if text.is_running else _enough(found, tokenizer, wanted, longest)

    documents = _all_documents(paths, tokenizer, read_hub)
    index = DocumentIndex()
    for document in documents if packing else samples(documents, seq_len * _MAX_CHARS_PER_TOKEN):
        index.add(document)
    order = array("q", range(len(index)))
    random.Random(seed).shuffle(order)  # pyright: ignore[reportArgumentType]
    make = _packed if packing else _padded
    return make(map(index.read, order), tokenizer, tokens, seq_len, held_out_blocks)


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise InputError(f"{name} must be at least {minimum}, got {value}")


def _packed(
    documents: Iterable[Document], tokenizer: Any, tokens: int, seq_len: int, num_held_out: int
) -> tuple[TokenBlocks, TokenBlocks]:
    num_blocks = -(-tokens // seq_len) + num_held_out
    needed = num_blocks * seq_len
    stream = array("q")
    for ids, _ in _stream(documents, tokenizer):
        stream.extend(ids)
        if len(stream) >= needed:
            break
    else:
        raise InputError(
            f"the text is too short: {len(stream)} tokens, needed are {needed} ({num_blocks} "
            f"blocks of {seq_len}, {num_held_out} of them held out); "
            "lower --tokens or add --text files"
        )
    blocks = torch.frombuffer(stream, dtype=torch.int64)[:needed].view(num_blocks, seq_len)
    # neighbours come from one piece, so the held-out ones are spread evenly
    chosen = {(2 * i + 1) * num_blocks // (2 * num_held_out) for i in range(num_held_out)}
    is_held_out = torch.tensor([i in chosen for i in range(num_blocks)])
    return TokenBlocks(blocks[~is_held_out]), TokenBlocks(blocks[is_held_out])


def _padded(
    documents: Iterable[Document], tokenizer: Any, tokens: int, seq_len: int, num_held_out: int
) -> tuple[TokenBlocks, TokenBlocks]:
    bos = _bos(tokenizer)
    # samples come shuffled: the held-out ones, which follow the others, are from all over too
    train, held_out, num_real = list[list[int]](), list[list[int]](), 0
    for _, _, row in _encoded(documents, tokenizer, True, seq_len * _MAX_CHARS_PER_TOKEN):
        # a chat template may have written bos already
        is_doubled = bos and row[len(bos) : 2 * len(bos)] == bos
        row = row[len(bos) if is_doubled else 0 :][:seq_len]
        if len(row) >= 2:
            (train if num_real < tokens else held_out).append(row)
            num_real += len(row)
        if num_real >= tokens and len(held_out) == num_held_out:
            break
    else:
        raise InputError(
            f"the text is too short: {num_real} tokens in {len(train) + len(held_out)} samples of "
            f"at most {seq_len}, needed are {tokens} to train and {num_held_out} samples held out; "
            "lower --tokens, add --text files or use packing"
        )
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return _pad(train, seq_len, pad), _pad(held_out, seq_len, pad)


def _pad(rows: list[list[int]], seq_len: int, pad: int) -> TokenBlocks:
    """Rows of at most seq_len ids, filled up with `pad`."""
    mask = torch.arange(seq_len) < torch.tensor([len(row) for row in rows]).view(-1, 1)
    ids = torch.full(mask.shape, pad)
    ids[mask] = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    return TokenBlocks(ids, None if bool(mask.all()) else mask)


def evaluation_blocks(
    paths: _Texts, tokenizer: PreTrainedTokenizerBase, *, seq_len: int
) -> EvaluationText:
    """Tokenise all the text in file order and cut it into blocks of seq_len and a tail.

    Raises:
        InputError: seq_len < 2, an unusable file (`read_documents`), fewer than 2 tokens.
    """
    _at_least("--seq-len", seq_len, 2)
    documents = _all_documents(paths, tokenizer, HubText.documents)
    stream, num_bytes = array("q"), 0
    for ids, size in _stream(documents, tokenizer):
        stream.extend(ids)
        num_bytes += size
    if len(stream) < 2:
        raise InputError(f"the text has {len(stream)} tokens, needed are 2; add --text files")
    ids = torch.frombuffer(stream, dtype=torch.int64).clone()
    num_full = len(ids) // seq_len * seq_len
    tail = ids[num_full:].view(1, -1) if len(ids) - num_full >= 2 else None
    return EvaluationText(ids[:num_full].view(-1, seq_len), tail, num_bytes, len(ids))
