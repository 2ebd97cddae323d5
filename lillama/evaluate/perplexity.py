"""Text to what is scored of it, by each definition of perplexity that `lillama eval` knows.

blocks  all the text in order (data.py), in blocks of seq_len and a tail
rows    as GPTQ and SparseGPT prepare WikiText-2: the rows of the dataset joined by an empty line,
        tokenised in one piece, full blocks only
words   as task `wikitext` of lm-evaluation-harness: every page by itself, detokenised, each of its
        tokens scored once in windows of seq_len; the loss is divided by the words (and bytes) of
        the page as it was before

Sources: datautils.py of github.com/IST-DASLab/gptq; lm_eval/tasks/wikitext and
get_rolling_token_windows of lm-eval 0.4.13; how the file is cut into pages:
huggingface.co/datasets/EleutherAI/wikitext_document_level.
Letters: b windows, T inputs of each.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lillama.config_eval import Metric
from lillama.data import evaluation_blocks, read_documents
from lillama.errors import InputError

__all__ = ["ScoredBatch", "ScoredText", "detokenized", "pages_of", "scored_text"]

# WikiText keeps the spaces that its tokeniser put in; these rules take them out, in this order
_LITERAL_FIRST = (("s '", "s'"),)
_PATTERNS_FIRST = ((r"/' [0-9]/", r"/'[0-9]/"),)
_LITERALS = (
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_PATTERNS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_LITERALS_LAST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \u00b0 ", "\u00b0"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


@dataclass(frozen=True, slots=True, eq=False)
class ScoredBatch:
    """input_ids: [b, T], int64. targets: [b, t], int64, t = T or T - 1: what follows each of the
    first t inputs. scored: [b, t], bool; None when every target counts."""

    input_ids: Tensor
    targets: Tensor
    scored: Tensor | None = None

    def to(self, device: torch.device) -> "ScoredBatch":
        scored = None if self.scored is None else self.scored.to(device)
        return ScoredBatch(self.input_ids.to(device), self.targets.to(device), scored)


@dataclass(frozen=True, slots=True, eq=False)
class ScoredText:
    """batches: every token that counts, once.

    token_ids: [tokens], int64, the text in order, to take prompts from.
    num_words, num_bytes: what the losses of all scored tokens are shared among; words is None where
    the definition has none, num_bytes then belongs to `num_tokens` tokens.
    """

    batches: list[ScoredBatch]
    token_ids: Tensor
    num_tokens: int
    num_bytes: int
    num_words: int | None = None


def _joined(path: Path) -> str:
    return "".join(document.text or "" for document in read_documents(path))


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".json")


def _key_of(path: Path) -> str:
    """`page` where the first row has that and no `text`; read_documents judges the rest."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            row = json.loads(next((line for line in file if line.strip()), "{}"))
    except (OSError, ValueError):
        return "text"
    return "page" if isinstance(row, dict) and "page" in row and "text" not in row else "text"


def _row_texts(path: Path) -> list[str]:
    """The `text` or `page` of every row, also of those without a word, which read_documents leaves
    out."""
    key = _key_of(path)
    for document in read_documents(path, text_key=key):
        if document.text is None:
            raise InputError(
                f"{document.where} is a chat; --metric rows and words need rows with {key!r}"
            )
    lines = path.read_text("utf-8-sig").split("\n")
    return [json.loads(line)[key] for line in lines if line.strip()]


def _rows_of(path: Path) -> list[str]:
    """Rows as the hub's wikitext-2-raw-v1 has them: a line with its line end, or nothing."""
    if _is_jsonl(path):
        return _row_texts(path)
    lines = re.findall(r"[^\n]*\n|[^\n]+", _joined(path))
    return [line if line.strip() else "" for line in lines]


def _is_title(line: str) -> bool:
    """` = Robert Boulter = `, and not ` = = Career = = `."""
    line = line.strip()
    sides = line.startswith("= ") and line.endswith(" =") and len(line) > 2
    return sides and not line.startswith("= =") and not line.endswith("= =")


def pages_of(path: Path) -> list[str]:
    """The pages of WikiText: jsonl rows (`page` or `text`), or a text file cut at its titles."""
    if _is_jsonl(path):
        return [page for page in _row_texts(path) if page.strip()]
    pages: list[list[str]] = [[]]
    for line in _joined(path).split("\n"):
        if _is_title(line):
            pages.append([])
        pages[-1].append(line)
    return [page for lines in pages if (page := "\n".join(lines)).strip()]


def detokenized(page: str) -> str:
    """A page of WikiText as people write: no spaces before commas, no @-@."""
    for literals, patterns in ((_LITERAL_FIRST, _PATTERNS_FIRST), (_LITERALS, _PATTERNS)):
        for old, new in literals:
            page = page.replace(old, new)
        for pattern, new in patterns:
            page = re.sub(pattern, new, page)
    for old, new in _LITERALS_LAST:
        page = page.replace(old, new)
    return page


def _block_batches(blocks: Tensor, batch_size: int) -> list[ScoredBatch]:
    return [ScoredBatch(ids, ids[:, 1:]) for ids in blocks.split(batch_size) if len(ids)]


def _of_blocks(paths: Sequence[Path], tokenizer: Any, seq_len: int, batch_size: int) -> ScoredText:
    text = evaluation_blocks(paths, tokenizer, seq_len=seq_len)
    batches = _block_batches(text.input_ids, batch_size)
    parts = [text.input_ids.flatten()]
    if text.tail is not None:
        batches += _block_batches(text.tail, batch_size)
        parts.append(text.tail.flatten())
    return ScoredText(batches, torch.cat(parts), text.num_tokens, text.num_bytes)


def _of_rows(paths: Sequence[Path], tokenizer: Any, seq_len: int, batch_size: int) -> ScoredText:
    text = "\n\n".join(row for path in paths for row in _rows_of(path))
    # verbose=False: no warning about text longer than the model's context, it is cut here
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < seq_len:
        raise InputError(
            f"the text has {len(ids)} tokens, --metric rows needs full blocks of {seq_len}; lower "
            "--seq-len or add --text files"
        )
    blocks = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    batches = _block_batches(blocks, batch_size)
    return ScoredText(batches, blocks.flatten(), len(ids), len(text.encode()))


def _windows(ids: list[int], prefix: int, seq_len: int) -> Iterator[tuple[list[int], int]]:
    """(inputs and one more target, how many of its last tokens count). Every token counts once; the
    last window of a page reaches back, to have as much context as the others."""
    whole = [prefix, *ids]
    yield whole[: seq_len + 1], min(seq_len, len(ids))
    for start in range(seq_len, len(ids), seq_len):
        end = min(start + seq_len, len(ids))
        yield whole[end - seq_len : end + 1], end - start


def _of_words(paths: Sequence[Path], tokenizer: Any, seq_len: int, batch_size: int) -> ScoredText:
    prefix = tokenizer.bos_token_id
    prefix = tokenizer.eos_token_id if prefix is None else prefix
    if prefix is None:
        raise InputError(
            "--metric words starts each page with the tokenizer's bos or eos token, and this one "
            "has neither; use --metric blocks"
        )
    by_length: dict[int, list[tuple[list[int], int]]] = {}
    stream: list[int] = []
    num_words = num_bytes = 0
    for page in (page for path in paths for page in pages_of(path)):
        num_words += len(re.split(r"\s+", page))
        num_bytes += len(page.encode())
        ids = tokenizer(detokenized(page), verbose=False)["input_ids"]
        stream += ids
        # a page of no token has no window
        for window, count in _windows(ids, prefix, seq_len) if ids else ():
            by_length.setdefault(len(window), []).append((window, count))
    batches = []
    # no padding: windows of equal length go together
    for length in sorted(by_length, reverse=True):
        found = by_length[length]
        for start in range(0, len(found), batch_size):
            part = found[start : start + batch_size]
            ids = torch.tensor([window for window, _ in part])
            counts = torch.tensor([[count] for _, count in part])
            scored = torch.arange(length - 1) >= length - 1 - counts
            batches.append(
                ScoredBatch(ids[:, :-1], ids[:, 1:], None if bool(scored.all()) else scored)
            )
    return ScoredText(batches, torch.tensor(stream), len(stream), num_bytes, num_words)


_MAKERS = {"blocks": _of_blocks, "rows": _of_rows, "words": _of_words}


def scored_text(
    metric: Metric,
    # files, and for blocks also datasets of the Hub
    paths: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    batch_size: int,
) -> ScoredText:
    """All of the text, as the definition wants it scored.

    Raises:
        InputError: an unusable file (`read_documents`), or too little text.
    """
    found = _MAKERS[metric](paths, tokenizer, seq_len, batch_size)
    if not found.batches:
        raise InputError("the text has no token to predict; add --text files")
    return found
