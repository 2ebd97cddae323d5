"""Token embeddings and the output head in vLLM from low-rank factors, table = B A.

B [V, R] is split over the rows of the vocabulary as vLLM splits the table: each process has the
rows of its own tokens and zeros for what pads the vocabulary. A [R, H] is whole everywhere, so
neither needs an exchange that the dense table does not: the head's R products are made by each
process for its own logits, and vLLM masks and sums embeddings as it does dense ones.

Of a checkpoint in the pivot gauge the identity is written out while it is loaded, R^2 numbers more
than the checkpoint has: in B for the head, whose rows are split, in A for the embeddings.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from lillama.checkpoint.format import factor_shapes
from lillama.checkpoint.pivots import order_of
from lillama.integrations.vllm.shards import (
    UNMARKED,
    Part,
    multiplied_out,
    not_loaded,
    pivot_rows,
)

__all__ = ["LowRankVocabularyMethod"]


class LowRankVocabularyMethod(QuantizeMethodBase):
    """embedding = B[ids] A, logits = (x A^T) B^T + bias.

    Args:
        name: checkpoint name of the matrix.
        rank: R.
        sentinel: name of the tensor that is in the checkpoint only to make other loaders fail.
        gauge: of the checkpoint.
        is_embedding: whether it is the embeddings, not the head.
    """

    def __init__(
        self, name: str, rank: int, sentinel: str, gauge: str, *, is_embedding: bool
    ) -> None:
        self.name, self.rank, self.sentinel = name, rank, sentinel
        self.gauge, self.is_embedding = gauge, is_embedding

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
        whole = (layer.org_vocab_size, H)
        self.wanted = factor_shapes(whole, self.rank, self.gauge, self.is_embedding)
        # B is split; of C and marks it is known which rows are here when both are loaded. The
        # sentinel is loaded into an empty weight: not every model of vLLM's drops it by name
        shapes = {**self.wanted, "weight": (0, H)}
        if "lr_B" in shapes:
            shapes["lr_B"] = rows, self.rank
        for name, shape in shapes.items():
            if name == "lr_pivots":
                value = torch.full(shape, UNMARKED, dtype=torch.uint8)
            else:
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
            wanted = self.wanted[name]
            if tuple(loaded.shape) != wanted:
                raise ValueError(
                    f"{self.name}.{name} is {list(loaded.shape)}, wanted {list(wanted)}: it does "
                    "not fit its config.json"
                )
            if name == "lr_B":
                own = loaded[self._own(layer)]
                target.data[: len(own)] = own
                target.data[len(own) :] = 0
            else:
                target.data.copy_(loaded)

        parameter.weight_loader = load  # type: ignore[attr-defined]

    @staticmethod
    def _own(layer: Any) -> slice:
        """The tokens whose rows are here."""
        indices = layer.shard_indices
        return slice(indices.org_vocab_start_index, indices.org_vocab_end_index)

    def _plain(self, layer: Any, found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A [R, H] and B [rows held here, R]. In `found` the order has taken the place of marks."""
        if self.gauge != "pivot":
            return found["lr_A"], found["lr_B"]
        C, order = found["lr_C"], found["lr_pivots"]
        if self.is_embedding:
            columns = torch.arange(len(order), device=order.device)
            return pivot_rows(C, order, columns).mT.contiguous(), found["lr_B"]
        tokens = torch.arange(len(order), device=order.device)[self._own(layer)]
        B = C.new_zeros(self.part.rows, self.rank)
        B[: len(tokens)] = pivot_rows(C, order, tokens)
        return found["lr_A"], B

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, then settle what is computed with: as in linear layers, the
        part of the table itself where the factors held here are no smaller.

        Raises:
            ValueError: a factor was missing from the checkpoint, or holds NaN or infinity, or marks
                do not fit the rank.
        """
        found = {name: getattr(layer, name).data for name in self.wanted}
        if "lr_pivots" in found:
            found["lr_pivots"] = order_of(found["lr_pivots"], self.rank)
        bad = ", ".join(not_loaded({f"{self.name}.{name}": t for name, t in found.items()}))
        if bad:
            raise ValueError(
                f"the checkpoint lacks {bad}, or holds NaN, infinity or marks that do not fit the "
                "rank there; it is damaged"
            )
        A, B = self._plain(layer, found)
        for name in ("weight", *self.wanted):
            delattr(layer, name)
        self.is_dense = layer.tp_size > 1 and not self.part.is_worth_factors(A.shape[1])
        kept = {"lr_W": multiplied_out(A, B)} if self.is_dense else {"lr_A": A, "lr_B": B}
        for name, value in kept.items():
            layer.register_parameter(name, Parameter(value, requires_grad=False))

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
