"""vLLM's layers that it builds without a quantization config, so that no method is ever asked for:
Mixtral's embeddings, and Mamba's with its head and its mixers' projections. These classes take the
place of vLLM's and hand the config in; for other models they are what they were.
"""

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from lillama.integrations.vllm.linear import LowRankLinearMethod
from lillama.integrations.vllm.quantization import LillamaVllmConfig

__all__ = ["LowRankLMHead", "LowRankMambaMixer", "LowRankVocabParallelEmbedding"]


def _config() -> LillamaVllmConfig | None:
    config = get_current_vllm_config().quant_config
    return config if isinstance(config, LillamaVllmConfig) else None


def _with_config(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the arguments of a layer; with our config if it has a rank for the layer."""
    config = _config()
    if config is None or prefix not in config.ranks:
        return values
    return {**values, "quant_config": config, "prefix": prefix}


@VocabParallelEmbedding.register_oot
class LowRankVocabParallelEmbedding(VocabParallelEmbedding):
    """vLLM's embeddings; those that have a rank compute with their factors."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        config, prefix = _config(), kwargs.get("prefix", "")
        if not prefix and config is not None:
            prefix = config.embedding or ""  # without a name: the only ones of the model
        super().__init__(num_embeddings, embedding_dim, *args, **_with_config(kwargs, prefix))


@ParallelLMHead.register_oot
class LowRankLMHead(ParallelLMHead):
    """vLLM's output head; one that has a rank computes with its factors."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        kwargs = _with_config(kwargs, kwargs.get("prefix", ""))
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)


@MambaMixer.register_oot
class LowRankMambaMixer(MambaMixer):
    """vLLM's mixer; projections that have a rank compute with their factors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = _config()
        if config is None:
            return
        for name in ("in_proj", "x_proj", "out_proj"):
            linear = getattr(self, name)
            method = config.get_quant_method(linear, f"{self.prefix}.{name}")
            if not isinstance(method, LowRankLinearMethod):
                continue
            del linear.weight
            linear.quant_config, linear.quant_method = config, method
            method.create_weights(
                linear,
                linear.input_size_per_partition,
                linear.output_partition_sizes,
                linear.input_size,
                linear.output_size,
                linear.params_dtype,
            )
