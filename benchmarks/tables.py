"""Turn benchmarks/results/ into the tables of the READMEs and of docs/quality.md, and its picture.

    python -m benchmarks.tables [--check] [--results DIR]

The tables stand between `<!-- benchmarks:begin NAME -->` and `<!-- benchmarks:end NAME -->`. Files
are called <gpu>-<date>-<suite>.json, as `make gpu` writes them: of each GPU and suite the newest
counts; of quality/*.jsonl every cell. --check writes nothing and fails where a file is out of date.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import quality_table
from benchmarks.bench_quality import METHODS
from benchmarks.quality_table import table
from benchmarks.rows import headline_mode
from benchmarks.targets import COLUMNS, GPU, TARGETS, Verdict, judge

__all__ = ["Suite", "main", "read_results", "render", "suite_table", "targets_table"]

ROOT = Path(__file__).parents[1]
SUITES = [
    *("low_rank_linear", "low_rank_linears", "pivot_low_rank_linear", "distill_loss"),
    *("low_rank_experts", "selective_scan", "causal_conv1d", "mamba_block", "generate"),
]
ROW_KEYS = frozenset("ceilings commit device failed floor_us modes".split())
VARIANT_KEYS = frozenset("gb_per_s median_us p20_us p80_us percent_of_ceiling tflop_per_s".split())
# what README.md shows of the cells of bench_quality; docs/quality.md shows all
SHORT_ROWS = {"removed": ["20%", "40%"], "method": ["paper, rate 1e-3", "fast", "default", "best"]}
SHORT_COLUMNS = ["teacher", "removed", "method", "retained", "KL", "bytes", "seconds"]


# The files
@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One file. gpu: as in its name. rows: extra_info by benchmark name."""

    gpu: str
    date: str
    name: str
    rows: Mapping[str, Mapping[str, Any]]

    @property
    def where(self) -> str:
        row = next(iter(self.rows.values()))
        return f"{row['device']}, {self.date}, commit {row['commit']}"


def _rows_of(path: Path) -> dict[str, Mapping[str, Any]]:
    try:
        data = json.loads(path.read_text("utf-8"))
        rows = {row["name"]: row["extra_info"] for row in data["benchmarks"]}
        for name, row in rows.items():
            missing = ROW_KEYS - row.keys()
            for mode in row.get("modes", {}).values():
                missing |= {"ours"} - mode.keys()
                for variant in mode.values():
                    missing |= VARIANT_KEYS - variant.keys()
            if missing:
                raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = repr(error) if type(error) is KeyError else str(error)
        raise ValueError(f"{path.name} is no benchmark result: {reason}; remove it") from None
    return rows


def read_results(folder: Path) -> list[Suite]:
    """The newest file of each GPU and suite that has rows, in the order of their names.

    Raises:
        ValueError: a file is not a result of these benchmarks, or is called otherwise.
    """
    newest: dict[tuple[str, str], Suite] = {}
    for path in sorted(folder.glob("*.json")):
        found = re.fullmatch(r"(.+)-(\d{4}-\d\d-\d\d)-(\w+)\.json", path.name)
        if found is None:
            raise ValueError(
                f"{path.name} is no benchmark result: they are called <gpu>-<date>-<suite>.json"
            )
        gpu, date, name = found.groups()
        # sorted by GPU, then by date: the last one stays
        if rows := _rows_of(path):
            newest[gpu, name] = Suite(gpu=gpu, date=date, name=name, rows=rows)
    return [newest[key] for key in sorted(newest)]


# kernels/README.md
def _cell(verdict: Verdict) -> str:
    goal, unit = verdict.goal, "x" if verdict.goal.rivals else "%"
    if verdict.worst is None:
        return f"{goal.least:g}{unit}: not measured"
    rows = f"{verdict.num_rows} of {len(goal.rows)} rows"
    # open: so far met, but rows are missing
    so_far = "**open**" if verdict.worst >= goal.least else "**missed**"
    said = "met" if verdict.met else so_far
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
    cells += [f"{ours['gb_per_s']:.0f}", f"{ours['tflop_per_s']:.1f}"]
    eager = row["modes"].get("eager", {})
    eager_us = f"{eager['ours']['median_us']:.1f}" if eager else ""
    return [*cells, f"{ours['percent_of_ceiling']:.0f}%", eager_us]


def _answer_lines(name: str, row: Mapping[str, Any]) -> list[list[str]]:
    """Of whole answers: a line for every variant."""
    called = name.partition("[")[2].removesuffix("]")
    lines = []
    for variant, found in row["answers"].items():
        times = f"{found['first_token_ms']:.1f}", f"{found['token_ms']:.2f}"
        peak = "not measured" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}"
        rates = f"{found['tokens_per_s']:.0f}", peak, f"{found['copy_bandwidth_percent']:.0f}%"
        lines.append([called, variant, *times, *rates])
    return lines + [[called, f"{variant}: failed", *[""] * 5] for variant in row["failed"]]


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
    few = [row for row in of_cells if all(row[key] in kept for key, kept in SHORT_ROWS.items())]
    return {
        Path("README.md"): {
            "quality": table(SHORT_COLUMNS, [[row[name] for name in SHORT_COLUMNS] for row in few])
        },
        Path("docs/quality.md"): {
            "quality": table(quality_table.COLUMNS, [list(row.values()) for row in of_cells])
        },
        Path("kernels/README.md"): {"targets": targets_table(suites), **tables},
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
    if cells:
        quality_table.draw(cells, root / "docs" / "quality.png")
        print("tables: wrote docs/quality.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
