"""A linear layer of vLLM's from low-rank factors; see shards.py for which process holds what.

vLLM joins matrices with one input (q, k, v) to one layer. Their ranks differ, so each has factors
of its own; every A takes part in one product.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
)

from lillama.checkpoint.names import (
    FACTOR_A,
    FACTOR_B,
    FACTOR_C,
    KEPT_DENSE,
    PERMUTATION,
    PIVOT_MASK,
)
from lillama.checkpoint.pivots import permutation_of, pivot_rows
from lillama.integrations.vllm.shards import Part, is_loaded, local_rows, multiplied_out, unset

__all__ = ["LowRankLinearMethod"]

SHARDS = {"q": 0, "k": 1, "v": 2, None: 0}


class LowRankLinearMethod(LinearMethodBase):
    """y = (x A^T) B^T + bias for each matrix of a layer; those without a rank stay dense.

    Args:
        names: checkpoint names of the matrices that vLLM has made one layer of.
        ranks: {name: R}.
        gauge: of the factors.
        sentinel: name of the tensor that is in the checkpoint only to make other loaders fail.
    """

    row = False
    # whether the sum over the processes is taken here, of R values a token instead of N
    sums_ranks = False

    def __init__(
        self, names: Sequence[str], ranks: Mapping[str, int], gauge: str, sentinel: str
    ) -> None:
        self.names, self.ranks, self.gauge, self.sentinel = names, ranks, gauge, sentinel

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
        sizes = [(size,) for size in output_partition_sizes]
        if len(self.names) == 1:
            sizes = [tuple(output_partition_sizes)]
        if len(sizes) != len(self.names):
            raise ValueError(
                f"{layer.prefix} has {len(sizes)} outputs for the {len(self.names)} matrices "
                f"{', '.join(self.names)}; this vLLM joins them in another way than lillama knows"
            )
        self.row, self.in_features = isinstance(layer, RowParallelLinear), input_size_per_partition
        self.sums_ranks = bool(self.row and layer.tp_size > 1 and layer.reduce_results)
        if self.sums_ranks:
            layer.reduce_results = False
        self.parts = [
            Part(name, self.ranks.get(name, 0), size, self.gauge)
            for name, size in zip(self.names, sizes, strict=True)
        ]
        shapes = [
            part.shapes(part.rows * self._place(layer, part)[1], input_size) for part in self.parts
        ]
        self._open(layer, shapes, params_dtype)

    def _open(
        self, layer: Any, shapes: list[dict[str, tuple[int, ...]]], dtype: torch.dtype
    ) -> None:
        """Make an empty parameter for each name that vLLM may look up, and one for each tensor that
        must come. `shapes`: of each part, as the checkpoint has it."""
        self.whole = shapes
        for key in (FACTOR_A, FACTOR_B, FACTOR_C, PIVOT_MASK, "weight"):
            door = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            door.weight_loader = partial(self._load, layer, key)  # type: ignore[attr-defined]
            layer.register_parameter(key, door)
        for index, wanted in enumerate(shapes):
            for key, shape in wanted.items():
                whole = torch.empty(shape, device="meta")
                own = tuple(self._share(layer, self.parts[index], key, whole).shape)
                value = unset(own, torch.uint8 if key == PIVOT_MASK else dtype)
                layer.register_parameter(f"{key}_{index}", value)

    def _load(
        self, layer: Any, key: str, door: Parameter, loaded: Tensor, shard: str | int | None = None
    ) -> None:
        index = shard if isinstance(shard, int) else SHARDS[shard]
        part, wanted = self.parts[index], self.whole[index].get(key)
        if key == "weight" and part.rank:
            if f"{part.name}.weight" != self.sentinel:
                raise ValueError(
                    f"{part.name} has a rank in config.json and a .weight in the checkpoint"
                )
            return
        if wanted is None:
            raise ValueError(f"{part.name}.{key} is in the checkpoint, not in config.json")
        if tuple(loaded.shape) != wanted:
            raise ValueError(
                f"{part.name}.{key} is {list(loaded.shape)}, wanted {list(wanted)}: it does "
                "not fit its config.json"
            )
        getattr(layer, f"{key}_{index}").data.copy_(self._share(layer, part, key, loaded))

    def _place(self, layer: Any, part: Part) -> tuple[int, int]:
        """Return which share of a matrix's outputs is here, of how many."""
        if self.row:
            return 0, 1
        if isinstance(layer, QKVParallelLinear) and part is not self.parts[0]:
            # few heads of keys and values: several processes hold the same
            replicas = layer.num_kv_head_replicas
            return layer.tp_rank // replicas, layer.tp_size // replicas
        return layer.tp_rank, layer.tp_size

    def _rows(self, layer: Any, part: Part, whole: Tensor) -> Tensor:
        """Return the rows of a whole matrix, or of its B, that are held here."""
        return whole[local_rows(part.sizes, *self._place(layer, part), whole.device)]

    def _share(self, layer: Any, part: Part, key: str, whole: Tensor) -> Tensor:
        """Return what is held here of a tensor; of C and its mask all: which of their rows are here
        is known when both are loaded."""
        if key in (FACTOR_A, "weight") and self.row:
            return whole.narrow(1, layer.tp_rank * self.in_features, self.in_features)
        return self._rows(layer, part, whole) if key in (FACTOR_B, "weight") else whole

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, then settle what each part is computed with.

        Raises:
            ValueError: a factor was missing from the checkpoint, or holds NaN or infinity, or a
                pivot mask does not fit the rank.
        """
        parts = [
            self._settled(layer, part, tensors)
            for part, tensors in zip(self.parts, self._taken(layer), strict=True)
        ]
        self.widths = [len(tensors[FACTOR_A]) for tensors in parts if FACTOR_A in tensors]
        self.kinds = [
            next(key for key in (KEPT_DENSE, FACTOR_B, FACTOR_C) if key in tensors)
            for tensors in parts
        ]
        if self.sums_ranks and not self.widths:
            self.sums_ranks = False
            layer.reduce_results = True
        kept = {
            f"{key}_{index}": tensor
            for index, tensors in enumerate(parts)
            for key, tensor in tensors.items()
            if key != FACTOR_A
        }
        if self.widths:
            kept[FACTOR_A] = torch.cat([t[FACTOR_A] for t in parts if FACTOR_A in t])
        for name, tensor in kept.items():
            parameter = Parameter(tensor.contiguous(), requires_grad=False)
            layer.register_parameter(name, parameter)

    def _taken(self, layer: Any) -> list[dict[str, Tensor]]:
        """Return the tensors of each part, with permutations in place of pivot masks, and leave the
        layer without parameters."""
        bad, taken = [], []
        for index, (part, wanted) in enumerate(zip(self.parts, self.whole, strict=True)):
            tensors = {}
            for key in wanted:
                tensor = getattr(layer, f"{key}_{index}").data
                delattr(layer, f"{key}_{index}")
                if key == PIVOT_MASK:
                    tensor = tensors[PERMUTATION] = permutation_of(tensor, part.rank)
                else:
                    tensors[key] = tensor
                if not is_loaded(tensor):
                    bad.append(f"{part.name}.{key}")
            taken.append(tensors)
        if bad:
            raise ValueError(
                f"the checkpoint lacks {', '.join(bad)}, or holds NaN, infinity or pivot masks "
                "that do not fit the rank there; it is damaged"
            )
        for key in (FACTOR_A, FACTOR_B, FACTOR_C, PIVOT_MASK, "weight"):
            delattr(layer, key)
        return taken

    def _settled(
        self, layer: Any, part: Part, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return a dense weight, A and B, or A, C and a permutation."""
        if not part.rank:
            return {KEPT_DENSE: tensors["weight"]}
        split, is_worth = layer.tp_size > 1, part.is_worth_factors(self.in_features)
        if self._keeps_pivot(split, is_worth) and FACTOR_C in tensors:
            return tensors
        A, B = self._plain(layer, part, tensors)
        if split and not is_worth:
            return {KEPT_DENSE: multiplied_out(A, B)}
        return {FACTOR_A: A, FACTOR_B: B}

    def _keeps_pivot(self, split: bool, is_worth: bool) -> bool:
        """Whether the pivot gauge can stay: the identity of split outputs is spread over the
        processes."""
        return not split or (self.row and is_worth)

    def _plain(
        self, layer: Any, part: Part, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return A and B as held here."""
        if FACTOR_C not in tensors:
            return tensors[FACTOR_A], tensors[FACTOR_B]
        B = pivot_rows(tensors[FACTOR_C], tensors[PERMUTATION])
        return tensors[FACTOR_A], self._rows(layer, part, B)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K local] -> [..., outputs held here]."""
        z: tuple[Tensor, ...] = ()
        if self.widths:
            products = F.linear(x, getattr(layer, FACTOR_A))
            if self.sums_ranks:
                products = tensor_model_parallel_all_reduce(products)
                # vLLM leaves the bias out on all processes but the first
                bias = None if layer.skip_bias_add else layer.bias
            z = products.split(self.widths, -1)
        outputs, taken = [], 0
        for index, kind in enumerate(self.kinds):
            weight = getattr(layer, f"{kind}_{index}")
            if kind == KEPT_DENSE:
                outputs.append(F.linear(x, weight))
                continue
            own, taken = z[taken], taken + 1
            y = F.linear(own, weight)
            if kind == FACTOR_C:
                permutation = getattr(layer, f"{PERMUTATION}_{index}")
                y = torch.cat([own, y], -1).index_select(-1, permutation)
            outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias
