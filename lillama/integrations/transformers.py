"""The Hugging Face quantizer: `import lillama`, then AutoModelForCausalLM.from_pretrained loads a
compressed model.

transformers silently tolerates missing, extra and mis-shaped tensors when a quantizer is present,
so everything is checked here: names and shapes against config.json before loading, that each
factor was really filled and is finite after it.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lillama.checkpoint.compression import FORMAT_VERSION, QUANT_METHOD, check_compression
from lillama.checkpoint.headers import read_shard_headers
from lillama.checkpoint.names import PERMUTATION, PIVOT_MASK
from lillama.checkpoint.pivots import as_stored, is_permutation, wrong_pivot_mask
from lillama.checkpoint.sentinel import saved_sentinel
from lillama.checkpoint.shapes import check_factors, stored_shapes
from lillama.errors import InputError
from lillama.integrations.stacked_experts import factor_conversions
from lillama.models.detection import family_for
from lillama.models.families import PROJECTIONS, Family
from lillama.modules.factorized import Factorized
from lillama.modules.low_rank_experts import LowRankExperts
from lillama.modules.replace import replace_modules

__all__ = ["LillamaConfig", "LillamaQuantizer", "attach_quantizer", "register"]

# where torch places the tensors it allocates itself
ALIGNMENT_BYTES = 64


class LillamaConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    Args:
        ranks: {matrix hub name: R}, what is factorised.
        format_version: of the on-disk format.
        gauge: "plain" or "pivot".
        sentinel: name of the tensor that makes a load without lillama fail.
        reduction: share of the whole model's parameters removed.
        base_model, base_revision, recipe, tokens, producer: where the model comes from; producer
            is {"name", "version"}, or "name version" as it once was.

    Raises:
        InputError: unknown keys, another format version or gauge, or no ranks or sentinel.
    """

    ranks: dict[str, int]

    def __init__(
        self,
        ranks: dict[str, int] | None = None,
        format_version: int = FORMAT_VERSION,
        gauge: str = "plain",
        sentinel: str | None = None,
        reduction: float | None = None,
        base_model: str | None = None,
        base_revision: str | None = None,
        recipe: str | None = None,
        tokens: int | None = None,
        producer: dict[str, str] | str | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise InputError(
                f"quantization_config has unknown keys {sorted(unknown)}; "
                "it was written by a newer lillama, upgrade"
            )
        promised = {"ranks": ranks, "gauge": gauge, "sentinel": sentinel}
        check_compression({"format_version": format_version, **promised})
        assert ranks is not None and sentinel is not None
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.gauge = gauge
        self.ranks = ranks
        self.sentinel = sentinel
        self.reduction = reduction
        self.base_model = base_model
        self.base_revision = base_revision
        self.recipe = recipe
        self.tokens = tokens
        # an object in any case: vLLM reads its "name", whoever made the checkpoint
        name, _, version = (producer if isinstance(producer, str) else "").partition(" ")
        named = {"name": name, "version": version} if name else {}
        self.producer = producer if isinstance(producer, dict) else named


class LillamaQuantizer(HfQuantizer):
    """Builds the factorised modules before the weights are loaded and verifies them afterwards."""

    quantization_config: LillamaConfig  # type: ignore[assignment]
    # a dense checkpoint cannot be loaded with our config: compress it instead
    requires_calibration = True
    # of the model that is being loaded
    _family: Family | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        return

    def _canonical(self, name: str, model: PreTrainedModel, family: Family) -> str:
        """Return a tensor's name as config.json would spell it: hub name, with the base model's
        prefix."""
        if family.experts is not None:
            name = name.replace(f".{family.experts.runtime}.", f".{family.experts.hub}.")
        prefix = f"{model.base_model_prefix}."
        wants_prefix = any(name.startswith(prefix) for name in self.quantization_config.ranks)
        if name.startswith(f"{family.runtime_head}."):
            return f"{family.head}{name.removeprefix(family.runtime_head)}"
        has_prefix = name.startswith((prefix, f"{family.head}."))
        return prefix + name if wants_prefix and not has_prefix else name

    def _ranks(self, model: PreTrainedModel, family: Family) -> dict[str, int]:
        """Return the ranks, without the head where the model has none (AutoModel)."""
        ranks: dict[str, int] = self.quantization_config.ranks
        has_head = model.get_output_embeddings() is not None
        return {name: rank for name, rank in ranks.items() if has_head or name != family.head}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        family = family_for(model.config)
        ranks = self._ranks(model, family)
        gauge = self.quantization_config.gauge
        shapes = stored_shapes(model, family, ranks)
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if files and all(file.suffix == ".safetensors" for file in files):
            dropped = f"{family.head}." if len(ranks) < len(self.quantization_config.ranks) else ()
            present = {
                self._canonical(name, model, family): header.shape
                for file in files
                for name, header in read_shard_headers(file).items()
                if not dropped or not name.startswith(dropped)
            }
            sentinel = self._canonical(self.quantization_config.sentinel, model, family)
            check_factors(present, ranks, shapes, gauge, family.embedding, sentinel)
        replaced = replace_modules(
            model,
            model.config,
            ranks,
            base_prefix=model.base_model_prefix,
            device="meta",
            pivot=gauge == "pivot",
            family=family,
        )
        self._family = family
        dense_names = [
            f"{path}.{key}" for path, old in replaced.items() for key, _ in old.named_parameters()
        ]
        patterns = {rf"{re.escape(name)}$" for name in dense_names if not name.endswith(".bias")}
        known = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = set(known) | patterns
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def update_weight_conversions(
        self, weight_conversions: list, *args: Any, **kwargs: Any
    ) -> list:
        return [*factor_conversions(self._family), *weight_conversions]

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        family = family_for(model.config)
        state = model.state_dict(keep_vars=True)
        for name, wanted in self._shapes.items():
            if name in state and tuple(state[name].shape) != wanted:
                raise InputError(
                    f"{name} has shape {list(state[name].shape)}, wanted {list(wanted)}"
                )
        for path, module in _factorised(model):
            for key, parameter in module.named_parameters(recurse=False):
                # offloaded to disk: nothing in memory to look at
                if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                    raise InputError(f"{path}.{key} is missing from the checkpoint")
            for matrix, rank, tensors in _matrices(family, path, module):
                _check_loaded(self._canonical(f"{matrix}.", model, family), rank, tensors)
        # tensors that went through a conversion keep the dtype of the file; tensors mapped from a
        # file lie at any address, and products on a CPU then differ in their last bit
        strict_fp32 = model._keep_in_fp32_modules_strict or ()
        for name, parameter in state.items():
            if parameter.is_meta:
                continue
            kept = any(part in name for part in strict_fp32)
            if parameter.is_floating_point() and not kept:
                parameter.data = parameter.data.to(model.config.dtype)
            if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT_BYTES:
                parameter.data = parameter.data.clone()
        return model

    def get_state_dict_and_metadata(  # type: ignore[override]
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what save_pretrained writes: experts one by one without padding, pivot masks in
        place of permutations, and the sentinel, under a name that stays and that goes into
        config.json. Raises ValueError as `pivot_mask_of`."""
        family = family_for(model.config)
        state = model.state_dict()
        for path, module in _factorised(model):
            for key in module.state_dict():
                del state[f"{path}.{key}"]
            for matrix, rank, tensors in _matrices(family, path, module):
                for key, tensor in as_stored(tensors, rank).items():
                    # a view of a stack would be saved with all of it
                    own = tensor.clone() if isinstance(module, LowRankExperts) else tensor
                    state[f"{matrix}.{key}"] = own.detach()
        name, shape = saved_sentinel(family, self.quantization_config.ranks)
        state[name] = torch.zeros(shape)
        self.quantization_config.sentinel = name
        return state, {"quant_method": QUANT_METHOD}

    def is_serializable(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _factorised(model: nn.Module) -> list[tuple[str, Factorized | LowRankExperts]]:
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, Factorized | LowRankExperts)
    ]


def _matrices(
    family: Family, path: str, module: Factorized | LowRankExperts
) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """Yield name, rank and tensors of every matrix of a factorised module."""
    if isinstance(module, Factorized):
        yield path, module.rank, module.state_dict()
        return
    assert family.experts is not None
    for projection in PROJECTIONS:
        short = family.experts.hub_projection(projection)
        for expert, rank in enumerate(module.ranks[projection]):
            yield f"{path}.{expert}.{short}", rank, module.matrix(projection, expert)


def _check_loaded(prefix: str, rank: int, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_meta:
            continue
        if key == PERMUTATION:
            if not is_permutation(tensor):
                raise InputError(wrong_pivot_mask(f"{prefix}{PIVOT_MASK}", rank, len(tensor)))
        elif not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{prefix}{key} holds NaN or infinity; the checkpoint is damaged")


def attach_quantizer(model: PreTrainedModel, config: LillamaConfig) -> None:
    """Make save_pretrained write our format for a model whose modules were replaced in memory."""
    model.hf_quantizer = LillamaQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = QUANT_METHOD  # type: ignore[assignment]
    model.config.quantization_config = config


def register() -> None:
    """Enter the config and the quantizer with transformers. Safe to call twice."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LillamaConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LillamaQuantizer  # type: ignore[assignment]
