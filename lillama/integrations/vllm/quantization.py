"""vLLM's QuantizationConfig of our checkpoints: which layer gets which of our methods."""

import functools
import logging
import re
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from lillama.checkpoint.format import QUANT_METHOD
from lillama.integrations.transformers import LillamaConfig
from lillama.integrations.vllm.experts import LowRankExpertsMethod
from lillama.integrations.vllm.linear import LowRankLinearMethod
from lillama.integrations.vllm.vocabulary import LowRankVocabularyMethod
from lillama.models.families import FAMILIES

__all__ = ["LillamaVllmConfig"]

logger = logging.getLogger(__name__)


@functools.cache
def _say_expanded() -> None:
    """Once a process, however many layers there are."""
    logger.warning(
        "experts in the pivot gauge are held as plain factors in vLLM: R^2 numbers more for each "
        "matrix of rank R than the checkpoint has"
    )


@register_quantization_config(QUANT_METHOD)
class LillamaVllmConfig(QuantizationConfig):
    """Ranks by matrix name from `quantization_config` of config.json; what has none is dense.

    Raises:
        InputError: unknown keys, another format version or gauge, or no ranks or sentinel.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        checked = LillamaConfig(**values)
        self.ranks = checked.ranks
        self.pivot = checked.gauge == "pivot"
        self.sentinel = checked.sentinel
        self._sentinels = {checked.sentinel}  # as it is called at any stage of loading

    @property
    def embedding(self) -> str | None:
        """Checkpoint name of the token embeddings, if they are factorised."""
        names = {family.embedding for family in FAMILIES.values()}
        return next((name for name in self.ranks if name in names), None)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LillamaVllmConfig":
        return cls(config)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """Drops the sentinel of experts. That of a linear layer is taken by the layer itself:
        vLLM's Mamba never asks here."""
        names = "|".join(map(re.escape, sorted(self._sentinels)))
        return WeightsMapper(orig_to_new_regex={re.compile(f"^({names})$"): None})

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Call matrices and sentinel what vLLM calls them, as the head of a GPT-NeoX, which is
        embed_out in the checkpoint and lm_head there."""

        def renamed(tensor: str) -> str:
            return hf_to_vllm_mapper.map_name(tensor) or tensor

        found = {renamed(f"{name}.weight"): rank for name, rank in self.ranks.items()}
        self.ranks = {name.removesuffix(".weight"): rank for name, rank in found.items()}
        self.sentinel = renamed(self.sentinel)
        self._sentinels.add(self.sentinel)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            names = self._matrices(prefix)
            if not any(name in self.ranks for name in names):
                return UnquantizedLinearMethod()
            return LowRankLinearMethod(names, self.ranks, self.pivot, self.sentinel)
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding) and prefix in self.ranks:
            return self._vocabulary_method(prefix, not isinstance(layer, ParallelLMHead))
        return None

    def _vocabulary_method(self, name: str, is_embedding: bool) -> LowRankVocabularyMethod:
        model = get_current_vllm_config().model_config
        if model.hf_text_config.tie_word_embeddings:
            raise ValueError(
                f"{name} is factorised and config.json says tie_word_embeddings: vLLM cannot share "
                "factors; serve what `lillama export --format dense` makes of this checkpoint"
            )
        gauge, rank = "pivot" if self.pivot else "plain", self.ranks[name]
        return LowRankVocabularyMethod(name, rank, self.sentinel, gauge, is_embedding=is_embedding)

    def _matrices(self, prefix: str) -> list[str]:
        """Checkpoint names of the matrices that vLLM has made one layer of."""
        parent, _, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{parent}.{name}" if parent else name for name in leaves]

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> LowRankExpertsMethod | None:
        shorts = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        ranks = [
            [
                self.ranks.get(f"{prefix}.{expert}.{short}", 0)
                for expert in range(layer.moe_config.num_logical_experts)
            ]
            for short in shorts
        ]
        if not any(map(any, ranks)):
            return None  # vLLM's own for dense experts
        gate, up, down = ranks
        if self.pivot:
            _say_expanded()
        return LowRankExpertsMethod(layer.moe_config, prefix, gate, up, down, self.pivot)
