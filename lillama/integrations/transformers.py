"""The Hugging Face quantizer: `import lillama`, then AutoModelForCausalLM.from_pretrained loads a
compressed model.

transformers silently tolerates missing, extra and mis-shaped tensors when a quantizer is present,
so everything is checked here: names and shapes against config.json before loading, that each
factor was really filled and is finite after it.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lillama.checkpoint.format import (
    FORMAT_VERSION,
    GAUGES,
    QUANT_METHOD,
    check_factors,
    check_ranks,
    check_sentinel,
    read_shard_headers,
    saved_sentinel,
)
from lillama.checkpoint.pivots import is_permutation, marks_of, wrong_marks
from lillama.errors import InputError
from lillama.integrations.stacked_experts import factor_conversions
from lillama.models.dense_linear import is_transposed
from lillama.models.detection import family_for
from lillama.models.families import PROJECTIONS, Family
from lillama.modules.low_rank_embedding import LowRankEmbedding
from lillama.modules.low_rank_experts import LowRankExperts
from lillama.modules.low_rank_linear import LowRankLinear
from lillama.modules.pivot_low_rank_embedding import PivotLowRankEmbedding
from lillama.modules.pivot_low_rank_experts import PivotLowRankExperts
from lillama.modules.pivot_low_rank_linear import PivotLowRankLinear
from lillama.modules.replace import replace_modules

__all__ = [
    "LillamaConfig",
    "LillamaQuantizer",
    "attach_quantizer",
    "dense_shapes",
    "kept_dense",
    "register",
]

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
        if format_version != FORMAT_VERSION or gauge not in GAUGES:
            raise InputError(
                f"format_version {format_version!r} with gauge {gauge!r} cannot be read; this "
                f"lillama reads version {FORMAT_VERSION} with gauge {' or '.join(GAUGES)}; "
                "compress again, or use the lillama that wrote it"
            )
        check_ranks(ranks)
        check_sentinel(sentinel)
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


def dense_shapes(
    model: nn.Module, family: Family, ranks: Iterable[str]
) -> dict[str, tuple[int, int]]:
    """{matrix hub name: (N, K)} of a dense model (meta tensors will do), names as in `ranks`.

    Raises:
        InputError: a name is not a matrix of this model.
    """
    prefix = getattr(model, "base_model_prefix", "")
    shapes: dict[str, tuple[int, int]] = {}
    parameters = dict(model.named_parameters())
    for name in ranks:
        parsed = None if family.experts is None else family.experts.parse(name)
        tensor = f"{parsed[0]}.down_proj" if parsed else f"{family.runtime_name(name)}.weight"
        tensor = tensor if tensor in parameters else tensor.removeprefix(f"{prefix}.")
        found = parameters.get(tensor)
        wanted_ndim = 2 if parsed is None else 3
        if (
            found is None
            or found.ndim != wanted_ndim
            or (parsed is not None and parsed[1] >= found.shape[0])
        ):
            raise InputError(f"quantization_config names {name}, which is no matrix of this model")
        if parsed is None:
            transposed = is_transposed(model.get_submodule(tensor.rpartition(".")[0]))
            shapes[name] = (found.shape[transposed], found.shape[not transposed])
        else:
            hidden, intermediate = found.shape[1:]
            down = parsed[2] == "down"
            shapes[name] = (hidden, intermediate) if down else (intermediate, hidden)
    return shapes


def kept_dense(model: PreTrainedModel, family: Family, ranks: Iterable[str]) -> list[str]:
    """Hub names of the matrices without a rank in experts modules that have one elsewhere."""
    naming, ranked = family.experts, set(ranks)
    if naming is None:
        return []
    return [
        name
        for block in {name.partition(f".{naming.hub}.")[0] for name in ranked if naming.parse(name)}
        for expert in range(family.num_experts(model.config))
        for projection in PROJECTIONS
        if (name := f"{block}.{naming.hub}.{expert}.{naming.hub_projection(projection)}")
        not in ranked
    ]


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
        """Tensor name as config.json would spell it: hub name, with the base model's prefix."""
        if family.experts is not None:
            name = name.replace(f".{family.experts.runtime}.", f".{family.experts.hub}.")
        prefix = f"{model.base_model_prefix}."
        wants_prefix = any(name.startswith(prefix) for name in self.quantization_config.ranks)
        if name.startswith(f"{family.runtime_head}."):
            return f"{family.head}{name.removeprefix(family.runtime_head)}"
        has_prefix = name.startswith((prefix, f"{family.head}."))
        return prefix + name if wants_prefix and not has_prefix else name

    def _ranks(self, model: PreTrainedModel, family: Family) -> dict[str, int]:
        """Without the head where the model has none (AutoModel)."""
        ranks: dict[str, int] = self.quantization_config.ranks
        has_head = model.get_output_embeddings() is not None
        return {name: rank for name, rank in ranks.items() if has_head or name != family.head}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        family = family_for(model.config)
        ranks = self._ranks(model, family)
        gauge = self.quantization_config.gauge
        shapes = dense_shapes(model, family, [*ranks, *kept_dense(model, family, ranks)])
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
                if parameter.is_meta:  # offloaded to disk: nothing in memory to look at
                    continue
                if not getattr(parameter, "_is_hf_initialized", False):
                    raise InputError(f"{path}.{key} is missing from the checkpoint")
                if not bool(torch.isfinite(parameter).all()):
                    name = _damaged_name(family, path, module, key, parameter)
                    name = self._canonical(name, model, family)
                    raise InputError(f"{name} holds NaN or infinity; the checkpoint is damaged")
            for name, (order, rank) in _orders(family, path, module).items():
                if not is_permutation(order):
                    name = self._canonical(name, model, family)
                    raise InputError(wrong_marks(name, rank, len(order)))
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
        """For save_pretrained: experts one by one without padding, marks in place of orders, and
        the sentinel, under a name that stays and that goes into config.json.

        Raises:
            ValueError: marks cannot express the order of a matrix's outputs.
        """
        family = family_for(model.config)
        state = model.state_dict()
        for path, module in _factorised(model):
            if isinstance(module, _Pivot):
                order = state.pop(f"{path}.lr_order")
                state[f"{path}.lr_pivots"] = marks_of(order, module.rank)
            if not isinstance(module, LowRankExperts) or family.experts is None:
                continue
            for key in module.state_dict():
                del state[f"{path}.{key}"]
            for projection in PROJECTIONS:
                short = family.experts.hub_projection(projection)
                for expert in range(module.num_experts):
                    for key, tensor in module.stored(projection, expert).items():
                        state[f"{path}.{expert}.{short}.{key}"] = tensor.clone()
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


_Pivot = PivotLowRankLinear | PivotLowRankEmbedding
_Factorised = LowRankLinear | LowRankExperts | LowRankEmbedding | _Pivot


def _factorised(model: nn.Module) -> list[tuple[str, _Factorised]]:
    return [
        (path, module) for path, module in model.named_modules() if isinstance(module, _Factorised)
    ]


def _damaged_name(family: Family, path: str, module: nn.Module, key: str, parameter: Tensor) -> str:
    """What the checkpoint calls the first part of a parameter that is not finite."""
    naming = family.experts
    if not isinstance(module, LowRankExperts) or naming is None:
        return f"{path}.{key}"
    projection, suffix = key.split("_")
    row = int((~torch.isfinite(parameter)).flatten(1).any(1).nonzero()[0])
    if suffix == "W":
        row = [e for e, rank in enumerate(module.ranks[projection]) if rank == 0][row]
    return f"{path}.{row}.{naming.hub_projection(projection)}.lr_{suffix}"


def _orders(family: Family, path: str, module: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """{hub name of the marks: (order of outputs, rank)} of what is in the pivot gauge, but on the
    meta device."""
    if isinstance(module, _Pivot):
        found = {f"{path}.lr_pivots": (module.lr_order, module.rank)}
    elif isinstance(module, PivotLowRankExperts) and family.experts is not None:
        found = {
            f"{path}.{expert}.{family.experts.hub_projection(projection)}.lr_pivots": (
                module.order(projection, expert),
                rank,
            )
            for projection in PROJECTIONS
            for expert, rank in enumerate(module.ranks[projection])
            if rank
        }
    else:
        found = {}
    return {name: pair for name, pair in found.items() if not pair[0].is_meta}


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
