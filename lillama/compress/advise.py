"""What to expect of compressing a model, and the command to do it with: `lillama plan --advise` and
`lillama.advise`. Nothing is written."""

import bisect
import logging
import math
import os
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lillama.checkpoint import TensorHeader
from lillama.compress import forecast
from lillama.compress.activations import ActivationMemory
from lillama.compress.allocate import RankRules, allocate, allocate_globally
from lillama.compress.blocks import TeacherBlocks
from lillama.compress.gradients import MatrixSensitivity
from lillama.compress.memory import held_out_blocks, peak_memory, resident_bytes
from lillama.compress.plan import Plan, make_plan
from lillama.compress.sensitivity import measure_sensitivity
from lillama.compress.spectra import Spectrum, sample_matrices, spectrum_of
from lillama.compress.speed import DeviceSpeed
from lillama.compress.work import count_work, decoded_numbers
from lillama.config import PlanConfig
from lillama.config_advice import ADVISED_PRESETS, AdviceConfig, AdvisedPreset
from lillama.data import calibration_blocks, evaluation_blocks
from lillama.errors import InputError
from lillama.hub_checkpoint import find_model
from lillama.integrations.mamba import fast_mamba
from lillama.loading import check_vocabulary, choose_device, load_tokenizer

__all__ = ["advise"]

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
CAVEATS = (
    "losses, times and their error bars were fitted to runs of three tiny models on a CPU; not "
    "measured on a GPU, nor on a large model",
    "decode is a bound: batch 1, limited by reading weights, no cache counted",
)
# those that are always forecast, and the steps in which a reduction is looked for
SHOWN = (0.2, 0.4, 0.6)
STEP = 0.05
# a text with more bytes for each token that is wanted is not counted
BYTES_A_TOKEN = 16


@dataclass(frozen=True)
class _Found:
    """Everything that was measured. losses: nats a token at each rank of each matrix; None without
    text."""

    options: AdviceConfig
    plan: Plan
    headers: dict[str, TensorHeader]
    held_bytes: int
    speed: DeviceSpeed
    device: torch.device
    losses: dict[str, list[float]] | None
    # that the text allows; None without text
    tokens: int | None

    def wanted(self, preset: AdvisedPreset, reduction: float | None = None) -> PlanConfig:
        """Of the run that is thought of, were there text enough."""
        options = self.options.run_options(preset, reduction)
        return options.at_width(self.plan.config.hidden_size)

    def run(self, preset: AdvisedPreset, reduction: float | None = None) -> PlanConfig:
        """Of the run that is thought of, with no more tokens than there are."""
        options = self.wanted(preset, reduction)
        return replace(options, tokens=min(options.num_tokens, self.tokens or options.num_tokens))

    def at(self, reduction: float) -> Plan:
        """The plan with the ranks of a run at this reduction; without text with uniform ones."""
        plan = self.plan
        if self.losses is None:
            rules = RankRules.for_hidden_size(plan.config.hidden_size)
            ranks = allocate(plan.matrices, plan.budget_total, reduction, plan.strategy, rules)
        else:
            ranks = allocate_globally(plan.matrices, plan.budget_total, reduction, self.losses)
        return replace(plan, ranks=ranks)

    def expected(self, plan: Plan) -> float | None:
        """Nats a token before training, as `predicted_loss_increase` of a run."""
        if self.losses is None:
            return None
        return sum(
            self.losses[m.name][m.ranks.index(plan.ranks[m.name])]
            for m in plan.matrices
            if m.name in plan.ranks
        )

    def reachable(self, reduction: float) -> bool:
        params = self.plan.params_before
        return math.ceil(reduction * params - 1e-6) <= round(self.plan.max_reduction * params)


def _tokens_of(options: AdviceConfig) -> int:
    """Calibration tokens that the text allows a run, as far as one of the presets would use them.

    Raises:
        InputError: too few for the shortest run.
    """
    seq_len = options.seq_len
    wanted = max(options.run_options(preset).num_tokens for preset in ADVISED_PRESETS)
    missing = [file for file in options.text if not file.is_file()]
    if not missing and sum(file.stat().st_size for file in options.text) > BYTES_A_TOKEN * wanted:
        return wanted
    text = evaluation_blocks(options.text, load_tokenizer(options.model), seq_len=seq_len)
    held_out = held_out_blocks(min(wanted, text.num_tokens), seq_len)
    # packing begins and ends documents at other places
    found = (math.floor(0.99 * text.num_tokens / seq_len) - held_out) * seq_len
    if found < seq_len:
        raise InputError(
            f"the text is too short: {text.num_tokens} tokens, needed are {held_out} blocks of "
            f"{seq_len} held out and at least one more; add --text files or lower --seq-len"
        )
    return min(wanted, found)


def _measure_losses(
    options: AdviceConfig,
    plan: Plan,
    teacher: TeacherBlocks,
    tokens: int,
    progress: Progress | None,
) -> dict[str, list[float]]:
    """The pass of preset default that weighs every rank, on a sample of the text."""
    run = options.run_options("default")
    wanted = min(run.num_tokens, run.recipe.sensitivity_tokens, tokens)
    blocks, _ = calibration_blocks(
        options.text, load_tokenizer(options.model), tokens=wanted, seq_len=options.seq_len,
        held_out_blocks=0,
    )  # fmt: skip
    check_vocabulary(blocks.input_ids, plan.config.vocab_size)
    first = max(0, min(matrix.block for matrix in plan.matrices))
    total = blocks.input_ids.numel() * (2 * len(teacher.blocks) - first)
    losses: dict[str, list[float]] = {}
    done = 0

    def tick(stage: str, tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(stage, done, total)

    def on_block(index: int, found: dict[str, MatrixSensitivity]) -> None:
        losses.update({name: value.losses for name, value in found.items()})

    with tempfile.TemporaryDirectory(prefix="lillama-advice-") as folder, fast_mamba():
        memory = ActivationMemory.for_run(teacher.device, options.activation_memory, Path(folder))
        measure_sensitivity(teacher, plan.matrices, blocks, run.recipe, memory, tick, 0, on_block)
    return losses


def _of_preset(found: _Found, plan: Plan, preset: AdvisedPreset) -> dict[str, Any]:
    """Loss (with text), seconds and host memory of one preset at the plan's ranks."""
    options = found.run(preset, plan.reduction)
    work = count_work(plan, options, found.headers)
    row = forecast.seconds(work, found.speed, forecast.time_kind(plan.config))
    row["peak_memory_bytes"] = peak_memory(plan, options, found.headers, found.held_bytes)["peak"]
    expected = found.expected(plan)
    return row if expected is None else {**forecast.loss(preset, expected), **row}


def _row(found: _Found, reduction: float) -> dict[str, Any]:
    """The forecast at one reduction."""
    if not found.reachable(reduction):
        return {"reduction": reduction, "reachable": False}
    plan = found.at(reduction)
    # load_model computes in fp32 on a CPU
    item = 4.0 if found.device.type == "cpu" else plan.item_bytes
    numbers = decoded_numbers(plan, found.headers)
    return {
        "reduction": reduction,
        "reachable": True,
        "params_after": plan.params_after,
        "bytes_after": plan.bytes_after,
        "dense_targets": [m.name for m in plan.matrices if m.name not in plan.ranks],
        "presets": {preset: _of_preset(found, plan, preset) for preset in ADVISED_PRESETS},
        "decoding": forecast.decoding(*numbers, item, found.speed.read_bytes),
    }


def _allowed(found: _Found, row: dict[str, Any]) -> list[AdvisedPreset]:
    """Presets that may be advised, cheapest first."""
    if found.options.preset is not None:
        return [found.options.preset]
    limit = found.options.max_hours * 3600
    return [p for p in ADVISED_PRESETS if p == "fast" or row["presets"][p]["seconds"] <= limit]


def _keeping(found: _Found, row: dict[str, Any]) -> AdvisedPreset | None:
    """The cheapest preset that keeps what is asked for even if its loss is underestimated as badly
    as that of any run of ours was."""
    retain = found.options.retain
    return next(
        (p for p in _allowed(found, row) if row["presets"][p]["retained_worst"] >= retain), None
    )


def _may_keep(found: _Found, reduction: float) -> bool:
    """Whether any preset keeps what is asked for, however long it takes."""
    expected = found.expected(found.at(reduction))
    assert expected is not None
    presets = ADVISED_PRESETS if found.options.preset is None else (found.options.preset,)
    kept = (forecast.loss(preset, expected)["retained_worst"] for preset in presets)
    return max(kept) >= found.options.retain


def _choose(found: _Found) -> tuple[dict[str, Any], AdvisedPreset, str]:
    """The forecast of what is advised, its preset, and why."""
    options = found.options
    if found.losses is None:
        row = _row(found, options.reduction or min(SHOWN[0], _steps(found)[-1]))
        preset = _allowed(found, row)[-1]
        return row, preset, "no quality is predicted without --text, so none is promised"
    retain = f"{options.retain:.0%} of the base model's quality (--retain)"
    if options.reduction is not None:
        row = _row(found, options.reduction)
        preset = _keeping(found, row)
        if preset is not None:
            return row, preset, f"{preset} is expected to keep {retain} at what you asked for"
        return (
            row,
            _allowed(found, row)[-1],
            f"nothing is sure to keep {retain} at what you asked for",
        )
    steps = _steps(found)
    # more reduction never costs less
    count = bisect.bisect_left(steps, True, key=lambda step: not _may_keep(found, step))
    for reduction in reversed(steps[:count]):
        row = _row(found, reduction)
        preset = _keeping(found, row)
        if preset is not None:
            return row, preset, f"the largest step of {STEP:.0%} that should keep {retain}"
    row = _row(found, steps[0])
    return row, _allowed(found, row)[-1], f"the smallest step; nothing is sure to keep {retain}"


def _steps(found: _Found) -> list[float]:
    steps = [round(STEP * count, 2) for count in range(1, round(1 / STEP))]
    return [step for step in steps if found.reachable(step)]


def _command(found: _Found, reduction: float, preset: AdvisedPreset) -> str:
    """The compress command line, as a shell takes it."""
    options = found.options
    tokens = found.run(preset).num_tokens
    own = replace(found.wanted(preset), tokens=None).at_width(found.plan.config.hidden_size)
    out = f"{options.model.resolve().name}-{round(100 * (1 - reduction))}percent"
    words = ["lillama", "compress", str(options.model), out, "--reduction", f"{reduction:g}"]
    for text in options.text or ("FILE",):
        words += ["--text", str(text)]
    plain = {
        "--preset": None if preset == "default" else preset,
        "--targets": None if options.targets is None else ",".join(options.targets),
        "--gauge": options.gauge,
        "--tokens": None if tokens == own.num_tokens else tokens,
        "--seq-len": _unless(options.seq_len, "seq_len"),
        "--activation-memory": _unless(options.activation_memory, "activation_memory"),
        "--device": _unless(options.device, "device"),
    }
    for option, value in plain.items():
        if value is not None:
            words += [option, str(value)]
    return shlex.join(words)


def _unless(value: Any, field: str) -> Any:
    """The value where it is not the default."""
    return None if value == AdviceConfig.__dataclass_fields__[field].default else value


def _warnings(
    found: _Found, spectra: list[Spectrum], chosen: dict[str, Any], preset: AdvisedPreset
) -> list[str]:
    lines = []
    flat = sum(spectrum.near_random for spectrum in spectra)
    if flat:
        lines.append(
            f"{flat} of {len(spectra)} matrices looked at have a nearly random spectrum: their "
            "factors lose nearly as much as a random matrix's would"
        )
    useless = [m.name for m in found.plan.matrices if not m.break_even_rank]
    if useless:
        lines.append(f"{len(useless)} matrices are too small for any rank to save parameters")
    wanted, tokens = found.wanted(preset).num_tokens, found.run(preset).num_tokens
    if tokens < wanted:
        lines.append(f"the text has room for {tokens:,} calibration tokens, not for {wanted:,}")
    row = chosen["presets"][preset]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if row["peak_memory_bytes"] > memory:
        lines.append(
            f"the run will need {row['peak_memory_bytes'] / 2**30:.1f} GiB of host memory, this "
            f"machine has {memory / 2**30:.1f}; lower --activation-memory or --seq-len"
        )
    if row.get("extrapolated"):
        lines.append("the predicted loss lies outside of what was ever measured")
    return lines


def advise(
    model: str | Path,
    *,
    reduction: float | None = None,
    text: str | Path | list[str | Path] | tuple[str | Path, ...] = (),
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Spectra, forecasts and a recommendation. Same as `lillama plan --advise --json`.

    Args:
        model: local checkpoint folder (safetensors).
        reduction: the one that is thought of; None: the largest that should keep `retain`.
        text: calibration file or files; without any no quality is predicted. With text the whole
            model runs forward and back on 65,536 tokens, one block in memory at a time.
        progress: called as progress(stage, done, total), in tokens run through a block.
        options: the other fields of `lillama.config_advice.AdviceConfig` with its defaults: preset,
            retain, targets, gauge, tokens, seq_len, activation_memory, device, max_hours.

    Returns:
        `recommendation` {command, why, reduction, preset}, `forecast[]` by reduction {presets
        {fast, default: {excess, excess_low, excess_high, retained, kl, seconds, peak_memory_bytes,
        ...}}, decoding, ...}, `spectra[]`, `not_worth_factoring[]`, `device`, `warnings[]` and
        more. Losses in nats a token.

    Raises:
        InputError: arguments, model or text that cannot be used. RunError: the model is broken.
    """
    files = [text] if isinstance(text, str | Path) else list(text)
    config = AdviceConfig(
        model=find_model(model), reduction=reduction, text=tuple(map(Path, files)), **options
    )
    device = choose_device(config.device)
    plan = make_plan(config.run_options("default"), needs_weights=True)
    limit = getattr(plan.config, "max_position_embeddings", None)
    if limit is not None and config.seq_len > limit:
        raise InputError(f"--seq-len must be at most {limit} for this model, got {config.seq_len}")
    held = resident_bytes()
    teacher = TeacherBlocks(config.model, plan.config, plan.family, device, torch.float32)
    teacher.check_names(matrix.name for matrix in plan.matrices)
    sample = sample_matrices(plan.matrices)
    spectra = []
    for count, matrix in enumerate(sample):
        if progress is not None:
            progress("spectra", count, len(sample))
        spectra.append(spectrum_of(matrix, teacher.matrix, device))
    speed = forecast.model_speed(plan, config.run_options("default"), device)
    losses = tokens = None
    if config.text:
        tokens = _tokens_of(config)
        losses = _measure_losses(config, plan, teacher, tokens, progress)
    headers = {name: teacher.headers[name] for name in teacher.runtime}
    found = _Found(config, plan, headers, held, speed, device, losses, tokens)
    return _document(found, spectra)


def _document(found: _Found, spectra: list[Spectrum]) -> dict[str, Any]:
    chosen, preset, why = _choose(found)
    plan = found.plan
    shown = sorted({*SHOWN, chosen["reduction"]})
    small = [
        {"name": m.name, "why": "no rank saves"} for m in plan.matrices if not m.break_even_rank
    ]
    flat = [{"name": s.matrix.name, "why": "near-random"} for s in spectra if s.near_random]
    return {
        "recommendation": {
            "command": _command(found, chosen["reduction"], preset),
            "why": why,
            "reduction": chosen["reduction"],
            "preset": preset,
        },
        "warnings": _warnings(found, spectra, chosen, preset),
        "caveats": list(CAVEATS),
        "params_before": plan.params_before,
        "bytes_before": plan.bytes_before,
        "max_reduction": plan.max_reduction,
        "gauge": plan.gauge,
        "retain": found.options.retain,
        "device": found.speed.as_json(),
        "forecast": [
            chosen if step == chosen["reduction"] else _row(found, step) for step in shown
        ],
        "not_worth_factoring": [*small, *flat],
        "matrices_total": len(plan.matrices),
        "spectra": [spectrum.as_json() for spectrum in spectra],
    }
