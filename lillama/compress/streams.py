"""The teacher's and the student's activations, moved from block to block: what to read, where to
write, and what the moments see on the way."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lillama.audio import AudioClips
from lillama.checkpoint import factor_shapes
from lillama.compress.activations import ActivationMemory, ActivationStore, prefetched, stored_dtype
from lillama.compress.blocks import TeacherBlocks, block_output
from lillama.compress.calibrate import MomentCollector, key_of
from lillama.compress.distill import Stream
from lillama.compress.encoder import Encoded, EncoderDecoderBlocks
from lillama.compress.gauge import plain_tensors
from lillama.compress.head import HeadStream
from lillama.compress.plan import Plan
from lillama.compress.ranks import STUDENT, TEACHER, Ranks
from lillama.config import Recipe
from lillama.data import TokenBlocks
from lillama.errors import RunError

__all__ = ["Streams"]


@dataclass
class _Set:
    """One set of token blocks and its activations before the current block; `spare` is a store that
    nothing needs any more. `blocks` is what the current block's rows are made of: in an encoder the
    clips of the tokens. In a decoder behind one, `encoded` is what that put out."""

    tokens: TokenBlocks
    blocks: TokenBlocks | AudioClips
    teacher: ActivationStore
    student: ActivationStore
    target: ActivationStore | None = None
    spare: ActivationStore | None = None
    encoded: Encoded | None = None

    @property
    def diverged(self) -> bool:
        return self.student is not self.teacher

    @property
    def is_told_apart(self) -> bool:
        """Whether a block is told other things of the student's stream than of the teacher's."""
        return self.encoded is not None and self.encoded.diverged

    def stores(self) -> list[ActivationStore]:
        """Each once."""
        every = [self.teacher, self.student, self.target, self.spare]
        every += [] if self.encoded is None else [self.encoded.teacher, self.encoded.student]
        return list({id(store): store for store in every if store is not None}.values())


class Streams:
    """The training and the held-out set before the current block, in this order.

    Args:
        blocks: training and held-out tokens. memory: where streams may live. tick(stage, tokens) is
            called after every batch that went through a block. with_student: False where nothing is
        trained on the student's stream, which then is not computed. shard: where the student's
        embeddings are, if they are factorised.

    Raises:
        RunError: no room for the streams.
    """

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        teacher: TeacherBlocks,
        blocks: tuple[TokenBlocks, TokenBlocks],
        memory: ActivationMemory,
        tick: Callable[[str, int], None],
        ranks: Ranks,
        *,
        with_student: bool,
        shard: Path,
    ) -> None:
        self.plan, self.recipe, self.teacher = plan, recipe, teacher
        self.ranks, self.with_student = ranks, with_student
        self.device, self.memory, self.tick = teacher.device, memory, tick
        self.dtype = stored_dtype(self.device)
        if ranks.owns(0):
            with teacher.embeddings():
                self.sets = [self._embed(part) for part in blocks]
            if self.diverges_before(0):
                self._embed_student(shard)
        else:
            stores = [self._new(part) for part in blocks]
            self.sets = [_Set(p, p, s, s) for p, s in zip(blocks, stores, strict=True)]

    def close(self) -> None:
        """Give the memory and the files back."""
        for data in self.sets:
            for store in data.stores():
                store.close()

    def rows(self, count: int) -> tuple[Tensor, ...]:
        return torch.arange(count).split(self.recipe.batch_size)

    def _new(self, blocks: TokenBlocks | AudioClips) -> ActivationStore:
        return self.memory.new((*blocks.shape, self.plan.config.hidden_size), self.dtype)

    def _embed(self, tokens: TokenBlocks) -> _Set:
        blocks = self.teacher.rows_of(tokens, 0)
        store = self._embedded(blocks)
        return _Set(tokens, blocks, store, store)

    def _embed_student(self, shard: Path) -> None:
        """Begin the student's stream with its own embeddings, as a user will have them."""
        matrix = self.plan.embedding
        assert matrix is not None
        rank, gauge = self.plan.ranks[matrix.name], self.plan.gauge
        parts = factor_shapes((matrix.N, matrix.K), rank, gauge, is_embedding=True)
        with safe_open(shard, "pt", backend="pread") as file:
            stored = {key: file.get_tensor(f"{matrix.name}.{key}") for key in parts}
        A, B = (factor.float() for factor in plain_tensors(stored))
        with self.teacher.embeddings((A.to(self.device), B.to(self.device))):
            for data in self.sets:
                data.student = self._embedded(data.blocks)

    def _embedded(self, blocks: TokenBlocks | AudioClips) -> ActivationStore:
        store = self._new(blocks)
        for rows in self.rows(len(store)):
            store.write(rows, self.teacher.first_states(blocks, rows))
        store.flush()
        return store

    @torch.no_grad()
    def _enter_decoder(self) -> None:
        """From behind an encoder's last block to before the decoder's first: what both encoders put
        out takes the place of their streams."""
        assert isinstance(self.teacher, EncoderDecoderBlocks)
        for data in self.sets:
            data.encoded = Encoded(data.teacher, data.student)
            for store in {id(s): s for s in (data.teacher, data.student)}.values():
                for rows in self.rows(len(store)):
                    hidden = store.read(rows).to(self.device, torch.float32)
                    store.write(rows, self.teacher.encoded(hidden))
                store.flush()
            if data.spare is not None:
                data.spare.close()
            data.blocks, data.target, data.spare = data.tokens, None, None
        with self.teacher.embeddings():
            for data in self.sets:
                data.teacher = data.student = self._embedded(data.blocks)

    def of_block(self, index: int) -> list[Stream]:
        """What a student block is trained and judged on; after `teacher_pass`."""
        return [
            Stream(
                d.teacher, d.student, d.target, d.blocks.mask, self.kwargs_of(d, index), d.encoded
            )
            for d in self.sets
            if d.target is not None
        ]

    def of_head(self) -> list[HeadStream]:
        """What the output head is trained and judged on, behind the last block."""
        behind = len(self.teacher.blocks)
        self.receive_teacher(behind)
        self.receive_student(behind)
        return [HeadStream(d.teacher, d.student, d.blocks.mask) for d in self.sets]

    def kwargs_of(self, data: _Set, index: int) -> Callable[[Tensor], dict[str, Any]]:
        """Keyword arguments of block `index` for given rows; asked once a batch size where nothing
        is padded."""
        cache: dict[int, dict[str, Any]] = {}
        length = data.blocks.shape[1]

        def kwargs(rows: Tensor) -> dict[str, Any]:
            if data.blocks.mask is None and len(rows) in cache:
                return cache[len(rows)]
            mask = None if data.blocks.mask is None else data.blocks.mask[rows]
            found = self.teacher.arguments_of(index, (len(rows), length), mask)
            if data.blocks.mask is None:
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
        """Run a block over a whole stream, the teacher's or the student's as the end of `stage`
        says; `sink` may be `source`. With `moments`, its hooks see each batch's mask.

        Raises:
            RunError: the block's output is not finite (names the block).
        """
        kwargs = self.kwargs_of(data, index)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        batches = self.rows(len(source))
        for rows, hidden in prefetched(batches, source.read, source.background):
            if moments is not None:
                moments.mask = None if data.blocks.mask is None else data.blocks.mask[rows]
            hidden = hidden.to(self.device, torch.float32)
            given = kwargs(rows)
            if data.encoded is not None:
                given = given | data.encoded.arguments(rows, stage.split()[-1:], self.device)
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"
            ):
                hidden = block_output(block, hidden, given)
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
        """Targets of every stream; moments from the training stream when the init wants them."""
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
            data.target, data.spare = data.spare or self._new(data.blocks), None
            if data is self.sets[0]:
                with moments.attached():
                    self.forward(block, data, data.teacher, data.target, index, stage, moments)
            else:
                self.forward(block, data, data.teacher, data.target, index, stage)
        return moments

    def diverges_before(self, index: int) -> bool:
        """Whether the student's stream into block `index` is not the teacher's."""
        from_start = self.plan.embedding is not None
        return self.with_student and (from_start or index > min(self.plan.blocks, default=index))

    def receive_teacher(self, index: int) -> None:
        """Take the teacher's stream into block `index` from the rank that has it."""
        if self.ranks.world == 1 or index == 0:
            return
        self.ranks.wait()
        for data in self.sets:
            data.teacher, *others = data.stores()
            data.student, data.target = data.teacher, None
            if self.diverges_before(index):
                data.student = others.pop() if others else self._new(data.blocks)
            data.spare = others.pop() if others else None
        teachers = [data.teacher for data in self.sets]
        self.ranks.receive(index, TEACHER, teachers, self.recipe.batch_size)

    def pass_teacher(self, index: int) -> None:
        """Send the teacher's stream behind block `index` on while the block is trained."""
        if self.ranks.world > 1:
            targets = [data.target for data in self.sets if data.target is not None]
            self.ranks.send_behind(index + 1, TEACHER, targets, self.recipe.batch_size)

    def receive_student(self, index: int) -> None:
        """As `receive_teacher`, of the student's stream, which is there later."""
        if self.ranks.world > 1 and index > 0 and self.diverges_before(index):
            students = [data.student for data in self.sets]
            self.ranks.receive(index, STUDENT, students, self.recipe.batch_size)

    def advance(self, student: nn.Module, index: int) -> None:
        """Move both streams behind block `index`; the student's takes the place of one that nothing
        needs any more."""
        if self.ranks.world > 1:
            if self.diverges_before(index + 1):
                stage = f"block {index} student"
                for data in self.sets:
                    self.forward(student, data, data.student, data.student, index, stage)
                students = [data.student for data in self.sets]
                self.ranks.send(index + 1, STUDENT, students, self.recipe.batch_size)
            return
        replaced = self.with_student and index in self.plan.blocks
        for data in self.sets:
            assert data.target is not None
            before = data.teacher
            if replaced or data.diverged or data.is_told_apart:
                stage = f"block {index} student"
                self.forward(student, data, data.student, data.student, index, stage)
                spare = before if data.diverged else None
                data.teacher, data.target, data.spare = data.target, None, spare
            else:
                data.teacher = data.student = data.target
                data.target, data.spare = None, before
        if index + 1 == self.teacher.num_encoder:
            self._enter_decoder()
