"""What a compression will lose, how long it will take and what it may gain, each with an error bar
from our own measured runs (`forecast_fit`).

Loss. `sensitivity` expects some nats a token before training: of use to compare, too high in
absolute terms. A line through log measured against log expected, by preset, corrects it:
measured = exp(intercept) * expected ^ slope. Its error bar is a factor either way: what cells
that were left out of the fit missed it by (root mean square of logs), one at a time.

Time. The FLOPs of each phase (`work`) over the device's measured rates (`speed`), times what runs
took in excess of that. All runs were of tiny models on a CPU.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lillama.compress.forecast_fit import LOSS, SECONDS
from lillama.compress.plan import Plan
from lillama.compress.speed import DeviceSpeed, measure_speed
from lillama.compress.work import Work, token_share
from lillama.config import PlanConfig
from lillama.config_advice import AdvisedPreset

__all__ = ["decoding", "ideal_seconds", "loss", "model_speed", "seconds", "time_kind"]


def _on_line(line: Mapping[str, float], expected: float) -> float:
    if expected <= 0:
        return 0.0
    return math.exp(line["intercept"] + line["slope"] * math.log(expected))


def loss(preset: AdvisedPreset, expected: float) -> dict[str, Any]:
    """From what `sensitivity` expects (nats a token) to what will be measured on other text.

    Returns:
        `predicted_loss_increase` (expected), `excess` (over the base model's loss), `kl`
        (divergence from it) and `retained` (exp(-excess)), the last three also with `_low`,
        `_high` (the error bar) and `_worst` (missed by as much as the worst cell);
        `extrapolated`: whether `expected` lies outside of what was measured.
    """
    found: dict[str, Any] = {"predicted_loss_increase": expected}
    for name, line in LOSS[preset].items():
        value = _on_line(line, expected)
        # training starts where fast ends, and keeps its best step
        untrained = LOSS["fast"][name]
        if preset == "default" and _on_line(untrained, expected) < value:
            value, line = _on_line(untrained, expected), untrained
        found |= {
            name: value,
            f"{name}_low": value / line["factor"],
            f"{name}_high": value * line["factor"],
            f"{name}_worst": value * line["worst"],
        }
    found["retained"] = math.exp(-found["excess"])
    found["retained_low"] = math.exp(-found["excess_high"])
    found["retained_high"] = math.exp(-found["excess_low"])
    found["retained_worst"] = math.exp(-found["excess_worst"])
    line = LOSS[preset]["excess"]
    found["extrapolated"] = not line["smallest"] <= expected <= line["largest"]
    return found


def model_speed(
    plan: Plan,
    options: PlanConfig,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> DeviceSpeed:
    """Of a device at the largest matrix of the blocks, for a batch of the run's tokens."""
    inside = [m for m in plan.matrices if m.block not in plan.outside] or plan.matrices
    largest = max(inside, key=lambda matrix: matrix.N * matrix.K)
    rows = options.recipe.batch_size * options.seq_len * token_share(plan, largest)
    return measure_speed(device, largest.N, largest.K, round(rows), clock)


def time_kind(config: Any) -> str:
    """Which of the measured factors is for this model: "scan" where a scan over time does what
    attention does elsewhere."""
    return "scan" if hasattr(config, "state_size") else "attention"


def ideal_seconds(work: Mapping[str, Work], speed: DeviceSpeed) -> dict[str, float]:
    """Of each phase, if nothing but products and decompositions took time."""
    return {
        phase: part.products / speed.products
        + part.doubles / speed.doubles
        + part.eigen / speed.eigen
        for phase, part in work.items()
    }


def seconds(work: Mapping[str, Work], speed: DeviceSpeed, kind: str) -> dict[str, Any]:
    """`phases`, their sum `seconds`, and `seconds_low`, `seconds_high`."""
    fitted = SECONDS[kind]
    phases = {name: fitted["excess"] * s for name, s in ideal_seconds(work, speed).items()}
    total = sum(phases.values())
    return {
        "seconds": total,
        "seconds_low": total / fitted["factor"],
        "seconds_high": total * fitted["factor"],
        "phases": phases,
    }


def decoding(dense: float, compressed: float, item_bytes: float, rate: float) -> dict[str, float]:
    """A bound for one request at a time: no faster than its weights can be read.

    dense, compressed: weights that a token reads. item_bytes: of one. rate: bytes/s of the device.
    """
    before, after = dense * item_bytes, compressed * item_bytes
    return {
        "bytes_per_token_before": round(before),
        "bytes_per_token_after": round(after),
        "tokens_per_s_bound_before": rate / before,
        "tokens_per_s_bound_after": rate / after,
        "speed_up_bound": before / after,
    }
