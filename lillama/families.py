"""What is factorised in each model family: one declaration a family.

Two names meet here. The hub name is how a checkpoint calls a matrix
(`...block_sparse_moe.experts.3.w1`); the runtime name is where transformers puts it
(`...mlp.experts`, gate half of `gate_up_proj[3]`). They differ only for stacked experts.
"""

import re
from dataclasses import dataclass, field

from lillama.config import Strategy
from lillama.errors import InputError

__all__ = ["FAMILIES", "PROJECTIONS", "ExpertsNaming", "Family", "family_of"]

# The three projections of a gated expert, in the order the files of this project use.
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class ExpertsNaming:
    """Names of a stacked experts module, relative to the block."""

    runtime: str
    hub: str
    gate: str
    up: str
    down: str

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
    """`targets` maps a short name to the nn.Linear's path inside the block; experts add theirs.
    `embedding` and `head` are the hub names of the matrices that the vocabulary has to itself."""

    model_type: str
    targets: dict[str, str] = field(default_factory=dict)
    default_targets: tuple[str, ...]
    experts: ExpertsNaming | None = None
    paper_strategy: Strategy
    embedding: str
    head: str = "lm_head"

    @property
    def target_names(self) -> tuple[str, ...]:
        experts = self.experts
        inside = () if experts is None else (experts.gate, experts.down, experts.up)
        return (*self.targets, *inside, *self.vocabulary)

    @property
    def vocabulary(self) -> dict[str, str]:
        """{short name: hub name} of the token embeddings and the output head."""
        return {name.rpartition(".")[2]: name for name in (self.embedding, self.head)}


FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        model_type="mixtral",
        default_targets=("w1", "w2", "w3"),
        experts=ExpertsNaming(
            runtime="mlp.experts", hub="block_sparse_moe.experts", gate="w1", up="w3", down="w2"
        ),
        paper_strategy="bottom",
        embedding="model.embed_tokens",
    ),
    # dt_proj and conv1d are read as tensors by the mixer and are tiny: never targets. x_proj can
    # be asked for.
    "mamba": Family(
        model_type="mamba",
        targets={
            "in_proj": "mixer.in_proj",
            "out_proj": "mixer.out_proj",
            "x_proj": "mixer.x_proj",
        },
        default_targets=("in_proj", "out_proj"),
        paper_strategy="uniform",
        embedding="backbone.embeddings",
    ),
}


def family_of(model_type: str) -> Family:
    """Raises InputError for a model type that is not declared above."""
    family = FAMILIES.get(model_type)
    if family is None:
        raise InputError(
            f"unknown architecture: model_type {model_type!r} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    return family
