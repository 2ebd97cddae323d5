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

from lillama.checkpoint import dtype_of, sentinel
from lillama.checkpoint_writer import CheckpointWriter
from lillama.compress.activations import ActivationMemory
from lillama.compress.allocate import Matrix
from lillama.compress.blocks import TeacherBlocks
from lillama.compress.calibrate import MomentCollector
from lillama.compress.distill import Stream, TrainResult, TrainState, held_out_loss, train_block
from lillama.compress.events import Events
from lillama.compress.memory import peak_memory_bytes
from lillama.compress.plan import Plan
from lillama.compress.ranks import Ranks
from lillama.compress.stop import StopRequest
from lillama.compress.streams import Streams
from lillama.compress.student import (
    block_entries,
    copied_entry,
    empty_student,
    fill_student,
    fix_gauge,
    load_student,
    round_parameters,
    stored_as,
    student_structure,
)
from lillama.compress.vocabulary import vocabulary_factors
from lillama.config import CompressConfig, Loss
from lillama.data import TokenBlocks
from lillama.shard_file import DTYPES, Entry, entries_of

__all__ = ["REST", "Progress", "Run", "pieces_of"]

logger = logging.getLogger(__name__)

# progress(stage, done, total): units are tokens run through a block
Progress = Callable[[str, int, int], None]
REST = "rest"


def pieces_of(num_blocks: int) -> list[str]:
    """Names of the shards of a compressed model: one a block, one for what is outside them."""
    return [*(f"block-{index}" for index in range(num_blocks)), REST]


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
        self.total_tokens = 0
        for index in filter(ranks.owns, range(last + 1)):
            passes = 1 + (self.with_student and first <= index < last)
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
            "name": f"{self.teacher.block_path}.{index}",
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
        return sum(m.saved(ranks[m.name]) for m in self.plan.matrices if m.name in ranks)

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
            "%s.%d: held-out loss %.5f -> %.5f (step %d of %d)",
            self.teacher.block_path, index,
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
                "%s.%d: experts %s saw fewer than %d of the calibration tokens; the rest of their "
                "statistics comes from tokens routed elsewhere (more --tokens would help)",
                self.teacher.block_path, index, starved, moments.floor,
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
        piece, seq_len = f"block-{index}", self.options.seq_len

        def on_step(rows: int, loss: Tensor) -> bool:
            self.tick(f"block {index} train", rows * seq_len)
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
            name=f"{self.teacher.block_path}.{index}",
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
        unfinished = [i for i in range(last + 1) if writer.done(f"block-{i}") is None]
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
                for index in filter(self.ranks.owns, range(unfinished[-1] + 1)):
                    self.block(index, streams, writer, is_last=index == unfinished[-1])
                self.ranks.wait()
        for index in filter(self.ranks.owns, range(last + 1, len(self.teacher.blocks))):
            # nothing above `last` is compressed: its tensors pass through, nothing is computed
            self._add(writer, index, None)
            self.stop.check()
        self._add_rest(writer)
        self.ranks.barrier()
        writer.reload()  # what the other ranks wrote
        records = [writer.done(f"block-{index}") for index in compressed]
        return [record["report"] for record in records if record is not None]

    def _add_rest(self, writer: CheckpointWriter) -> None:
        if self.ranks.is_first and writer.done(REST) is None:
            writer.add_shard(REST, self.rest(writer))

    def rest(self, writer: CheckpointWriter) -> list[Entry]:
        """Embeddings, final norm, head: everything outside the blocks, factorised or as it is, and
        the sentinel."""
        inside = f"{self.teacher.block_path}."
        factorised = {f"{m.name}.weight": m for m in self.plan.matrices
                      if m.block in self.plan.outside and m.name in self.plan.ranks}  # fmt: skip
        entries: list[Entry] = []
        for name, runtime in self.teacher.runtime.items():
            if name in factorised:
                entries += self._vocabulary(factorised[name], writer)
            elif not runtime.startswith(inside):
                entries.append(copied_entry(self.teacher, name, self.save_dtype))
        name, shape = sentinel(self.plan.family, self.plan.ranks)
        return [*entries, *entries_of({name: torch.zeros(shape)})]

    def _vocabulary(self, matrix: Matrix, writer: CheckpointWriter) -> list[Entry]:
        """The factors of the embeddings or of the head."""
        name = f"{matrix.name}.weight"
        weight = self.teacher.read(name).to(self.device)
        dtype = self.save_dtype or DTYPES[self.teacher.headers[name].dtype]
        measured = _reader(writer.gradients_of(REST))
        rank = self.plan.ranks[matrix.name]
        factors = vocabulary_factors(matrix, weight, rank, measured)
        stored = {f"{matrix.name}.{key}": value for key, value in factors.items()}
        return entries_of({key: stored_as(key, value, dtype) for key, value in stored.items()})
