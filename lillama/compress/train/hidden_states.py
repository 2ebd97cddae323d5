"""The teacher's and the student's hidden states, moved from block to block: what to read, where to
write, and what the moments see on the way."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lillama.checkpoint.format import factor_shapes
from lillama.checkpoint.gauge import plain_tensors
from lillama.compress.measure.moments import MomentCollector, key_of
from lillama.compress.session.processes import STUDENT, TEACHER
from lillama.compress.session.session import REST, Session
from lillama.compress.teacher.activations import (
    ActivationStore,
    prefetched,
    stored_dtype,
)
from lillama.compress.teacher.blocks import block_output
from lillama.compress.train.block_inputs import BlockInputs, HeadInputs
from lillama.data.sequences import TokenBlocks
from lillama.errors import RunError

__all__ = ["HiddenStates"]


@dataclass
class _Set:
    """One set of sequences and its hidden states before the current block; `spare` is a store that
    nothing needs any more."""

    sequences: TokenBlocks
    teacher: ActivationStore
    student: ActivationStore
    target: ActivationStore | None = None
    spare: ActivationStore | None = None

    @property
    def diverged(self) -> bool:
        return self.student is not self.teacher

    def stores(self) -> list[ActivationStore]:
        """Each once."""
        every = (self.teacher, self.student, self.target, self.spare)
        return list({id(store): store for store in every if store is not None}.values())


class HiddenStates:
    """Those of the training and of the held-out sequences before the current block, in this order.

    Args:
        session: of this run. tick(stage, tokens): called after every batch that went through a
            block. with_student: False where nothing is trained on the student's hidden states,
            which then are not computed.

    Raises:
        RunError: no room for them.
    """

    def __init__(
        self, session: Session, tick: Callable[[str, int], None], *, with_student: bool
    ) -> None:
        self.plan, self.recipe, self.teacher = session.plan, session.recipe, session.teacher
        self.processes, self.with_student = session.processes, with_student
        self.device, self.memory, self.tick = session.device, session.new_memory(), tick
        self.dtype = stored_dtype(self.device)
        if self.processes.owns(0):
            with self.teacher.embeddings():
                self.sets = [self._embed(part) for part in session.sequences]
            if self.diverges_before(0):
                self._embed_student(session.writer.file_of(REST))
        else:
            self.sets = [_Set(part, *[self._new(part)] * 2) for part in session.sequences]

    def close(self) -> None:
        """Give the memory and the files back."""
        for data in self.sets:
            for store in data.stores():
                store.close()

    def rows(self, count: int) -> tuple[Tensor, ...]:
        return torch.arange(count).split(self.recipe.batch_size)

    def _new(self, sequences: TokenBlocks) -> ActivationStore:
        return self.memory.new((*sequences.shape, self.plan.config.hidden_size), self.dtype)

    def _embed(self, sequences: TokenBlocks) -> _Set:
        store = self._embedded(sequences)
        return _Set(sequences, store, store)

    def _embed_student(self, shard: Path) -> None:
        """Begin the student's hidden states with its own embeddings, as a user will have them."""
        matrix = self.plan.embedding
        assert matrix is not None
        rank, gauge = self.plan.ranks[matrix.name], self.plan.gauge
        parts = factor_shapes((matrix.N, matrix.K), rank, gauge, is_embedding=True)
        with safe_open(shard, "pt", backend="pread") as file:
            stored = {key: file.get_tensor(f"{matrix.name}.{key}") for key in parts}
        A, B = (factor.float() for factor in plain_tensors(stored))
        with self.teacher.embeddings((A.to(self.device), B.to(self.device))):
            for data in self.sets:
                data.student = self._embedded(data.sequences)

    def _embedded(self, sequences: TokenBlocks) -> ActivationStore:
        store = self._new(sequences)
        for rows in self.rows(len(store)):
            mask = None if sequences.mask is None else sequences.mask[rows]
            store.write(rows, self.teacher.inputs(sequences.input_ids[rows], mask)[0])
        store.flush()
        return store

    def of_block(self, index: int) -> list[BlockInputs]:
        """What a student block is trained and judged on; after `teacher_pass`."""
        return [
            BlockInputs(d.teacher, d.student, d.target, d.sequences.mask, self.kwargs_of(d, index))
            for d in self.sets
            if d.target is not None
        ]

    def of_head(self) -> list[HeadInputs]:
        """What the output head is trained and judged on, behind the last block."""
        behind = len(self.teacher.blocks)
        self.receive_teacher(behind)
        self.receive_student(behind)
        return [HeadInputs(d.teacher, d.student, d.sequences.mask) for d in self.sets]

    def kwargs_of(self, data: _Set, index: int) -> Callable[[Tensor], dict[str, Any]]:
        """Keyword arguments of block `index` for given rows; asked once a batch size where nothing
        is padded."""
        cache: dict[int, dict[str, Any]] = {}
        length = data.sequences.shape[1]

        def kwargs(rows: Tensor) -> dict[str, Any]:
            if data.sequences.mask is None and len(rows) in cache:
                return cache[len(rows)]
            mask = None if data.sequences.mask is None else data.sequences.mask[rows]
            found = self.teacher.arguments((len(rows), length), mask)[index]
            if data.sequences.mask is None:
                cache[len(rows)] = found
            return found

        return kwargs

    @torch.no_grad()
    def forward(
        self,
        block: nn.Module,
        data: _Set,
        source: ActivationStore,
        sink: ActivationStore,
        index: int,
        stage: str,
        moments: MomentCollector | None = None,
    ) -> None:
        """Run a block over a whole store; `sink` may be `source`. With `moments`, its hooks see
        each batch's mask.

        Raises:
            RunError: the block's output is not finite (names the block).
        """
        kwargs = self.kwargs_of(data, index)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        batches = self.rows(len(source))
        for rows, hidden in prefetched(batches, source.read, source.background):
            if moments is not None:
                moments.mask = None if data.sequences.mask is None else data.sequences.mask[rows]
            hidden = hidden.to(self.device, torch.float32)
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"
            ):
                hidden = block_output(block, hidden, kwargs(rows))
            finite &= torch.isfinite(hidden).all()
            sink.write(rows, hidden)
            self.tick(stage, rows.numel() * source.shape[1])
        sink.flush()
        if not bool(finite):
            raise RunError(
                f"the output of {self.teacher.block_paths[index]} ({stage.split()[-1]}) holds "
                "NaN or infinity; the weights of this block or of one before it are broken"
            )

    def teacher_pass(self, block: nn.Module, index: int, collect: bool) -> MomentCollector:
        """Targets of every set; moments from the training set when the init wants them."""
        prefix = f"{self.teacher.block_paths[index]}."
        names = self.plan.ranks_of_block(index)
        keys = [key_of(self.plan.family, prefix, name) for name in names]
        linears = [key for key in keys if isinstance(key, str)]
        with_experts = len(linears) < len(keys)
        wanted = collect and self.recipe.init != "svd"
        floor = self.plan.config.hidden_size
        moments = MomentCollector(
            block,
            self.plan.family,
            linears if wanted else [],
            wanted and with_experts,
            floor=floor,
            sample_rows=math.ceil(floor / len(self.rows(len(self.sets[0].teacher)))),
        )
        stage = f"block {index} teacher"
        for data in self.sets:
            data.target, data.spare = data.spare or self._new(data.sequences), None
            if data is self.sets[0]:
                with moments.attached():
                    self.forward(block, data, data.teacher, data.target, index, stage, moments)
            else:
                self.forward(block, data, data.teacher, data.target, index, stage)
        return moments

    def diverges_before(self, index: int) -> bool:
        """Whether the student's hidden states before block `index` differ from the teacher's."""
        from_start = self.plan.embedding is not None
        return self.with_student and (from_start or index > min(self.plan.blocks, default=index))

    def receive_teacher(self, index: int) -> None:
        """Take the teacher's hidden states before block `index` from the process that has them."""
        if self.processes.world_size == 1 or index == 0:
            return
        self.processes.wait()
        for data in self.sets:
            data.teacher, *others = data.stores()
            data.student, data.target = data.teacher, None
            if self.diverges_before(index):
                data.student = others.pop() if others else self._new(data.sequences)
            data.spare = others.pop() if others else None
        teachers = [data.teacher for data in self.sets]
        self.processes.receive(index, TEACHER, teachers, self.recipe.batch_size)

    def pass_teacher(self, index: int) -> None:
        """Send the teacher's hidden states behind block `index` on while the block is trained."""
        if self.processes.world_size > 1:
            targets = [data.target for data in self.sets if data.target is not None]
            self.processes.send_behind(index + 1, TEACHER, targets, self.recipe.batch_size)

    def receive_student(self, index: int) -> None:
        """As `receive_teacher`, of the student's, which are there later."""
        if self.processes.world_size > 1 and index > 0 and self.diverges_before(index):
            students = [data.student for data in self.sets]
            self.processes.receive(index, STUDENT, students, self.recipe.batch_size)

    def advance(self, student: nn.Module, index: int) -> None:
        """Move both behind block `index`; the student's take the place of what nothing needs any
        more."""
        if self.processes.world_size > 1:
            if self.diverges_before(index + 1):
                stage = f"block {index} student"
                for data in self.sets:
                    self.forward(student, data, data.student, data.student, index, stage)
                students = [data.student for data in self.sets]
                self.processes.send(index + 1, STUDENT, students, self.recipe.batch_size)
            return
        replaced = self.with_student and index in self.plan.blocks
        for data in self.sets:
            assert data.target is not None
            before = data.teacher
            if replaced or data.diverged:
                stage = f"block {index} student"
                self.forward(student, data, data.student, data.student, index, stage)
                spare = before if data.diverged else None
                data.teacher, data.target, data.spare = data.target, None, spare
            else:
                data.teacher = data.student = data.target
                data.target, data.spare = None, before
