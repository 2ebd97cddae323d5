"""Triton's interpreter as the tests want it: with a GPU's bf16, faster, and on request strict.

`install` is called once, before any kernel runs, where TRITON_INTERPRET is set:

* bf16 is what it is on a GPU: numbers of 16 bits that are only loaded, stored, converted and
  multiplied by tl.dot, which sums in fp32. Triton 3.9 cuts digits off where a GPU rounds to the
  nearest even, and multiplies the bits. Other arithmetic on bf16 raises: our kernels have none.
* The language is bound to the interpreter once, not at every call of every function.
* An associative scan runs over whole slices, not element by element; the order is the same.

`sanitize` adds a check of every load and store: its address lies in a tensor that the launch was
given, and no program reads or writes what another one of the same launch has written.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from lillama_kernels import dispatch
from triton.runtime import interpreter

__all__ = ["install", "sanitize"]

Builder: Any = interpreter.InterpreterBuilder
Handle: Any = interpreter.TensorHandle
Executor: Any = interpreter.GridExecutor


# bf16
def widened(bits: np.ndarray) -> np.ndarray:
    """fp32 of bf16, which is its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(numbers: np.ndarray) -> np.ndarray:
    """bf16 bits of numbers, to the nearest, to the even one of two: by PyTorch, on the CPU."""
    wide = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32))
    return wide.bfloat16().view(torch.uint16).numpy().reshape(numbers.shape)


def is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, source: Any, target: Any) -> Any:
        scalar = target.scalar
        if is_bf16(source) == (scalar == tl.bfloat16):
            return original(self, source, target)
        if is_bf16(source):
            return original(self, Handle(widened(source.data), tl.float32), target)
        return Handle(rounded(source.data), scalar)

    return run


def dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (Handle(widened(h.data), tl.float32) if is_bf16(h) else h for h in (a, b))
        return original(self, a, b, *others)

    return run


def refused(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, first: Any, *others: Any) -> Any:
        if is_bf16(first):
            raise TypeError("arithmetic on bf16; convert to float32 first")
        return original(self, first, *others)

    return run


# Speed
class _Bound:
    """What binding the language returns: nothing is undone."""

    def restore(self) -> None:
        pass


def bound_once(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    done: set[str] = set()

    def bind(function: Any) -> _Bound:
        names = {n for n, v in function.__globals__.items() if v is tl or v is tl.core}
        key = " ".join(sorted(function.__globals__[n].__name__ for n in names))
        if key not in done:
            original(function)
            done.add(key)
        return _Bound()

    return bind


def scan_of_slices(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """interpreter.ScanOps.generic_scan, one step for all elements that are not along the axis."""
    types = [given.dtype for given in inputs]
    given = [np.moveaxis(tensor.handle.data, self.axis, 0) for tensor in inputs]
    found = [np.empty_like(data) for data in given]
    state: tuple[Any, ...] = ()
    for i in range(len(given[0])):
        here = tuple(self.to_tensor(d[i], t) for d, t in zip(given, types, strict=True))
        state = here if i == 0 else self.combine_fn.fn(*state, *here)
        state = state if isinstance(state, tuple) else (state,)
        for out, tensor in zip(found, state, strict=True):
            out[i] = tensor.handle.data.reshape(out[i].shape)
    back = [np.ascontiguousarray(np.moveaxis(data, 0, self.axis)) for data in found]
    return [self.to_tensor(data, dtype) for data, dtype in zip(back, types, strict=True)]


def install() -> None:
    assert dispatch.interpreting(), "TRITON_INTERPRET was not set when triton was imported"
    Builder.cast_impl = cast(Builder.cast_impl)
    Builder.create_dot = dot(Builder.create_dot)
    for name in ("binary_op", "unary_op", "create_fabs", "create_fma", "create_rsqrt"):
        setattr(Builder, name, refused(getattr(Builder, name)))
    dispatch.interprets_bf16 = True
    interpreter._patch_lang = bound_once(interpreter._patch_lang)
    interpreter.ScanOps.generic_scan = scan_of_slices


# The check of loads and stores
def tensors_in(arguments: Any) -> Iterator[torch.Tensor]:
    for value in arguments:
        if isinstance(value, tuple):
            yield from tensors_in(value)
        elif isinstance(value, torch.Tensor) and value.numel():
            yield value


class _Launch:
    """The memory that a launch may touch, and who has touched what."""

    def __init__(self, arguments: Any) -> None:
        spans = sorted(
            (t.data_ptr(), t.data_ptr() + t.element_size() * (1 + self.reach(t)))
            for t in tensors_in(arguments)
        )
        self.starts = np.array([start for start, _ in spans], dtype=np.uint64)
        # of several that start earlier the one that reaches furthest counts
        ends = np.array([end for _, end in spans], dtype=np.uint64)
        self.ends = np.maximum.accumulate(ends) if spans else ends
        self.reads: list[tuple[int, np.ndarray]] = []
        self.writes: list[tuple[int, np.ndarray]] = []

    @staticmethod
    def reach(tensor: torch.Tensor) -> int:
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        return sum((size - 1) * stride for size, stride in sizes)

    def touch(self, what: str, pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data, dtype=np.uint64)
        counted = np.broadcast_to(mask.data, addresses.shape).astype(bool)
        used = addresses[counted]
        width = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        before = np.searchsorted(self.starts, used, side="right") - 1
        inside = (before >= 0) & (used + width <= self.ends[np.maximum(before, 0)])
        if not inside.all():
            raise AssertionError(f"{what} of {(~inside).sum()} elements outside of every argument")
        x, y, z = interpreter.interpreter_builder.grid_idx
        program = x + 65536 * (y + 65536 * z)
        if what == "store" and np.unique(used).size != used.size:
            raise AssertionError("one store writes an element twice")
        (self.writes if what == "store" else self.reads).append((program, np.unique(used)))

    def judge(self, kernel: str) -> None:
        if not self.writes:
            return
        places = np.concatenate([used for _, used in self.writes])
        owners = np.concatenate([np.full(used.size, program) for program, used in self.writes])
        order = np.lexsort((owners, places))
        places, owners = places[order], owners[order]
        if ((places[1:] == places[:-1]) & (owners[1:] != owners[:-1])).any():
            raise AssertionError(f"{kernel}: two programs write one element")
        places, first = np.unique(places, return_index=True)
        for program, used in self.reads:
            at = np.minimum(np.searchsorted(places, used), places.size - 1)
            if ((places[at] == used) & (owners[first[at]] != program)).any():
                raise AssertionError(f"{kernel}: a program reads what another one writes")


def sanitize() -> None:
    current: list[_Launch] = []

    def watched(original: Callable[..., Any], what: str, mask_at: int) -> Callable[..., Any]:
        def run(self: Any, pointers: Any, *others: Any) -> Any:
            current[-1].touch(what, pointers, others[mask_at])
            return original(self, pointers, *others)

        return run

    def launched(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *arguments: Any, **options: Any) -> Any:
            current.append(_Launch([*arguments, *options.values()]))
            try:
                result = original(self, *arguments, **options)
                current[-1].judge(self.fn.__name__)
            finally:
                current.pop()
            return result

        return run

    Builder.create_masked_load = watched(Builder.create_masked_load, "load", 0)
    Builder.create_masked_store = watched(Builder.create_masked_store, "store", 1)
    Executor.__call__ = launched(Executor.__call__)
