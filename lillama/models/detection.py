"""The family of a model type that `families.py` does not declare, found in the model itself:
every linear layer of its blocks, and stacked experts of the form that transformers gives most
models. What is not of this form stays dense and is named in `Family.left_out`."""

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations import moe

from lillama.errors import InputError
from lillama.models.dense_linear import is_linear, linear_shape
from lillama.models.families import FAMILIES, ExpertsNaming, Family, check_decoder
from lillama.models.skeleton import block_list, skeleton

__all__ = ["family_for", "find_family"]

# what configs call the number of experts
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# a module of this name, or with it behind a "_", decides where tokens go
ROUTERS = ("gate", "router")
FIELDS = ("hidden_size", "num_hidden_layers", "vocab_size")


def family_for(config: PretrainedConfig, model: PreTrainedModel | None = None) -> Family:
    """Return what is declared for the config's model type, or else found in `model`, a dense
    one of this config with its head, where the caller has one already.

    Raises:
        InputError: neither; see `find_family`.
    """
    declared = FAMILIES.get(config.model_type)
    if declared is not None:
        return declared
    check_decoder(config)
    return find_family(skeleton(config) if model is None else model)


def find_family(model: PreTrainedModel) -> Family:
    """The family of a causal language model on any device, by its modules alone.

    Targets are all linear layers of the blocks but routers and those whose weight their module
    reads itself; with experts the layers of attention are none by default, as in the declared
    families.

    Raises:
        InputError: the model is not a plain decoder, or holds nothing that can be factorised.
    """
    kind = model.config.model_type
    problem = _problem(model)
    if problem is not None:
        raise InputError(f"model_type {kind!r} cannot be compressed: {problem}")
    block_path, blocks = block_list(model)
    experts, left_out = _experts(model, block_path, blocks)
    linears = _linears(blocks, left_out)
    if not linears and experts is None:
        holders = {type(m).__name__ for m in blocks.modules() if _has_matrix(m)}
        raise InputError(
            f"model_type {kind!r} cannot be compressed: its blocks hold neither nn.Linear nor "
            "Conv1D nor stacked experts of the common form; their matrices belong to "
            f"{', '.join(sorted(holders)) or 'nothing'}" + "".join(f"; {text}" for text in left_out)
        )
    dense = [path for path in linears if experts is None or not linears[path][1]]
    shorts = _short_names(linears)
    targets = {short: path for path, short in shorts.items()}
    inside = () if experts is None else experts.projections
    paths = {module: path for path, module in model.named_modules()}
    embedding = paths[model.get_input_embeddings()]
    head = paths[model.get_output_embeddings()]
    widest = max((width for path in dense for width in linears[path][0]), default=0)
    return Family(
        model_type=kind,
        targets=targets,
        default_targets=tuple(dict.fromkeys((*inside, *(shorts[path] for path in dense)))),
        experts=experts,
        paper_strategy="bottom",
        embedding=embedding,
        head=_hub_name(model, head),
        runtime_head=head,
        before_blocks=_outside(model, block_path, (embedding, head)),
        inner_size=widest if experts is None else _expert_width(blocks, experts),
        shared_size=widest if experts is not None and widest else None,
        left_out=tuple(dict.fromkeys(left_out)),
    )


def _problem(model: PreTrainedModel) -> str | None:
    """Return why blocks cannot be taken out of a model; None where they can."""
    absent = [name for name in FIELDS if not isinstance(getattr(model.config, name, None), int)]
    if absent:
        return f"its config has no {absent[0]} of its own"
    if model.get_input_embeddings() is None or model.get_output_embeddings() is None:
        return "it does not say what its token embeddings and its output head are"
    _, blocks = block_list(model)
    owners = [{id(p) for p in block.parameters()} for block in blocks]
    if any(a & b for place, a in enumerate(owners) for b in owners[:place]):
        return "its blocks share weights"
    parents = block_list(model)[0].split(".")[:-1]
    for depth in range(len(parents) + 1):
        if _own_parameters(model.get_submodule(".".join(parents[:depth]))):
            return "it has weights outside its blocks that belong to no module of their own"
    return None


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in _own_parameters(module).values())


def _outside(model: PreTrainedModel, block_path: str, vocabulary: Iterable[str]) -> tuple[str, ...]:
    """Return every module with weights outside the blocks but embeddings and head: which of them
    run before the blocks is not known, and all are small."""
    return tuple(
        name
        for name, module in model.named_modules()
        if _own_parameters(module)
        and not f"{name}.".startswith(f"{block_path}.")
        and name not in vocabulary
    )


def _linears(blocks: nn.ModuleList, left_out: list[str]) -> dict[str, tuple[tuple[int, int], bool]]:
    """Return {path in the block: ((N, K), whether it is a part of attention)}."""
    found: dict[str, tuple[tuple[int, int], bool]] = {}
    for block in blocks:
        modules = dict(block.named_modules())
        for path, module in modules.items():
            *_, leaf = parts = path.split(".")
            if not is_linear(module) or path in found:
                continue
            parent, problem = modules[path.rpartition(".")[0]], None
            if any(part.rpartition("_")[2] in ROUTERS for part in parts):
                problem = "it is a router or a gate by its name"
            elif _reads_weight(parent, leaf):
                problem = f"{type(parent).__name__} reads its weight itself"
            if problem is not None:
                left_out.append(f"{path} stays dense: {problem}")
                continue
            above = [modules[".".join(parts[:depth])] for depth in range(1, len(parts))]
            attention = any("attention" in type(m).__name__.lower() for m in above)
            found[path] = linear_shape(module), attention
    return found


def _reads_weight(parent: nn.Module, leaf: str) -> bool:
    """Return whether a module looks at the weight of its layer `leaf`, which factors have not."""
    return f"self.{leaf}.weight" in inspect.getsource(type(parent))


def _short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return {path: its last parts joined by "_", as many as tell it from the others}."""

    def short(path: str, count: int) -> str:
        return "_".join(path.split(".")[-count:])

    counts = dict.fromkeys(paths, 1)
    while True:
        names = [short(path, count) for path, count in counts.items()]
        double = [p for p, name in zip(counts, names, strict=True) if names.count(name) > 1]
        longer = [path for path in double if counts[path] <= path.count(".")]
        if not longer:
            return dict(zip(counts, names, strict=True))
        counts |= {path: counts[path] + 1 for path in longer}


def _hub_name(model: PreTrainedModel, path: str) -> str:
    """Return what a checkpoint calls a module's weight, by transformers' own renaming."""
    names = revert_weight_conversion(model, {f"{path}.weight": torch.empty(0)})
    return next(iter(names)).removesuffix(".weight")


def _stacked(blocks: nn.ModuleList) -> Iterator[tuple[int, str, nn.Module]]:
    """Yield (block, path in it, module) of everything that holds stacked matrices."""
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            stacked = any(p.ndim == 3 for p in _own_parameters(module).values())
            if stacked and not isinstance(module, nn.Conv1d):
                yield index, path, module


def _experts(
    model: PreTrainedModel, block_path: str, blocks: nn.ModuleList
) -> tuple[ExpertsNaming | None, list[str]]:
    """Return the naming of the stacked experts, if they are of the common form, and what is not."""
    found: dict[str, ExpertsNaming] = {}
    left_out: list[str] = []
    for index, path, module in _stacked(blocks):
        naming = _uncommon(model, module)
        if naming is None and path not in found:
            naming = _naming(model, f"{block_path}.{index}", path, module)
        if isinstance(naming, ExpertsNaming):
            found[path] = naming
        elif naming is not None:
            left_out.append(f"{path} stays dense: {type(module).__name__} {naming}")
    first, *others = [*found.values()] or [None]
    left_out += [f"{o.runtime} stays dense: other experts are found" for o in others if o]
    return first, left_out


def _uncommon(model: PreTrainedModel, module: Any) -> str | None:
    """Return what sets stacked matrices apart from transformers' common experts, if anything."""
    shapes = {name: p.shape for name, p in _own_parameters(module).items()}
    if shapes.keys() != {"gate_up_proj", "down_proj"} or any(len(s) != 3 for s in shapes.values()):
        return f"holds {', '.join(shapes)}, not gate_up_proj and down_proj alone"
    (E, double, H), (E_down, H_down, inner) = shapes["gate_up_proj"], shapes["down_proj"]
    form = ("is_concatenated", "has_gate", "has_bias", "is_transposed")
    plain = [getattr(module, name, None) for name in form] == [True, True, False, False]
    if (E, double, H) != (E_down, 2 * inner, H_down) or not plain:
        return "lays its matrices out in a way of its own"
    if getattr(module, "has_post_expert_norm", False):
        return "norms what its experts put out"
    if getattr(type(module), "_apply_gate", None) is not moe._default_apply_gate:
        return "has a gate of its own"
    if getattr(model.config, "hidden_act", None) != "silu":
        return "has another activation than silu"
    if not isinstance(getattr(model.config, "num_experts_per_tok", None), int):
        return "has a config without num_experts_per_tok"
    if _count(model.config, E) is None:
        return f"has a config that does not say that there are {E}"
    return None


def _count(config: PretrainedConfig, experts: int) -> str | None:
    """Return what the config calls the number of experts."""
    own = config.to_dict()
    return next((name for name in COUNTS if own.get(name) == experts), None)


def _naming(
    model: PreTrainedModel, block: str, path: str, module: nn.Module
) -> ExpertsNaming | str:
    """Return how checkpoints call each expert's matrices, seen in what transformers makes of marked
    ones; or why that does not fit."""
    num_experts = module.get_parameter("down_proj").shape[0]
    marked = {"gate_up_proj": [[[0.0], [1.0]]], "down_proj": [[[2.0]]]}
    # with numbers, also where models are being built on the meta device
    tensors = {key: torch.tensor(value, device="cpu") for key, value in marked.items()}
    stacked = {f"{block}.{path}.{k}": v.repeat(num_experts, 1, 1) for k, v in tensors.items()}
    names: list[str] = [""] * 3
    hub = ""
    found: dict[str, Tensor] = revert_weight_conversion(model, stacked)
    for name, value in found.items():
        match = re.fullmatch(rf"{re.escape(block)}\.(.+)\.(\d+)\.(\w+)\.weight", name)
        if match is None or value.numel() != 1:
            return "is not stored one matrix an expert"
        hub, names[int(value)] = match[1], match[3]
    if len(found) != 3 * num_experts or not path.endswith("experts") or not all(names):
        return "is not stored one matrix an expert"
    count = _count(model.config, num_experts)
    assert count is not None
    gate, up, down = names
    return ExpertsNaming(runtime=path, hub=hub, gate=gate, up=up, down=down, count=count)


def _expert_width(blocks: nn.ModuleList, experts: ExpertsNaming) -> int:
    _, _, module = next(m for m in _stacked(blocks) if m[1] == experts.runtime)
    return module.get_parameter("down_proj").shape[2]
