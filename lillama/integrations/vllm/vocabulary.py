"""Token embeddings and the output head in vLLM from low-rank factors, table = B A.

B [V, R] is split over the rows of the vocabulary as vLLM splits the table: each process has the
rows of its own tokens and zeros for what pads the vocabulary. A [R, H] is whole everywhere, so
neither needs an exchange that the dense table does not: the head's R products are made by each
process for its own logits, and vLLM masks and sums embeddings as it does dense ones.

Of a checkpoint in the pivot gauge the identity is written out while it is loaded, R^2 numbers more
than the checkpoint has: in B for the head, whose rows are split, in A for the embeddings.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lillama.checkpoint.names import FACTOR_A, FACTOR_B, FACTOR_C, KEPT_DENSE, PERMUTATION
from lillama.checkpoint.pivots import pivot_rows
from lillama.integrations.vllm.linear import LowRankLinearMethod
from lillama.integrations.vllm.shards import Part

__all__ = ["LowRankVocabularyMethod"]


class LowRankVocabularyMethod(LowRankLinearMethod):
    """embedding = B[ids] A, logits = (x A^T) B^T + bias. is_embedding: whether it is the
    embeddings, not the head; the other arguments as `LowRankLinearMethod`'s."""

    def __init__(
        self, name: str, rank: int, gauge: str, sentinel: str, *, is_embedding: bool
    ) -> None:
        super().__init__([name], {name: rank}, gauge, sentinel)
        self.is_embedding = is_embedding

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
        (name,), sizes = self.names, tuple(output_partition_sizes)
        self.in_features = input_size_per_partition
        self.parts = [Part(name, self.ranks[name], sizes, self.gauge, self.is_embedding)]
        shapes = self.parts[0].shapes(layer.org_vocab_size, self.in_features)
        self._open(layer, [shapes], params_dtype)

    def _rows(self, layer: Any, part: Part, whole: Tensor) -> Tensor:
        """Return the rows of the tokens that are here, and zeros for what pads them."""
        indices = layer.shard_indices
        own = whole[indices.org_vocab_start_index : indices.org_vocab_end_index]
        return torch.cat([own, own.new_zeros(part.rows - len(own), own.shape[1])])

    def _keeps_pivot(self, split: bool, is_worth: bool) -> bool:
        return False

    def _plain(
        self, layer: Any, part: Part, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.is_embedding and FACTOR_C in tensors:
            columns = pivot_rows(tensors[FACTOR_C], tensors[PERMUTATION])
            return columns.mT.contiguous(), tensors[FACTOR_B]
        return super()._plain(layer, part, tensors)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """input_ [tokens], indices of rows held here -> [tokens, H]."""
        (kind,) = self.kinds
        found = F.embedding(input_, getattr(layer, f"{kind}_0"))
        return found if kind == KEPT_DENSE else found @ getattr(layer, FACTOR_A)
