"""Whether a model still writes: continuations of places in a text, greedy and sampled, beside its
base's.

A compression that keeps the perplexity can still stop at once or repeat itself, because perplexity
is always measured behind text that a person wrote. Three figures of a continuation, no judge:

empty        it has no visible character
distinct_3   its different 3-grams of tokens / all of them; 1 repeats none
loop         the largest share of its tokens that is one n-gram of at most 16 tokens over and over
"""

import logging
import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lillama.errors import InputError
from lillama.evaluate.perplexity import Progress

__all__ = ["check_generations", "distinct_ngrams", "longest_loop"]

logger = logging.getLogger(__name__)

PROMPT_TOKENS, NEW_TOKENS = 32, 64
LONGEST_NGRAM = 16
SEED = 0
# perplexity that looks fine, and what a mean over the prompts may get worse by
FINE_RETAINED = 0.9
WORSE_BY = 0.1

Figures = dict[str, list[float]]


def distinct_ngrams(ids: Sequence[int], n: int) -> float:
    """Different n-grams / n-grams; 1 where there is none."""
    found = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(found)) / len(found) if found else 1.0


def longest_loop(ids: Sequence[int]) -> float:
    """Share of the tokens in the longest run of one n-gram repeated, n <= 16; a run has at least
    three of them, the last may be cut. 0 where there is none."""
    longest = 0
    for n in range(1, min(LONGEST_NGRAM, len(ids) // 3) + 1):
        run = 0
        for i in range(n, len(ids)):
            run = run + 1 if ids[i] == ids[i - n] else 0
            if run >= 2 * n:
                longest = max(longest, run + n)
    return longest / len(ids) if ids else 0.0


def _prompts(ids: Tensor, count: int) -> Tensor:
    """[count, 32 + 64] pieces, evenly spaced; none overlap."""
    length = PROMPT_TOKENS + NEW_TOKENS
    most = len(ids) // length
    if most < count:
        raise InputError(
            f"--generations {count} needs {count * length} tokens of text, it has {len(ids)}; "
            f"lower it to {most} or add --text files"
        )
    starts = [i * len(ids) // count for i in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


def _ends(model: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else set() if found is None else {found}


@torch.no_grad()
def _continue(model: Any, prompts: Tensor, sample: bool) -> list[list[int]]:
    """Continuations without the end token and what pads after it."""
    ends = _ends(model)
    device = model.device
    settings: dict[str, Any] = {"do_sample": sample}
    if sample:
        settings |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        output = model.generate(
            input_ids=prompts.to(device),
            attention_mask=torch.ones_like(prompts, device=device),
            max_new_tokens=NEW_TOKENS,
            use_cache=True,
            # what a generation_config.json may set against repetition would hide it
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=min(ends, default=0),
            **settings,
        )
    rows = output[:, prompts.shape[1] :].tolist()
    stops = [next((i for i, t in enumerate(row) if t in ends), len(row)) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops, strict=True)]


def _figures(rows: Sequence[Sequence[int]], tokenizer: Any) -> Figures:
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return {
        "empty": [float(not text.strip()) for text in texts],
        "distinct_3": [distinct_ngrams(row, 3) for row in rows],
        "loop": [longest_loop(row) for row in rows],
    }


def _means(figures: Figures) -> dict[str, float]:
    return {name: fmean(values) for name, values in figures.items()}


def _worse(ours: Figures, base: Figures) -> list[str]:
    """The figures that are worse than the base's by more than chance: the mean difference over the
    same prompts beyond WORSE_BY and two of its standard errors."""
    found = []
    for name, values in ours.items():
        sign = -1 if name == "distinct_3" else 1
        gaps = [sign * (a - b) for a, b in zip(values, base[name], strict=True)]
        error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
        if fmean(gaps) > max(WORSE_BY, 2 * error):
            found.append(name)
    return found


def _warning(ours: dict[str, Figures], base: dict[str, Figures], retained: float) -> str | None:
    said = [
        f"{kind} {name} {fmean(figures[name]):.2f} (base {fmean(base[kind][name]):.2f})"
        for kind, figures in ours.items()
        for name in _worse(figures, base[kind])
    ]
    if not said or retained < FINE_RETAINED:
        return None
    return f"perplexity looks fine ({retained:.1%} retained), its text does not: {', '.join(said)}"


def check_generations(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    tokenizer: Any,
    token_ids: Tensor,
    *,
    count: int,
    retained: float | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Let both models continue `count` places of the text, and compare.

    Args:
        token_ids: [tokens], int64, the text; prompts of 32 tokens are taken evenly from it.
        retained: base perplexity / perplexity; None without a base.

    Returns:
        `count, prompt_tokens, new_tokens`; `greedy` and `sampled` (temperature 1, all tokens, seed
        0) with the means of the figures; `text`, the same of what the text itself goes on with;
        with a base `base_greedy, base_sampled` and `warning`, one line or None: the warning is also
        logged.

    Raises:
        InputError: too little text, or more than the model's positions.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and limit < PROMPT_TOKENS + NEW_TOKENS:
        raise InputError(
            f"--generations needs {PROMPT_TOKENS + NEW_TOKENS} positions, the model has {limit}"
        )
    pieces = _prompts(token_ids, count)
    prompts = pieces[:, :PROMPT_TOKENS]
    found: dict[str, dict[str, Figures]] = {}
    models = {"ours": model} if base is None else {"ours": model, "base": base}
    done, total = 0, len(models) * 2 * count * NEW_TOKENS
    for name, one in models.items():
        for kind in ("greedy", "sampled"):
            rows = _continue(one, prompts, kind == "sampled")
            found.setdefault(name, {})[kind] = _figures(rows, tokenizer)
            done += count * NEW_TOKENS
            if progress is not None:
                progress("generations", done, total)
    report: dict[str, Any] = {
        "count": count,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "text": _means(_figures(pieces[:, PROMPT_TOKENS:].tolist(), tokenizer)),
        **{kind: _means(figures) for kind, figures in found["ours"].items()},
    }
    if "base" in found and retained is not None:
        report |= {f"base_{kind}": _means(figures) for kind, figures in found["base"].items()}
        report["warning"] = _warning(found["ours"], found["base"], retained)
        if report["warning"] is not None:
            logger.warning("%s", report["warning"])
    return report
