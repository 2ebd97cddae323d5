"""Which implementation of an op runs: the one documented rule, and the switch that forces it.

`impl="auto"` means Triton for tensors on a CUDA device when the op has a Triton kernel, and the
reference everywhere else. An explicit `impl="reference"` or `impl="triton"` is obeyed or raises;
it never falls back. `kernels_impl(...)` replaces "auto" for everything that runs inside it, in
this thread or async task; code under torch.compile keeps what was in force when it was traced.
"""

import contextlib
import contextvars
import logging
from collections.abc import Iterator
from typing import Literal, get_args

import torch

__all__ = ["Impl", "kernels_impl", "resolve_impl"]

Impl = Literal["auto", "reference", "triton"]

# Ops with a Triton kernel. Empty until the first kernel lands; each kernel file adds its op here.
TRITON_OPS: frozenset[str] = frozenset()

logger = logging.getLogger(__name__)
_forced: contextvars.ContextVar[Impl] = contextvars.ContextVar(
    "lillama_kernels_impl", default="auto"
)
_logged: set[tuple[str, str]] = set()


def _check(impl: str) -> None:
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")


# torch.compile cannot trace ContextVar.get
@torch.compiler.assume_constant_result
def _forced_impl() -> Impl:
    return _forced.get()


@contextlib.contextmanager
def kernels_impl(impl: Impl) -> Iterator[None]:
    """Force the implementation of every op called with `impl="auto"` inside the block.

    Args:
        impl: "reference", "triton", or "auto" (back to the rule).

    Raises:
        ValueError: `impl` is none of the three.
    """
    _check(impl)
    token = _forced.set(impl)
    try:
        yield
    finally:
        _forced.reset(token)


def resolve_impl(op: str, impl: Impl, tensor: torch.Tensor) -> Literal["reference", "triton"]:
    """Return the implementation that op must run for `tensor`.

    Raises:
        ValueError: `impl` is not a known name.
        NotImplementedError: Triton was asked for and the op has no Triton kernel.
    """
    _check(impl)
    wanted = _forced_impl() if impl == "auto" else impl
    if wanted == "auto":
        wanted = "triton" if tensor.is_cuda and op in TRITON_OPS else "reference"
    elif wanted == "triton" and op not in TRITON_OPS:
        raise NotImplementedError(
            f"{op} has no Triton kernel yet; pass impl='reference' or leave impl='auto'"
        )
    if not torch.compiler.is_compiling() and (op, wanted) not in _logged:
        _logged.add((op, wanted))
        logger.info("%s runs its %s implementation (asked: %s)", op, wanted, impl)
    return wanted
