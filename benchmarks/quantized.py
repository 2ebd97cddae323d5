"""What rounding weights to few bits costs, so that factors can be compared with it at equal bytes.

Round to nearest, symmetric, one bf16 scale for every GROUP numbers of a row: the simplest of the
weight-only formats that torchao and compressed-tensors store (int8 and int4 with groups). Nothing
is packed: the rounded numbers are written as fp32, and bytes are counted.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["GROUP", "round_checkpoint"]

# numbers that share a scale; fewer where a row is not a multiple of it
GROUP = 32
# stay as they are, as in those tools: routers, norms, convolutions, the state's matrix
_KEPT = ("gate.weight", "norm.weight", "conv1d.weight", "A_log")


def _rounded(weight: Tensor, bits: int) -> tuple[Tensor, int]:
    """[N, K] as the nearest numbers that can be stored, fp32, and the bytes they take."""
    group = next(size for size in (GROUP, 16, 8, 4, 2, 1) if weight.shape[-1] % size == 0)
    rows = weight.float().unflatten(-1, (-1, group))
    largest = 2 ** (bits - 1) - 1
    scale = (rows.abs().amax(-1, keepdim=True) / largest).bfloat16().float()
    scale = scale.where(scale > 0, torch.ones_like(scale))
    found = (rows / scale).round().clamp(-largest - 1, largest) * scale
    return found.flatten(-2), weight.numel() * bits // 8 + 2 * scale.numel()


def round_checkpoint(source: Path, out: Path, bits: int) -> int:
    """Write `source`, dense or compressed, to the new folder `out` with its matrices rounded.

    Returns:
        Bytes of the tensors so stored; what is not rounded counts as it is.
    """
    shutil.copytree(source, out)
    total = 0
    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if tensor.dim() == 2 and tensor.is_floating_point() and not name.endswith(_KEPT):
                tensors[name], size = _rounded(tensor, bits)
                total += size
            else:
                total += tensor.nbytes
        save_file(tensors, shard, {"format": "pt"})
    return total
