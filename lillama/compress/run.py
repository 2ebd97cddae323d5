"""The loop over the blocks: teacher pass, factors, training, and on to the next; one teacher and
one student block in memory at a time."""

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lillama.checkpoint.format import dtype_of
from lillama.checkpoint.shard_file import entries_of
from lillama.checkpoint.writer import CheckpointWriter
from lillama.compress.distributed import Ranks
from lillama.compress.events import Events
from lillama.compress.measure.moments import MomentCollector
from lillama.compress.plan.memory import peak_memory_bytes
from lillama.compress.plan.plan import Plan
from lillama.compress.stop import StopRequest
from lillama.compress.teacher.activations import ActivationMemory
from lillama.compress.teacher.blocks import TeacherBlocks
from lillama.compress.teacher.hidden_states import Streams
from lillama.compress.train.distill import (
    Stream,
    TrainResult,
    TrainState,
    held_out_loss,
    train_block,
)
from lillama.compress.train.outside import HEAD, REST, Outside
from lillama.compress.train.student import (
    block_entries,
    empty_student,
    fill_student,
    fix_gauge,
    load_student,
    round_parameters,
    student_structure,
)
from lillama.config import CompressConfig, Loss
from lillama.data.sequences import TokenBlocks

__all__ = ["Progress", "Run", "pieces_of"]

logger = logging.getLogger(__name__)

# progress(stage, done, total): units are tokens run through a block
Progress = Callable[[str, int, int], None]


def pieces_of(num_blocks: int) -> list[str]:
    """Names of the shards of a compressed model: one a block, two for what is outside them."""
    return [*(f"block-{index}" for index in range(num_blocks)), REST, HEAD]


def _reader(file: Path) -> Callable[[str], Tensor]:
    """Reads tensors of a file by name; the file need not be there before the first."""

    def read(name: str) -> Tensor:
        with safe_open(file, "pt", backend="pread") as opened:
            return opened.get_tensor(name)

    return read


class Run:
    """The state of one compression; `lillama.compress` is its only user.

    Args:
        blocks: calibration tokens, training and held-out. memory: where streams may live. stop:
        asks for an end between two steps.
    """

    def __init__(
        self,
        options: CompressConfig,
        plan: Plan,
        teacher: TeacherBlocks,
        blocks: tuple[TokenBlocks, TokenBlocks],
        memory: ActivationMemory,
        stop: StopRequest,
        events: Events,
        ranks: Ranks,
        progress: Progress | None,
    ) -> None:
        self.options, self.recipe, self.plan = options, options.recipe, plan
        self.teacher, self.device = teacher, teacher.device
        self.blocks = blocks
        self.memory, self.stop, self.progress = memory, stop, progress
        self.events, self.ranks = events, ranks
        self.done_tokens = 0
        self.save_dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
        # without training only the held-out loss needs it, and is then told of the teacher's input
        self.loss: Loss = options.loss if options.train else "teacher"
        self.with_student = self.loss != "teacher"
        # the student's stream leaves the teacher's behind the first factorised matrix
        first = 0 if plan.embedding is not None else min(plan.blocks, default=0)
        last = max(plan.blocks, default=-1)
        train, held_out = (part.input_ids.numel() for part in blocks)
        self.outside = Outside(teacher, plan, self.save_dtype)
        self.trains_head = options.train and options.recipe.train_head and plan.head is not None
        end = len(teacher.blocks) if self.trains_head else last
        self.total_tokens = train if self.trains_head and ranks.owns(len(teacher.blocks)) else 0
        for index in filter(ranks.owns, range(min(end + 1, len(teacher.blocks)))):
            passes = 1 + (self.with_student and first <= index < end)
            trained = options.train and index in plan.blocks
            self.total_tokens += passes * (train + held_out) + trained * train

    def tick(self, stage: str, tokens: int) -> None:
        self.done_tokens += tokens
        if self.progress is not None:
            self.progress(stage, self.done_tokens, self.total_tokens)
        if not stage.endswith("train"):  # training saves first
            self.stop.check()

    def block(self, index: int, streams: Streams, writer: CheckpointWriter, is_last: bool) -> None:
        """Bring one block to its shard, or back from it, and both streams behind it."""
        compressed = index in self.plan.blocks
        finished = writer.done(f"block-{index}") is not None
        resumed = not finished and self._step_of(index, writer) is not None
        started = time.monotonic()
        with contextlib.ExitStack() as loaded:
            streams.receive_teacher(index)
            block = loaded.enter_context(self.teacher.block(index))
            collect = compressed and not finished and not resumed
            moments = streams.teacher_pass(block, index, collect)
            if not is_last:
                streams.pass_teacher(index)
            if not compressed:
                self._add(writer, index, None)
                if not is_last:
                    streams.receive_student(index)
                    streams.advance(block, index)
                return
            notes = {} if finished else self._notes(moments, index, writer)
            moments.finish()
            student = student_structure(self.teacher, index, block, self.plan)
            params = sum(p.numel() for p in block.parameters())
        # the teacher's weights are gone from here on
        if finished:
            load_student(student, self.teacher, index, self.plan, writer.file_of(f"block-{index}"))
        elif resumed:  # from a state that holds all that trains
            empty_student(student, self.device)
        else:
            gradients = _reader(writer.gradients_of(f"block-{index}"))
            fill_student(student, self.teacher, index, moments, self.recipe, gradients)
        streams.receive_student(index)
        if not finished:
            row = {**notes, "params_before": params, "params_after": params - self._saved(index)}
            self._finish(index, student, streams, row, started, writer)
        if not is_last:
            streams.advance(student, index)

    def _finish(
        self,
        index: int,
        student: nn.Module,
        streams: Streams,
        row: dict[str, Any],
        started: float,
        writer: CheckpointWriter,
    ) -> None:
        """Train a student block and write it with its row of the report."""
        result = self._distill(index, student, streams.of_block(index), row, writer)
        dtype = self.save_dtype or dtype_of(self.plan.config)
        largest = fix_gauge(student, self.teacher, index, self.plan, dtype)
        round_parameters(student, dtype)
        report = {
            "index": index,
            "name": self.teacher.block_paths[index],
            "ranks": sorted(set(self.plan.ranks_of_block(index).values())),
            "held_out_loss_before": result.loss_before,
            "held_out_loss_after": result.loss_after,
            "steps": result.steps,
            "best_step": result.best_step,
            **row,
            **({} if largest is None else {"pivot_largest": round(largest, 3)}),
            "seconds": round(time.monotonic() - started, 2),
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        self.events("block", **report)
        self._add(writer, index, student, report=report)

    def _saved(self, index: int) -> int:
        """Parameters that a block loses."""
        ranks = self.plan.ranks_of_block(index)
        return sum(m.params_saved(ranks[m.name]) for m in self.plan.matrices if m.name in ranks)

    def _add(
        self, writer: CheckpointWriter, index: int, student: nn.Module | None, **record: object
    ) -> None:
        """Write a block's shard unless it is there."""
        piece = f"block-{index}"
        if writer.done(piece) is None:
            ranks = self.plan.ranks_of_block(index)
            entries = block_entries(self.teacher, index, student, ranks, self.save_dtype)
            writer.add_shard(piece, entries, **record)

    def _distill(
        self,
        index: int,
        student: nn.Module,
        streams: list[Stream],
        notes: dict[str, Any],
        writer: CheckpointWriter,
    ) -> TrainResult:
        """Train the student block, or only judge it."""
        if self.options.train:
            result = self._train(index, student, streams, notes, writer)
        else:
            loss = held_out_loss(
                student,
                streams[1],
                self.loss,
                self.recipe.form,
                self.recipe.batch_size,
                self.device,
            )
            result = TrainResult(loss, loss, 0, 0)
        logger.info(
            "%s: held-out loss %.5f -> %.5f (step %d of %d)",
            self.teacher.block_paths[index],
            result.loss_before, result.loss_after, result.best_step, result.steps,
        )  # fmt: skip
        return result

    def _notes(
        self, moments: MomentCollector, index: int, writer: CheckpointWriter
    ) -> dict[str, Any]:
        """What the teacher pass says for the report; of a block that is resumed, what it said."""
        record = writer.step_of(f"block-{index}")
        if record is not None:
            return record["notes"]
        tokens = moments.expert_tokens()
        if not tokens:
            return {}
        starved = [expert for expert in sorted(tokens) if tokens[expert] < moments.floor]
        if starved:
            logger.warning(
                "%s: experts %s saw fewer than %d of the calibration tokens; the rest of their "
                "statistics comes from tokens routed elsewhere (more --tokens would help)",
                self.teacher.block_paths[index], starved, moments.floor,
            )  # fmt: skip
        counts = [tokens[expert] for expert in sorted(tokens)]
        return {"expert_tokens": counts, "starved_experts": starved}

    def _train(
        self,
        index: int,
        student: nn.Module,
        streams: list[Stream],
        notes: dict[str, Any],
        writer: CheckpointWriter,
    ) -> TrainResult:
        piece = f"block-{index}"

        def on_step(rows: int, loss: Tensor) -> bool:
            self.tick(f"block {index} train", rows * self.options.seq_len)
            return self.stop.wanted

        def save(state: TrainState) -> None:
            writer.add_step(
                piece,
                state.step,
                entries_of(state.tensors),
                loss_before=state.loss_before,
                best_loss=state.best_loss,
                best_step=state.best_step,
                notes=notes,
            )
            self.stop.check()

        return train_block(
            student,
            *streams,
            recipe=self.recipe,
            loss=self.loss,
            peak_learning_rate=self.recipe.peak_learning_rate(self.plan.config.hidden_size),
            seed=self.options.seed + index,
            device=self.device,
            name=self.teacher.block_paths[index],
            on_step=on_step,
            resume=self._saved_state(index, writer),
            save=save,
            save_every_s=self.options.checkpoint_seconds,
            on_judge=lambda step, loss: self.events(
                "judged", block=index, step=step, held_out_loss=loss
            ),
        )

    def _step_of(self, index: int, writer: CheckpointWriter) -> dict[str, Any] | None:
        return writer.step_of(f"block-{index}") if self.options.train else None

    def _saved_state(self, index: int, writer: CheckpointWriter) -> TrainState | None:
        """The state that an interrupted run left inside this block."""
        record = self._step_of(index, writer)
        if record is None:
            return None
        with safe_open(writer.staging / record["file"], "pt", backend="pread") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        losses = record["loss_before"], record["best_loss"]
        return TrainState(record["step"], *losses, record["best_step"], tensors)

    def run(self, writer: CheckpointWriter) -> list[dict]:
        """Every block in order, then the rest; returns the report's rows."""
        compressed = self.plan.blocks
        last = max(compressed, default=-1)
        if self.plan.embedding is not None:
            self._add_rest(writer)  # first: the student's stream begins with its embeddings
        behind = len(self.teacher.blocks)
        unfinished = [i for i in range(last + 1) if writer.done(f"block-{i}") is None]
        if self.trains_head and writer.done(HEAD) is None:
            unfinished = [behind]
        if unfinished:
            streams = Streams(
                self.plan,
                self.recipe,
                self.teacher,
                self.blocks,
                self.memory,
                self.tick,
                self.ranks,
                with_student=self.with_student,
                shard=writer.file_of(REST),
            )
            with contextlib.closing(streams):
                for index in filter(self.ranks.owns, range(min(unfinished[-1] + 1, behind))):
                    self.block(index, streams, writer, is_last=index == unfinished[-1])
                if unfinished == [behind] and self.ranks.owns(behind):
                    self._train_head(streams, writer)
                self.ranks.wait()
        for index in filter(self.ranks.owns, range(last + 1, len(self.teacher.blocks))):
            # nothing above `last` is compressed: its tensors pass through, nothing is computed
            self._add(writer, index, None)
            self.stop.check()
        self._add_rest(writer)
        if self.ranks.owns(behind) and writer.done(HEAD) is None:
            writer.add_shard(HEAD, self.outside.behind(writer))
        self.ranks.barrier()
        writer.reload()  # what the other ranks wrote
        records = [writer.done(f"block-{index}") for index in compressed]
        return [record["report"] for record in records if record is not None]

    def _add_rest(self, writer: CheckpointWriter) -> None:
        if self.ranks.is_first and writer.done(REST) is None:
            writer.add_shard(REST, self.outside.rest(writer))

    def head_report(self, writer: CheckpointWriter) -> dict[str, Any] | None:
        """What training the head did; None where it was not trained."""
        record = writer.done(HEAD)
        return None if record is None else record.get("report")

    def _train_head(self, streams: Streams, writer: CheckpointWriter) -> None:
        started = time.monotonic()

        def on_step(rows: int) -> None:
            self.tick("head train", rows * self.options.seq_len)
            self.stop.check()  # nothing inside the head's training is saved

        train, held_out = streams.of_head()
        trained, result = self.outside.train_head(
            train, held_out, self.recipe, self.options.seed, writer, on_step
        )
        report = {**result, "seconds": round(time.monotonic() - started, 2)}
        self.events("head", **report)
        writer.add_shard(HEAD, self.outside.behind(writer, trained), report=report)
