"""A row of results: variants checked, then timed in every mode, beside the measured ceilings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lillama_kernels.testing import assert_close_to_truth, check_op, check_values
from torch import Tensor

from benchmarks import machine
from benchmarks.timing import SAMPLE_S, Call, Mode, measure, modes_of, quantiles, step

__all__ = ["Variant", "Work", "check_call", "compare", "compiled"]
__all__ += ["headline", "headline_mode", "variant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The least that one call must compute and move through memory."""

    flop: float = 0.0
    bytes_moved: float = 0.0

    def floor_us(self, limits: Mapping[str, float], dtype: str) -> float:
        """Nothing is faster: the larger of bytes / bandwidth and FLOP / peak."""
        moving_s = self.bytes_moved / limits["copy_gb_per_s"] / 1e9
        return 1e6 * max(moving_s, self.flop / limits[f"{dtype}_tflop_per_s"] / 1e12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """calls: one a set of inputs. check: raises when the result is wrong. work: its own, where it
    does another than "ours", as the dense layer. graph: False where it waits for the GPU, which a
    CUDA graph cannot capture."""

    calls: Sequence[Call]
    check: Callable[[], None] | None = None
    work: Work | None = None
    graph: bool = True


def compiled(*functions: Callable[..., Any]) -> list[Callable[..., Any]]:
    """torch.compile's best without its own CUDA graphs, so that all variants are captured alike.

    Forgets what was compiled before: beyond 8 shapes torch.compile would run eagerly.
    """
    torch.compiler.reset()
    mode = "max-autotune-no-cudagraphs"
    return [torch.compile(function, mode=mode, dynamic=False) for function in functions]


def variant(
    function: Callable[..., Tensor | Sequence[Tensor]],
    oracle: Callable[..., Tensor | Sequence[Tensor]],
    sets: Sequence[Mapping[str, Tensor]],
    backward: bool,
    thorough: bool = True,
) -> Variant:
    """function(**inputs) for every set of inputs, checked against oracle on the first one.

    thorough: as the tests check, with poisoned memory and twice. torch.compile would compile again
    for that; what it made is held to the same tolerance only.
    """
    calls = [step(function, given, backward) for given in sets]

    def check() -> None:
        if thorough:
            (check_op if backward else check_values)(function, oracle, sets[0])
        else:
            check_call(calls[0], oracle, sets[0], backward)

    return Variant(calls=calls, check=check)


def check_call(
    call: Callable[[], list[Tensor]],
    oracle: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Mapping[str, Tensor],
    backward: bool,
) -> None:
    """Hold what is timed, a `step` of inputs, to the tests' tolerance rule.

    Raises:
        AssertionError: see `assert_close_to_truth`.
    """
    double = {name: tensor.double() for name, tensor in inputs.items()}
    three = (call(), step(oracle, double, backward)(), step(oracle, inputs, backward)())
    for i, (found, truth, baseline) in enumerate(zip(*three, strict=True)):
        assert_close_to_truth(found, truth, baseline, f"result {i}")


def _checked(variants: Mapping[str, Variant]) -> tuple[dict[str, Variant], dict[str, str]]:
    """The variants whose result is right, and why the others are not among them."""
    right, failed = {}, {}
    for name, variant in variants.items():
        try:
            if variant.check is not None:
                variant.check()
            right[name] = variant
        except Exception as error:  # a rival that fails must not cost the row
            if name == "ours":
                raise
            failed[name] = f"check: {type(error).__name__}: {str(error)[:300]}"
    return right, failed


def _judged(
    found: Mapping[str, Sequence[float]],
    works: Mapping[str, Work],
    limits: Mapping[str, float],
    dtype: str,
) -> dict[str, dict[str, float]]:
    """For each variant its quantiles, rates and share of its own ceiling."""
    judged = {}
    for name, seconds in found.items():
        times, work = quantiles(seconds), works[name]
        median_us = times["median_us"]
        judged[name] = times | {
            "gb_per_s": work.bytes_moved / median_us / 1e3,
            "tflop_per_s": work.flop / median_us / 1e6,
            "percent_of_ceiling": 100 * work.floor_us(limits, dtype) / median_us,
        }
    return judged


def _rounded(value: Any) -> Any:
    """Five digits are more than any clock gives; without the others a file is half as long."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def compare(
    benchmark: Any,
    variants: Mapping[str, Variant],
    *,
    shape: object,
    dtype: torch.dtype,
    device: torch.device,
    work: Work,
    rounds: int = 20,
    warmup_rounds: int = 2,
    sample_s: float = SAMPLE_S,
    modes: Sequence[Mode] | None = None,
) -> dict[str, Any]:
    """Check the variants ("ours" is one), time the right ones, and store the row in
    benchmark.extra_info.

    Args:
        benchmark: pytest-benchmark's fixture, which carries the row to the result file.
        work: of one call of every variant that does not name its own.
        rounds, warmup_rounds, sample_s: see `measure`.
        modes: how to time, all modes of the device when left out.

    Returns:
        The row: see benchmarks/README.md.

    Raises:
        AssertionError: ours is wrong, and nothing is timed; or, after the row is stored, another
            variant could not be checked or timed.
    """
    right, failed = _checked(variants)
    where = machine.describe(device)
    limits, name_of_dtype = where["ceilings"], str(dtype).removeprefix("torch.")
    works = {name: variant.work or work for name, variant in right.items()}
    found = {}
    for mode in modes_of(device) if modes is None else modes:
        calls = {
            name: variant.calls
            for name, variant in right.items()
            if variant.graph or mode.name != "graph"
        }
        seconds, not_run = measure(
            calls, mode, rounds=rounds, warmup_rounds=warmup_rounds, sample_s=sample_s
        )
        failed |= not_run
        found[mode.name] = _judged(seconds, works, limits, name_of_dtype)
    row = {
        "shape": str(shape),
        "dtype": name_of_dtype,
        "input_sets": len(variants["ours"].calls),
        "flop": work.flop,
        "bytes_moved": work.bytes_moved,
        "floor_us": work.floor_us(limits, name_of_dtype),
        "modes": found,
        "speedup": {
            mode: {name: v["median_us"] / each["ours"]["median_us"] for name, v in each.items()}
            for mode, each in found.items()
        },
        "failed": failed,
    } | where
    row = _rounded(row)
    benchmark.extra_info |= row
    benchmark.pedantic(variants["ours"].calls[0], rounds=1, warmup_rounds=0)
    if failed:
        raise AssertionError(f"timed without {failed}")
    return row


def headline_mode(row: Mapping[str, Any]) -> str:
    """The mode that a row is quoted in: without launches where that was measured."""
    return "graph" if "graph" in row["modes"] else next(iter(row["modes"]))


def headline(name: str, row: Mapping[str, Any]) -> str:
    """A row in one line: ours, its fastest rival, and how far ours is from the ceiling."""
    mode = headline_mode(row)
    medians = {variant: found["median_us"] for variant, found in row["modes"][mode].items()}
    ours = row["modes"][mode]["ours"]
    # ours by other names is no rival
    rivals = [variant for variant in medians if not variant.startswith("ours")]
    best = min(rivals, key=lambda variant: medians[variant], default="ours")
    return (
        f"{name.removeprefix('bench_'):<58} {mode:<5} {ours['median_us']:>9.1f} us  "
        f"{best} {medians[best]:.1f} us = {medians[best] / ours['median_us']:.2f}x  "
        f"{ours['percent_of_ceiling']:.0f}%"
    )
