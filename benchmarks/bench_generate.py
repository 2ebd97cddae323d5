"""Whole answers: prompts of so many tokens and 64 new ones, by the serving engine and by
transformers' generate, each with the dense and the compressed models.

Random weights. A row's `modes` have the time of a token after the first; `answers` have the rest.
"""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks.answers import Cache, Once, assert_same, ours, theirs
from benchmarks.decode_models import (
    GENERATIONS,
    STEPS,
    DecodeShape,
    model_of,
    prompt_of,
    work_of,
)
from benchmarks.rows import Variant, Work, compare
from benchmarks.timing import Call, Mode
from lillama.integrations.mamba import fast_mamba

ROUNDS = {"cpu": 3, "cuda": 5}


def _caches(shape: DecodeShape, device: torch.device) -> tuple[Cache, ...]:
    """Of transformers' variants. A Mamba's own cache is as static, but generate compiles with one
    that is called so only; on a CPU, where it does not compile, they are the same."""
    if shape.family != "mamba":
        return ("static",)
    return ("own", "static") if device.type == "cuda" else ("own",)


def _check(shape: DecodeShape, keep: float, device: torch.device) -> None:
    """Ours against transformers' in fp32, where no expert is chosen by rounding."""
    model = model_of(shape, keep, torch.float32, device)
    prompts = prompt_of(shape, shape.batch, device)
    wanted = theirs(model, prompts, STEPS, "own", compiled=False)()
    # on the same weights, for two such models may be more than a GPU holds
    assert_same(ours(model, prompts, STEPS)(), wanted, model, prompts)


def _variants(
    shape: DecodeShape, name: str, keep: float, dtype: torch.dtype, device: torch.device
) -> dict[str, Variant]:
    """One model by everyone, as little of it in memory as there can be: on a GPU one copy."""
    model = model_of(shape, keep, dtype, device)
    prompts = prompt_of(shape, shape.batch, device)
    cuda = device.type == "cuda"
    work = work_of(shape, model, shape.prompt + STEPS // 2)
    size = sum(parameter.nbytes for parameter in model.parameters())
    # on a CPU ours lays the weights out anew, which others would not
    mine = model if cuda else copy.deepcopy(model)

    def variant(build: Callable[[], Any], **given: Any) -> Variant:
        return Variant(calls=[Once(build, device, size)], work=work, **given)

    found = {
        "ours" if name == "ours" else f"ours_{name}": variant(
            lambda: ours(mine, prompts, STEPS), check=lambda: _check(shape, keep, device)
        )
    }
    name = "40" if name == "ours" else name
    for cache in _caches(shape, device):
        called = "transformers" if len(found) == 1 else "transformers_static"
        found[f"{called}_{name}"] = variant(
            lambda cache=cache: theirs(model, prompts, STEPS, cache, compiled=cuda)
        )
    return found


def _mode() -> Mode:
    """The clock is the answer's own. The first one, which compiles and captures, is not a sample,
    and a rival that fails at it is left out of the row."""

    def prepare(run: Call) -> Call:
        run()
        return run

    def token_s(run: Any) -> float:
        return run()[0]

    return Mode("wall", token_s, prepare)


def _answers(
    row: dict[str, Any], variants: dict[str, Variant], shape: DecodeShape, rounds: int
) -> dict[str, dict[str, float | None]]:
    """Medians of the answers that were timed, for every variant that was."""
    found = {}
    for name, timed in row["modes"]["wall"].items():
        once: Any = variants[name].calls[0]
        runs = once.stamps_s[1 : 1 + rounds]
        peaks = once.peaks_bytes[:rounds]
        found[name] = {
            "first_token_ms": 1e3 * median(stamps_s[0] for stamps_s in runs),
            "token_ms": timed["median_us"] / 1e3,
            "tokens_per_s": median(shape.batch * len(s) / s[-1] for s in runs),
            "peak_gib": max(peaks) / 2**30 if peaks else None,
            "copy_bandwidth_percent": 100 * timed["gb_per_s"] / row["ceilings"]["copy_gb_per_s"],
        }
    return found


def _notes(shape: DecodeShape, device: torch.device) -> dict[str, str]:
    notes = {}
    if device.type == "cpu":
        notes["transformers"] = "not compiled: generate compiles on a GPU only"
        notes["peak_gib"] = "not measured on a CPU"
    elif shape.family == "mamba":
        notes["transformers"] = "its own cache, not compiled; transformers_static: compiled"
    else:
        notes["transformers"] = "static cache, compiled"
    if shape.family == "mamba":
        notes["transformers"] += "; with our scan, convolution and steps"
    return notes


def compare_answers(
    benchmark: Any, shape: DecodeShape, dtype: torch.dtype, device: torch.device
) -> None:
    """Check and time all variants of a shape in turn; the row, its `answers` and `notes` go to
    benchmark.extra_info.

    Raises:
        AssertionError: as `compare`.
    """
    torch.compiler.reset()  # beyond 8 shapes torch.compile would run eagerly
    variants: dict[str, Variant] = {}
    for name, keep in (*shape.keeps, ("dense", 1.0)):
        variants |= _variants(shape, name, keep, dtype, device)
    rounds = ROUNDS[device.type]
    try:
        compare(
            benchmark,
            variants,
            shape=shape,
            dtype=dtype,
            device=device,
            work=variants["ours"].work or Work(),
            rounds=rounds,
            warmup_rounds=0,
            sample_s=0,
            modes=[_mode()],
        )
    finally:  # a rival that failed is told after the row is stored
        row = benchmark.extra_info
        if "modes" in row:
            row["answers"] = _answers(row, variants, shape, rounds)
            row["notes"] = _notes(shape, device)


@pytest.mark.parametrize("shape", GENERATIONS, ids=lambda s: s.name)
def bench_generate(benchmark, shape, dtype, device):
    # around all of it: entering at every call would be timed too
    with fast_mamba():
        compare_answers(benchmark, shape, dtype, device)
