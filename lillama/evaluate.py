"""How much a compressed model still knows: perplexity on held-out text, and its divergence from
the base.

Text is cut into blocks of seq_len tokens; each block predicts its tokens from the second on (the
convention of GPTQ and SparseGPT). Figures are comparable only at equal tokenizer and seq_len; bits
per byte also across tokenizers.
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
from lillama.config import EvalConfig
from lillama.data import EvaluationText, evaluation_blocks
from lillama.errors import InputError, RunError
from lillama.families_generic import family_for
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


def _token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [b, T, V], labels [b, T] -> negative log-likelihood [b, T-1] of labels[:, 1:]."""
    flat = logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(flat, labels[:, 1:].flatten(), reduction="none").view(len(labels), -1)


@torch.no_grad()
def _add_batch(
    sums: _Sums, ids: Tensor, model: PreTrainedModel, base: PreTrainedModel | None
) -> None:
    logits = model(input_ids=ids, use_cache=False).logits
    nll = _token_nll(logits, ids)
    sums.nll += float(nll.double().sum())
    sums.predicted += nll.numel()
    if base is None:
        return
    base_logits = base(input_ids=ids, use_cache=False).logits
    sums.base_nll += float(_token_nll(base_logits, ids).double().sum())
    ours = F.log_softmax(logits[:, :-1].float(), -1)
    theirs = F.log_softmax(base_logits[:, :-1].float(), -1)
    sums.kl += float((theirs.exp() * (theirs - ours)).sum(-1).double().sum())
    sums.agree += float((ours.argmax(-1) == theirs.argmax(-1)).sum())


def _measure(
    text: EvaluationText,
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    batch_size: int,
    progress: Progress | None,
) -> _Sums:
    device = model.device
    sums = _Sums()
    batches = [batch for batch in text.input_ids.split(batch_size) if len(batch)]
    if text.tail is not None:
        batches.append(text.tail)
    total = sum(batch.numel() for batch in batches)
    done = 0
    for batch in batches:
        _add_batch(sums, batch.to(device), model, base)
        done += batch.numel()
        if progress is not None:
            progress("eval", done, total)
        for name, nll in (("MODEL", sums.nll), ("--against", sums.base_nll)):
            if not math.isfinite(nll):
                raise RunError(
                    f"the loss of {name} became {nll} within the first {done} tokens; "
                    "its weights are broken"
                )
    return sums


def _perplexity(nll: float, predicted: int) -> float:
    mean = nll / predicted
    if mean > 700:
        raise RunError(f"the mean loss is {mean:.0f} nats a token; the model is broken")
    return math.exp(mean)


def evaluate(
    model: str | Path,
    text: str | Path | list[str | Path] | tuple[str | Path, ...],
    *,
    against: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Perplexity of a checkpoint on text it has not seen. Same as `lillama eval`; exported as
    `lillama.eval`.

    Args:
        model: local checkpoint folder, dense or compressed.
        text: file or files (text or jsonl).
        against: the base model's folder; adds its figures and the divergence from it.
        progress: called as progress("eval", done, total), in tokens.
        options: the other fields of `lillama.config.EvalConfig`: seq_len, batch_size, dtype,
        device.

    Returns:
        `perplexity, bits_per_byte, tokens, params, bytes`; with `against` also `base_perplexity,
        retained` (base perplexity / perplexity), `kl` (mean KL(base || model) per token, nats) and
        `top1_agreement`.

    Raises:
        InputError: a model or text that cannot be used. RunError: the loss is not finite.
    """
    files = [text] if isinstance(text, str | Path) else list(text)
    config = EvalConfig(
        model=Path(model),
        text=tuple(Path(file) for file in files),
        against=None if against is None else Path(against),
        **options,
    )
    device = choose_device(config.device)
    params, num_bytes = stored_size(config.model)
    tokenizer = load_tokenizer(config.model)
    blocks = evaluation_blocks(config.text, tokenizer, seq_len=config.seq_len)
    ours = load_model(config.model, device, config.dtype)
    for ids in (blocks.input_ids, blocks.tail):
        if ids is not None and ids.numel():
            check_vocabulary(ids, ours.config.vocab_size)
    base = None
    if config.against is not None:
        base = load_model(config.against, device, config.dtype)
        if base.config.vocab_size != ours.config.vocab_size:
            raise InputError(
                f"--against has a vocabulary of {base.config.vocab_size}, MODEL of "
                f"{ours.config.vocab_size}; they are not a model and its base"
            )
    with fast_mamba():
        sums = _measure(blocks, ours, base, config.batch_size, progress)
    tokens_per_byte = blocks.num_tokens / blocks.num_bytes
    report = {
        "perplexity": _perplexity(sums.nll, sums.predicted),
        "bits_per_byte": sums.nll / sums.predicted / math.log(2) * tokens_per_byte,
        "tokens": sums.predicted,
        "params": params,
        "bytes": num_bytes,
    }
    if base is not None:
        base_perplexity = _perplexity(sums.base_nll, sums.predicted)
        report |= {
            "base_perplexity": base_perplexity,
            "base_bits_per_byte": sums.base_nll / sums.predicted / math.log(2) * tokens_per_byte,
            "retained": base_perplexity / report["perplexity"],
            "kl": sums.kl / sums.predicted,
            "top1_agreement": sums.agree / sums.predicted,
        }
    return report
