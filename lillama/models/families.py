"""Model families: one declaration of what is factorised in each.

To add one: name the nn.Linear layers inside a block, those to factorise unless told, the stacked
experts if it has any, and what its checkpoints call embeddings and head. The blocks are found by
themselves (`lillama.models.skeleton.block_list`).

Two names meet here. The hub name is how a checkpoint calls a matrix
(`...block_sparse_moe.experts.3.w1`); the runtime name is where transformers puts it
(`...mlp.experts`, gate half of `gate_up_proj[3]`). They differ for stacked experts and for the head
of GPT-NeoX.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lillama.config import Strategy
from lillama.errors import InputError

__all__ = [
    "FAMILIES",
    "PROJECTIONS",
    "ExpertsNaming",
    "Family",
    "check_decoder",
    "check_model_type",
    "family_of",
]

# The three projections of a gated expert, in the order the files of this project use.
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class ExpertsNaming:
    """Names of a stacked experts module, relative to the block; `count` is what the config calls
    their number. A block without such a module is dense."""

    runtime: str
    hub: str
    gate: str
    up: str
    down: str
    count: str = "num_experts"

    @property
    def projections(self) -> tuple[str, ...]:
        return self.gate, self.down, self.up

    def hub_projection(self, projection: str) -> str:
        return {"gate": self.gate, "up": self.up, "down": self.down}[projection]

    def parse(self, hub_name: str) -> tuple[str, int, str] | None:
        """Split a hub name into (runtime module, expert, projection); None when it is not an
        expert's matrix."""
        names = f"{self.gate}|{self.up}|{self.down}"
        match = re.fullmatch(rf"(.*\.)?{re.escape(self.hub)}\.(\d+)\.({names})", hub_name)
        if match is None:
            return None
        short = {self.gate: "gate", self.up: "up", self.down: "down"}
        return f"{match[1] or ''}{self.runtime}", int(match[2]), short[match[3]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model type: what lillama knows of it beside its config."""

    model_type: str
    # {short name: path of the nn.Linear inside the block}, in the blocks that have it; experts add
    # theirs, where the same short name stands for both
    targets: dict[str, str] = field(default_factory=dict)
    default_targets: tuple[str, ...]
    # further ones where each rank is chosen by what it costs the model's loss
    worth_targets: tuple[str, ...] = ()
    experts: ExpertsNaming | None = None
    paper_strategy: Strategy
    # hub names of the two matrices of the vocabulary, and where transformers puts the head
    embedding: str
    head: str = "lm_head"
    runtime_head: str = "lm_head"
    # other modules with weights that run before the first block
    before_blocks: tuple[str, ...] = ()
    # what the config calls the width of the MLP (of one expert where there are experts) and of the
    # MLP that every token sees beside them, or the width itself
    inner_size: str | int | None = "intermediate_size"
    shared_size: str | int | None = None
    # what it calls how many times wider than the model a state-space mixer is
    expand: str | None = None
    # numbers that autograd keeps of a scan for each of the mixer's width, beyond those of an MLP
    scan_kept: int = 0
    # what `lillama.models.detection` leaves dense, and why
    left_out: tuple[str, ...] = ()

    @property
    def target_names(self) -> tuple[str, ...]:
        inside = () if self.experts is None else self.experts.projections
        return tuple(dict.fromkeys((*self.targets, *inside, *self.vocabulary)))

    def runtime_name(self, name: str) -> str:
        """Where transformers puts a linear layer or the embeddings with this hub name."""
        return self.runtime_head if name == self.head else name

    def num_experts(self, config: Any) -> int:
        """Experts of a block; 0 for a dense family."""
        return 0 if self.experts is None else getattr(config, self.experts.count)

    def inner_width(self, config: Any) -> int:
        """Width of the MLP, or of one expert; 0 where there is none. GPT-2's config may leave it to
        be four hidden sizes."""
        if self.inner_size is None:
            return 0
        return _width(config, self.inner_size) or 4 * config.hidden_size

    def shared_width(self, config: Any) -> int:
        """Width of the MLP beside the experts; 0 where there is none."""
        return 0 if self.shared_size is None else _width(config, self.shared_size)

    @property
    def vocabulary(self) -> dict[str, str]:
        """{short name: hub name} of the token embeddings and the output head."""
        return {name.rpartition(".")[2]: name for name in (self.embedding, self.head)}


def _width(config: Any, size: str | int) -> int:
    return size if isinstance(size, int) else getattr(config, size)


def _in(module: str, *names: str) -> dict[str, str]:
    """Return {short name: path} of layers in one module of the block."""
    return {name: f"{module}.{name}" for name in names}


_ATTENTION = _in("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
_MLP = _in("mlp", "gate_proj", "up_proj", "down_proj")
_GATED = _in("mlp", "gate_up_proj", "down_proj")


def _dense(model_type: str, targets: Mapping[str, str], **more: Any) -> Family:
    """A family without experts: every linear layer of its blocks is a target."""
    values = {"embedding": "model.embed_tokens", "paper_strategy": "bottom", **more}
    return Family(
        model_type=model_type, targets=dict(targets), default_targets=tuple(targets), **values
    )


def _moe(
    model_type: str,
    experts: ExpertsNaming,
    targets: Mapping[str, str],
    default: tuple[str, ...] = (),
    attention: Mapping[str, str] = _ATTENTION,
    **more: Any,
) -> Family:
    """A family with experts: these are the targets, and `default`; attention can be asked for."""
    return Family(
        model_type=model_type,
        targets={**attention, **targets},
        default_targets=(*experts.projections, *default),
        experts=experts,
        paper_strategy="bottom",
        embedding="model.embed_tokens",
        **more,
    )


def _state_space(model_type: str, targets: Mapping[str, str], **more: Any) -> Family:
    """A family whose blocks are one mixer each."""
    return Family(
        model_type=model_type,
        targets=dict(targets),
        default_targets=("in_proj", "out_proj"),
        worth_targets=tuple(name for name in targets if name == "x_proj"),
        paper_strategy="uniform",
        embedding="backbone.embeddings",
        **more,
    )


_PROJ_EXPERTS = ExpertsNaming(
    runtime="mlp.experts", hub="mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"
)
_W_EXPERTS = replace(
    _PROJ_EXPERTS,
    hub="block_sparse_moe.experts",
    gate="w1",
    up="w3",
    down="w2",
    count="num_local_experts",
)
# dt_proj and conv1d are read as tensors by the mixer and are tiny: never targets.
_MIXER = _in("mixer", "in_proj", "out_proj", "x_proj")
_SHARED = {f"shared_{name}": f"mlp.shared_expert.{name}" for name in _MLP}

# of DeepSeek
_ROUTED_EXPERTS = replace(_PROJ_EXPERTS, count="n_routed_experts")
_LATENT_ATTENTION = {
    **_in("self_attn", "q_proj", "q_a_proj", "q_b_proj"),
    "kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    **_in("self_attn", "kv_b_proj", "o_proj"),
}
_SHARED_EXPERTS = {f"shared_{name}": f"mlp.shared_experts.{name}" for name in _MLP}
_DEEPSEEK: dict[str, Any] = {
    "attention": _LATENT_ATTENTION,
    "default": tuple(_SHARED_EXPERTS),
    "inner_size": "moe_intermediate_size",
    # of the dense blocks, which is wider than the shared experts
    "shared_size": "intermediate_size",
}

_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "cohere")
FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        model_type="mixtral",
        default_targets=("w1", "w2", "w3"),
        experts=_W_EXPERTS,
        paper_strategy="bottom",
        embedding="model.embed_tokens",
    ),
    "mamba": _state_space("mamba", _MIXER),
    **{name: _dense(name, {**_ATTENTION, **_MLP}) for name in _LLAMA_LIKE},
    # q, k, v are one matrix here, gate and up another: one pair of factors each
    "phi3": _dense("phi3", {**_in("self_attn", "qkv_proj", "o_proj"), **_GATED}),
    "phi": _dense(
        "phi", _in("self_attn", "q_proj", "k_proj", "v_proj", "dense") | _in("mlp", "fc1", "fc2")
    ),
    "gpt_neox": _dense(
        "gpt_neox",
        _in("attention", "query_key_value", "dense") | _in("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        embedding="gpt_neox.embed_in",
        head="embed_out",
    ),
    "opt": _dense(
        "opt",
        {**_in("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"), "fc1": "fc1", "fc2": "fc2"},
        embedding="model.decoder.embed_tokens",
        before_blocks=("model.decoder.embed_positions", "model.decoder.project_in"),
        inner_size="ffn_dim",
    ),
    "glm4": _dense("glm4", {**_ATTENTION, **_GATED}),
    "starcoder2": _dense("starcoder2", {**_ATTENTION, **_in("mlp", "c_fc", "c_proj")}),
    # multi-head latent attention: queries through one narrow matrix or two, keys and values through
    # two; the first blocks may be dense
    "deepseek_v2": _moe("deepseek_v2", _ROUTED_EXPERTS, {**_MLP, **_SHARED_EXPERTS}, **_DEEPSEEK),
    "deepseek_v3": _moe("deepseek_v3", _ROUTED_EXPERTS, {**_MLP, **_SHARED_EXPERTS}, **_DEEPSEEK),
    # transformers' Conv1D: the checkpoint holds the transposed weight
    "gpt2": _dense(
        "gpt2",
        {
            "c_attn": "attn.c_attn",
            "attn_c_proj": "attn.c_proj",
            "c_fc": "mlp.c_fc",
            "mlp_c_proj": "mlp.c_proj",
        },
        embedding="transformer.wte",
        before_blocks=("transformer.wpe",),
        inner_size="n_inner",
    ),
    # some blocks may have one MLP in place of the experts, with the same three projections
    "qwen2_moe": _moe(
        "qwen2_moe",
        _PROJ_EXPERTS,
        {**_MLP, **_SHARED},
        default=tuple(_SHARED),
        inner_size="moe_intermediate_size",
        shared_size="shared_expert_intermediate_size",
    ),
    "qwen3_moe": _moe("qwen3_moe", _PROJ_EXPERTS, _MLP, inner_size="moe_intermediate_size"),
    "olmoe": _moe("olmoe", _PROJ_EXPERTS, {}),
    "phimoe": _moe("phimoe", _W_EXPERTS, {}),
    # norms without weights between x_proj and the scan
    "falcon_mamba": _state_space("falcon_mamba", _MIXER),
    # steps, B and C come out of in_proj; `scan_kept` is for the state size of 128 that is usual
    "mamba2": _state_space(
        "mamba2",
        _in("mixer", "in_proj", "out_proj"),
        inner_size=None,
        expand="expand",
        scan_kept=17,
    ),
    # every block has a mixer or attention, and experts or one MLP
    "jamba": _moe(
        "jamba",
        replace(_PROJ_EXPERTS, runtime="feed_forward.experts", hub="feed_forward.experts"),
        _in("feed_forward", *_MLP) | _in("mamba", *_MIXER),
        default=("in_proj", "out_proj"),
        worth_targets=("x_proj",),
        expand="mamba_expand",
    ),
}


def family_of(model_type: str) -> Family:
    """Raises InputError for a model type that is not declared above."""
    family = FAMILIES.get(model_type)
    if family is None:
        raise InputError(_unknown(model_type))
    return family


def check_model_type(model_type: str) -> None:
    """Raises InputError for a model type that is neither declared above nor a causal language model
    of transformers, in which a family may be found (`lillama.models.detection`)."""
    if model_type not in FAMILIES and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{_unknown(model_type)}; transformers has no causal language model of this type either"
        )


def check_decoder(config: Any) -> None:
    """Raises InputError for a model with an encoder: transformers would make its decoder alone,
    whose config, when it was saved, no longer says so but for its class."""
    if config.is_encoder_decoder or getattr(type(config), "is_encoder_decoder", False):
        raise InputError(f"{_unknown(config.model_type)}; models with an encoder cannot be added")


def _unknown(model_type: str) -> str:
    return (
        f"unknown architecture: model_type {model_type!r} is not supported; "
        f"supported are {', '.join(sorted(FAMILIES))}; lillama/models/families.py says how to add "
        "one"
    )
