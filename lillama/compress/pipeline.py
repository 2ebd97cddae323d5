"""Model in, smaller model out: block after block, one teacher and one student block in memory at a
time."""

import logging
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lillama.checkpoint import dtype_of, sentinel
from lillama.checkpoint_writer import CheckpointWriter, check_space
from lillama.compress.blocks import TeacherBlocks, block_output
from lillama.compress.calibrate import GramCollector
from lillama.compress.describe import config_json, model_card, recipe_json
from lillama.compress.distill import Stream, held_out_loss, train_block
from lillama.compress.plan import Plan, make_plan
from lillama.compress.student import block_tensors, make_student, round_parameters, stored_as
from lillama.config import CompressConfig
from lillama.data import TokenBlocks, calibration_blocks
from lillama.errors import InputError, RunError
from lillama.integrations.mamba import fast_mamba
from lillama.loading import check_vocabulary, choose_device, load_tokenizer

__all__ = ["Progress", "compress"]

logger = logging.getLogger(__name__)

# progress(stage, done, total): units are tokens run through a block
Progress = Callable[[str, int, int], None]

COPIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


@dataclass
class _Set:
    """One set of token blocks and its activations before the current block."""

    blocks: TokenBlocks
    teacher: Tensor
    student: Tensor
    target: Tensor = field(default_factory=lambda: torch.empty(0))

    def advance(self, student_target: Tensor | None) -> None:
        self.teacher, self.student = (
            self.target,
            self.target if student_target is None else student_target,
        )


class _Run:
    """The state of one compression; `compress` below is its only user."""

    def __init__(self, options: CompressConfig, plan: Plan, progress: Progress | None) -> None:
        self.options = options
        self.recipe = options.recipe
        self.plan = plan
        self.device = choose_device(options.device)
        self.progress = progress
        self.done_tokens = 0
        self.total_tokens = 0
        tokenizer = load_tokenizer(options.model)
        limit = getattr(plan.config, "max_position_embeddings", None)
        if limit is not None and options.seq_len > limit:
            raise InputError(
                f"--seq-len must be at most {limit} for this model, got {options.seq_len}"
            )
        count = -(-options.tokens // options.seq_len)
        self.train, self.held_out = calibration_blocks(
            options.text,
            tokenizer,
            tokens=options.tokens,
            seq_len=options.seq_len,
            held_out_blocks=min(32, max(8, count // 40)),
            seed=options.seed,
            packing=options.packing,
        )
        for blocks in (self.train, self.held_out):
            check_vocabulary(blocks.input_ids, plan.config.vocab_size)
        self.teacher = TeacherBlocks(
            options.model, plan.config, plan.family, self.device, torch.float32
        )
        self.save_dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)

    def tick(self, stage: str, tokens: int) -> None:
        self.done_tokens += tokens
        if self.progress is not None:
            self.progress(stage, self.done_tokens, self.total_tokens)

    def rows(self, count: int) -> list[Tensor]:
        return list(torch.arange(count).split(self.recipe.batch_size))

    def embed(self, blocks: TokenBlocks) -> _Set:
        parts = []
        for rows in self.rows(len(blocks.input_ids)):
            mask = None if blocks.mask is None else blocks.mask[rows]
            parts.append(self.teacher.inputs(blocks.input_ids[rows], mask)[0].cpu())
        hidden = torch.cat(parts)
        return _Set(blocks, hidden, hidden)

    def kwargs_of(self, data: _Set, index: int) -> Callable[[Tensor], dict[str, Any]]:
        """Keyword arguments of block `index` for given rows; asked once a batch size where nothing
        is padded."""
        cache: dict[int, dict[str, Any]] = {}

        def kwargs(rows: Tensor) -> dict[str, Any]:
            if data.blocks.mask is None and len(rows) in cache:
                return cache[len(rows)]
            mask = None if data.blocks.mask is None else data.blocks.mask[rows]
            found = self.teacher.inputs(data.blocks.input_ids[rows], mask)[1][index]
            if data.blocks.mask is None:
                cache[len(rows)] = found
            return found

        return kwargs

    @torch.no_grad()
    def forward(
        self,
        block: nn.Module,
        data: _Set,
        source: Tensor,
        index: int,
        stage: str,
        grams: GramCollector | None,
    ) -> Tensor:
        """Run a block over a whole stream [n, T, H]; with `grams`, its hooks see each batch's
        mask.

        Raises:
            RunError: the block's output is not finite (names the block).
        """
        kwargs = self.kwargs_of(data, index)
        out = torch.empty_like(source)
        for rows in self.rows(len(source)):
            if grams is not None:
                grams.mask = None if data.blocks.mask is None else data.blocks.mask[rows]
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"
            ):
                hidden = block_output(block, source[rows].to(self.device), kwargs(rows))
            out[rows] = hidden.to("cpu", out.dtype)
            if not bool(torch.isfinite(out[rows]).all()):
                raise RunError(
                    f"the output of {self.teacher.block_path}.{index} ({stage.split()[-1]}) holds "
                    "NaN or infinity; the weights of this block or of one before it are broken"
                )
            self.tick(stage, rows.numel() * source.shape[1])
        return out

    def teacher_pass(self, block: nn.Module, index: int, sets: list[_Set]) -> GramCollector:
        """Targets of every stream; Gram matrices from the training stream when the init wants
        them."""
        ranks = self.plan.ranks_of_block(index)
        prefix = f"{self.teacher.block_path}.{index}."
        linears, with_experts = [], False
        for name in ranks:
            experts = self.plan.family.experts
            if experts is not None and experts.parse(name) is not None:
                with_experts = True
            else:
                linears.append(name.removeprefix(prefix))
        wanted = self.recipe.init == "whitened"
        grams = GramCollector(
            block, self.plan.family, linears if wanted else [], wanted and with_experts
        )
        stage = f"block {index} teacher"
        with grams.attached():
            sets[0].target = self.forward(block, sets[0], sets[0].teacher, index, stage, grams)
        for data in sets[1:]:
            data.target = self.forward(block, data, data.teacher, index, stage, None)
        return grams

    def compress_block(
        self, block: nn.Module, index: int, sets: list[_Set]
    ) -> tuple[nn.Module, dict]:
        """Factorise and train; returns the student and its row of the report."""
        started = time.monotonic()
        grams = self.teacher_pass(block, index, sets)
        student = make_student(self.teacher, index, block, self.plan, grams, self.recipe)
        del grams
        streams = [
            Stream(d.teacher, d.student, d.target, d.blocks.mask, self.kwargs_of(d, index))
            for d in sets
        ]
        name = f"{self.teacher.block_path}.{index}"
        options, recipe = self.options, self.recipe
        if options.train:
            seq_len = options.seq_len
            result = train_block(
                student,
                *streams,
                recipe=recipe,
                loss=options.loss,
                peak_learning_rate=recipe.peak_learning_rate(self.plan.config.hidden_size),
                seed=options.seed + index,
                device=self.device,
                name=name,
                on_step=lambda rows, loss: self.tick(f"block {index} train", rows * seq_len),
            )
            before, after, steps, best = (
                result.loss_before, result.loss_after, result.steps, result.best_step
            )  # fmt: skip
        else:
            before = after = held_out_loss(
                student, streams[1], options.loss, recipe.batch_size, self.device
            )
            steps = best = 0
        ranks = self.plan.ranks_of_block(index)
        report = {
            "index": index,
            "name": name,
            "ranks": sorted(set(ranks.values())),
            "params_before": sum(p.numel() for p in block.parameters()),
            "params_after": sum(p.numel() for p in block.parameters())
            - sum(m.saved(ranks[m.name]) for m in self.plan.matrices if m.name in ranks),
            "held_out_loss_before": before,
            "held_out_loss_after": after,
            "steps": steps,
            "best_step": best,
            "seconds": round(time.monotonic() - started, 2),
        }
        logger.info(
            "%s: held-out loss %.5f -> %.5f (step %d of %d)", name, before, after, best, steps
        )
        return student, report

    def run(self, writer: CheckpointWriter) -> list[dict]:
        """Every block in order, then the rest; returns the report's rows."""
        compressed = self.plan.blocks
        last = compressed[-1]
        train = self.train.input_ids.numel()
        both = train + self.held_out.input_ids.numel()
        # the teacher runs blocks 0..last, the student's stream from the first compressed to last
        self.total_tokens = both * (last + 1 + last - compressed[0])
        if self.options.train:
            self.total_tokens += train * len(compressed)
        sets = [self.embed(self.train), self.embed(self.held_out)]
        rows = []
        for index in range(len(self.teacher.blocks)):
            # nothing above `last` is compressed: the bytes pass through, nothing is computed
            if index > last:
                writer.add_shard(block_tensors(self.teacher, index, None, {}, self.save_dtype))
                continue
            with self.teacher.block(index) as block:
                if index in compressed:
                    student, row = self.compress_block(block, index, sets)
                    rows.append(row)
                    dtype = self.save_dtype or dtype_of(self.plan.config)
                    round_parameters(student, dtype)
                else:
                    student = None
                    self.teacher_pass(block, index, sets)
                self.advance(block if student is None else student, index, sets, index == last)
            ranks = self.plan.ranks_of_block(index)
            writer.add_shard(block_tensors(self.teacher, index, student, ranks, self.save_dtype))
            del student  # before the next block's is made
        writer.add_shard(self.rest())
        return rows

    def advance(self, student: nn.Module, index: int, sets: list[_Set], is_last: bool) -> None:
        """Move both streams behind block `index`."""
        if is_last:
            return
        replaced = index in self.plan.blocks
        for data in sets:
            if replaced or data.student is not data.teacher:
                stage = f"block {index} student"
                data.advance(self.forward(student, data, data.student, index, stage, None))
            else:
                data.advance(None)

    def rest(self) -> dict[str, Tensor]:
        """Embeddings, final norm, head: everything outside the blocks, as it is, and the
        sentinel."""
        inside = f"{self.teacher.block_path}."
        tensors = {}
        for name, runtime in self.teacher.runtime.items():
            if not runtime.startswith(inside):
                value = self.teacher.read(name)
                tensors[name] = stored_as(name, value, self.save_dtype or value.dtype)
        name, shape = sentinel(self.plan.family, self.plan.ranks)
        tensors[name] = torch.zeros(shape)
        return tensors


def _peak_memory_bytes(device: torch.device) -> int:
    """Host peak of this process, or the device's when a GPU computes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compress(
    model: str | Path,
    out: str | Path,
    *,
    reduction: float,
    text: str | Path | list[str | Path] | tuple[str | Path, ...],
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Compress the checkpoint folder `model` into the new folder `out`. Same as `lillama compress`.

    Args:
        model: local checkpoint folder (safetensors).
        out: folder to create; nothing is left there unless the run finishes.
        reduction: share of the whole model's parameters to remove, in (0, 1).
        text: calibration file or files (text, or jsonl with "text", "messages" or "conversations").
        progress: called as progress(stage, done, total), in tokens run through a block.
        options: the other fields of `lillama.config.CompressConfig` with its defaults: tokens,
            seq_len, preset, strategy, loss, targets, packing, train, seed, dtype, device,
            overwrite.

    Returns:
        The report, as in report.json: `params_before, params_after, reduction, target_reduction,
        tokens, seconds, peak_memory_bytes, blocks[]` and more.

    Raises:
        InputError: arguments or data that cannot be used; nothing was written.
        RunError: the run failed (NaN, full disk); nothing was left behind.
    """
    started = time.monotonic()
    files = [text] if isinstance(text, str | Path) else list(text)
    config = CompressConfig(
        model=Path(model),
        out=Path(out),
        reduction=reduction,
        text=tuple(Path(file) for file in files),
        **options,
    )
    plan = make_plan(config, needs_weights=True)
    inside = config.out.resolve().is_relative_to(config.model.resolve())
    if inside or config.model.resolve().is_relative_to(config.out.resolve()):
        raise InputError(f"OUT must lie outside MODEL, got {config.out}")
    with fast_mamba():
        run = _Run(config, plan, progress)
        recipe = recipe_json(
            config, plan, run.teacher.headers, run.device, (run.train, run.held_out)
        )
        with CheckpointWriter(config.out, recipe, overwrite=config.overwrite) as writer:
            item = plan.item_bytes if run.save_dtype is None else run.save_dtype.itemsize
            check_space(config.out, round(plan.params_after * item))
            blocks = run.run(writer)
            _, sentinel_shape = sentinel(plan.family, plan.ranks)
            bytes_after = writer.total_bytes - torch.zeros(sentinel_shape).nbytes
            report = {
                "params_before": plan.params_before,
                "params_after": plan.params_after,
                "reduction": plan.reduction,
                "target_reduction": config.reduction,
                "target_weights_reduction": plan.target_weights_reduction,
                "bytes_before": plan.bytes_before,
                "bytes_after": bytes_after,
                "tokens": run.train.num_tokens,
                "seconds": round(time.monotonic() - started, 2),
                "peak_memory_bytes": _peak_memory_bytes(run.device),
                "device": str(run.device),
                "blocks": blocks,
            }
            writer.finish(
                config_json(config, plan),
                report=report,
                model_card=model_card(config, report),
                copies=[file for name in COPIED_FILES if (file := config.model / name).is_file()],
            )
    return report
