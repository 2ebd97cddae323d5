"""What the page shows, read from the files of OUT and checked: every number is one, and all are of
the same run; otherwise an error says which file and which entry."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from lillama.checkpoint.format import compression_of, read_config
from lillama.compress.plan.allocate import Matrix
from lillama.compress.plan.targets import find_matrices
from lillama.config import ReportConfig
from lillama.errors import InputError
from lillama.models.detection import family_for
from lillama.models.families import Family
from lillama.models.skeleton import named_blocks, skeleton

__all__ = ["Facts", "RankedMatrix", "read_facts"]

# What `_check` asks of a file: float is any finite number, a name with "?" may be absent or null,
# "*" stands for every name, "#" too, which must then be a number
TOTALS = ("params_before", "params_after", "seconds", "peak_memory_bytes")
BLOCK = {
    **dict.fromkeys(("index", "held_out_loss_before", "held_out_loss_after"), float),
    **dict.fromkeys(("steps", "best_step", *TOTALS), float),
    **dict.fromkeys(("expert_tokens?", "starved_experts?"), [int]),
}
REPORT = {
    **dict.fromkeys((*TOTALS, "bytes_before", "bytes_after", "reduction", "tokens"), float),
    **dict.fromkeys(("target_reduction", "predicted_loss_increase?"), float),
    "predicted_host_memory_bytes?": float,
    "head?": {"held_out_kl_before": float, "held_out_kl_after": float},
    "finetune?": {"kl_before": float, "kl_after": float},
    "blocks": [BLOCK],
    "rank_losses?": {"*": {"#": float}},
}
RECIPE = {"options": {"preset_values": {}, "text": list, "targets?": list}}
EVENTS = {
    "judged": {"block": float, "step": float, "held_out_loss": float},
    "block": {"index": float, "held_out_loss_after": float},
}
QUALITY = {
    **dict.fromkeys(("params", "tokens?", "retained?"), float),
    **{"tasks?": {"*": {}}, "generations?": {}, "speed?": {}},
}
KINDS = {float: "a finite number", int: "an integer", list: "a list", dict: "an object"}
FROM_COMPRESS = "`lillama compress` writes it into OUT: give that folder"


class Layer(NamedTuple):
    """A block, or one of the parts outside the blocks."""

    label: str
    short: str
    params_before: int
    params_after: int


class RankedMatrix(NamedTuple):
    """A target matrix; `rank` None: it stayed dense. `label` is its name inside the block, `block`
    None outside the blocks; `losses`: {rank: loss left} where the run measured it."""

    matrix: Matrix
    label: str
    block: int | None
    rank: int | None
    losses: dict[int, float]

    @property
    def params_after(self) -> int:
        dense = self.matrix.N * self.matrix.K
        return dense if self.rank is None else self.matrix.numbers(self.rank)

    @property
    def saved(self) -> int:
        return self.matrix.N * self.matrix.K - self.params_after


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything on the page. curves: {block: [(step, held-out loss)]} of the events file; quality:
    what `lillama eval --json` printed (None: not given)."""

    out: Path
    gauge: str
    report: dict[str, Any]
    recipe: dict[str, Any]
    layers: list[Layer]
    matrices: list[RankedMatrix]
    curves: dict[int, list[tuple[int, float]]] | None
    quality: dict[str, Any] | None

    @property
    def blocks(self) -> list[dict[str, Any]]:
        return self.report["blocks"]


# What the files say
def _load(file: Path, wanted: str, parse: Callable[[str], Any] = json.loads) -> Any:
    try:
        return parse(file.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} is missing; {wanted}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}; {wanted}") from error


def _check(value: Any, shape: Any, file: object, place: str = "") -> None:
    """shape: one of KINDS, [shape of each], or {name: shape}, beside which other names may be."""
    kind = shape if isinstance(shape, type) else type(shape)
    is_number = type(value) in (int, float) and math.isfinite(value)
    if not (is_number if kind is float else type(value) is kind):
        where = f"{file}: {place}" if place else file
        raise InputError(f"{where} must be {KINDS[kind]}, got {value!r:.80}")
    if isinstance(shape, list):
        for index, item in enumerate(value):
            _check(item, shape[0], file, f"{place}[{index}]")
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            for key in value if name in "*#" else [name.removesuffix("?")]:
                if name == "#" and not key.isdecimal():
                    raise InputError(f"{file}: {place} must have numbers as names, got {key!r:.80}")
                if not name.endswith("?") or value.get(key) is not None:
                    _check(value.get(key), inner, file, f"{place}.{key}".strip("."))


def _check_figures(values: Any, file: Path, place: str) -> None:
    """An object of numbers and words, and of such objects; null where nothing is known."""
    _check(values, {}, file, place)
    for name, found in values.items():
        if isinstance(found, dict):
            _check_figures(found, file, f"{place}.{name}")
        elif not isinstance(found, str | None):
            _check(found, float, file, f"{place}.{name}".strip("."))


def _read(file: Path, shape: dict[str, Any]) -> dict[str, Any]:
    found = _load(file, FROM_COMPRESS)
    _check(found, shape, file)
    return found


def _read_quality(file: Path, params: int) -> dict[str, Any]:
    wanted = "give what `lillama eval OUT --against MODEL --json` prints"
    found = _load(file, wanted)
    _check(found, QUALITY, file)
    _check_figures(found, file, "")
    if not found.keys() & {"perplexity", "word_perplexity", "tasks"}:
        raise InputError(f"{file} has neither a perplexity nor tasks; {wanted}")
    if found["params"] != params:
        raise InputError(
            f"{file} is about another model: it has {found['params']:,} parameters, OUT {params:,}"
        )
    return found


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _read_curves(file: Path, blocks: list[dict[str, Any]]) -> dict[int, list[tuple[int, float]]]:
    """Return the held-out losses while each block trained: of the last run that was appended to the
    file, and of a step that a resumed run did again the last."""
    wanted = "give the file that `lillama compress --events FILE` wrote"
    written = {row["index"]: row["held_out_loss_after"] for row in blocks}
    curves: dict[int, dict[int, float]] = {}
    ends: dict[int, float] = {}
    kind = ""
    for number, event in enumerate(_load(file, wanted, _lines), 1):
        _check(event, {}, file, f"event {number}")
        if kind == "finished":
            curves, ends = {}, {}
        kind = str(event.get("event"))
        _check(event, EVENTS.get(kind, {}), file, f"event {number}")
        if kind == "judged" and event["block"] in written:
            curves.setdefault(event["block"], {})[event["step"]] = event["held_out_loss"]
        elif kind == "block":
            ends[event["index"]] = event["held_out_loss_after"]
    if written and not ends:
        raise InputError(f"{file} tells of no finished block; {wanted}")
    for index, loss in ends.items():
        if written.get(index) != loss:
            raise InputError(
                f"{file} is of another run: there block {index} ends at a held-out loss of {loss}, "
                f"in report.json at {written.get(index)}"
            )
    return {block: sorted(losses.items()) for block, losses in sorted(curves.items())}


# What it belongs to in the model
def _label(name: str, family: Family) -> str:
    """Return what the family calls a matrix, of an expert with its number before it."""
    if family.experts is not None and f".{family.experts.hub}." in name:
        return name.partition(f".{family.experts.hub}.")[2]
    ends = (short for short, path in family.targets.items() if name.endswith(f".{path}"))
    return next(ends, name.rpartition(".")[2])


def _layers(
    model: PreTrainedModel, family: Family, report: dict[str, Any], matrices: list[RankedMatrix]
) -> list[Layer]:
    """Return the parts of the model in order."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    embedding, head = (module.weight for module in ends)
    before = Counter({row["index"]: row["params_before"] for row in report["blocks"]})
    before |= Counter(emb=embedding.numel(), head=0 if head is embedding else head.numel())
    before["rest"] = report["params_before"] - before.total()
    saved, outside = Counter(), {family.embedding: "emb", family.head: "head"}
    for row in matrices:
        saved[outside.get(row.matrix.name, row.block)] += row.saved
    labels = {"emb": "token embeddings"}
    labels |= {row["index"]: f"block {row['index']}" for row in report["blocks"]}
    labels |= {"rest": "final norm and other", "head": "output head"}
    return [
        Layer(label, str(part), before[part], before[part] - saved[part])
        for part, label in labels.items()
        if before[part]
    ]


def read_facts(options: ReportConfig) -> Facts:
    """Read OUT, and the events and quality files where they are given.

    Raises:
        InputError: a file is missing or damaged, or belongs to another run.
    """
    out = options.out
    config = read_config(out)
    compression = compression_of(config)
    if compression is None:
        raise InputError(f"{out} is a dense model; report is about what `lillama compress` wrote")
    ranks, gauge = compression["ranks"], compression.get("gauge", "plain")
    report, recipe = _read(out / "report.json", REPORT), _read(out / "recipe.json", RECIPE)
    chosen, values = recipe["options"].get("targets"), recipe["options"]["preset_values"]
    by_worth, losses = recipe.get("strategy") == "global", report.get("rank_losses") or {}
    model = skeleton(config)
    family = family_for(config, model)
    targets = find_matrices(
        model,
        family,
        None if chosen is None else tuple(map(str, chosen)),
        gauge,
        vocabulary=by_worth and bool(values.get("vocabulary", False)),
        by_worth=by_worth and values.get("init") == "fisher",
    )
    names, blocks = {matrix.name for matrix in targets}, range(len(named_blocks(model)))
    for part, found in (("config.json: ranks", ranks), ("report.json: rank_losses", losses)):
        if unknown := sorted(found.keys() - names):
            raise InputError(f"{out}/{part} has {unknown[0]}, no target of the run in recipe.json")
    matrices = [
        RankedMatrix(
            *(
                matrix,
                _label(matrix.name, family),
                matrix.block if matrix.block in blocks else None,
            ),
            ranks.get(matrix.name),
            {int(rank): loss for rank, loss in losses.get(matrix.name, {}).items()},
        )
        for matrix in targets
    ]
    after = report["params_before"] - sum(row.saved for row in matrices)
    if after != report["params_after"]:
        raise InputError(
            f"report.json of {out} counts {report['params_after']:,} parameters, its config.json "
            f"{after:,}; they are not of the same run (or `lillama export` changed the gauge since)"
        )
    layers = _layers(model, family, report, matrices)
    curves = None if options.events is None else _read_curves(options.events, report["blocks"])
    quality = None if options.eval is None else _read_quality(options.eval, after)
    return Facts(out, gauge, report, recipe, layers, matrices, curves, quality)
