"""A compressed model and its base in, a better one out: what `lillama finetune` calls.

Blocks were trained one by one, each to its own teacher's output. Here gradients cross them: the
whole model learns the base model's predictions (logit distillation, Hinton et al., arXiv
1503.02531). Both models are in memory whole; that is why it is a step of its own.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from lillama.checkpoint.folder import FolderWriter, disk_errors
from lillama.checkpoint.format import (
    SHARD_INDEX,
    compression_of,
    dtype_of,
    read_config,
    read_headers,
    tensor_bytes,
)
from lillama.checkpoint.remote import find_model
from lillama.checkpoint.writer import check_space
from lillama.compress.measure.gradients import without_outliers
from lillama.compress.session.own_text import own_text_of, write_own_text
from lillama.compress.session.stop import StopRequest
from lillama.compress.train.distill import learning_rate_at
from lillama.compress.train.optimizer import WholeOptimizer
from lillama.config import FinetuneConfig
from lillama.data.datasets import HubText, find_texts
from lillama.data.sequences import TokenBlocks, calibration_blocks, held_out_blocks
from lillama.errors import InputError, RunError
from lillama.integrations.loading import check_vocabulary, choose_device, load_model, load_tokenizer
from lillama.integrations.mamba import fast_mamba
from lillama.models.hub import recorded
from lillama.models.skeleton import named_blocks

__all__ = ["finetune", "finetune_blocks"]

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

# Peak rate at hidden size 128 and a divergence of one nat a token (benchmarks/NOTES.md): a Mamba at
# 0.43 nats wants 1e-3 rather than 3e-4, at 0.046 the other way round.
RATE = 1.8e-3
# times the median norm of a batch: of divergences ordinary tokens reach 600 (benchmarks/NOTES.md)
OUTLIER = 1000.0


def rate_for(divergence: float, hidden_size: int) -> float:
    """The peak learning rate for a model `divergence` nats a token from its base.

    The way to go is as long as the root of a divergence, which is quadratic near its minimum; the
    steps are as many. Widths as in training blocks.
    """
    return RATE * math.sqrt(min(divergence, 1.0) * 128 / hidden_size)


def divergence(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over the counted positions of KL(teacher || student), from logits [b, T, V]; fp32."""
    ours, theirs = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    rows = (theirs.exp() * (theirs - ours)).sum(-1)
    return rows.sum() if mask is None else rows[mask].sum()


class _Finetuning:
    """Both models and the state of the training."""

    def __init__(
        self, student: PreTrainedModel, base: PreTrainedModel, config: FinetuneConfig
    ) -> None:
        self.student, self.base, self.config = student, base, config
        self.device = student.device
        outside = {id(student.get_input_embeddings().weight)}
        if (head := student.get_output_embeddings()) is not None:
            outside.add(id(head.weight))
        for parameter in student.parameters():
            parameter.requires_grad_(id(parameter) not in outside)
        self.trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self.optimizer = WholeOptimizer(student, self.trained, weight_decay=0.01)
        self.left_out = torch.zeros((), dtype=torch.int64, device=self.device)
        for module in (student.get_input_embeddings(), *named_blocks(student).values()):
            module.register_forward_hook(self._bound)
        self.best: dict[str, Tensor] = {}
        self.best_loss, self.best_step = math.inf, 0

    def _bound(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Let no single token's gradient below this module that is far beyond all others: clipping
        would leave nothing of the rest."""
        hidden = output[0] if isinstance(output, tuple) else output

        def hook(gradient: Tensor) -> Tensor:
            bounded, left_out = without_outliers(gradient, OUTLIER)
            self.left_out += left_out
            return bounded

        if hidden.requires_grad:
            hidden.register_hook(hook)

    def loss(self, blocks: TokenBlocks, rows: Tensor) -> tuple[Tensor, int]:
        """Sum over the rows' tokens, and their number."""
        ids = blocks.input_ids[rows].to(self.device)
        mask = None if blocks.mask is None else blocks.mask[rows].to(self.device)
        given: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": None if mask is None else mask.long(),
            "use_cache": False,
        }
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            with torch.no_grad():
                theirs = self.base(**given).logits
            ours = self.student(**given).logits
        return divergence(ours, theirs, mask), ids.numel() if mask is None else int(mask.sum())

    @torch.no_grad()
    def judge(self, held_out: TokenBlocks, step: int) -> float:
        """Mean divergence on held-out text; keeps the model if it is the best so far."""
        total, count = 0.0, 0
        for rows in torch.arange(len(held_out.input_ids)).split(self.config.batch_size):
            loss, tokens = self.loss(held_out, rows)
            total, count = total + float(loss), count + tokens
        mean = total / count
        if not math.isfinite(mean):
            raise RunError(
                f"the held-out divergence became {mean} by step {step}; lower --learning-rate"
            )
        if mean < self.best_loss:
            self.best_loss, self.best_step = mean, step
            self.best = {name: value.detach().cpu().clone() for name, value in self.trained.items()}
        return mean

    def step(self, blocks: TokenBlocks, rows: Tensor, rate: float) -> None:
        with torch.enable_grad():
            loss, tokens = self.loss(blocks, rows)
            (loss / tokens).backward()
        nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        self.optimizer.step(rate)

    @torch.no_grad()
    def keep_best(self) -> None:
        for name, value in self.trained.items():
            value.copy_(self.best[name])


def _blocks(
    config: FinetuneConfig, vocab_size: int, stop: StopRequest, progress: Progress | None
) -> tuple[TokenBlocks, TokenBlocks]:
    """(training, held-out) blocks of the text given, then of the one that the base model writes."""
    tokenizer = load_tokenizer(config.model)

    def draw(text: tuple[Path | HubText, ...], tokens: int) -> tuple[TokenBlocks, TokenBlocks]:
        found = calibration_blocks(
            text,
            tokenizer,
            tokens=tokens,
            seq_len=config.seq_len,
            held_out_blocks=held_out_blocks(tokens, config.seq_len),
            seed=config.seed,
            packing=config.packing,
        )
        for part in found:
            check_vocabulary(part.input_ids, vocab_size)
        return found

    train, held_out = draw(config.text, config.tokens)
    if config.own_tokens:
        file, seed = own_text_of(config.out, config.seed)
        write_own_text(file, config.base, config.own_tokens, seed, config, stop, progress)
        more = draw((file,), config.own_tokens)
        train, held_out = train.joined(more[0]), held_out.joined(more[1])
    return train, held_out


def _check(config: FinetuneConfig) -> None:
    if compression_of(read_config(config.model)) is None:
        raise InputError(f"{config.model} is not compressed by lillama; compress it first")
    if compression_of(read_config(config.base)) is not None:
        raise InputError(f"--base {config.base} is itself compressed; give the dense base model")
    sizes = [getattr(read_config(path), "vocab_size", None) for path in (config.model, config.base)]
    if sizes[0] != sizes[1]:
        raise InputError(
            "MODEL and --base have different vocabularies; they do not belong together"
        )


def finetune(
    model: str | Path,
    out: str | Path,
    *,
    base: str | Path,
    text: str | Path | list[str | Path] | tuple[str | Path, ...],
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a compressed model end to end on its base model's predictions. Same as `lillama
    finetune`.

    Factors, norms, routers and whatever else is in the blocks learn; embeddings and head stay where
    they are not factorised. The best step by held-out text is kept, the start included.

    Args:
        model: compressed checkpoint folder. out: folder to create; it appears when all is done.
        base: the dense model it was made from.
        text: training file or files, as for `compress`.
        progress: called as progress(stage, done, total), in tokens.
        options: the other fields of `lillama.config.FinetuneConfig`: tokens, own_tokens,
            seq_len, batch_size, packing, epochs, learning_rate, seed, device, overwrite.

    Returns:
        `kl_before`, `kl_after` (held-out KL(base || model), nats a token), `learning_rate` (its
        peak), `steps, best_step, tokens, seconds`.

    Raises:
        InputError: arguments or data that cannot be used. RunError: the run failed (NaN, Ctrl-C);
        nothing was written.
    """
    config = FinetuneConfig(
        model=find_model(model),
        out=Path(out),
        base=find_model(base),
        text=find_texts(text),
        **options,
    )
    _check(config)
    with FolderWriter(config.out, {"command": "finetune"}, overwrite=config.overwrite) as folder:
        with StopRequest() as stop:
            return finetune_blocks(config, folder, stop, progress)


def finetune_blocks(
    config: FinetuneConfig, folder: FolderWriter, stop: StopRequest, progress: Progress | None
) -> dict[str, Any]:
    """As `finetune`, for a caller that has claimed OUT and listens to Ctrl-C itself."""
    check_space(config.out, tensor_bytes(read_headers(config.model)))
    device = choose_device(config.device)
    started = time.monotonic()
    train, held_out = _blocks(config, read_config(config.model).vocab_size, stop, progress)
    student = load_model(config.model, device, "float32")
    teacher = load_model(config.base, device)
    run = _Finetuning(student, teacher.requires_grad_(False), config)
    with fast_mamba():
        report = _train(run, train, held_out, stop, progress)
    report["seconds"] = round(time.monotonic() - started, 2)
    for parameter in student.parameters():
        parameter.data = parameter.data.to(dtype_of(read_config(config.model)))
    _write(config, folder, student, report)
    if config.own_tokens:
        own_text_of(config.out, config.seed)[0].unlink()
    return report


def _train(
    run: _Finetuning,
    train: TokenBlocks,
    held_out: TokenBlocks,
    stop: StopRequest,
    progress: Progress | None,
) -> dict[str, Any]:
    config = run.config
    generator = torch.Generator().manual_seed(config.seed)
    batches: list[Tensor] = []
    for _ in range(config.epochs):
        order = torch.randperm(len(train.input_ids), generator=generator)
        batches += order.split(config.batch_size)
    every = max(1, math.ceil(len(batches) / config.evaluations))
    before = run.judge(held_out, 0)
    peak = config.learning_rate or rate_for(before, run.student.config.hidden_size)
    for step, rows in enumerate(batches, start=1):
        rate = learning_rate_at(peak, step - 1, len(batches), 0.05)
        run.step(train, rows, rate)
        if progress is not None:
            total = config.epochs * train.input_ids.numel()
            progress("finetune", round(total * step / len(batches)), total)
        stop.check()
        if step % every == 0 or step == len(batches):
            run.judge(held_out, step)
    run.keep_best()
    if left_out := int(run.left_out):
        logger.warning(
            "finetune: left out %d gradients of single tokens between blocks, each over %g times "
            "the median of its batch, as where the embedding of the first token is 0",
            left_out, OUTLIER,
        )  # fmt: skip
    return {
        "kl_before": before,
        "kl_after": run.best_loss,
        "learning_rate": peak,
        "steps": len(batches),
        "best_step": run.best_step,
        "tokens": train.num_tokens,
    }


def _write(
    config: FinetuneConfig, folder: FolderWriter, student: PreTrainedModel, report: dict[str, Any]
) -> None:
    staging = folder.staging
    with disk_errors(config.out):
        try:
            student.save_pretrained(staging)
        except SafetensorError as error:  # a full disk
            raise RunError(f"cannot write {staging}: {error}") from error
        for file in config.model.iterdir():
            is_written = (staging / file.name).exists() or file.name == SHARD_INDEX
            if file.is_file() and file.suffix != ".safetensors" and not is_written:
                shutil.copyfile(file, staging / file.name)
        if (made := staging / "report.json").is_file():
            whole = json.loads(made.read_text("utf-8"))
            # an imported model was compressed elsewhere: no seconds of that
            whole["seconds"] = round(whole.get("seconds", 0.0) + report["seconds"], 2)
            made.write_text(json.dumps({**whole, "finetune": report}, indent=2) + "\n", "utf-8")
        record = {**recorded(config), **report}
        (staging / "finetune.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    folder.finish()
