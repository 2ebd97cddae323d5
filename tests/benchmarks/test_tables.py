"""From result files to tables: targets met and missed, files rewritten, bad files."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.shapes import EXPERTS, LINEARS, LOSSES, MAMBA_BLOCKS, SCANS
from benchmarks.targets import COLUMNS, TARGETS, judge

ROOT = Path(__file__).parents[2]
QUALITY = "<!-- benchmarks:begin quality -->\nold\n<!-- benchmarks:end quality -->\n"
README = f"# A\nbetween\n{QUALITY}tail\n"
KERNELS = "".join(
    f"<!-- benchmarks:begin {name} -->\n<!-- benchmarks:end {name} -->\n"
    for name in ("targets", *tables.SUITES)
)
LIMITS = {"copy_gb_per_s": 4000.0, "read_gb_per_s": 4200.0, "bfloat16_tflop_per_s": 700.0}
DECODE = [name for name in TARGETS[0].goals[0].rows if "-w1-" in name]
LINEAR = "nvidia-h200-2026-11-20-low_rank_linear.json"


def row(ours_us: float, percent: float, **others_us: float) -> dict[str, Any]:
    """A row as benchmarks.rows makes it; the others are equally fast in both modes, ours is twice
    as slow in eager mode."""

    def times(median_us: float) -> dict[str, float]:
        return {
            "median_us": median_us,
            "p20_us": 0.9 * median_us,
            "p80_us": 1.1 * median_us,
            "gb_per_s": 4e7 / median_us / 1e3,
            "tflop_per_s": 6e8 / median_us / 1e6,
            "percent_of_ceiling": percent * ours_us / median_us,
        }

    def mode(ours_us: float) -> dict[str, dict[str, float]]:
        return {name: times(us) for name, us in {"ours": ours_us, **others_us}.items()}

    return {
        "modes": {"eager": mode(2 * ours_us), "graph": mode(ours_us)},
        "failed": {},
        "floor_us": ours_us * percent / 100,
        "ceilings": LIMITS,
        "dtype": "bfloat16",
        "device": "NVIDIA H200",
        "commit": "0123456789",
    }


# M = 1, 4 and 16 of Mixtral's w1 at rank 1024
ROWS = {
    DECODE[0]: row(10, 85, cublas=40, compiled=14, dense=30),
    DECODE[1]: row(10, 85, cublas=36, dense=30),
    DECODE[2]: row(10, 70, cublas=34, compiled=11, dense=26),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the files that hold tables, and no results."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "quality.md").write_text(QUALITY)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "kernels" / "README.md").write_text(KERNELS)
    return tmp_path


def write(root: Path, file: str, rows: dict[str, dict[str, Any]]) -> None:
    found = [{"name": name, "extra_info": extra} for name, extra in rows.items()]
    text = json.dumps({"benchmarks": found, "datetime": "2026-11-20T10:00:00"})
    (root / "benchmarks" / "results" / file).write_text(text)


# Targets
def test_a_target_is_judged_by_its_worst_row():
    verdicts = {verdict.goal.column: verdict for verdict in judge(TARGETS[0], ROWS)}
    # eager against eager: 34 us over 20 us
    assert verdicts["eager"].worst == pytest.approx(1.7)
    assert verdicts["compiled"].worst == pytest.approx(1.1)
    assert verdicts["dense"].worst == pytest.approx(2.6)
    assert verdicts["ceiling"].worst == pytest.approx(70)
    assert verdicts["eager"].num_rows == 3 and len(verdicts["eager"].goal.rows) == 6
    assert verdicts["compiled"].num_rows == 2 and verdicts["compiled"].goal.rows == (
        *(name for name in DECODE if "M4-" not in name),
    )
    assert [verdict.worst for verdict in judge(TARGETS[1], ROWS)] == [None] * 4


def test_a_target_is_met_only_with_all_of_its_rows():
    good = {
        name: row(10, 99, cublas=99, compiled=99, dense=99) for name in TARGETS[0].goals[0].rows
    }
    assert all(verdict.met for verdict in judge(TARGETS[0], good))
    del good[TARGETS[0].goals[0].rows[-2]]
    met = {verdict.goal.column: verdict.met for verdict in judge(TARGETS[0], good)}
    assert met == {"eager": False, "compiled": True, "dense": False, "ceiling": False}


def test_the_loss_is_compared_with_the_faster_of_two_compilations():
    (target,) = (target for target in TARGETS if target.case.startswith("loss"))
    (name,) = target.goals[0].rows
    rivals = {"eager": 600, "compiled": 50, "compiled_and_grad": 40}
    verdicts = judge(target, {name: row(20, 90, **rivals)})
    assert [v.worst for v in verdicts] == pytest.approx([15.0, 2.0, 90])
    verdicts = judge(target, {name: row(20, 90, eager=600, compiled=50)})
    assert [v.num_rows for v in verdicts] == [1, 0, 1]


def test_every_target_covers_rows_that_run_by_themselves():
    running = {f"bench_low_rank_linear[{s.name}-forward]" for s in LINEARS if not s.full}
    running |= {f"bench_distill_loss[{s.name}-training]" for s in LOSSES}
    experts = [s for s in EXPERTS if not s.full]
    running |= {f"bench_low_rank_experts[{s.name}-forward]" for s in experts}
    running |= {f"bench_low_rank_experts[{s.name}-training]" for s in experts if s.train}
    running |= {f"bench_selective_scan[{s.name}]" for s in SCANS}
    running |= {f"bench_mamba_block[{s.name}]" for s in MAMBA_BLOCKS}
    for target in TARGETS:
        for goal in target.goals:
            assert goal.rows and set(goal.rows) <= running, target.case
            assert goal.column in COLUMNS


# Tables
def test_tables_say_met_missed_and_open(root):
    write(root, LINEAR, ROWS)
    assert tables.main([], root) == 0
    short = (root / "README.md").read_text()
    assert short.startswith("# A\n") and short.endswith("tail\n") and "old" not in short
    text = (root / "kernels" / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| Mixtral linear, decode")]
    assert lines == [
        "| Mixtral linear, decode M = 1 to 16, rank 1024 | 1.6x: 1.7x in 3 of 6 rows, **open** "
        "| 1.25x: 1.1x in 2 of 2 rows, **missed** |  | 2.7x: 2.6x in 3 of 6 rows, **missed** "
        "| 80%: 70% in 3 of 6 rows, **missed** | NVIDIA H200, 2026-11-20, commit 0123456789 |",
        "| Mixtral linear, decode M = 1 to 16, rank 2048 | 1.4x: not measured "
        "| 1.15x: not measured |  | 1.45x: not measured | 88%: not measured "
        "| not measured on a GPU |",
    ]
    rows = text
    assert (
        "| mixtral-8x7b-w1-R1024-M16-forward | 10.0 (9.0 to 11.0) | 34.0 = 3.40x | 11.0 = 1.10x "
        "| 26.0 = 2.60x | 4000 | 60.0 | 70% | 20.0 |"
    ) in rows
    assert rows.count("Not measured on a GPU.") == len(tables.SUITES) - 1
    assert tables.main(["--check"], root) == 0


def test_a_target_with_all_rows_is_met(root):
    rows = {
        name: row(10, 99, cublas=99, compiled=99, dense=99) for name in TARGETS[0].goals[0].rows
    }
    write(root, LINEAR, rows)
    assert tables.main([], root) == 0
    text = (root / "kernels" / "README.md").read_text()
    assert "| 1.6x: 4.95x in 6 of 6 rows, met | 1.25x: 9.9x in 2 of 2 rows, met |" in text


def test_a_rival_that_failed_is_said(root):
    rows = {
        "bench_low_rank_linear[x-forward]": row(10, 50, cublas=20)
        | {"failed": {"compiled": "check"}}
    }
    write(root, LINEAR, rows)
    assert tables.main([], root) == 0
    text = (root / "kernels" / "README.md").read_text()
    assert "| x-forward | 10.0 (9.0 to 11.0) | 20.0 = 2.00x | failed |" in text


def test_whole_answers_have_a_line_for_every_variant(root):
    times = {
        "first_token_ms": 12.34,
        "token_ms": 1.234,
        "tokens_per_s": 800.4,
        "peak_gib": 2.04,
        "copy_bandwidth_percent": 61.2,
    }
    answers = {"ours": times, "transformers_40": times | {"peak_gib": None}}
    rows = {
        "bench_generate[x-B1-P128]": row(10, 50, transformers_40=20)
        | {"answers": answers, "notes": {}, "failed": {"other": "why"}}
    }
    write(root, "nvidia-h200-2026-11-20-generate.json", rows)
    assert tables.main([], root) == 0
    lines = (root / "kernels" / "README.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| x-B1")] == [
        "| x-B1-P128 | ours | 12.3 | 1.23 | 800 | 2.0 | 61% |",
        "| x-B1-P128 | transformers_40 | 12.3 | 1.23 | 800 | not measured | 61% |",
        "| x-B1-P128 | other: failed |  |  |  |  |  |",
    ]


def test_the_newest_file_of_each_gpu_and_suite_counts(root):
    slow = {name: row(20, 10, cublas=1, compiled=1, dense=1) for name in ROWS}
    loss = {"bench_distill_loss[x]": row(1, 1)}
    write(root, LINEAR, ROWS)
    write(root, "nvidia-h200-2026-11-19-low_rank_linear.json", slow)
    write(root, "nvidia-h200-2026-11-19-distill_loss.json", loss)
    write(root, "nvidia-h100-2026-12-01-low_rank_linear.json", slow)
    write(root, "nvidia-h200-2026-12-01-selective_scan.json", {})
    suites = tables.read_results(root / "benchmarks" / "results")
    assert [(suite.gpu, suite.name, suite.date) for suite in suites] == [
        ("nvidia-h100", "low_rank_linear", "2026-12-01"),
        ("nvidia-h200", "distill_loss", "2026-11-19"),
        ("nvidia-h200", "low_rank_linear", "2026-11-20"),
    ]
    # the targets are for one GPU
    assert "2026-12-01" not in tables.targets_table(suites)
    assert tables.read_results(root / "nowhere") == []


def test_results_may_lie_elsewhere(root, tmp_path):
    write(root, LINEAR, ROWS)
    elsewhere = tmp_path / "out"
    (root / "benchmarks" / "results").rename(elsewhere)
    assert tables.main(["--results", str(elsewhere)], root) == 0
    assert "1.7x in 3 of 6" in (root / "kernels" / "README.md").read_text()


# Quality
def cell(method: str, seed: int, excess: float, reduction: float = 0.2) -> dict[str, Any]:
    text = {"excess": excess, "kl": 0.1, "bits_per_byte": 2.0}
    return {
        **{"teacher": "t", "method": method, "reduction": reduction, "seed": seed},
        **{"params_after": 1000, "bytes_after": int(2e6 * (1 - reduction))},
        **{"seconds": 60.0 if reduction else 0.0},
        "texts": {"a": text, "b": text | {"excess": excess + 0.2}},
    }


def test_cells_of_quality_become_two_tables_and_a_picture(root, capsys):
    cells = [cell("default", 1, 0.3), cell("default", 0, 0.1), cell("svd", 0, 1.0)]
    cells += [cell("dense", 0, -0.1, 0.0), cell("default", 0, 0.9, 0.4)]
    folder = root / "benchmarks" / "results" / "quality"
    folder.mkdir()
    (folder / "t.jsonl").write_text("".join(json.dumps(found) + "\n" for found in cells))
    assert tables.main(["--results", str(root / "nowhere")], root) == 0
    lines = (root / "docs" / "quality.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| t |")] == [
        "| t | 0% | dense | -0.1000 / +0.1000 | 1.0000 | 2.0000 / 2.0000 | 0.1000 | 1,000 "
        "| 2,000,000 | - | 1 |",
        "| t | 20% | svd | +1.0000 / +1.2000 | 0.3329 | 2.0000 / 2.0000 | 0.1000 | 1,000 "
        "| 1,600,000 | 60 | 1 |",
        "| t | 20% | default | +0.2000 / +0.4000 | 0.7408 | 2.0000 / 2.0000 | 0.1000 | 1,000 "
        "| 1,600,000 | 60 | 2 |",
        "| t | 40% | default | +0.9000 / +1.1000 | 0.3679 | 2.0000 / 2.0000 | 0.1000 | 1,000 "
        "| 1,200,000 | 60 | 1 |",
    ]
    short = (root / "README.md").read_text()
    assert "| t | 20% | default | 0.7408 | 0.1000 | 1,600,000 | 60 |" in short
    assert "svd" not in short and "dense" not in short and "between" in short
    assert (root / "docs" / "quality.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert tables.main(["--check"], root) == 0
    (folder / "t.jsonl").write_text(json.dumps(cells[0]) + "\n")
    assert tables.main(["--check"], root) == 1
    assert "docs/quality.md is out of date" in capsys.readouterr().err


# What goes wrong
def test_every_benchmark_has_its_table():
    files = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    files.remove("bench_quality")  # a command with tables of its own
    assert files == {f"bench_{name}" for name in tables.SUITES}


def test_check_says_what_is_out_of_date(root, capsys):
    assert tables.main(["--check"], root) == 1
    error = capsys.readouterr().err
    assert "tables: README.md is out of date; run make tables" in error
    assert (root / "README.md").read_text() == README


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("h200-2026-11-20-x.json", "{", "Expecting property name"),
        ("h200-2026-11-20-x.json", "{}", "KeyError('benchmarks')"),
        ("h200-2026-11-20-x.json", "[]", "list indices"),
        ("h200-2026-11-20-x.json", '{"benchmarks": [{"name": "a", "extra_info": []}]}', "'keys'"),
        ("h200-2026-11-20-x.json", b"\xff", "utf-8"),
        ("notes.json", "{}", "they are called <gpu>-<date>-<suite>.json"),
    ],
    ids=["malformed", "empty", "list", "rows", "bytes", "name"],
)
def test_a_bad_file_is_one_line(name, content, message, root, capsys):
    path = root / "benchmarks" / "results" / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert tables.main([], root) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"tables: {name} is no benchmark result: ") and message in error
    assert error.count("\n") == 1


def test_a_row_of_an_older_format_is_one_line(root, capsys):
    old = row(1, 1)
    del old["floor_us"], old["modes"]["graph"]["ours"]["gb_per_s"]
    write(root, "h200-2026-11-20-x.json", {"bench_x[y]": old})
    assert tables.main([], root) == 1
    assert "bench_x[y] lacks floor_us, gb_per_s; remove it\n" in capsys.readouterr().err


def test_a_readme_without_its_marker_is_one_line(root, capsys):
    (root / "README.md").write_text("# A\n")
    assert tables.main([], root) == 1
    assert "no <!-- benchmarks:begin quality -->" in capsys.readouterr().err
    (root / "README.md").unlink()
    assert tables.main([], root) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_readmes_of_this_repository_are_up_to_date():
    assert tables.main(["--check"], ROOT) == 0
