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
    PERMUTATION,
    PIVOT_MASK,
    STACKED,
    stacked_name,
    stacked_place,
    stacked_shape,
)
from lillama.checkpoint.pivots import is_permutation, permutation_of, pivot_rows, wrong_pivot_mask
from lillama.integrations.vllm.shards import is_loaded
from lillama.models.families import PROJECTIONS

__all__ = ["LowRankExpertsMethod"]

# vLLM's names of the three, whatever the checkpoint calls them
SHARD_IDS = {"w1": "gate", "w3": "up", "w2": "down"}
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
        self.prefix = prefix
        # of the tensors in the checkpoint
        self.keys = [PIVOT_MASK if key == PERMUTATION else key for key in STACKED[gauge]]
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
        wide = intermediate_size_per_partition, hidden_size
        self.shapes = {"gate": wide, "up": wide, "down": wide[::-1]}
        experts = range(len(self.all_ranks["gate"]))
        # by place here; what is of another process has the place -1
        numbers = {layer._map_global_expert_id_to_local_expert_id(e): e for e in experts}
        self.numbers = [numbers.get(place, -1) for place in range(num_experts)]
        self.ranks = {
            name: [ranks[e] if e >= 0 else 0 for e in self.numbers]
            for name, ranks in self.all_ranks.items()
        }
        # NaN where something must come, zeros where ranks are padded
        for name in PROJECTIONS:
            padded = [_padded(rank) for rank in self.ranks[name]]
            for key in STACKED["plain"]:
                stack = torch.zeros(
                    stacked_shape(key, self.shapes[name], padded) or (0,), dtype=params_dtype
                )
                parameter = Parameter(stack, requires_grad=False)
                layer.register_parameter(stacked_name(name, key), parameter)
                for place in range(num_experts):
                    if (view := self._view(layer, name, key, place)) is not None:
                        view.fill_(torch.nan)
        # what vLLM looks up by name while it loads
        for name in ("w13", "w2"):
            for key in self.keys:
                door = Parameter(torch.empty(0), requires_grad=False)
                door.weight_loader = partial(self._load, layer, key)  # type: ignore[attr-defined]
                layer.register_parameter(f"{name}_{key}", door)

    def _view(self, layer: Any, name: str, key: str, place: int) -> Tensor | None:
        """Return where one expert's tensor belongs; None if config.json promises none."""
        ranks, (N, _) = self.ranks[name], self.shapes[name]
        index = stacked_place(key, ranks, place, N)
        return None if index is None else getattr(layer, stacked_name(name, key)).data[index]

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
        for place, expert in enumerate(self.numbers):
            for name in PROJECTIONS:
                for key in STACKED["plain"]:
                    view = self._view(layer, name, key, place)
                    if view is None or is_loaded(view):
                        continue
                    if key == FACTOR_B and FACTOR_C in self.keys:
                        key = f"{FACTOR_C} or {PIVOT_MASK}"
                    raise ValueError(
                        f"the checkpoint lacks {key} of {self.prefix}.{expert} ({name}), or holds "
                        "NaN or infinity there; it is damaged"
                    )
        self._check_device(layer)
        self.flat_ranks = [_padded(rank) for name in PROJECTIONS for rank in self.ranks[name]]

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
