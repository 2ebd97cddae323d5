"""Turn benchmarks/results/ into the tables of the READMEs and of docs/quality.md, and into plots.

    python -m benchmarks.tables [--check] [--results DIR]

The tables stand between `<!-- benchmarks:begin NAME -->` and `<!-- benchmarks:end NAME -->`. Of
each GPU and suite the newest file counts; of quality/*.jsonl every cell. Prints the headline rows.
--check writes nothing and fails where a file is out of date.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import quality_table
from benchmarks.bench_quality import METHODS
from benchmarks.markdown import table
from benchmarks.results import Suite, read_results
from benchmarks.roofline import draw
from benchmarks.rows import headline, headline_mode
from benchmarks.targets import COLUMNS, GPU, TARGETS, Verdict, judge

__all__ = ["main", "render", "suite_table", "targets_table"]

ROOT = Path(__file__).parents[1]
SUITES = [
    *("low_rank_linear", "low_rank_linears", "pivot_low_rank_linear", "distill_loss"),
    *("low_rank_experts", "selective_scan", "causal_conv1d", "mamba_block", "compress"),
    *("decode", "generate"),
]
# suites with no more rows are printed whole
FEW = 12
# what README.md shows of the cells of bench_quality; docs/quality.md shows all
QUALITY_METHODS = [
    *("dense", "dense, int4", "whitened svd", "paper, rate 1e-3", "fast", "default", "best"),
]
LEFT_OUT = ["bits per byte by text", "parameters"]


# README.md
def _cell(verdict: Verdict) -> str:
    goal, unit = verdict.goal, "x" if verdict.goal.rivals else "%"
    if verdict.worst is None:
        return f"{goal.least:g}{unit}: not measured"
    rows = f"{verdict.num_rows} of {len(goal.rows)} rows"
    if verdict.met:
        said = "met"
    elif verdict.worst >= goal.least:
        said = "**open**"  # so far met, but rows are missing
    else:
        said = "**missed**"
    return f"{goal.least:g}{unit}: {verdict.worst:.3g}{unit} in {rows}, {said}"


def targets_table(suites: Sequence[Suite]) -> str:
    """Every target beside the worst of its rows on the GPU that it is for."""
    suites = [suite for suite in suites if suite.gpu == GPU]
    rows = {name: row for suite in suites for name, row in suite.rows.items()}
    lines = []
    for target in TARGETS:
        verdicts = judge(target, rows)
        cells = dict.fromkeys(COLUMNS, "") | {v.goal.column: _cell(v) for v in verdicts}
        names = {name for verdict in verdicts for name in verdict.goal.rows}
        where = [suite.where for suite in suites if names & suite.rows.keys()]
        lines.append([target.case, *cells.values(), "; ".join(where) or "not measured on a GPU"])
    return table(["case", *COLUMNS.values(), "where and when"], lines)


# kernels/README.md
def _row_cells(name: str, row: Mapping[str, Any], rivals: Sequence[str]) -> list[str]:
    found = row["modes"][headline_mode(row)]
    ours, median_us = found["ours"], found["ours"]["median_us"]
    cells = [
        name.removeprefix("bench_").partition("[")[2].removesuffix("]"),
        f"{median_us:.1f} ({ours['p20_us']:.1f} to {ours['p80_us']:.1f})",
    ]
    for rival in rivals:
        other = found.get(rival, {}).get("median_us")
        failed = "failed" if rival in row["failed"] else ""
        cells.append(failed if other is None else f"{other:.1f} = {other / median_us:.2f}x")
    eager = row["modes"].get("eager", {})
    cells += [
        f"{ours['gb_per_s']:.0f}",
        f"{ours['tflop_per_s']:.1f}",
        f"{ours['percent_of_ceiling']:.0f}%",
        f"{eager['ours']['median_us']:.1f}" if eager else "",
    ]
    return cells


def _answer_lines(name: str, row: Mapping[str, Any]) -> list[list[str]]:
    """Of whole answers: a line for every variant."""
    called = name.partition("[")[2].removesuffix("]")
    lines = []
    for variant, found in row["answers"].items():
        peak = found["peak_gib"]
        cells = [
            f"{found['first_token_ms']:.1f}",
            f"{found['token_ms']:.2f}",
            f"{found['tokens_per_s']:.0f}",
            "not measured" if peak is None else f"{peak:.1f}",
            f"{found['copy_bandwidth_percent']:.0f}%",
        ]
        lines.append([called, variant, *cells])
    lines += [[called, f"{variant}: failed", *[""] * 5] for variant in row["failed"]]
    said = row["notes"].get("vllm")
    return lines + ([[called, f"vllm: {said}", *[""] * 5]] if said == "not installed" else [])


def suite_table(suite: Suite) -> str:
    """All rows of one file: medians without launches where there are any."""
    rivals = dict.fromkeys(
        variant
        for row in suite.rows.values()
        for variant in (*row["modes"][headline_mode(row)], *row["failed"])
        if variant != "ours"
    )
    if any("answers" in row for row in suite.rows.values()):
        head = ["shape", "variant", "first token, ms", "a later one, ms", "tokens/s", "peak, GiB"]
        head += ["of the copy's bandwidth"]
        lines = [line for name, row in suite.rows.items() for line in _answer_lines(name, row)]
    else:
        head = ["shape", "ours, us (p20 to p80)", *(f"{rival}, us" for rival in rivals)]
        head += ["GB/s", "TFLOP/s", "of the ceiling", "ours eager, us"]
        lines = [_row_cells(name, row, list(rivals)) for name, row in suite.rows.items()]
    limits = next(iter(suite.rows.values()))["ceilings"]
    said = ", ".join(f"{name} {value:.0f}" for name, value in limits.items())
    return f"{suite.where}. Ceilings: {said}.\n\n{table(head, lines)}"


# All
def _tables_of(
    suites: Sequence[Suite], cells: Sequence[dict[str, Any]]
) -> dict[Path, dict[str, str]]:
    """What stands between the markers of each file."""
    tables = {
        name: "\n\n".join(suite_table(suite) for suite in suites if suite.name == name)
        or "Not measured on a GPU."
        for name in SUITES
    }
    of_cells = quality_table.rows(cells, list(METHODS))
    few = [row for row in of_cells if row["method"] in QUALITY_METHODS]
    columns = [name for name in quality_table.COLUMNS if name not in LEFT_OUT]
    return {
        Path("README.md"): {
            "targets": targets_table(suites),
            "quality": table(columns, [[row[name] for name in columns] for row in few]),
        },
        Path("docs/quality.md"): {
            "quality": table(quality_table.COLUMNS, [list(row.values()) for row in of_cells])
        },
        Path("kernels/README.md"): tables,
    }


def render(text: str, tables: Mapping[str, str]) -> str:
    """text with each table between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    for name, lines in tables.items():
        begin, end = (f"<!-- benchmarks:{word} {name} -->" for word in ("begin", "end"))
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"no {begin} with its end")
        text = f"{head}{begin}\n{lines}\n{end}{tail}"
    return text


def _print_headlines(suites: Sequence[Suite]) -> None:
    """The rows that targets speak of, or all of a small suite."""
    named = {row for target in TARGETS for goal in target.goals for row in goal.rows}
    for suite in suites:
        print(f"\n{suite.name}: {suite.where}")
        for name, row in suite.rows.items():
            if len(suite.rows) <= FEW or name in named:
                print("  " + headline(name, row))


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Write or check the tables; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    parser.add_argument("--results", type=Path, help="folder, benchmarks/results when left out")
    arguments = parser.parse_args(argv)
    folder = arguments.results or root / "benchmarks" / "results"
    try:
        suites = read_results(folder)
        files = sorted((root / "benchmarks" / "results" / "quality").glob("*.jsonl"))
        cells = [cell for file in files for cell in quality_table.read_cells(file)]
        wanted = _tables_of(suites, cells)
        before = {path: (root / path).read_text("utf-8") for path in wanted}
        after = {path: render(before[path], wanted[path]) for path in wanted}
    except (ValueError, OSError) as error:
        print(f"tables: {error}", file=sys.stderr)
        return 1
    stale = [path for path in after if after[path] != before[path]]
    if arguments.check:
        for path in stale:
            print(f"tables: {path} is out of date; run make tables", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        (root / path).write_text(after[path], "utf-8")
        print(f"tables: wrote {path}")
    for gpu in sorted({suite.gpu for suite in suites}):
        of_gpu = [suite for suite in suites if suite.gpu == gpu]
        plot = folder / f"{gpu}-{max(suite.date for suite in of_gpu)}-roofline.png"
        if draw(of_gpu, plot):
            print(f"tables: wrote {plot}")
    if cells:
        quality_table.draw(cells, root / "docs" / "quality.png")
        print("tables: wrote docs/quality.png")
    _print_headlines(suites)
    return 0


if __name__ == "__main__":
    sys.exit(main())
