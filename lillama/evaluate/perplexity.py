"""Perplexity on held-out text by each definition that `lillama eval` knows, and the divergence from
the base.

blocks  all the text in order (data.py), in blocks of seq_len and a tail
rows    as GPTQ and SparseGPT prepare WikiText-2: the rows of the dataset joined by an empty line,
        tokenised in one piece, full blocks only
words   as task `wikitext` of lm-evaluation-harness: every page by itself, detokenised, each of its
        tokens scored once in windows of seq_len; the loss is divided by the words (and bytes) of
        the page as it was before

Sources: datautils.py of github.com/IST-DASLab/gptq; get_rolling_token_windows of lm-eval 0.4.13.
Figures are comparable only at equal definition, tokenizer and seq_len; bits per byte also across
tokenizers. Letters: b windows, T inputs of each.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lillama.config import Metric
from lillama.data.sequences import evaluation_blocks
from lillama.errors import InputError, RunError
from lillama.evaluate.wikitext import detokenized, pages_of, rows_of

__all__ = ["NOT_SCORED", "Progress", "ScoredText", "measure_text", "scored_text"]

# a target that does not count, as in F.cross_entropy
NOT_SCORED = -100

Progress = Callable[[str, int, int], None]
# input_ids [b, T] and targets [b, t], both int64, t = T or T - 1: what follows each of the first t
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ScoredText:
    """batches: every token that counts, once.

    token_ids: [tokens], int64, the text in order, to take prompts from.
    num_words, num_bytes: what the losses of all scored tokens are shared among; words is None where
    the definition has none, num_bytes then belongs to `num_tokens` tokens.
    """

    batches: list[Batch]
    token_ids: Tensor
    num_tokens: int
    num_bytes: int
    num_words: int | None = None


# From text to batches
def _block_batches(blocks: Tensor, batch_size: int) -> list[Batch]:
    return [(ids, ids[:, 1:]) for ids in blocks.split(batch_size) if len(ids)]


def _of_blocks(paths: Sequence[Any], tokenizer: Any, seq_len: int, batch_size: int) -> ScoredText:
    text = evaluation_blocks(paths, tokenizer, seq_len=seq_len)
    parts = [text.input_ids] if text.tail is None else [text.input_ids, text.tail]
    batches = [batch for part in parts for batch in _block_batches(part, batch_size)]
    token_ids = torch.cat([part.flatten() for part in parts])
    return ScoredText(batches, token_ids, text.num_tokens, text.num_bytes)


def _of_rows(paths: Sequence[Any], tokenizer: Any, seq_len: int, batch_size: int) -> ScoredText:
    text = "\n\n".join(row for path in paths for row in rows_of(path))
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


def _of_words(paths: Sequence[Any], tokenizer: Any, seq_len: int, batch_size: int) -> ScoredText:
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    prefix = next((token for token in ends if token is not None), None)
    if prefix is None:
        raise InputError(
            "--metric words starts each page with the tokenizer's bos or eos token, and this one "
            "has neither; use --metric blocks"
        )
    windows: list[tuple[list[int], int]] = []
    token_ids: list[int] = []
    num_words = num_bytes = 0
    for page in (page for path in paths for page in pages_of(path)):
        num_words += len(re.split(r"\s+", page))
        num_bytes += len(page.encode())
        # a page of no token has no window
        if ids := tokenizer(detokenized(page), verbose=False)["input_ids"]:
            token_ids += ids
            windows += _windows(ids, prefix, seq_len)
    batches = []
    # no padding: windows of equal length go together
    for length in sorted({len(window) for window, _ in windows}, reverse=True):
        found = [(window, count) for window, count in windows if len(window) == length]
        ids = torch.tensor([window for window, _ in found])
        first = torch.tensor([[length - 1 - count] for _, count in found])
        targets = ids[:, 1:].masked_fill(torch.arange(length - 1) < first, NOT_SCORED)
        parts = (ids[:, :-1].split(batch_size), targets.split(batch_size))
        batches += zip(*parts, strict=True)
    return ScoredText(batches, torch.tensor(token_ids), len(token_ids), num_bytes, num_words)


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
    """Return all of the text, as the definition wants it scored.

    Raises:
        InputError: an unusable file (`read_documents`), or too little text.
    """
    found = _MAKERS[metric](paths, tokenizer, seq_len, batch_size)
    if not found.batches:
        raise InputError("the text has no token to predict; add --text files")
    return found


# From batches to figures
@torch.no_grad()
def _log_probs(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, float]:
    """Return log-probabilities [targets that count, V], and the sum of those of the targets."""
    ids, targets = (tensor.to(model.device) for tensor in batch)
    logits = model(input_ids=ids, use_cache=False).logits[:, : targets.shape[1]]
    scored = targets != NOT_SCORED
    found = F.log_softmax(logits[scored].float(), -1)
    of_targets = found.gather(-1, targets[scored].unsqueeze(-1))
    return found, float(of_targets.double().sum())


def _exp(mean: float, unit: str) -> float:
    if mean > 700:
        raise RunError(f"the mean loss is {mean:.0f} nats a {unit}; the model is broken")
    return math.exp(mean)


def _figures(nll: float, predicted: int, text: ScoredText) -> dict[str, float]:
    """Return the perplexities of one model; of words under lm-evaluation-harness's names."""
    if text.num_words is None:
        per_byte = nll / predicted / math.log(2) * (text.num_tokens / text.num_bytes)
        return {"perplexity": _exp(nll / predicted, "token"), "bits_per_byte": per_byte}
    return {
        "word_perplexity": _exp(nll / text.num_words, "word"),
        "byte_perplexity": _exp(nll / text.num_bytes, "byte"),
        "bits_per_byte": nll / text.num_bytes / math.log(2),
        "token_perplexity": _exp(nll / predicted, "token"),
    }


def measure_text(
    text: ScoredText,
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the perplexities and the number of tokens; with a base also its perplexities and the
    divergence from it.

    Raises:
        RunError: a loss is not finite, or too large for a perplexity.
    """
    nll = base_nll = kl = agree = 0.0
    predicted = done = 0
    total = sum(ids.numel() for ids, _ in text.batches)
    for batch in text.batches:
        ours, found = _log_probs(model, batch)
        nll -= found
        predicted += len(ours)
        if base is not None:
            theirs, found = _log_probs(base, batch)
            base_nll -= found
            kl += float((theirs.exp() * (theirs - ours)).sum(-1).double().sum())
            agree += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        done += batch[0].numel()
        if progress is not None:
            progress("eval", done, total)
        for name, loss in (("MODEL", nll), ("--against", base_nll)):
            if not math.isfinite(loss):
                raise RunError(
                    f"the loss of {name} became {loss} within the first {done} tokens; "
                    "its weights are broken"
                )
    report: dict[str, Any] = {**_figures(nll, predicted, text), "tokens": predicted}
    if text.num_words is not None:
        report["words"] = text.num_words
    if base is not None:
        figures = _figures(base_nll, predicted, text)
        report |= {f"base_{name}": value for name, value in figures.items()}
        report["retained"] = math.exp((base_nll - nll) / predicted)
        report |= {"kl": kl / predicted, "top1_agreement": agree / predicted}
    return report
