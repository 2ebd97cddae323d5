"""causal_conv1d beside transformers' own: a padded grouped conv1d whose tail is cut off."""

import pytest
import torch.nn.functional as F
from lillama_kernels import causal_conv1d
from lillama_kernels.mamba import reference
from lillama_kernels.testing import causal_conv1d_inputs, check_op
from torch import Tensor

from benchmarks.rows import Work, compare, variant
from benchmarks.shapes import SCANS

WIDTH = 4  # conv_kernel of every published Mamba


def padded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv1d(x, weight[:, None], bias, padding=WIDTH - 1, groups=x.shape[1])[
        ..., : x.shape[2]
    ]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("shape", SCANS, ids=lambda s: s.name)
def bench_causal_conv1d(benchmark, shape, backward, dtype, device):
    sizes = (shape.batch, shape.channels, shape.steps, WIDTH)
    inputs = causal_conv1d_inputs(*sizes, dtype=dtype, device=device)
    check_op(causal_conv1d, reference.causal_conv1d, inputs)
    del inputs["initial_state"]  # transformers' takes none
    variants = {
        "ours": variant(causal_conv1d, reference.causal_conv1d, [inputs], backward),
        "padded": variant(padded, reference.causal_conv1d, [inputs], backward, thorough=False),
    }
    # forward reads x and writes y; backward reads x and grad_y and writes grad_x
    least = (5.0 if backward else 2.0) * inputs["x"].numel() * inputs["x"].element_size()
    compare(
        benchmark, variants, shape=shape, dtype=dtype, device=device, work=Work(bytes_moved=least)
    )
