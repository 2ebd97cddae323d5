"""Turn benchmarks/results/*.json into the tables of the READMEs and a roofline plot.

    python -m benchmarks.tables [--check]

The tables stand between `<!-- benchmarks:begin NAME -->` and `<!-- benchmarks:end NAME -->`. Of
each suite the newest file counts. --check writes nothing and fails where a README is out of date.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.targets import TARGETS, Goal, judge

__all__ = ["Results", "main", "read_results", "render", "roofline"]

ROOT = Path(__file__).parents[1]
NEEDED = {"bytes_moved", "ceilings", "device", "floor_us", "flop", "modes", "percent_of_ceiling",
          "speedup"}  # fmt: skip
COLUMNS = {
    "eager": "two cuBLAS calls, or plain PyTorch, eager",
    "compiled": "torch.compile",
    "dense": "dense cuBLAS",
    "ceiling": "of the ceiling",
}
# colours that differ for every kind of colour vision (Okabe and Ito)
COLOURS = {"ours": "#0072B2", "cublas": "#E69F00", "eager": "#E69F00", "compiled": "#009E73",
           "dense": "#CC79A7", "triton": "#56B4E9"}  # fmt: skip


class Results(NamedTuple):
    """The newest results: rows as (name, extra_info), and where and when they were measured."""

    rows: list[tuple[str, dict[str, Any]]]
    device: str
    date: str
    commit: str
    stem: str


def read_results(folder: Path) -> Results | None:
    """The newest file of each suite in folder, None when there is none.

    Raises:
        ValueError: a file is not a result of these benchmarks.
    """
    newest: dict[str, tuple[str, str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        found = re.fullmatch(r"(.+)-(\d{4}-\d\d-\d\d)-(\w+)\.json", path.name)
        if found is None:
            raise ValueError(f"{path.name}: results are called <gpu>-<date>-<suite>.json")
        gpu, date, suite = found.groups()
        newest[suite] = max(newest.get(suite, ("", "", path)), (date, gpu, path))
    rows: list[tuple[str, dict[str, Any]]] = []
    commit = ""
    for _, _, path in sorted(newest.values()):
        try:
            data = json.loads(path.read_text("utf-8"))
            rows += [(b["name"], b["extra_info"]) for b in data["benchmarks"]]
            commit = data["commit_info"]["id"][:10]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path.name}: not a benchmark result ({error!r}); delete it"
            ) from None
        for name, row in rows:
            if missing := sorted(NEEDED - row.keys()):
                raise ValueError(f"{path.name}: {name} lacks {', '.join(missing)}; run it again")
    if not rows:
        return None
    date, gpu, _ = max(newest.values())
    return Results(rows, rows[-1][1]["device"], date, commit, f"{gpu}-{date}")


def _cell(goal: Goal, value: float | None) -> str:
    unit = "%" if goal.rival is None else "x"
    if value is None:
        return f"{goal.least:g}{unit}: not measured"
    verdict = "met" if value >= goal.least else "**missed**"
    return f"{goal.least:g}{unit}: {value:.3g}{unit}, {verdict}"


def _where(results: Results | None) -> str:
    if results is None:
        return "Nothing here was measured on a GPU yet."
    return f"{results.device}, {results.date}, commit {results.commit}."


def _targets(results: Results | None) -> str:
    lines = [
        f"{_where(results)} A cell is the target and the case's worst row: medians, both sides in "
        "CUDA graphs but for the first column.",
        "",
        f"| case | {' | '.join(COLUMNS.values())} |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for target in TARGETS:
        cells = dict.fromkeys(COLUMNS, "")
        for goal, value in judge(target, results.rows if results else []):
            cells[goal.column] = _cell(goal, value)
        lines.append(f"| {target.case} | {' | '.join(cells.values())} |")
    return "\n".join(lines)


def _all_rows(results: Results | None) -> str:
    if results is None:
        return _where(results)
    lines = [
        f"{_where(results)} Medians in us; x is the time of the other over ours.",
        "",
        "| row | mode | ours us (p20, p80) | others | % of the ceiling |",
        "|---|---|---|---|---|",
    ]
    for name, row in results.rows:
        for mode, variants in row["modes"].items():
            ours = variants["ours"]
            others = ", ".join(
                f"{other} {row['speedup'][mode][other]:.2f}x"
                for other in variants
                if other != "ours"
            )
            percent = 100 * row["floor_us"] / ours["median_us"]
            lines.append(
                f"| {name.removeprefix('bench_')} | {mode} | {ours['median_us']:.1f} "
                f"({ours['p20_us']:.1f}, {ours['p80_us']:.1f}) | {others} | {percent:.0f} |"
            )
    return "\n".join(lines)


def render(text: str, tables: dict[str, str]) -> str:
    """text with each table between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    for name, table in tables.items():
        begin, end = (f"<!-- benchmarks:{word} {name} -->" for word in ("begin", "end"))
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"no {begin} with its end in the README")
        text = f"{head}{begin}\n{table}\n{end}{tail}"
    return text


def roofline(results: Results, path: Path) -> None:
    """A PNG: work per byte against work per second of every row that has both, and the ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for _, row in results.rows if row["flop"] and row["bytes_moved"]]
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    if rows:
        limits = rows[0]["ceilings"]
        peak, bandwidth = limits["matmul_tflop_per_s"], limits["copy_gb_per_s"] / 1e3
        intensities = [row["flop"] / row["bytes_moved"] for row in rows]
        low, high = min(intensities) / 2, max(*intensities, 2 * peak / bandwidth) * 2
        ridge = peak / bandwidth
        axes.plot([low, ridge, high], [low * bandwidth, peak, peak], color="black", linewidth=1,
                  label=f"measured ceilings: {bandwidth:.2f} TB/s, {peak:.0f} TFLOP/s")  # fmt: skip
        for variant in sorted({v for row in rows for mode in row["modes"].values() for v in mode}):
            points = [
                (row["flop"] / row["bytes_moved"], row["flop"] / mode[variant]["median_us"] / 1e6)
                for row in rows
                for mode in list(row["modes"].values())[-1:]
                if variant in mode and variant != "dense"
            ]
            if points:
                x, y = zip(*points, strict=True)
                colour = COLOURS.get(variant, "#999999")
                axes.scatter(x, y, s=22, color=colour, label=variant, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte moved", ylabel="TFLOP/s")
    axes.set_title(f"{results.device}, {results.date}")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Write or check the tables; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    arguments = parser.parse_args(argv)
    folder = root / "benchmarks" / "results"
    try:
        results = read_results(folder)
        wanted = {
            root / "README.md": {"targets": _targets(results)},
            root / "kernels" / "README.md": {"rows": _all_rows(results)},
        }
        texts = {path: render(path.read_text("utf-8"), table) for path, table in wanted.items()}
    except ValueError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 1
    stale = [path for path, text in texts.items() if path.read_text("utf-8") != text]
    if arguments.check:
        for path in stale:
            print(f"tables: {path.relative_to(root)} is out of date; make tables", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(texts[path], "utf-8")
        print(f"tables: wrote {path.relative_to(root)}")
    if results is not None:
        plot = folder / f"{results.stem}-roofline.png"
        roofline(results, plot)
        print(f"tables: wrote {plot.relative_to(root)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
