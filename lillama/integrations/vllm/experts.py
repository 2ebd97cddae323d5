"""A mixture of low-rank experts in vLLM, on this project's own operation.

`lillama_kernels.low_rank_experts` takes each expert's own ranks, reads nothing back from a GPU and
has an index for "no expert": that is where experts of other processes go. On the CPU it is plain
products, on a GPU grouped Triton kernels.

Expert parallelism gives whole experts to each process and keeps all that low rank saves. Tensor
parallelism splits the intermediate size: gate and up keep their A whole, down its B, as in
shards.py; vLLM sums the outputs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lillama_kernels import ExpertFactors, ProjectionFactors, low_rank_experts
from lillama_kernels.dispatch import target_of
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.utils.torch_utils import direct_register_custom_op

from lillama.checkpoint.names import (
    FACTOR_A,
    FACTOR_B,
    FACTOR_C,
    KEPT_DENSE,
    PIVOT_MASK,
    STACKED,
    stacked_name,
)
from lillama.checkpoint.pivots import (
    is_permutation,
    permutation_of,
    pivot_rows,
    wrong_pivot_mask,
)
from lillama.integrations.vllm.shards import is_loaded
from lillama.models.families import PROJECTIONS

__all__ = ["LowRankExpertsMethod"]

# vLLM's names of the three, whatever the checkpoint calls them
SHARD_IDS = {"w1": "gate", "w3": "up", "w2": "down"}
# {gauge: what the checkpoint has of experts}
KEYS = {
    "plain": (FACTOR_A, FACTOR_B, KEPT_DENSE),
    "pivot": (FACTOR_A, FACTOR_C, PIVOT_MASK, KEPT_DENSE),
}
# The Triton kernels want ranks that are multiples of this; the rest is zeros, which add nothing
RANK_MULTIPLE = 8


def _experts(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, ranks: list[int], tensors: list[Tensor]
) -> Tensor:
    """x [M, H]; ranks of gate, up and down one after another; tensors A, B and W of each, empty
    where there is none."""
    num_experts = len(ranks) // 3
    parts = [
        ProjectionFactors(
            tuple(ranks[i * num_experts : (i + 1) * num_experts]),
            *(tensor if tensor.numel() else None for tensor in tensors[3 * i : 3 * i + 3]),
        )
        for i in range(3)
    ]
    return low_rank_experts(x, topk_ids, topk_weights, ExpertFactors(*parts))


def _experts_fake(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, ranks: list[int], tensors: list[Tensor]
) -> Tensor:
    return torch.empty_like(x)


# closed to torch.compile, which would else follow the loop over experts on the CPU
direct_register_custom_op("lillama_experts", _experts, fake_impl=_experts_fake)


def _padded(rank: int) -> int:
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


class LowRankExpertsMethod(FusedMoEMethodBase):
    """out = sum_k w_k down(silu(gate(x)) * up(x)) with factors for gate, up and down.

    Args:
        moe: vLLM's description of the layer.
        prefix: checkpoint name of the experts.
        ranks: of gate, up and down those of all experts of the layer, 0 for a dense matrix.
        gauge: of the checkpoint. Factors are held as plain ones: the operation has a Triton kernel
            for these alone.
    """

    def __init__(self, moe: Any, prefix: str, ranks: Sequence[Sequence[int]], gauge: str) -> None:
        super().__init__(moe)
        if moe.activation != MoEActivation.SILU:
            raise ValueError(f"{prefix} uses {moe.activation}; low-rank experts are silu only")
        self.prefix, self.keys = prefix, KEYS[gauge]
        self.all_ranks = dict(zip(PROJECTIONS, ranks, strict=True))
        # what of C and its mask came first, by projection and expert
        self.waiting: dict[tuple[str, int], dict[str, Tensor]] = {}

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    @property
    def supports_eplb(self) -> bool:
        """Moving experts between places would need equal ranks."""
        return False

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        if layer.apply_router_weight_on_input:
            raise ValueError(f"{self.prefix}: router weights on the input are not supported")
        hidden, inner = hidden_size, intermediate_size_per_partition
        self.shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        self.ranks = {name: [0] * num_experts for name in PROJECTIONS}
        self.numbers = [-1] * num_experts
        for expert in range(len(self.all_ranks["gate"])):
            place = layer._map_global_expert_id_to_local_expert_id(expert)
            if place == -1:
                continue  # of another process
            self.numbers[place] = expert
            for name in PROJECTIONS:
                self.ranks[name][place] = self.all_ranks[name][expert]
        for name in PROJECTIONS:
            for key, tensor in self._empty(name, params_dtype).items():
                parameter = Parameter(tensor, requires_grad=False)
                layer.register_parameter(stacked_name(name, key), parameter)
        # what vLLM looks up by name while it loads
        for name in ("w13", "w2"):
            for key in self.keys:
                door = Parameter(torch.empty(0), requires_grad=False)
                door.weight_loader = partial(self._load, layer, key)  # type: ignore[attr-defined]
                layer.register_parameter(f"{name}_{key}", door)

    def _empty(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return A [E, R, K], B [E, N, R] and W [dense experts, N, K]: NaN where something must
        come, zeros where ranks are padded."""
        (N, K), ranks = self.shapes[name], self.ranks[name]
        width, num_dense = max(map(_padded, ranks)), ranks.count(0)
        A = torch.zeros(len(ranks), width, K, dtype=dtype)
        B = torch.zeros(len(ranks), N, width, dtype=dtype)
        for place, rank in enumerate(ranks):
            A[place, :rank] = torch.nan
            B[place, :, :rank] = torch.nan
        W = torch.full((num_dense, N, K), torch.nan, dtype=dtype)
        return {FACTOR_A: A, FACTOR_B: B, KEPT_DENSE: W}

    def _view(self, layer: Any, name: str, key: str, place: int) -> Tensor | None:
        """Return where one expert's tensor belongs; None if config.json promises none."""
        data, rank = getattr(layer, stacked_name(name, key)).data, self.ranks[name][place]
        if (rank == 0) != (key == KEPT_DENSE):
            return None
        if key == KEPT_DENSE:
            return data[self.ranks[name][:place].count(0)]
        return data[place, :rank] if key == FACTOR_A else data[place, :, :rank]

    def _load(
        self,
        layer: Any,
        key: str,
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        done = True if return_success else None
        place = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if place == -1:
            return False if return_success else None
        name = SHARD_IDS[shard_id]
        if key in (FACTOR_C, PIVOT_MASK):
            both = self.waiting.setdefault((name, expert_id), {})
            both[key] = loaded_weight.clone()  # its memory may be used again
            if len(both) < 2:
                return done
            del self.waiting[name, expert_id]
            loaded_weight = self._plain(name, expert_id, both[FACTOR_C], both[PIVOT_MASK])
            key = FACTOR_B
        target = self._view(layer, name, key, place)
        label = f"{self.prefix}.{expert_id} ({name}) {key}"
        if target is None:
            raise ValueError(f"{label} is in the checkpoint, not in config.json")
        value = self._share(layer, name, key, loaded_weight)
        if value.shape != target.shape:
            raise ValueError(
                f"{label} is {list(loaded_weight.shape)}, {list(value.shape)} of it for this "
                f"process, wanted {list(target.shape)}: it does not fit its config.json"
            )
        target.copy_(value)
        return done

    def _plain(self, name: str, expert: int, C: Tensor, mask: Tensor) -> Tensor:
        """Return B [N, R] of what the pivot gauge stores of it."""
        label = f"{self.prefix}.{expert} ({name})"
        if C.ndim != 2 or mask.shape != (sum(C.shape),):
            raise ValueError(
                f"{label}: {PIVOT_MASK} {list(mask.shape)} is not the mask of the outputs that "
                f"{FACTOR_C} {list(C.shape)} belongs to; the checkpoint is damaged"
            )
        permutation = permutation_of(mask, C.shape[1])
        if not is_permutation(permutation):
            raise ValueError(wrong_pivot_mask(f"{label} {PIVOT_MASK}", C.shape[1], len(mask)))
        return pivot_rows(C, permutation)

    def _share(self, layer: Any, name: str, key: str, value: Tensor) -> Tensor:
        """Return what this process holds of one expert's tensor: the intermediate size is split."""
        size = layer.moe_config.tp_size
        dim = 1 if name == "down" else 0
        if size == 1 or key == (FACTOR_B if name == "down" else FACTOR_A):
            return value
        inner = self.shapes["down"][1]
        if value.shape[dim] != size * inner:
            return value  # refused by its shape
        return value.narrow(dim, self.moe.tp_rank * inner, inner)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came.

        Raises:
            ValueError: a factor was missing from the checkpoint, or holds NaN or infinity; or a GPU
                that the Triton kernels have no tiles for, with CUDA graphs.
        """
        for name in ("w13", "w2"):
            for key in self.keys:
                delattr(layer, f"{name}_{key}")
        for name in PROJECTIONS:
            for key in STACKED["plain"]:
                if not is_loaded(getattr(layer, stacked_name(name, key)).data):
                    raise ValueError(self._damaged(layer, name, key))
        self._check_device(layer)
        self.flat_ranks = [_padded(rank) for name in PROJECTIONS for rank in self.ranks[name]]

    def _damaged(self, layer: Any, name: str, key: str) -> str:
        for place, expert in enumerate(self.numbers):
            view = self._view(layer, name, key, place)
            if view is not None and not is_loaded(view):
                if key == FACTOR_B and FACTOR_C in self.keys:
                    key = f"{FACTOR_C} or {PIVOT_MASK}"
                return (
                    f"the checkpoint lacks {key} of {self.prefix}.{expert} ({name}), or holds NaN "
                    "or infinity there; it is damaged"
                )
        raise AssertionError("called for finite tensors")

    def _check_device(self, layer: Any) -> None:
        device = getattr(layer, stacked_name("down", FACTOR_B)).device
        sizes = {"hidden size": self.shapes["down"][0], "intermediate size": self.shapes["down"][1]}
        odd = [f"{name} {size}" for name, size in sizes.items() if size % RANK_MULTIPLE]
        eager = get_current_vllm_config().model_config.enforce_eager
        if device.type == "cpu" or eager or (target_of(device) is not None and not odd):
            return
        raise ValueError(
            f"{self.prefix}: no Triton kernel for {device} with {', '.join(odd) or 'its GPU'}, and "
            "what runs instead cannot be captured in a CUDA graph; pass --enforce-eager"
        )

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """x [M, H], topk_weights and topk_ids [M, k] -> [M, H], with tensor parallelism this
        process's part of the sum."""
        if layer.expert_map is not None:
            local = layer.expert_map[topk_ids.long()]
            topk_ids = torch.where(local < 0, len(self.numbers), local)
        tensors = [
            getattr(layer, stacked_name(name, key))
            for name in PROJECTIONS
            for key in STACKED["plain"]
        ]
        return torch.ops.vllm.lillama_experts(x, topk_weights, topk_ids, self.flat_ranks, tensors)
