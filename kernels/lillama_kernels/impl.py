"""Which implementation of an op runs: the one documented rule, and the switch that forces it.

`impl="auto"` means Triton for tensors on a CUDA device (ROCm's too) when the op has a Triton kernel
for that GPU and dtype, the committed table of the op (`launch.py`) calls for it at that shape, and
the package triton is installed; it means the reference everywhere else. An explicit
`impl="reference"` or `impl="triton"` is obeyed or raises; it never falls back. On the CPU
`impl="triton"` runs in Triton's interpreter, which is on when TRITON_INTERPRET=1 was set before
Python started, and raises otherwise. `kernels_impl(...)` replaces "auto" for everything that runs
inside it, in this thread or async task; code under torch.compile keeps what was in force when it
was traced.
"""

import contextlib
import contextvars
import functools
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import torch

__all__ = [
    "Impl",
    "autocasting",
    "has_triton",
    "interpreting",
    "kernels_impl",
    "resolve_impl",
    "work_dtype",
]

Impl = Literal["auto", "reference", "triton"]

# Ops with a Triton kernel: each kernel file adds its op here.
TRITON_OPS = frozenset(
    {
        "causal_conv1d",
        "distill_loss",
        "low_rank_experts",
        "low_rank_linear",
        "mamba_mixer_step",
        "pivot_low_rank_linear",
        "selective_scan",
    }
)

logger = logging.getLogger(__name__)
# What replaces "auto", for which ops (None: all of them)
_forced: contextvars.ContextVar[tuple[Impl, frozenset[str] | None]] = contextvars.ContextVar(
    "lillama_kernels_impl", default=("auto", None)
)
_logged: set[tuple[str, str]] = set()


def _check(impl: str) -> None:
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")


# torch.compile cannot trace ContextVar.get
@torch.compiler.assume_constant_result
def _forced_impl(op: str) -> Impl:
    impl, ops = _forced.get()
    return impl if ops is None or op in ops else "auto"


# Every call asks both; neither answer changes while Python runs.
@functools.cache
def _triton_found() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_is_interpreted() -> bool:
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    return not isinstance(tl.cdiv, JITFunction)


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return _triton_found()


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter.

    TRITON_INTERPRET=1 must be set before triton is imported: its own functions are bound then.
    """
    return _triton_is_interpreted()


def autocasting(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the tensor's device; never for one that has none, as meta."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def work_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What nn.Linear would compute in: autocast leaves fp64 alone."""
    if autocasting(tensor) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


@contextlib.contextmanager
def kernels_impl(impl: Impl, ops: Iterable[str] | None = None) -> Iterator[None]:
    """Force the implementation of every op called with `impl="auto"` inside the block.

    Args:
        impl: "reference", "triton", or "auto" (back to the rule).
        ops: names of the ops that it holds for, all when left out. The others go back to the rule.

    Raises:
        ValueError: `impl` is none of the three.
    """
    _check(impl)
    token = _forced.set((impl, None if ops is None else frozenset(ops)))
    try:
        yield
    finally:
        _forced.reset(token)


def _check_triton(op: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if op not in TRITON_OPS:
        raise NotImplementedError(
            f"{op} has no Triton kernel yet; pass impl='reference' or leave impl='auto'"
        )
    if not has_triton():
        raise NotImplementedError(
            "impl='triton' needs the package triton, which is not installed; "
            "pip install triton (Linux) or leave impl='auto'"
        )
    if interpreting():
        if dtype == torch.bfloat16:
            raise NotImplementedError(
                f"{op}: Triton's interpreter computes bfloat16 wrongly; "
                "give it float32 or float16, or unset TRITON_INTERPRET"
            )
    elif not tensor.is_cuda:
        raise NotImplementedError(
            f"{op}: impl='triton' needs tensors on a CUDA device, got {tensor.device}; leave "
            "impl='auto', or set TRITON_INTERPRET=1 to run the kernel slowly on the CPU"
        )


def resolve_impl(
    op: str,
    impl: Impl,
    tensor: torch.Tensor,
    auto: Literal["reference", "triton"] = "triton",
    dtype: torch.dtype | None = None,
) -> Literal["reference", "triton"]:
    """Return the implementation that op must run for `tensor`.

    Args:
        auto: what the op's table says for this call, where Triton can run at all.
        dtype: what the kernel would compute in, when that is not the dtype of `tensor` (autocast).

    Raises:
        ValueError: `impl` is not a known name.
        NotImplementedError: Triton was asked for and cannot run: the op has no kernel, the package
            is missing, the tensor is on the CPU without the interpreter, or bf16 in the
            interpreter.
    """
    _check(impl)
    wanted = _forced_impl(op) if impl == "auto" else impl
    if wanted == "triton":
        _check_triton(op, tensor, tensor.dtype if dtype is None else dtype)
    elif wanted == "auto":
        can_run = tensor.is_cuda and op in TRITON_OPS and has_triton()
        wanted = auto if can_run else "reference"
    if not torch.compiler.is_compiling() and (op, wanted) not in _logged:
        _logged.add((op, wanted))
        logger.info("%s runs its %s implementation (asked: %s)", op, wanted, impl)
    return wanted
