"""Several processes at one run, under torchrun: each works at the blocks p, p + world_size, ...

A block needs the teacher's hidden states from the block before it, and (unless the loss is
"teacher") the student's. The teacher's are passed on before a block is trained, by a thread, so
that the next process runs its teacher pass and its factorisation meanwhile; with the loss "teacher"
nothing else is needed and all processes train at the same time. Hidden states travel through host
memory over gloo.
"""

import datetime
import os
import threading
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lillama.checkpoint.folder import differences
from lillama.compress.teacher.activations import ActivationStore
from lillama.errors import InputError, LillamaError, RunError

__all__ = ["STUDENT", "TEACHER", "Processes"]

# A process may wait for days for the one before it; a peer that died is noticed by its connection.
TIMEOUT = datetime.timedelta(days=30)
START_TIMEOUT = datetime.timedelta(minutes=5)
TEACHER, STUDENT = 0, 1


class Processes:
    """The processes of a run; one alone when torchrun did not start it.

    Raises (on construction):
        RunError: the other processes cannot be reached.
    """

    def __init__(self) -> None:
        self.process, self.world_size = 0, 1
        self._sender: threading.Thread | None = None
        self._failure: BaseException | None = None
        if not dist.is_torchelastic_launched():
            return
        store, self.process, self.world_size = self._rendezvous()
        try:
            dist.init_process_group(
                "gloo", store=store, rank=self.process, world_size=self.world_size, timeout=TIMEOUT
            )
        except (RuntimeError, ValueError) as error:
            raise RunError(f"cannot reach the other processes of torchrun: {error}") from error

    @staticmethod
    def _rendezvous() -> tuple[Any, int, int]:
        """A store of this attempt only: what a killed attempt left in torchrun's would make the
        next one wait for processes that are gone."""
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
        address, port, process, world_size, attempt = (os.environ[name] for name in names)
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address, int(port), is_master=False, timeout=START_TIMEOUT
        )
        store = dist.PrefixStore(f"lillama-{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
        return store, int(process), int(world_size)

    def device(self, name: str) -> str:
        """--device of this process: under torchrun each takes the GPU of its own number."""
        if self.world_size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{os.environ['LOCAL_RANK']}"
        return name

    @property
    def is_first(self) -> bool:
        return self.process == 0

    def owner(self, index: int) -> int:
        """Return the process that works at block `index`."""
        return index % self.world_size

    def owns(self, index: int) -> bool:
        return self.owner(index) == self.process

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def agree(self, what: str, value: object) -> None:
        """Raises InputError in every process when they do not all have the same value."""
        if self.world_size == 1:
            return
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value)
        for number, other in enumerate(values):
            if other != values[0]:
                found = "; ".join(differences(values[0], other))
                raise InputError(
                    f"processes 0 and {number} do not agree on {what} ({found}); give all the same "
                    "command, model, text and versions"
                )

    def raise_together(self, error: LillamaError | None) -> None:
        """Raise an error that the first process met in every one."""
        if self.world_size > 1:
            box = [None if error is None else (type(error), str(error))]
            dist.broadcast_object_list(box, src=0)
            if error is None and box[0] is not None:
                kind, text = box[0]
                raise kind(text)
        if error is not None:
            raise error

    def send(self, index: int, kind: int, stores: Iterable[ActivationStore], batch: int) -> None:
        """Pass hidden states on to the owner of block `index`. Raises RunError."""
        try:
            for store in stores:
                for rows in torch.arange(len(store)).split(batch):
                    values = store.read(rows).to("cpu").contiguous()
                    dist.send(values, self.owner(index), tag=2 * index + kind)
        except RuntimeError as error:
            raise RunError(f"process {self.owner(index)} is gone: {error}") from error

    def send_behind(self, index: int, kind: int, stores: list[ActivationStore], batch: int) -> None:
        """As `send`, by a thread; the stores must stay as they are until `wait`."""

        def work() -> None:
            try:
                self.send(index, kind, stores, batch)
            except BaseException as error:
                self._failure = error

        self._sender = threading.Thread(target=work, daemon=True)
        self._sender.start()

    def wait(self) -> None:
        """Wait for `send_behind`. Raises RunError."""
        if self._sender is not None:
            self._sender.join()
            self._sender = None
        if self._failure is not None:
            raise self._failure

    def receive(self, index: int, kind: int, stores: Iterable[ActivationStore], batch: int) -> None:
        """Fill stores with what the owner of the block before `index` sends. Raises RunError."""
        try:
            for store in stores:
                for rows in torch.arange(len(store)).split(batch):
                    values: Tensor = torch.empty((len(rows), *store.shape[1:]), dtype=store.dtype)
                    dist.recv(values, self.owner(index - 1), tag=2 * index + kind)
                    store.write(rows, values)
                store.flush()
        except RuntimeError as error:
            raise RunError(f"process {self.owner(index - 1)} is gone: {error}") from error

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
