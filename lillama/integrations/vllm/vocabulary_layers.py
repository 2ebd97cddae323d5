"""vLLM's token embeddings and output head, with factors where the checkpoint has them.

vLLM builds Mixtral's embeddings and both of Mamba's without a quantization config, so that no
method is ever asked for: these classes take the place of vLLM's and hand the config in.
"""

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from lillama.integrations.vllm.quantization import LillamaVllmConfig

__all__ = ["LowRankLMHead", "LowRankVocabParallelEmbedding"]


def _with_config(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The arguments of a layer; with our config if it has a rank for the layer."""
    config = get_current_vllm_config().quant_config
    if isinstance(config, LillamaVllmConfig) and prefix in config.ranks:
        return {**values, "quant_config": config, "prefix": prefix}
    return values


@VocabParallelEmbedding.register_oot
class LowRankVocabParallelEmbedding(VocabParallelEmbedding):
    """vLLM's embeddings; those that have a rank compute with their factors. For other models it is
    what it was."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        config = get_current_vllm_config().quant_config
        prefix = kwargs.get("prefix", "")
        if not prefix and isinstance(config, LillamaVllmConfig):
            # without a name: the only ones of the model
            prefix = config.embedding or ""
        super().__init__(num_embeddings, embedding_dim, *args, **_with_config(kwargs, prefix))


@ParallelLMHead.register_oot
class LowRankLMHead(ParallelLMHead):
    """As `LowRankVocabParallelEmbedding`, for the output head."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        kwargs = _with_config(kwargs, kwargs.get("prefix", ""))
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
