"""A linear layer of vLLM's from low-rank factors; see shards.py for which process holds what.

vLLM joins matrices with one input (q, k, v) to one layer. Their ranks differ, so the factors of all
lie behind one another in one parameter each; every A takes part in one product.
"""

from collections.abc import Mapping, Sequence
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

from lillama.checkpoint.pivots import order_of
from lillama.integrations.vllm.shards import (
    UNMARKED,
    Part,
    local_rows,
    multiplied_out,
    not_loaded,
    pivot_rows,
)

__all__ = ["LowRankLinearMethod"]

SHARDS = {"q": 0, "k": 1, "v": 2, None: 0}


def _first(values: Sequence[int]) -> list[int]:
    """[a, b, c] -> [0, a, a + b]: where each begins."""
    return [sum(values[:i]) for i in range(len(values))]


class LowRankLinearMethod(LinearMethodBase):
    """y = (x A^T) B^T + bias for each matrix of a layer; those without a rank stay dense.

    Args:
        names: checkpoint names of the matrices that vLLM has made one layer of.
        ranks: {name: R}.
        pivot: whether factors are in the pivot gauge.
        sentinel: name of the tensor that is in the checkpoint only to make other loaders fail.
    """

    def __init__(
        self, names: Sequence[str], ranks: Mapping[str, int], pivot: bool, sentinel: str
    ) -> None:
        self.names, self.ranks, self.pivot, self.sentinel = names, ranks, pivot, sentinel

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
        parts = [
            Part(name, self.ranks.get(name, 0), size, self.pivot and name in self.ranks)
            for name, size in zip(self.names, sizes, strict=True)
        ]
        self.row = isinstance(layer, RowParallelLinear)
        self.parts, self.in_features = parts, input_size_per_partition
        # the sum over the processes is taken here, of R values a token instead of N
        self.sums_ranks = bool(self.row and layer.tp_size > 1 and layer.reduce_results)
        if self.sums_ranks:
            layer.reduce_results = False
        for name, shape, dtype in self._shapes(layer, params_dtype):
            unset = torch.nan if dtype.is_floating_point else UNMARKED
            value = torch.full(shape, unset, dtype=dtype)
            parameter = Parameter(value, requires_grad=False)
            layer.register_parameter(name, parameter)
            self._set_loader(layer, parameter, name)

    def _place(self, layer: Any, part: Part) -> tuple[int, int]:
        """Which share of a matrix's outputs is here, of how many."""
        if self.row:
            return 0, 1
        if isinstance(layer, QKVParallelLinear) and part is not self.parts[0]:
            # few heads of keys and values: several processes hold the same
            replicas = layer.num_kv_head_replicas
            return layer.tp_rank // replicas, layer.tp_size // replicas
        return layer.tp_rank, layer.tp_size

    def _whole_rows(self, layer: Any, part: Part) -> int:
        """N of a matrix, of all processes."""
        return part.rows * self._place(layer, part)[1]

    def _whole_shape(self, layer: Any, part: Part, name: str) -> tuple[int, ...]:
        """Of a tensor as the checkpoint has it."""
        N, K, R = self._whole_rows(layer, part), layer.input_size, part.rank
        shapes = {"lr_A": (R, K), "lr_B": (N, R), "lr_C": (N - R, R), "weight": (N, K)}
        return shapes.get(name, (N,))

    def _shapes(
        self, layer: Any, dtype: torch.dtype
    ) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Names, shapes and dtypes of the parameters that are loaded into."""
        plain = [part for part in self.parts if part.rank and not part.pivot]
        pivot = [part for part in self.parts if part.pivot]
        dense = [part for part in self.parts if not part.rank]
        K, num_ranks = self.in_features, sum(part.rank for part in self.parts)
        shapes: list[tuple[str, tuple[int, ...], torch.dtype]] = [("lr_A", (num_ranks, K), dtype)]
        if plain:
            shapes.append(("lr_B", (sum(p.rows * p.rank for p in plain),), dtype))
        if pivot:
            # C and marks of all outputs: which of them are here is known when both are loaded
            whole = [(self._whole_rows(layer, p), p.rank) for p in pivot]
            shapes.append(("lr_C", (sum((N - R) * R for N, R in whole),), dtype))
            shapes.append(("lr_pivots", (sum(N for N, _ in whole),), torch.uint8))
        if dense or self.sentinel.rpartition(".")[0] in self.names:
            shapes.append(("weight", (sum(p.rows for p in dense), K), dtype))
        return shapes

    def _slices(self, layer: Any, name: str) -> list[tuple[int, tuple[int, ...]]]:
        """Of each part: where it begins in parameter `name`, and its shape; () for none of it."""
        shapes: list[tuple[int, ...]] = []
        for part in self.parts:
            R, N = part.rank, self._whole_rows(layer, part)
            has = {
                "lr_A": R > 0,
                "lr_B": R > 0 and not part.pivot,
                "lr_C": part.pivot,
                "lr_pivots": part.pivot,
                "weight": R == 0,
            }[name]
            shape = {
                "lr_A": (R, self.in_features),
                "lr_B": (part.rows, R),
                "lr_C": (N - R, R),
                "lr_pivots": (N,),
                "weight": (part.rows, self.in_features),
            }[name]
            shapes.append(shape if has else ())
        flat = name in ("lr_B", "lr_C")
        sizes = [(s[0] * s[1] if flat else s[0]) if s else 0 for s in shapes]
        return list(zip(_first(sizes), shapes, strict=True))

    def _view(self, layer: Any, name: str, index: int) -> Tensor:
        """The place of one part in a parameter."""
        start, shape = self._slices(layer, name)[index]
        data = getattr(layer, name).data
        if name in ("lr_B", "lr_C"):
            return data[start : start + shape[0] * shape[1]].view(shape)
        return data[start : start + shape[0]]

    def _rows(self, layer: Any, part: Part, device: torch.device) -> Tensor:
        """Indices of the outputs of a whole matrix that are held here."""
        return local_rows(part.sizes, *self._place(layer, part), device)

    def _set_loader(self, layer: Any, parameter: Parameter, name: str) -> None:
        def load(target: Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
            index = shard if isinstance(shard, int) else SHARDS[shard]
            part = self.parts[index]
            if name == "weight" and part.rank:
                if f"{part.name}.weight" != self.sentinel:
                    raise ValueError(
                        f"{part.name} has a rank in config.json and a .weight in the checkpoint"
                    )
                return
            if not self._slices(layer, name)[index][1]:
                raise ValueError(f"{part.name}.{name} is in the checkpoint, not in config.json")
            wanted = self._whole_shape(layer, part, name)
            if tuple(loaded.shape) != wanted:
                raise ValueError(
                    f"{part.name}.{name} is {list(loaded.shape)}, wanted {list(wanted)}: it does "
                    "not fit its config.json"
                )
            value = loaded
            if name in ("lr_A", "weight") and self.row:
                value = value.narrow(1, layer.tp_rank * self.in_features, self.in_features)
            elif name in ("lr_B", "weight"):
                value = value[self._rows(layer, part, value.device)]
            self._view(layer, name, index).copy_(value)

        parameter.weight_loader = load  # type: ignore[attr-defined]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, then settle what each part is computed with.

        Raises:
            ValueError: a factor was missing from the checkpoint, or holds NaN or infinity, or marks
                do not fit the rank.
        """
        found = {
            f"{part.name}.{name}": self._view(layer, name, index)
            for index, part in enumerate(self.parts)
            for name in ("lr_A", "lr_B", "lr_C", "lr_pivots", "weight")
            if hasattr(layer, name) and self._slices(layer, name)[index][1]
        }
        for part in self.parts:
            if part.pivot:
                marks = f"{part.name}.lr_pivots"
                found[marks] = order_of(found[marks], part.rank)
        bad = ", ".join(not_loaded(found))
        if bad:
            raise ValueError(
                f"the checkpoint lacks {bad}, or holds NaN, infinity or marks that do not fit the "
                "rank there; it is damaged"
            )
        parts = [self._settled(layer, part, found) for part in self.parts]
        factors = [tensors for tensors in parts if "B" in tensors or "C" in tensors]
        for name in ("lr_A", "lr_B", "lr_C", "lr_pivots", "weight"):
            if hasattr(layer, name):
                delattr(layer, name)
        if self.sums_ranks and not factors:
            self.sums_ranks = False
            layer.reduce_results = True
        self.widths = [len(tensors["A"]) for tensors in factors]
        self.kinds = [next(key for key in "WBC" if key in tensors) for tensors in parts]
        if factors:
            self._keep(layer, "lr_A", torch.cat([tensors.pop("A") for tensors in factors]))
        for index, tensors in enumerate(parts):
            for key, tensor in tensors.items():
                self._keep(layer, f"lr_{key}_{index}", tensor)

    @staticmethod
    def _keep(layer: Any, name: str, tensor: Tensor) -> None:
        layer.register_parameter(name, Parameter(tensor.contiguous(), requires_grad=False))

    def _settled(self, layer: Any, part: Part, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"W"} of a dense part, {"A", "B"}, or {"A", "C", "order"}, each a tensor of its own.
        In `found` orders have taken the place of marks."""
        if not part.rank:
            return {"W": found[f"{part.name}.weight"].clone()}
        A, split = found[f"{part.name}.lr_A"], layer.tp_size > 1
        if part.pivot and (self.row or not split):
            C, order = found[f"{part.name}.lr_C"], found[f"{part.name}.lr_pivots"]
            if not split or part.is_worth_factors(self.in_features):
                return {"A": A, "C": C.clone(), "order": order}
        if part.pivot:
            # its identity is spread over the processes: plain factors here
            C, order = found[f"{part.name}.lr_C"], found[f"{part.name}.lr_pivots"]
            B = pivot_rows(C, order, self._rows(layer, part, C.device))
        else:
            B = found[f"{part.name}.lr_B"]
        if split and not part.is_worth_factors(self.in_features):
            return {"W": multiplied_out(A, B)}
        return {"A": A, "B": B.clone()}

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K local] -> [..., outputs held here]."""
        z: tuple[Tensor, ...] = ()
        if self.widths:
            products = F.linear(x, layer.lr_A)
            if self.sums_ranks:
                products = tensor_model_parallel_all_reduce(products)
                # vLLM leaves the bias out on all processes but the first
                bias = None if layer.skip_bias_add else layer.bias
            z = products.split(self.widths, -1)
        outputs, taken = [], 0
        for index, kind in enumerate(self.kinds):
            weight = getattr(layer, f"lr_{kind}_{index}")
            if kind == "W":
                outputs.append(F.linear(x, weight))
                continue
            own, taken = z[taken], taken + 1
            y = F.linear(own, weight)
            if kind == "C":
                y = torch.cat([own, y], -1).index_select(-1, getattr(layer, f"lr_order_{index}"))
            outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias
