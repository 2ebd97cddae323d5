"""Which implementation of an op runs: the one documented rule, and the switch that forces it.

`impl="auto"` means Triton for tensors on a CUDA device (ROCm's too) when the op has a Triton kernel
for that GPU and dtype, the op calls for it at that shape, and the package triton is installed; it
means the reference everywhere else. An explicit `impl="reference"` or `impl="triton"` is obeyed or
raises; it never falls back. On the CPU `impl="triton"` runs in Triton's interpreter, which is on
when TRITON_INTERPRET=1 was set before Python started, and raises otherwise. `kernels_impl(...)`
replaces "auto" for everything that runs inside it, in this thread or async task; code under
torch.compile keeps what was in force when it was traced.
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
    "DTYPES",
    "TARGETS",
    "Impl",
    "autocasting",
    "compiling_for",
    "dtype_name",
    "has_triton",
    "interpreting",
    "kernels_impl",
    "resolve_impl",
    "runs_triton",
    "target_of",
    "trains",
    "work_dtype",
]

Impl = Literal["auto", "reference", "triton"]

TRITON_OPS = frozenset(
    ("causal_conv1d", "distill_loss", "low_rank_experts", "low_rank_linear", "mamba_mixer_step",
     "pivot_low_rank_linear", "selective_scan")
)  # fmt: skip
# torch dtypes that kernels take, with Triton's names
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# GPUs that the kernels are compiled for: A100, consumer Ampere and Ada, H100 and H200, B200, MI300
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")

logger = logging.getLogger(__name__)
# What replaces "auto", for which ops (None: all of them)
_forced: contextvars.ContextVar[tuple[Impl, frozenset[str] | None]] = contextvars.ContextVar(
    "lillama_kernels_impl", default=("auto", None)
)
_logged: set[tuple[str, str]] = set()
# The target of `compiling_for`
_compiled_for: str | None = None
# Triton's interpreter rounds bf16 wrongly; the tests mend that
interprets_bf16 = False


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
    """Whether Triton kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set before triton
    was imported, which binds its functions."""
    return _triton_is_interpreted()


@functools.cache
def _target_of_card(index: int) -> str | None:
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
        return name if name in TARGETS else None
    major, minor = torch.cuda.get_device_capability(index)
    # 8.6, 8.7 and 8.9 and all of 12.x have the small shared memory of sm_89
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89"
    return {9: "sm_90", 10: "sm_100", 12: "sm_89"}.get(major)


@torch.compiler.assume_constant_result
def _target(device_type: str, index: int | None) -> str | None:
    if _compiled_for is not None or not has_triton():
        return _compiled_for
    if interpreting():
        return "sm_90"
    if device_type != "cuda":
        return None
    return _target_of_card(torch.cuda.current_device() if index is None else index)


def target_of(device: torch.device) -> str | None:
    """The entry of TARGETS whose tiles a device runs, None where there is none; in the interpreter
    sm_90."""
    return _target(device.type, device.index)


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Inside the block ops take CPU tensors to the kernels and tiles of a target, which is for a
    Triton driver that compiles and launches nothing: see compile_gate.py."""
    global _compiled_for
    _compiled_for = target
    try:
        yield
    finally:
        _compiled_for = None


def dtype_name(dtype: torch.dtype) -> str:
    """Triton's name of a dtype that the kernels take; TypeError for others."""
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise TypeError(f"Triton kernels take {names}; got {str(dtype).removeprefix('torch.')}")
    return DTYPES[dtype]


def autocasting(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the tensor's device; never for one that has none, as meta."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def work_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What nn.Linear would compute in: autocast leaves fp64 alone."""
    if autocasting(tensor) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def trains(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd wants a gradient of any of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
        if dtype == torch.bfloat16 and not interprets_bf16:
            raise NotImplementedError(
                f"{op}: Triton's interpreter computes bfloat16 wrongly; "
                "give it float32 or float16, or unset TRITON_INTERPRET"
            )
    elif not tensor.is_cuda and _compiled_for is None:
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
        auto: what the op wants for this call, where Triton can run at all.
        dtype: what the kernel would compute in, when that is not the dtype of `tensor` (autocast).

    Raises:
        ValueError: `impl` is not a known name.
        NotImplementedError: Triton was asked for and cannot run: no kernel, no package triton, a
            tensor on the CPU without the interpreter, or bf16 in the interpreter.
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


def runs_triton(
    op: str, impl: Impl, x: torch.Tensor, fits: bool = True, dtype: torch.dtype | None = None
) -> bool:
    """Whether op runs its Triton kernel for x; "auto" does so on a GPU with tiles, in a dtype that
    kernels take, where the call `fits`.

    Raises:
        As `resolve_impl`; TypeError: `impl="triton"` and a dtype that kernels do not take.
    """
    dtype = x.dtype if dtype is None else dtype
    # the device first: where there is no GPU, triton is not imported to ask
    wants = x.is_cuda and fits and dtype in DTYPES and target_of(x.device) is not None
    if resolve_impl(op, impl, x, "triton" if wants else "reference", dtype) == "reference":
        return False
    dtype_name(dtype)  # refuses what the kernels do not take
    return True
