"""How much a compressed model still knows: perplexity on held-out text, and its divergence from
the base.

Figures are comparable only at equal definition (perplexity.py), tokenizer and seq_len; bits per
byte also across tokenizers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lillama.checkpoint import (
    compression_of,
    read_config,
    read_headers,
    sentinel_names,
    tensor_bytes,
)
from lillama.config_eval import EvalConfig
from lillama.errors import InputError, RunError
from lillama.evaluate.generations import check_generations
from lillama.evaluate.perplexity import ScoredBatch, ScoredText, scored_text
from lillama.evaluate.speed import measure_speed
from lillama.evaluate.tasks import check_harness, run_tasks
from lillama.families_generic import family_for
from lillama.hub_checkpoint import find_model
from lillama.hub_text import find_texts
from lillama.integrations.mamba import fast_mamba
from lillama.loading import (
    check_vocabulary,
    choose_device,
    count_params,
    load_model,
    load_tokenizer,
)

__all__ = ["evaluate", "stored_size"]

Progress = Callable[[str, int, int], None]


@dataclass
class _Sums:
    """Totals over the predicted tokens, in nats."""

    nll: float = 0.0
    base_nll: float = 0.0
    kl: float = 0.0
    agree: float = 0.0
    predicted: int = 0


def stored_size(path: Path) -> tuple[int, int]:
    """(parameters, bytes) of a checkpoint folder, the sentinel left out, tied weights counted
    once."""
    config = read_config(path)
    compression = compression_of(config)
    headers = read_headers(path)
    if compression is None:
        return count_params(config), tensor_bytes(headers)
    family, ranks = family_for(config), compression["ranks"]
    gauge = compression.get("gauge", "plain")
    return count_params(config, ranks, gauge), tensor_bytes(
        headers, skip=sentinel_names(headers, family, ranks)
    )


def _token_nll(logits: Tensor, batch: ScoredBatch) -> Tensor:
    """logits [b, T, V] -> negative log-likelihood [targets that count]."""
    flat = logits[:, : batch.targets.shape[1]].float().flatten(0, 1)
    nll = F.cross_entropy(flat, batch.targets.flatten(), reduction="none")
    return nll if batch.scored is None else nll[batch.scored.flatten()]


def _log_probs(logits: Tensor, batch: ScoredBatch) -> Tensor:
    """logits [b, T, V] -> log-probabilities [targets that count, V]."""
    flat = logits[:, : batch.targets.shape[1]].flatten(0, 1)
    kept = flat if batch.scored is None else flat[batch.scored.flatten()]
    return F.log_softmax(kept.float(), -1)


@torch.no_grad()
def _add_batch(
    sums: _Sums, batch: ScoredBatch, model: PreTrainedModel, base: PreTrainedModel | None
) -> None:
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    nll = _token_nll(logits, batch)
    sums.nll += float(nll.double().sum())
    sums.predicted += nll.numel()
    if base is None:
        return
    base_logits = base(input_ids=batch.input_ids, use_cache=False).logits
    sums.base_nll += float(_token_nll(base_logits, batch).double().sum())
    ours, theirs = _log_probs(logits, batch), _log_probs(base_logits, batch)
    sums.kl += float((theirs.exp() * (theirs - ours)).sum(-1).double().sum())
    sums.agree += float((ours.argmax(-1) == theirs.argmax(-1)).sum())


def _measure(
    text: ScoredText,
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    progress: Progress | None,
) -> _Sums:
    device = model.device
    sums = _Sums()
    total = sum(batch.input_ids.numel() for batch in text.batches)
    done = 0
    for batch in text.batches:
        _add_batch(sums, batch.to(device), model, base)
        done += batch.input_ids.numel()
        if progress is not None:
            progress("eval", done, total)
        for name, nll in (("MODEL", sums.nll), ("--against", sums.base_nll)):
            if not math.isfinite(nll):
                raise RunError(
                    f"the loss of {name} became {nll} within the first {done} tokens; "
                    "its weights are broken"
                )
    return sums


def _exp(mean: float, unit: str) -> float:
    if mean > 700:
        raise RunError(f"the mean loss is {mean:.0f} nats a {unit}; the model is broken")
    return math.exp(mean)


def _figures(nll: float, predicted: int, text: ScoredText) -> dict[str, float]:
    """The perplexities of one model. Of words: those of lm-evaluation-harness under its names."""
    if text.num_words is None:
        per_byte = nll / predicted / math.log(2) * (text.num_tokens / text.num_bytes)
        return {"perplexity": _exp(nll / predicted, "token"), "bits_per_byte": per_byte}
    return {
        "word_perplexity": _exp(nll / text.num_words, "word"),
        "byte_perplexity": _exp(nll / text.num_bytes, "byte"),
        "bits_per_byte": nll / text.num_bytes / math.log(2),
        "token_perplexity": _exp(nll / predicted, "token"),
    }


def _quality(sums: _Sums, text: ScoredText, with_base: bool) -> dict[str, Any]:
    report: dict[str, Any] = _figures(sums.nll, sums.predicted, text)
    report["tokens"] = sums.predicted
    if text.num_words is not None:
        report["words"] = text.num_words
    if with_base:
        base = _figures(sums.base_nll, sums.predicted, text)
        report |= {f"base_{name}": value for name, value in base.items()}
        report |= {
            "retained": math.exp((sums.base_nll - sums.nll) / sums.predicted),
            "kl": sums.kl / sums.predicted,
            "top1_agreement": sums.agree / sums.predicted,
        }
    return report


def _context(model: PreTrainedModel, tokenizer: Any) -> int:
    """Tokens that the model was made for, found as lm-evaluation-harness finds them."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        length = getattr(model.config, name, None)
        if length is not None:
            return int(length)
    length = tokenizer.model_max_length
    # transformers writes 1e30 for "not known"
    return 2048 if length >= 1e12 else int(length)


def _with_text(
    config: EvalConfig,
    tokenizer: Any,
    ours: PreTrainedModel,
    base: PreTrainedModel | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Perplexity, and what else the options ask of the text."""
    text = scored_text(
        config.metric,
        config.text,
        tokenizer,
        seq_len=config.window or _context(ours, tokenizer),
        batch_size=config.batch_size,
    )
    check_vocabulary(text.token_ids, ours.config.vocab_size)
    sums = _measure(text, ours, base, progress)
    report = {"metric": config.metric, **_quality(sums, text, base is not None)}
    if config.generations:
        report["generations"] = check_generations(
            ours,
            base,
            tokenizer,
            text.token_ids,
            count=config.generations,
            retained=report.get("retained"),
            progress=progress,
        )
    if config.speed:
        report["speed"] = measure_speed(ours, base, text.token_ids, progress=progress)
    return report


def evaluate(
    model: str | Path,
    text: str | Path | list[str | Path] | tuple[str | Path, ...] = (),
    *,
    against: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """How good a checkpoint still is: perplexity on text it has not seen, tasks, what it writes,
    how fast. Same as `lillama eval`; exported as `lillama.eval`. docs/evaluation.md has the
    definitions.

    Args:
        model: checkpoint folder, dense or compressed, or ORG/NAME[@REVISION] of the Hub.
        text: file or files (text or jsonl).
        against: the base model's folder; adds its figures and the divergence from it.
        progress: called as progress(stage, done, total); stage "eval" counts tokens.
        options: the other fields of `lillama.config_eval.EvalConfig`: metric, seq_len, batch_size,
            tasks, task_path, limit, generations, speed, dtype, device.

    Returns:
        `params, bytes`. With text `metric, tokens` and for blocks and rows `perplexity,
        bits_per_byte`, for words `word_perplexity, byte_perplexity, bits_per_byte,
        token_perplexity, words`; with tasks `tasks` and `lm_eval`; `generations` and `speed` where
        asked for. With `against` the same of the base under `base_...`, and of text also `retained`
        (base perplexity / perplexity, by token), `kl` (mean KL(base || model) per token, nats) and
        `top1_agreement`.

    Raises:
        InputError: a model, text or task that cannot be used, or lillama[eval] is missing.
        RunError: the loss is not finite.
    """
    plain: dict[str, Any] = {}
    if options.get("task_path") is not None:
        plain["task_path"] = Path(options["task_path"])
    if isinstance(tasks := options.get("tasks", ()), str):
        plain["tasks"] = (tasks,)
    config = EvalConfig(
        model=find_model(model),
        text=find_texts(text, evaluation=True),
        against=None if against is None else find_model(against),
        **{**options, **plain},
    )
    if config.tasks:
        check_harness()
    device = choose_device(config.device)
    params, num_bytes = stored_size(config.model)
    report: dict[str, Any] = {"params": params, "bytes": num_bytes}
    tokenizer = load_tokenizer(config.model)
    ours = load_model(config.model, device, config.dtype)
    base = None
    if config.against is not None:
        base_params, base_bytes = stored_size(config.against)
        report |= {"base_params": base_params, "base_bytes": base_bytes}
        base = load_model(config.against, device, config.dtype)
        if base.config.vocab_size != ours.config.vocab_size:
            raise InputError(
                f"--against has a vocabulary of {base.config.vocab_size}, MODEL of "
                f"{ours.config.vocab_size}; they are not a model and its base"
            )
    with fast_mamba():
        if config.text:
            report = {**_with_text(config, tokenizer, ours, base, progress), **report}
        if config.tasks:
            report |= run_tasks(
                ours,
                base,
                tokenizer,
                config.tasks,
                include_path=config.task_path,
                batch_size=config.batch_size,
                limit=config.limit,
            )
    return report
