"""What `lillama report` shows: read from the files of OUT, checked, and nothing computed but sums.

Everything that comes from a file is of the type the page expects, finite, and of the same run:
otherwise an error says which file and which entry.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lillama.checkpoint import compression_of, read_config, read_headers, sentinel_names
from lillama.compress.allocate import Matrix
from lillama.compress.targets import find_matrices
from lillama.config import ReportConfig
from lillama.errors import InputError
from lillama.families import Family
from lillama.families_generic import family_for
from lillama.skeleton import block_of, named_blocks, skeleton

__all__ = ["METRIC_NUMBERS", "TRAINED", "Facts", "Layer", "RankedMatrix", "read_facts"]

BLOCK_NUMBERS = (
    *("index", "held_out_loss_before", "held_out_loss_after", "steps", "best_step"),
    *("params_before", "params_after", "seconds", "peak_memory_bytes"),
)
REPORT_NUMBERS = (
    *("params_before", "params_after", "reduction", "target_reduction", "bytes_before"),
    *("bytes_after", "tokens", "seconds", "peak_memory_bytes"),
)
# of one model, by what `lillama eval --metric` was
TOKEN_NUMBERS = ("perplexity", "bits_per_byte")
METRIC_NUMBERS = {
    "blocks": TOKEN_NUMBERS,
    "rows": TOKEN_NUMBERS,
    "words": ("word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity"),
}
# what was trained on the base's predictions: the divergence before and after
TRAINED = {
    "head": ("held_out_kl_before", "held_out_kl_after"),
    "finetune": ("kl_before", "kl_after"),
}
AGAINST_NUMBERS = ("retained", "kl", "top1_agreement")


@dataclass(frozen=True, slots=True)
class Layer:
    """A block, or one of the parts outside the blocks. `bytes_before` is counted at the base's mean
    size of a parameter, `bytes_after` is what the tensors take."""

    label: str
    short: str
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class RankedMatrix:
    """A target matrix; `rank` None: it stayed dense. `label` is its name inside the block, `block`
    None outside the blocks."""

    matrix: Matrix
    label: str
    block: int | None
    rank: int | None

    @property
    def params_after(self) -> int:
        dense = self.matrix.N * self.matrix.K
        return dense if self.rank is None else self.matrix.numbers(self.rank)


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything on the page.

    report, recipe, quality: report.json, recipe.json and `lillama eval --json` (None: not given).
    curves: {block: [(step, held-out loss)]} of the events file (None: not given).
    """

    out: Path
    base: str
    gauge: str
    report: dict[str, Any]
    recipe: dict[str, Any]
    layers: tuple[Layer, ...]
    matrices: tuple[RankedMatrix, ...]
    curves: dict[int, list[tuple[int, float]]] | None
    quality: dict[str, Any] | None

    @property
    def blocks(self) -> list[dict[str, Any]]:
        return self.report["blocks"]


def _text_of(file: Path, wanted: str) -> str:
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(f"{file} is missing; {wanted}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}; {wanted}") from error


def _object_of(text: str, file: Path, wanted: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"{file} is no JSON ({error}); {wanted}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} must hold a JSON object; {wanted}")
    return found


def _check_numbers(values: Any, names: tuple[str, ...], place: str) -> None:
    if not isinstance(values, dict):
        raise InputError(f"{place} must be an object, got {type(values).__name__}")
    for name in names:
        found: Any = values.get(name)
        if type(found) not in (int, float) or not math.isfinite(found):
            raise InputError(f"{place}: {name} must be a finite number, got {found!r}")


def _check_rows(values: Any, place: str) -> None:
    """An object of names, numbers and words, and of such objects; None where nothing is known."""
    if not isinstance(values, dict):
        raise InputError(f"{place} must be an object, got {type(values).__name__}")
    for name, found in values.items():
        if isinstance(found, dict):
            _check_rows(found, f"{place}.{name}")
        elif isinstance(found, int | float):
            _check_numbers(values, (name,), place)
        elif not isinstance(found, str | None):
            raise InputError(f"{place}: {name} must be a number, got {found!r}")


def _read_report(out: Path) -> dict[str, Any]:
    wanted = "`lillama compress` writes it into OUT: give that folder"
    file = out / "report.json"
    report = _object_of(_text_of(file, wanted), file, wanted)
    _check_numbers(report, REPORT_NUMBERS, str(file))
    for name in ("predicted_host_memory_bytes", "predicted_loss_increase", "ranks"):
        if report.get(name) is not None:
            _check_numbers(report, (name,), str(file))
    for name, numbers in TRAINED.items():
        if name in report:
            _check_numbers(report[name], numbers, f"{file}: {name}")
    if not isinstance(report.get("blocks"), list):
        raise InputError(f"{file}: blocks must be a list; {wanted}")
    for place, row in enumerate(report["blocks"]):
        _check_numbers(row, BLOCK_NUMBERS, f"{file}: blocks[{place}]")
        tokens, starved = row.get("expert_tokens", []), row.get("starved_experts", [])
        if not all(
            isinstance(v, list) and all(type(n) is int for n in v) for v in (tokens, starved)
        ):
            raise InputError(f"{file}: blocks[{place}]: the experts' tokens must be integers")
    return report


def _read_recipe(out: Path) -> dict[str, Any]:
    wanted = "`lillama compress` writes it into OUT: give that folder"
    file = out / "recipe.json"
    recipe = _object_of(_text_of(file, wanted), file, wanted)
    options = recipe.get("options")
    if not isinstance(options, dict) or not isinstance(options.get("preset_values"), dict):
        raise InputError(f"{file} has no options of a compression; {wanted}")
    texts = options.get("text")
    if not isinstance(texts, list) or not isinstance(options.get("targets"), list | None):
        raise InputError(f"{file}: text must be a list, targets a list or null; {wanted}")
    return recipe


def _read_quality(file: Path, params: int) -> dict[str, Any]:
    """`--eval FILE`: one JSON document, or the whole stdout, of which it is the last line."""
    wanted = "give what `lillama eval OUT --against MODEL --json` prints"
    text = _text_of(file, wanted).strip()
    try:
        found = _object_of(text, file, wanted)
    except InputError:
        found = _object_of(text.rpartition("\n")[2], file, wanted)
    _check_numbers(found, ("params", "bytes"), str(file))
    # a file of tasks alone has no text; older files name no metric
    if "metric" in found or "tasks" not in found:
        metric = found.setdefault("metric", "blocks")
        if metric not in METRIC_NUMBERS:
            raise InputError(f"{file}: metric must be one of {', '.join(METRIC_NUMBERS)}")
        names = METRIC_NUMBERS[metric]
        _check_numbers(found, (*names, "tokens"), str(file))
        if "retained" in found or f"base_{names[0]}" in found:
            _check_numbers(found, (*(f"base_{n}" for n in names), *AGAINST_NUMBERS), str(file))
    for part in ("tasks", "generations", "speed"):
        _check_rows(found.get(part, {}), f"{file}: {part}")
    for task, values in found.get("tasks", {}).items():
        _check_rows(values, f"{file}: tasks.{task}")
    if found["params"] != params:
        raise InputError(
            f"{file} is about another model: it has {found['params']:,} parameters, OUT {params:,}"
        )
    return found


def _events_of(file: Path) -> list[dict[str, Any]]:
    """Of the last run in the file: a file may have been appended to by several."""
    wanted = "give the file that `lillama compress --events FILE` wrote"
    runs: list[list[dict[str, Any]]] = [[]]
    for number, line in enumerate(_text_of(file, wanted).splitlines(), 1):
        if not line.strip():
            continue
        place = Path(f"{file}:{number}")
        event = _object_of(line, place, wanted)
        if runs[-1] and runs[-1][-1].get("event") == "finished":
            runs.append([])
        if event.get("event") == "judged":
            _check_numbers(event, ("block", "step", "held_out_loss"), str(place))
        elif event.get("event") == "block":
            _check_numbers(event, ("index", "held_out_loss_after"), str(place))
        runs[-1].append(event)
    return runs[-1]


def _read_curves(file: Path, report: dict[str, Any]) -> dict[int, list[tuple[int, float]]]:
    """The held-out losses while each block trained; of a step that a resumed run did again, the
    last."""
    rows = {row["index"]: row for row in report["blocks"]}
    found: dict[int, dict[int, float]] = {}
    told = 0
    for event in _events_of(file):
        if event.get("event") == "block":
            index, loss = event["index"], event["held_out_loss_after"]
            there = rows.get(index, {}).get("held_out_loss_after")
            if there != loss:
                raise InputError(
                    f"{file} is of another run: there block {index} ends at a held-out loss of "
                    f"{loss}, in report.json at {there}"
                )
            told += 1
        elif event.get("event") == "judged" and event["block"] in rows:
            found.setdefault(event["block"], {})[event["step"]] = event["held_out_loss"]
    if not told and rows:
        raise InputError(
            f"{file} tells of no finished block; give the file of the run that made OUT"
        )
    return {block: sorted(losses.items()) for block, losses in sorted(found.items())}


def _part_of(name: str, family: Family, places: Mapping[str, int]) -> str | int:
    """The layer that a tensor belongs to, by its hub or runtime name."""
    if (index := block_of(name, places)) is not None:
        return index
    for part, prefix in (("embeddings", family.embedding), ("head", family.head)):
        if name.startswith(f"{prefix}."):
            return part
    return "rest"


def _label(matrix: Matrix, family: Family) -> str:
    """What the family calls it, an expert's after its number."""
    parsed = None if family.experts is None else family.experts.parse(matrix.name)
    if parsed is None or family.experts is None:
        ends = (short for short, path in family.targets.items() if matrix.name.endswith(f".{path}"))
        return next(ends, matrix.name.rpartition(".")[2])
    return f"{parsed[1]}.{family.experts.hub_projection(parsed[2])}"


def _matrices(
    model: PreTrainedModel, family: Family, compression: dict[str, Any], recipe: dict[str, Any]
) -> tuple[RankedMatrix, ...]:
    """The run's target matrices, with the ranks that config.json has."""
    ranks = compression["ranks"]
    chosen = recipe["options"].get("targets")
    values = recipe["options"]["preset_values"]
    by_worth = recipe.get("strategy") == "global"
    found = find_matrices(
        model,
        family,
        None if chosen is None else tuple(map(str, chosen)),
        compression.get("gauge", "plain"),
        vocabulary=by_worth and bool(values.get("vocabulary", False)),
        by_worth=by_worth and values.get("init") == "fisher",
    )
    unknown = sorted(ranks.keys() - {matrix.name for matrix in found})
    if unknown:
        raise InputError(
            f"config.json has a rank of {unknown[0]}, which is no target of the run in recipe.json"
        )
    blocks = range(len(named_blocks(model)))
    return tuple(
        RankedMatrix(
            matrix,
            _label(matrix, family),
            matrix.block if matrix.block in blocks else None,
            ranks.get(matrix.name),
        )
        for matrix in found
    )


def _layers(
    model: PreTrainedModel,
    family: Family,
    matrices: tuple[RankedMatrix, ...],
    stored: Mapping[str, int],
    item_bytes: float,
) -> tuple[Layer, ...]:
    """stored: {tensor: its bytes}; item_bytes: of the base's parameters on average."""
    before: Counter[str | int] = Counter()
    saved: Counter[str | int] = Counter()
    bytes_after: Counter[str | int] = Counter()
    places = {path: index for index, path in enumerate(named_blocks(model))}
    # a model may call its head otherwise than its checkpoint does
    head: Any = model.get_output_embeddings()
    ends = {id(head.weight): "head"}
    ends[id(model.get_input_embeddings().weight)] = "embeddings"  # tied ones count here
    for name, parameter in model.named_parameters():
        before[ends.get(id(parameter), _part_of(name, family, places))] += parameter.numel()
    for row in matrices:
        numbers = row.matrix.N * row.matrix.K - row.params_after
        saved[_part_of(f"{row.matrix.name}.weight", family, places)] += numbers
    for name, num_bytes in stored.items():
        bytes_after[_part_of(name, family, places)] += num_bytes
    names = {
        "embeddings": ("token embeddings", "emb"),
        "rest": ("final norm and other", "rest"),
        "head": ("output head", "head"),
    }
    blocks = sorted(part for part in before if isinstance(part, int))
    order: list[str | int] = ["embeddings", *blocks, "rest", "head"]
    return tuple(
        Layer(
            *(names[part] if isinstance(part, str) else (f"block {part}", str(part))),
            params_before=before[part],
            params_after=before[part] - saved[part],
            bytes_before=round(before[part] * item_bytes),
            bytes_after=bytes_after[part],
        )
        for part in order
        if before[part]
    )


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
    report, recipe = _read_report(out), _read_recipe(out)
    model = skeleton(config)
    family = family_for(config, model)
    matrices = _matrices(model, family, compression, recipe)
    headers = read_headers(out)
    skipped = set(sentinel_names(headers, family, compression["ranks"]))
    stored = {name: h.num_bytes for name, h in headers.items() if name not in skipped}
    item_bytes = report["bytes_before"] / max(1, report["params_before"])
    layers = _layers(model, family, matrices, stored, item_bytes)
    after = sum(layer.params_after for layer in layers)
    if after != report["params_after"]:
        raise InputError(
            f"report.json of {out} counts {report['params_after']:,} parameters, its config.json "
            f"{after:,}; they are not of the same run (or `lillama export` changed the gauge since)"
        )
    return Facts(
        out=out,
        base=str(recipe["options"].get("model", "")),
        gauge=compression.get("gauge", "plain"),
        report=report,
        recipe=recipe,
        layers=layers,
        matrices=matrices,
        curves=None if options.events is None else _read_curves(options.events, report),
        quality=None if options.eval is None else _read_quality(options.eval, after),
    )
