"""What the Triton kernel files share: aligned sizes, row layout, and the device that launches."""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["current_device_of", "multiple_of_8", "unit_stride"]


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


def unit_stride(matrix: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, itself if they are."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
