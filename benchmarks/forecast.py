"""Fits the constants of `lillama plan --advise` to our own measured runs, with their error bars.

    python -m benchmarks.forecast                 what the fits say, cell by cell
    python -m benchmarks.forecast --write         and write lillama/compress/forecast_fit.py
    python -m benchmarks.forecast --measure TEACHER... --text FILE --presets fast --tokens 16384
                                                  add timed runs to results/forecast/seconds.jsonl
    python -m benchmarks.forecast --cells TEACHER...  and the seconds of the cells, after that

Losses: every cell of results/quality/ whose ranks the loss chose. Seconds: the timed runs, in CPU
seconds; the cells' are of the clock on a busy machine and widen the error bar only.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lillama
from lillama.checkpoint import read_headers
from lillama.compress.forecast import ideal_seconds, model_speed, time_kind
from lillama.compress.plan import make_plan
from lillama.compress.speed import DeviceSpeed
from lillama.compress.work import count_work
from lillama.config import PlanConfig
from lillama.config_advice import ADVISED_PRESETS

HERE = Path(__file__).parent
CELLS = HERE / "results" / "quality"
TIMED = HERE / "results" / "forecast" / "seconds.jsonl"
MODULE = HERE.parent / "lillama" / "compress" / "forecast_fit.py"
MEASURES = ("excess", "kl")
RATES = ("products", "doubles", "eigen", "read_bytes")


def read_lines(files: Sequence[Path]) -> list[dict[str, Any]]:
    lines = [line for file in sorted(files) for line in file.read_text("utf-8").splitlines()]
    return [json.loads(line) for line in lines]


# nats: where nothing is lost, seeds of one recipe lie between -0.0002 and 0.0014, whose logarithms
# mean nothing
NOISE = 0.002
OTHER = ("int8", "int4", "uniform ranks")


def loss_points(cells: Sequence[dict[str, Any]], preset: str, measure: str) -> list[dict[str, Any]]:
    """{teacher, method, reduction, expected, excess, kl}: means over the texts. A cell that is
    another one under a second name counts once; those that were trained end to end, rounded, or
    given ranks that the loss did not choose, do not, and none that lost less than NOISE."""
    found: dict[tuple, dict[str, Any]] = {}
    for cell in cells:
        expected = cell["predicted_loss_increase"]
        if expected is None or "finetune" in cell["method"]:
            continue
        if cell["method"].split(",")[0] != preset or cell["method"].endswith(OTHER):
            continue
        texts = cell["texts"].values()
        means = {name: sum(text[name] for text in texts) / len(texts) for name in MEASURES}
        if means[measure] < NOISE:
            continue
        point = {key: cell[key] for key in ("teacher", "method", "reduction")}
        found.setdefault(
            (cell["teacher"], expected, *means.values()), {**point, "expected": expected, **means}
        )
    return list(found.values())


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope by least squares."""
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    over = sum((x - mean_x) * (y - mean_y) for x, y in points)
    slope = over / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope


def logarithms(points: Sequence[dict[str, Any]], measure: str) -> list[tuple[float, float]]:
    return [(math.log(point["expected"]), math.log(point[measure])) for point in points]


def left_out(points: Sequence[dict[str, Any]], measure: str) -> list[float]:
    """What each cell misses, in logarithms, the line through the cells of all other teachers and
    reductions by: a second seed or gauge lies beside the first and must not foretell it."""
    missed = []
    for point in points:
        others = [
            other
            for other in points
            if (other["teacher"], other["reduction"]) != (point["teacher"], point["reduction"])
        ]
        intercept, slope = line_through(logarithms(others, measure))
        missed += [y - intercept - slope * x for x, y in logarithms([point], measure)]
    return missed


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def fit_loss(points: Sequence[dict[str, Any]], measure: str) -> dict[str, float]:
    intercept, slope = line_through(logarithms(points, measure))
    expected = [point["expected"] for point in points]
    missed = left_out(points, measure)
    return {
        "intercept": round(intercept, 3),
        "slope": round(slope, 3),
        "factor": round(math.exp(root_mean_square(missed)), 2),
        "worst": round(max(1.0, math.exp(max(missed))), 2),
        "smallest": math.floor(min(expected) * 1e4) / 1e4,
        "largest": math.ceil(max(expected) * 1e4) / 1e4,
        "cells": len(points),
    }


def fit_seconds(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, float]:
    """The timed runs' mean excess over the ideal, and what they and the cells miss it by."""
    found = [row for row in rows if row["kind"] == kind]
    logs = [math.log(row["seconds"] / row["ideal_s"]) for row in found]
    timed = [value for value, row in zip(logs, found, strict=True) if not row["busy"]]
    mean = sum(timed) / len(timed)
    factor = round(math.exp(root_mean_square([value - mean for value in logs])), 2)
    return {"excess": round(math.exp(mean), 2), "factor": factor, "runs": len(logs)}


def fits() -> tuple[dict[str, Any], dict[str, Any]]:
    cells = read_lines(list(CELLS.glob("*.jsonl")))
    losses = {
        preset: {name: fit_loss(loss_points(cells, preset, name), name) for name in MEASURES}
        for preset in ADVISED_PRESETS
    }
    rows = read_lines([TIMED])
    return losses, {kind: fit_seconds(rows, kind) for kind in ("attention", "scan")}


def module_text() -> str:
    """Of lillama/compress/forecast_fit.py, as ruff formats it."""
    losses, seconds = fits()
    lines = [
        '"""Constants of `forecast`, written by `python -m benchmarks.forecast --write` from the',
        "measured runs in benchmarks/results: edit neither, run it again.",
        "",
        "factor: the error bar, either way. worst: how many times what the others foretell the",
        "worst cell lost. smallest, largest: expected losses among the cells.",
        '"""',
        "",
        '__all__ = ["LOSS", "SECONDS"]',
        "",
        "LOSS = {",
    ]
    for preset, measures in losses.items():
        lines.append(f'    "{preset}": {{')
        for name, values in measures.items():
            inside = "".join(f'            "{key}": {value},\n' for key, value in values.items())
            lines.append(f'        "{name}": {{\n{inside}        }},')
        lines.append("    },")
    lines += ["}", "SECONDS = {"]
    for kind, values in seconds.items():
        inside = ", ".join(f'"{key}": {value}' for key, value in values.items())
        lines.append(f'    "{kind}": {{{inside}}},')
    return "\n".join([*lines, "}", ""])


def measure(
    teacher: Path, text: Path, preset: str, tokens: int, seq_len: int, reduction: float
) -> dict[str, Any]:
    """One timed run, with the device's rates right before it; both in CPU seconds of one thread,
    which are those of the clock where nothing else runs."""
    if torch.get_num_threads() != 1:
        raise SystemExit("--measure counts CPU seconds: set OMP_NUM_THREADS=1")
    options = PlanConfig(
        model=teacher, reduction=reduction, preset=preset, tokens=tokens, seq_len=seq_len
    )  # type: ignore[arg-type]
    plan = make_plan(options)
    speed = model_speed(plan, options, torch.device("cpu"), clock=time.process_time)
    work = count_work(plan, options, read_headers(teacher))
    ideal = ideal_seconds(work, speed)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        lillama.compress(
            teacher, Path(folder) / "out", reduction=reduction, text=text, preset=preset,
            tokens=tokens, seq_len=seq_len, device="cpu",
        )  # fmt: skip
    taken = time.process_time() - started
    return {
        "teacher": teacher.name,
        "kind": time_kind(plan.config),
        "hidden_size": plan.config.hidden_size,
        "preset": preset,
        "tokens": tokens,
        "seq_len": seq_len,
        "reduction": reduction,
        "busy": False,
        "seconds": round(taken, 2),
        "ideal_s": round(sum(ideal.values()), 3),
        "phases": {name: round(value, 3) for name, value in ideal.items()},
        "speed": {
            key: f"{value:.3g}" if isinstance(value, float) else value
            for key, value in asdict(speed).items()
        },
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def count_cells(teacher: Path) -> list[dict[str, Any]]:
    """Rows of the cells of presets fast and default, at the rates of this teacher's timed runs."""
    timed = next(r for r in read_lines([TIMED]) if r["teacher"] == teacher.name and not r["busy"])
    speed = DeviceSpeed(
        "cpu", "float32", *(float(timed["speed"][name]) for name in RATES)
    )  # fmt: skip
    rows = []
    for cell in read_lines(list(CELLS.glob("*.jsonl"))):
        preset = cell["method"].split(",")[0]
        like_preset = cell["method"] in (preset, f"{preset}, blocks only")
        if cell["teacher"] != teacher.name or preset not in ADVISED_PRESETS or not like_preset:
            continue
        known = {"reduction": cell["reduction"], "preset": preset}
        known |= {key: cell["conditions"][key] for key in ("tokens", "seq_len")}
        options = PlanConfig(model=teacher, **known)
        work = count_work(make_plan(options), options, read_headers(teacher))
        ideal = sum(ideal_seconds(work, speed).values())
        rows.append(
            {
                **{"teacher": teacher.name, "kind": timed["kind"], **known, "busy": True},
                **{"method": cell["method"], "seconds": cell["seconds"]},
                "ideal_s": round(ideal, 3),
            }
        )
    return rows


def add_rows(rows: Sequence[dict[str, Any]]) -> None:
    TIMED.parent.mkdir(exist_ok=True)
    with TIMED.open("a", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)


def show() -> None:
    cells = read_lines(list(CELLS.glob("*.jsonl")))
    for preset in ADVISED_PRESETS:
        for name in MEASURES:
            points = loss_points(cells, preset, name)
            print(f"{preset}, {name}: {fit_loss(points, name)}")
            for point, missed in zip(points, left_out(points, name), strict=True):
                print(
                    f"    {point['teacher']:<14} {point['reduction']:.0%} {point['method']:<34} "
                    f"expected {point['expected']:.4f} measured {point[name]:.4f}, "
                    f"left out: {math.exp(missed):.2f} times the line"
                )
    for row in read_lines([TIMED]):
        print(
            f"{row['teacher']:<14} {row['preset']:<8} {row['tokens']:>7} tokens: "
            f"{row['seconds']:.1f} s, {row['seconds'] / row['ideal_s']:.1f} times the ideal"
        )
    print(fits()[1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.forecast", description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--measure", type=Path, nargs="+", default=[])
    parser.add_argument("--cells", type=Path, nargs="+", default=[])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--presets", nargs="+", default=list(ADVISED_PRESETS))
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--reduction", type=float, default=0.2)
    arguments = parser.parse_args(argv)
    for teacher in arguments.measure:
        for preset in arguments.presets:
            row = measure(
                teacher, arguments.text, preset, arguments.tokens, arguments.seq_len,
                arguments.reduction,
            )  # fmt: skip
            add_rows([row])
    for teacher in arguments.cells:
        add_rows(count_cells(teacher))
    if arguments.write:
        MODULE.write_text(module_text(), "utf-8")
    if not arguments.measure and not arguments.cells:
        show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
