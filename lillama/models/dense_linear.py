"""The two kinds of linear layer of transformers. Conv1D (GPT-2) holds its weight the other way
round, [K, N], in memory and in checkpoints; here every weight is [N, K], as nn.Linear's."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["DenseLinear", "is_linear", "is_transposed", "linear_shape", "linear_weight"]

DenseLinear = nn.Linear | Conv1D


def is_linear(module: nn.Module | None) -> bool:
    """Whether factors can take a module's place: what a subclass does would be lost."""
    return type(module) in (nn.Linear, Conv1D)


def is_transposed(module: nn.Module | None) -> bool:
    """Whether its weight is [K, N]."""
    return isinstance(module, Conv1D)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight [N, K] of a linear layer or of embeddings [V, H], a view."""
    weight = module.get_parameter("weight")
    return weight.mT if is_transposed(module) else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(N, K) of the same."""
    N, K = linear_weight(module).shape
    return N, K
