"""The loop over the blocks: teacher pass, factors, training, and on to the next; one teacher and
one student block in memory at a time."""

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from lillama.checkpoint.format import dtype_of
from lillama.checkpoint.shard_file import entries_of
from lillama.compress.measure.moments import MomentCollector
from lillama.compress.plan.memory import peak_memory_bytes
from lillama.compress.session.session import HEAD, REST, Session, block_shard
from lillama.compress.train.block_inputs import BlockInputs
from lillama.compress.train.distill import (
    BlockTraining,
    TrainResult,
    TrainState,
    held_out_loss,
    train_block,
)
from lillama.compress.train.hidden_states import HiddenStates
from lillama.compress.train.outside import Outside
from lillama.compress.train.student import (
    block_entries,
    empty_student,
    fill_student,
    fix_gauge,
    load_student,
    round_parameters,
    student_structure,
)
from lillama.config import Loss

__all__ = ["Run"]

logger = logging.getLogger(__name__)


def _reader(file: Path) -> Callable[[str], Tensor]:
    """Reads tensors of a file by name; the file need not be there before the first."""

    def read(name: str) -> Tensor:
        with safe_open(file, "pt", backend="pread") as opened:
            return opened.get_tensor(name)

    return read


class Run:
    """The loop over the blocks of one session; `lillama.compress` is its only user."""

    def __init__(self, session: Session) -> None:
        self.session, self.plan, self.recipe = session, session.plan, session.recipe
        self.options, self.writer = session.config, session.writer
        self.teacher, self.processes = session.teacher, session.processes
        options, plan = self.options, self.plan
        # without training only the held-out loss needs it, and is then told of the teacher's input
        self.loss: Loss = options.loss if options.train else "teacher"
        self.with_student = self.loss != "teacher"
        self.outside = Outside(session)
        self.trains_head = options.train and self.recipe.train_head and plan.head is not None
        self.count = session.counter(self._total_tokens())

    def _total_tokens(self) -> int:
        """Tokens that this process runs through blocks, as often as it does."""
        # the student's hidden states leave the teacher's behind the first factorised matrix
        first = 0 if self.plan.embedding is not None else min(self.plan.blocks, default=0)
        behind = len(self.teacher.blocks)
        end = behind if self.trains_head else max(self.plan.blocks, default=-1)
        train, held_out = (part.input_ids.numel() for part in self.session.sequences)
        total = train if self.trains_head and self.processes.owns(behind) else 0
        for index in filter(self.processes.owns, range(min(end + 1, behind))):
            passes = 1 + (self.with_student and first <= index < end)
            trained = self.options.train and index in self.plan.blocks
            total += passes * (train + held_out) + trained * train
        return total

    def tick(self, stage: str, tokens: int) -> None:
        self.count(stage, tokens)
        if not stage.endswith("train"):  # training saves first
            self.session.stop.check()

    def block(self, index: int, states: HiddenStates, is_last: bool) -> None:
        """Bring one block to its shard, or back from it, and the hidden states behind it."""
        compressed = index in self.plan.blocks
        finished = self.writer.done(block_shard(index)) is not None
        resumed = not finished and self._step_of(index) is not None
        started = time.monotonic()
        with contextlib.ExitStack() as loaded:
            states.receive_teacher(index)
            block = loaded.enter_context(self.teacher.block(index))
            collect = compressed and not finished and not resumed
            moments = states.teacher_pass(block, index, collect)
            if not is_last:
                states.pass_teacher(index)
            if not compressed:
                self._add(index, None)
                if not is_last:
                    states.receive_student(index)
                    states.advance(block, index)
                return
            notes = {} if finished else self._notes(moments, index)
            moments.finish()
            student = student_structure(self.teacher, index, block, self.plan)
            params = sum(p.numel() for p in block.parameters())
        # the teacher's weights are gone from here on
        if finished:
            file = self.writer.file_of(block_shard(index))
            load_student(student, self.teacher, index, self.plan, file)
        elif resumed:  # from a state that holds all that trains
            empty_student(student, self.session.device)
        else:
            gradients = _reader(self.writer.gradients_of(block_shard(index)))
            fill_student(student, self.teacher, index, moments, self.recipe, gradients)
        states.receive_student(index)
        if not finished:
            row = {**notes, "params_before": params, "params_after": params - self._saved(index)}
            self._finish(index, student, states, row, started)
        if not is_last:
            states.advance(student, index)

    def _finish(
        self,
        index: int,
        student: nn.Module,
        states: HiddenStates,
        row: dict[str, Any],
        started: float,
    ) -> None:
        """Train a student block and write it with its row of the report."""
        result = self._distill(index, student, states.of_block(index), row)
        dtype = self.session.save_dtype or dtype_of(self.plan.config)
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
            "peak_memory_bytes": peak_memory_bytes(self.session.device),
        }
        self.session.events("block", **report)
        self._add(index, student, report=report)

    def _saved(self, index: int) -> int:
        """Parameters that a block loses."""
        ranks = self.plan.ranks_of_block(index)
        return sum(m.params_saved(ranks[m.name]) for m in self.plan.matrices if m.name in ranks)

    def _add(self, index: int, student: nn.Module | None, **record: object) -> None:
        """Write a block's shard unless it is there."""
        shard = block_shard(index)
        if self.writer.done(shard) is None:
            ranks = self.plan.ranks_of_block(index)
            entries = block_entries(self.teacher, index, student, ranks, self.session.save_dtype)
            self.writer.add_shard(shard, entries, **record)

    def _distill(
        self,
        index: int,
        student: nn.Module,
        inputs: list[BlockInputs],
        notes: dict[str, Any],
    ) -> TrainResult:
        """Train the student block, or only judge it."""
        if self.options.train:
            result = self._train(index, student, inputs, notes)
        else:
            loss = held_out_loss(
                student,
                inputs[1],
                self.loss,
                self.recipe.form,
                self.recipe.batch_size,
                self.session.device,
            )
            result = TrainResult(loss, loss, 0, 0)
        logger.info(
            "%s: held-out loss %.5f -> %.5f (step %d of %d)",
            self.teacher.block_paths[index],
            result.loss_before, result.loss_after, result.best_step, result.steps,
        )  # fmt: skip
        return result

    def _notes(self, moments: MomentCollector, index: int) -> dict[str, Any]:
        """What the teacher pass says for the report; of a block that is resumed, what it said."""
        record = self.writer.step_of(block_shard(index))
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
        inputs: list[BlockInputs],
        notes: dict[str, Any],
    ) -> TrainResult:
        shard = block_shard(index)

        def on_step(rows: int, loss: Tensor) -> bool:
            self.tick(f"block {index} train", rows * self.options.seq_len)
            return self.session.stop.wanted

        def save(state: TrainState) -> None:
            self.writer.add_step(
                shard,
                state.step,
                entries_of(state.tensors),
                loss_before=state.loss_before,
                best_loss=state.best_loss,
                best_step=state.best_step,
                notes=notes,
            )
            self.session.stop.check()

        training = BlockTraining(
            recipe=self.recipe,
            loss=self.loss,
            peak_learning_rate=self.recipe.peak_learning_rate(self.plan.config.hidden_size),
            seed=self.options.seed + index,
            device=self.session.device,
            name=self.teacher.block_paths[index],
            on_step=on_step,
            save=save,
            save_every_s=self.options.checkpoint_seconds,
            on_judge=lambda step, loss: self.session.events(
                "judged", block=index, step=step, held_out_loss=loss
            ),
        )
        train, held_out = inputs
        return train_block(student, train, held_out, training, self._saved_state(index))

    def _step_of(self, index: int) -> dict[str, Any] | None:
        return self.writer.step_of(block_shard(index)) if self.options.train else None

    def _saved_state(self, index: int) -> TrainState | None:
        """The state that an interrupted run left inside this block."""
        record = self._step_of(index)
        if record is None:
            return None
        with safe_open(self.writer.staging / record["file"], "pt", backend="pread") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        losses = record["loss_before"], record["best_loss"]
        return TrainState(record["step"], *losses, record["best_step"], tensors)

    def run(self) -> list[dict]:
        """Every block in order, then the rest; returns the report's rows."""
        compressed = self.plan.blocks
        last = max(compressed, default=-1)
        if self.plan.embedding is not None:
            self._add_rest()  # first: the student's hidden states begin with them
        behind = len(self.teacher.blocks)
        unfinished = [i for i in range(last + 1) if self.writer.done(block_shard(i)) is None]
        if self.trains_head and self.writer.done(HEAD) is None:
            unfinished = [behind]
        if unfinished:
            states = HiddenStates(self.session, self.tick, with_student=self.with_student)
            with contextlib.closing(states):
                for index in filter(self.processes.owns, range(min(unfinished[-1] + 1, behind))):
                    self.block(index, states, is_last=index == unfinished[-1])
                if unfinished == [behind] and self.processes.owns(behind):
                    self._train_head(states)
                self.processes.wait()
        for index in filter(self.processes.owns, range(last + 1, len(self.teacher.blocks))):
            # nothing above `last` is compressed: its tensors pass through, nothing is computed
            self._add(index, None)
            self.session.stop.check()
        self._add_rest()
        if self.processes.owns(behind) and self.writer.done(HEAD) is None:
            self.writer.add_shard(HEAD, self.outside.behind())
        self.processes.barrier()
        self.writer.reload()  # what the other processes wrote
        records = [self.writer.done(block_shard(index)) for index in compressed]
        return [record["report"] for record in records if record is not None]

    def _add_rest(self) -> None:
        if self.processes.is_first and self.writer.done(REST) is None:
            self.writer.add_shard(REST, self.outside.rest())

    def head_report(self) -> dict[str, Any] | None:
        """What training the head did; None where it was not trained."""
        record = self.writer.done(HEAD)
        return None if record is None else record.get("report")

    def _train_head(self, states: HiddenStates) -> None:
        started = time.monotonic()

        def on_step(rows: int) -> None:
            self.tick("head train", rows * self.options.seq_len)
            self.session.stop.check()  # nothing inside the head's training is saved

        train, held_out = states.of_head()
        trained, result = self.outside.train_head(train, held_out, on_step)
        report = {**result, "seconds": round(time.monotonic() - started, 2)}
        self.session.events("head", **report)
        self.writer.add_shard(HEAD, self.outside.behind(trained), report=report)
