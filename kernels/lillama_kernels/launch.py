"""What launchers and kernels share: aligned sizes, row layout, and the device that launches."""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lillama_kernels.dispatch import interpreting, target_of
from lillama_kernels.tiles import PDL_TARGETS

__all__ = [
    "current_device_of",
    "dependent_launch",
    "multiple_of_8",
    "rows_aligned",
    "target_with_tiles",
    "unit_stride",
]


@triton.jit
def multiple_of_8(value, ALIGNED: tl.constexpr):
    """The same value; the compiler learns that it is a multiple of 8, so that 16-bit rows of such a
    length load 16 bytes at a time."""
    if ALIGNED:
        return (value // 8) * 8
    else:
        return value


def current_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def target_with_tiles(tensor: Tensor) -> str:
    """The target whose tiles run where the tensor is.

    Raises:
        NotImplementedError: there are none for that GPU.
    """
    target = target_of(tensor.device)
    if target is None:
        raise NotImplementedError(f"no Triton tiles for the GPU {tensor.device}; use the reference")
    return target


def dependent_launch(target: str) -> dict[str, bool]:
    """Launch options of a kernel that starts while the one in front of it runs (programmatic
    dependent launch); empty where there is no such thing, as in the interpreter."""
    return {"launch_pdl": True} if target in PDL_TARGETS and not interpreting() else {}


def unit_stride(matrix: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, itself if they are."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def rows_aligned(*tensors: Tensor) -> bool:
    """Whether all rows start at multiples of 8 elements, so that they load 16 bytes at a time."""
    return all(t.shape[-1] % 8 == 0 and t.stride(0) % 8 == 0 for t in tensors)
