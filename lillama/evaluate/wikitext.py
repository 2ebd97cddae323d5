"""WikiText as tables of perplexity prepare it: rows as the Hub has them, pages as task `wikitext`
of lm-evaluation-harness cuts and detokenises them.

Sources: lm_eval/tasks/wikitext of lm-eval 0.4.13; how the file is cut into pages:
huggingface.co/datasets/EleutherAI/wikitext_document_level.
"""

import json
import re
from pathlib import Path

from lillama.data.sequences import read_documents
from lillama.errors import InputError

__all__ = ["detokenized", "pages_of", "rows_of"]

# WikiText keeps the spaces that its tokeniser put in; these patterns take them out, in this order
_RULES = (
    ("s '", "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    *((f" @{re.escape(mark)}@ ", mark) for mark in "-,."),
    *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \u00b0 ", "\u00b0"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenized(page: str) -> str:
    """Return a page of WikiText as people write: no spaces before commas, no @-@."""
    for pattern, new in _RULES:
        page = re.sub(pattern, new, page)
    return page


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


def rows_of(path: Path) -> list[str]:
    """Return rows as the Hub's wikitext-2-raw-v1 has them: a line with its line end, or nothing."""
    if _is_jsonl(path):
        return _row_texts(path)
    lines = re.findall(r"[^\n]*\n|[^\n]+", _joined(path))
    return [line if line.strip() else "" for line in lines]


def _is_title(line: str) -> bool:
    """` = Robert Boulter = `, and not ` = = Career = = `."""
    return re.fullmatch(r"= (?!=).*(?<!=) =", line.strip()) is not None


def pages_of(path: Path) -> list[str]:
    """Return the pages: jsonl rows (`page` or `text`), or a text file cut at its titles."""
    if _is_jsonl(path):
        return [page for page in _row_texts(path) if page.strip()]
    pages: list[list[str]] = [[]]
    for line in _joined(path).split("\n"):
        if _is_title(line):
            pages.append([])
        pages[-1].append(line)
    return [page for lines in pages if (page := "\n".join(lines)).strip()]
