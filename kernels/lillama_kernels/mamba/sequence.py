"""How tensors over time lie in memory."""

import torch
from torch import Tensor

__all__ = ["sequence_like"]


def sequence_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty [B, D, T] in which channels are neighbours where they are in x, else steps."""
    batch, channels, steps = x.shape
    if x.stride(1) == 1 and channels > 1:
        return x.new_empty((batch, steps, channels), dtype=dtype).transpose(1, 2)
    return x.new_empty(x.shape, dtype=dtype)
