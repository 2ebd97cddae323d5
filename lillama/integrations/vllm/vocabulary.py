"""Token embeddings and the output head in vLLM from low-rank factors, table = B A.

B [V, R] is split over the rows of the vocabulary as vLLM splits the table: each process has the
rows of its own tokens and zeros for what pads the vocabulary. A [R, H] is whole everywhere, so
neither needs an exchange that the dense table does not: the head's R products are made by each
process for its own logits, and vLLM masks and sums embeddings as it does dense ones. Always plain
factors, also in a checkpoint of the pivot gauge.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from lillama.integrations.vllm.shards import Part, multiplied_out, not_loaded

__all__ = ["LowRankVocabularyMethod"]


class LowRankVocabularyMethod(QuantizeMethodBase):
    """embedding = B[ids] A, logits = (x A^T) B^T + bias.

    Args:
        name: checkpoint name of the matrix.
        rank: R.
        sentinel: name of the tensor that is in the checkpoint only to make other loaders fail.
    """

    def __init__(self, name: str, rank: int, sentinel: str) -> None:
        self.name, self.rank, self.sentinel = name, rank, sentinel

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        rows, H = sum(output_partition_sizes), input_size_per_partition
        self.part = Part(self.name, self.rank, (rows,))
        # the sentinel is loaded into an empty weight: not every model of vLLM's drops it by name
        shapes = {"lr_A": (self.rank, H), "lr_B": (rows, self.rank), "weight": (0, H)}
        for name, shape in shapes.items():
            value = torch.full(shape, torch.nan, dtype=params_dtype)
            parameter = Parameter(value, requires_grad=False)
            layer.register_parameter(name, parameter)
            self._set_loader(layer, parameter, name)

    def _set_loader(self, layer: Any, parameter: Parameter, name: str) -> None:
        def load(target: Parameter, loaded: Tensor) -> None:
            if name == "weight":
                if f"{self.name}.weight" != self.sentinel:
                    raise ValueError(
                        f"{self.name} has a rank in config.json and a .weight in the checkpoint"
                    )
                return
            V, H = layer.org_vocab_size, layer.embedding_dim
            wanted = (self.rank, H) if name == "lr_A" else (V, self.rank)
            if tuple(loaded.shape) != wanted:
                raise ValueError(
                    f"{self.name}.{name} is {list(loaded.shape)}, wanted {list(wanted)}: it does "
                    "not fit its config.json"
                )
            if name == "lr_A":
                target.data.copy_(loaded)
                return
            indices = layer.shard_indices
            own = loaded[indices.org_vocab_start_index : indices.org_vocab_end_index]
            target.data[: len(own)] = own
            target.data[len(own) :] = 0

        parameter.weight_loader = load  # type: ignore[attr-defined]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, then settle what is computed with: as in linear layers, the
        part of the table itself where the factors held here are no smaller.

        Raises:
            ValueError: a factor was missing from the checkpoint, or holds NaN or infinity.
        """
        A, B = layer.lr_A.data, layer.lr_B.data
        bad = ", ".join(not_loaded({f"{self.name}.lr_A": A, f"{self.name}.lr_B": B}))
        if bad:
            raise ValueError(
                f"the checkpoint lacks {bad}, or holds NaN or infinity there; it is damaged"
            )
        del layer.weight
        self.is_dense = layer.tp_size > 1 and not self.part.is_worth_factors(A.shape[1])
        if self.is_dense:
            del layer.lr_A, layer.lr_B
            table = Parameter(multiplied_out(A, B), requires_grad=False)
            layer.register_parameter("lr_W", table)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """input_ [tokens], indices of rows held here -> [tokens, H]."""
        if self.is_dense:
            return F.embedding(input_, layer.lr_W)
        return F.embedding(input_, layer.lr_B) @ layer.lr_A

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., H] -> logits [..., rows held here]."""
        if self.is_dense:
            return F.linear(x, layer.lr_W, bias)
        return F.linear(F.linear(x, layer.lr_A), layer.lr_B, bias)
