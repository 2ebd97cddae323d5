"""A mixture of low-rank experts in vLLM, on this project's own operation.

`lillama_kernels.low_rank_experts` takes each expert's own ranks, reads nothing back from a GPU and
has an index for "no expert": that is where experts of other processes go. On the CPU it is plain
products, on a GPU grouped Triton kernels.

Expert parallelism gives whole experts to each process and keeps all that low rank saves. Tensor
parallelism splits the intermediate size: gate and up keep their A whole, down its B, as in
shards.py; vLLM sums the outputs.
"""

from collections.abc import Sequence
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

from lillama.families import PROJECTIONS
from lillama.integrations.vllm.shards import not_loaded, pivot_rows
from lillama.pivots import is_permutation, order_of, wrong_marks

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
        gate, up, down: ranks of all experts of the layer, 0 for a dense matrix.
        pivot: whether factors are in the pivot gauge. They are held as plain ones: the operation
            has a Triton kernel for these alone.
    """

    def __init__(
        self,
        moe: Any,
        prefix: str,
        gate: Sequence[int],
        up: Sequence[int],
        down: Sequence[int],
        pivot: bool = False,
    ) -> None:
        super().__init__(moe)
        if moe.activation != MoEActivation.SILU:
            raise ValueError(f"{prefix} uses {moe.activation}; low-rank experts are silu only")
        self.prefix = prefix
        self.all_ranks = dict(zip(PROJECTIONS, (gate, up, down), strict=True))
        self.suffixes = ("A", "C", "pivots", "W") if pivot else ("A", "B", "W")
        # what of C and marks came first, by projection and expert
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
            for suffix, tensor in self._empty(name, params_dtype).items():
                layer.register_parameter(f"{name}_{suffix}", Parameter(tensor, requires_grad=False))
        # what vLLM looks up by name while it loads
        for name in ("w13", "w2"):
            for suffix in self.suffixes:
                door = Parameter(torch.empty(0), requires_grad=False)
                door.weight_loader = self._loader(layer)  # type: ignore[attr-defined]
                layer.register_parameter(f"{name}_lr_{suffix}", door)

    def _empty(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """A [E, R, K], B [E, N, R] and W [dense experts, N, K]: NaN where something must come,
        zeros where ranks are padded."""
        (N, K), ranks = self.shapes[name], self.ranks[name]
        width, num_dense = max(map(_padded, ranks)), ranks.count(0)
        A = torch.zeros(len(ranks), width, K, dtype=dtype)
        B = torch.zeros(len(ranks), N, width, dtype=dtype)
        for place, rank in enumerate(ranks):
            A[place, :rank] = torch.nan
            B[place, :, :rank] = torch.nan
        return {"A": A, "B": B, "W": torch.full((num_dense, N, K), torch.nan, dtype=dtype)}

    def _view(self, layer: Any, name: str, suffix: str, place: int) -> Tensor | None:
        """Where one expert's tensor belongs; None if config.json promises none."""
        data, rank = getattr(layer, f"{name}_{suffix}").data, self.ranks[name][place]
        if (rank == 0) != (suffix == "W"):
            return None
        if suffix == "W":
            return data[self.ranks[name][:place].count(0)]
        return data[place, :rank] if suffix == "A" else data[place, :, :rank]

    def _loader(self, layer: Any) -> Any:
        def load(
            param: Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            place = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if place == -1:
                return False if return_success else None
            name, suffix = SHARD_IDS[shard_id], weight_name.rpartition("_")[2]
            if suffix in ("C", "pivots"):
                both = self.waiting.setdefault((name, expert_id), {})
                both[suffix] = loaded_weight.clone()  # its memory may be used again
                if len(both) < 2:
                    return True if return_success else None
                del self.waiting[name, expert_id]
                loaded_weight, suffix = self._plain(name, expert_id, **both), "B"
            target = self._view(layer, name, suffix, place)
            label = f"{self.prefix}.{expert_id} ({name}) lr_{suffix}"
            if target is None:
                raise ValueError(f"{label} is in the checkpoint, not in config.json")
            value = self._share(layer, name, suffix, loaded_weight)
            if value.shape != target.shape:
                raise ValueError(
                    f"{label} is {list(loaded_weight.shape)}, {list(value.shape)} of it for this "
                    f"process, wanted {list(target.shape)}: it does not fit its config.json"
                )
            target.copy_(value)
            return True if return_success else None

        return load

    def _plain(self, name: str, expert: int, C: Tensor, pivots: Tensor) -> Tensor:
        """B [N, R] of what the pivot gauge stores of it."""
        label = f"{self.prefix}.{expert} ({name})"
        if C.ndim != 2 or pivots.shape != (sum(C.shape),):
            raise ValueError(
                f"{label}: lr_pivots {list(pivots.shape)} are not the marks of the outputs that "
                f"lr_C {list(C.shape)} belongs to; the checkpoint is damaged"
            )
        order = order_of(pivots, C.shape[1])
        if not is_permutation(order):
            raise ValueError(wrong_marks(f"{label} lr_pivots", C.shape[1], len(order)))
        return pivot_rows(C, order, torch.arange(len(order), device=order.device))

    def _share(self, layer: Any, name: str, suffix: str, value: Tensor) -> Tensor:
        """What this process holds of one expert's tensor: the intermediate size is split."""
        size = layer.moe_config.tp_size
        dim = 1 if name == "down" else 0
        if size == 1 or suffix == ("B" if name == "down" else "A"):
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
            for suffix in self.suffixes:
                delattr(layer, f"{name}_lr_{suffix}")
        for name in PROJECTIONS:
            for suffix in "ABW":
                if not_loaded({"it": getattr(layer, f"{name}_{suffix}").data}):
                    raise ValueError(self._damaged(layer, name, suffix))
        self._check_device(layer)
        self.flat_ranks = [_padded(rank) for name in PROJECTIONS for rank in self.ranks[name]]

    def _damaged(self, layer: Any, name: str, suffix: str) -> str:
        for place, expert in enumerate(self.numbers):
            view = self._view(layer, name, suffix, place)
            if view is not None and not bool(torch.isfinite(view).all()):
                if suffix == "B" and "C" in self.suffixes:
                    suffix = "C or lr_pivots"
                return (
                    f"the checkpoint lacks lr_{suffix} of {self.prefix}.{expert} ({name}), or "
                    "holds NaN or infinity there; it is damaged"
                )
        raise AssertionError("called for finite tensors")

    def _check_device(self, layer: Any) -> None:
        device = layer.down_B.device
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
        tensors = [getattr(layer, f"{name}_{suffix}") for name in PROJECTIONS for suffix in "ABW"]
        return torch.ops.vllm.lillama_experts(x, topk_weights, topk_ids, self.flat_ranks, tensors)
