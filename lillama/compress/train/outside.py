"""What is outside the blocks, for the two shards that hold it: embeddings and the rest, and what is
behind the blocks, where a factorised head is trained first."""

from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lillama.checkpoint.format import sentinel
from lillama.checkpoint.gauge import pivot_tensors
from lillama.checkpoint.shard_file import DTYPES, Entry, entries_of
from lillama.compress.measure.vocabulary import vocabulary_factors
from lillama.compress.plan.matrix import Matrix
from lillama.compress.session.session import HEAD, Session
from lillama.compress.train.block_inputs import HeadInputs
from lillama.compress.train.head import HeadTrainer
from lillama.compress.train.student import copied_entry, stored_as

__all__ = ["Outside"]


class Outside:
    """The entries of both shards of this session's result."""

    def __init__(self, session: Session) -> None:
        teacher, plan = session.teacher, session.plan
        self.teacher, self.plan, self.save_dtype = teacher, plan, session.save_dtype
        self.recipe, self.seed, self.writer = session.recipe, session.config.seed, session.writer
        head = f"{plan.family.head}.weight"
        before = tuple(f"{name}." for name in plan.family.before_blocks)
        inside = f"{teacher.block_path}."
        outside = {n: r for n, r in teacher.runtime.items() if not r.startswith(inside)}
        parameters = dict(teacher.model.named_parameters())
        # by hub name: vectors that no module before the blocks owns, as the final norm's
        self.vectors = [
            name
            for name, runtime in outside.items()
            if len(teacher.headers[name].shape) == 1
            and runtime in parameters
            and not runtime.startswith(before)
        ]
        self._behind = [name for name in outside if name == head or name in self.vectors]
        self._rest = [name for name in outside if name not in self._behind]
        self.factorised = {
            f"{matrix.name}.weight": matrix
            for matrix in plan.matrices
            if matrix.block in plan.outside and matrix.name in plan.ranks
        }

    def rest(self) -> list[Entry]:
        """Embeddings, factorised or as they are, and what else is not behind the blocks."""
        return [entry for name in self._rest for entry in self._entries(name)]

    def behind(self, trained: dict[str, Tensor] | None = None) -> list[Entry]:
        """Final norm and head, and the sentinel. trained: head factors and vectors by hub name,
        instead of those that the model came with."""
        name, shape = sentinel(self.plan.family, self.plan.ranks)
        entries = entries_of({name: torch.zeros(shape)})
        if trained is None:
            return [e for name in self._behind for e in self._entries(name)] + entries
        return self._stored(trained) + entries

    def _entries(self, name: str) -> list[Entry]:
        if name not in self.factorised:
            return [copied_entry(self.teacher, name, self.save_dtype)]
        matrix = self.factorised[name]
        return self._stored(self._in_gauge(matrix, self._factors(matrix))[0])

    def _dtype_of(self, name: str) -> torch.dtype:
        dense = name if name in self.teacher.headers else f"{name.rpartition('.')[0]}.weight"
        return self.save_dtype or DTYPES[self.teacher.headers[dense].dtype]

    def _stored(self, tensors: dict[str, Tensor]) -> list[Entry]:
        return entries_of(
            {n: stored_as(n, value, self._dtype_of(n)) for n, value in tensors.items()}
        )

    def _in_gauge(
        self, matrix: Matrix, factors: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], float | None]:
        """Plain factors in the gauge that they are stored in, by hub name; and the largest number
        of C, None where the gauge is plain."""
        largest = None
        if matrix.pivot:
            dtype, is_embedding = self._dtype_of(f"{matrix.name}.weight"), matrix.block < 0
            A, B = factors["lr_A"], factors["lr_B"]
            factors, largest = pivot_tensors(A, B, dtype, is_embedding=is_embedding)
        return {f"{matrix.name}.{key}": value for key, value in factors.items()}, largest

    def _factors(self, matrix: Matrix) -> dict[str, Tensor]:
        """The plain ones of the embeddings or of the head, fp64."""
        weight = self.teacher.read(f"{matrix.name}.weight").to(self.teacher.device)

        def measured(name: str) -> Tensor:
            # both are in one file, which goes when the head's shard is written: the last one
            with safe_open(self.writer.gradients_of(HEAD), "pt", backend="pread") as file:
                return file.get_tensor(name)

        return vocabulary_factors(matrix, weight, self.plan.ranks[matrix.name], measured)

    def train_head(
        self,
        train: HeadInputs,
        held_out: HeadInputs,
        on_step: Callable[[int], None],
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The head's factors, in the gauge that they are stored in, and the vectors behind the
        blocks as trained, by hub name; and the report."""
        matrix, runtime = self.plan.head, self.teacher.runtime
        assert matrix is not None
        factors = self._factors(matrix)
        vectors = {runtime[name]: self.teacher.read(name) for name in self.vectors}
        trainer = HeadTrainer(
            self.teacher,
            runtime[f"{matrix.name}.weight"],
            (factors["lr_A"], factors["lr_B"]),
            vectors,
            self.recipe,
            self.seed + len(self.teacher.blocks),
        )
        with self.teacher.head():
            report = trainer.train(train, held_out, on_step)
        found = {name: trainer.vectors[runtime[name]].detach() for name in self.vectors}
        factors = {"lr_A": trainer.A.detach(), "lr_B": trainer.B.detach()}
        del trainer  # its moments and best state: the conversion needs as much
        trained, largest = self._in_gauge(matrix, factors)
        if largest is not None:
            report["pivot_largest"] = round(largest, 3)
        return found | trained, report
