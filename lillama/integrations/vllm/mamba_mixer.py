"""Mamba-1's mixer in vLLM with factorised projections.

vLLM builds the projections of `MambaMixer` without a quantization config, so that no method is ever
asked for: this class takes the mixer's place and exchanges them once they are there.
"""

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer

from lillama.integrations.vllm.linear import LowRankLinearMethod
from lillama.integrations.vllm.quantization import LillamaVllmConfig

__all__ = ["LowRankMambaMixer"]


@MambaMixer.register_oot
class LowRankMambaMixer(MambaMixer):
    """vLLM's mixer; projections that have a rank compute with their factors. For other models it is
    what it was."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config().quant_config
        if not isinstance(config, LillamaVllmConfig):
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
