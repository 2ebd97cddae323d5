"""Fixtures of the tests of operations."""

from collections.abc import Callable

import pytest
import torch
from lillama_kernels import low_rank_linear


@pytest.fixture
def runs(device: torch.device) -> Callable[[torch.dtype], bool]:
    """runs(dtype): whether a Triton kernel can run here in that dtype.

    False for bf16 in the interpreter, which would be wrong; it is then seen refused.
    """

    def judge(dtype: torch.dtype) -> bool:
        if dtype != torch.bfloat16 or device.type == "cuda":
            return True
        x, w = torch.ones(1, 8, dtype=dtype), torch.ones(8, 8, dtype=dtype)
        with pytest.raises(NotImplementedError, match="interpreter computes bfloat16 wrongly"):
            low_rank_linear(x, w, w, impl="triton")
        return False

    return judge
