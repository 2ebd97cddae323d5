"""How much a compressed model still knows, says and takes: what `lillama eval` and `lillama.eval`
call."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lillama.checkpoint.format import (
    compression_of,
    read_config,
    read_headers,
    tensor_bytes,
)
from lillama.checkpoint.remote import find_model
from lillama.config import EvalConfig
from lillama.data.datasets import find_texts
from lillama.errors import InputError
from lillama.evaluate.generations import check_generations
from lillama.evaluate.perplexity import Progress, measure_text, scored_text
from lillama.evaluate.speed import measure_speed
from lillama.evaluate.tasks import check_harness, run_tasks
from lillama.integrations.loading import (
    check_vocabulary,
    choose_device,
    count_params,
    load_model,
    load_tokenizer,
)
from lillama.integrations.mamba import fast_mamba

__all__ = ["evaluate", "stored_size"]


def stored_size(path: Path) -> tuple[int, int]:
    """Return (parameters, bytes) of a checkpoint folder, the sentinel left out, tied weights
    counted once."""
    config = read_config(path)
    compression = compression_of(config)
    headers = read_headers(path)
    if compression is None:
        return count_params(config), tensor_bytes(headers)
    ranks, gauge = compression["ranks"], compression.get("gauge", "plain")
    return count_params(config, ranks, gauge), tensor_bytes(headers, [compression["sentinel"]])


def _context(model: PreTrainedModel, tokenizer: Any) -> int:
    """Return the tokens that the model was made for, found as lm-evaluation-harness finds them."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (length := getattr(model.config, name, None)) is not None:
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
    """Return the perplexity, and what else the options ask of the text."""
    seq_len = config.window or _context(ours, tokenizer)
    text = scored_text(
        config.metric, config.text, tokenizer, seq_len=seq_len, batch_size=config.batch_size
    )
    check_vocabulary(text.token_ids, ours.config.vocab_size)
    report = {"metric": config.metric, **measure_text(text, ours, base, progress)}
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
