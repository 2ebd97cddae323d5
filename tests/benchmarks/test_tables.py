"""From result files to tables: targets met and missed, READMEs rewritten, a plot, bad files."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.shapes import LINEARS, LOSSES
from benchmarks.targets import TARGETS, judge

ROOT = Path(__file__).parents[2]
README = "# A\n<!-- benchmarks:begin targets -->\nold\n<!-- benchmarks:end targets -->\ntail\n"
KERNELS = "<!-- benchmarks:begin rows -->\n<!-- benchmarks:end rows -->\n"
LIMITS = {"copy_gb_per_s": 4000.0, "read_gb_per_s": 4200.0, "matmul_tflop_per_s": 700.0}


def row(ours_us: float, percent: float, **others_us: float) -> dict[str, Any]:
    """A row as benchmarks.timing writes it, every other variant equally fast in both modes."""

    def times(value: float) -> dict[str, float]:
        return {"median_us": value, "p20_us": 0.9 * value, "p80_us": 1.1 * value}

    found = {name: times(value) for name, value in {"ours": ours_us, **others_us}.items()}
    speedup = {name: value["median_us"] / ours_us for name, value in found.items()}
    return {
        "modes": {"eager": found, "graph": found},
        "speedup": {"eager": speedup, "graph": speedup},
        "percent_of_ceiling": percent,
        "floor_us": ours_us * percent / 100,
        "flop": 6e8,
        "bytes_moved": 4e7,
        "ceilings": LIMITS,
        "device": "NVIDIA H200",
    }


ROWS = {
    "bench_low_rank_linear[mixtral-8x7b-w1-R1024-M1-forward]": row(
        10, 85, cublas=20, compiled=14, dense=30
    ),
    "bench_low_rank_linear[mixtral-8x7b-w1-R1024-M16-forward]": row(
        10, 70, cublas=18, compiled=11, dense=29
    ),
    "bench_low_rank_linear[mixtral-8x7b-w2-R1024-M16-forward]": row(10, 90, cublas=17, dense=28),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the two READMEs and no results."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "kernels" / "README.md").write_text(KERNELS)
    return tmp_path


def write(root: Path, name: str, rows: dict[str, dict[str, Any]]) -> None:
    data = {
        "benchmarks": [{"name": name, "extra_info": extra} for name, extra in rows.items()],
        "commit_info": {"id": "0123456789abcdef"},
        "datetime": "2026-11-20T10:00:00",
    }
    (root / "benchmarks" / "results" / name).write_text(json.dumps(data))


def test_targets_are_judged_by_their_worst_row():
    judged = judge(TARGETS[0], list(ROWS.items()))
    assert [(goal.column, value) for goal, value in judged] == [
        ("eager", pytest.approx(1.7)),
        ("compiled", pytest.approx(1.1)),
        ("dense", pytest.approx(2.8)),
        ("ceiling", 70),
    ]
    assert [value for _, value in judge(TARGETS[1], list(ROWS.items()))] == [None] * 4


def test_every_target_covers_benchmarks_that_exist():
    names = [f"bench_low_rank_linear[{shape.name}-forward]" for shape in LINEARS]
    names += [f"bench_distill_loss[{shape.name}]" for shape in LOSSES]
    variants = {"cublas": 1.0, "compiled": 1.0, "dense": 1.0, "eager": 1.0}
    for target in TARGETS:
        judged = judge(target, [(name, row(1, 50, **variants)) for name in names])
        assert all(value is not None for _, value in judged), target.case


def test_tables_say_met_and_missed(root, capsys):
    write(root, "nvidia-h200-2026-11-20-low_rank_linear.json", ROWS)
    assert tables.main([], root) == 0
    text = (root / "README.md").read_text()
    line = next(line for line in text.splitlines() if "rank 1024 | " in line)
    assert line == (
        "| Mixtral linear, decode M = 1 to 16, rank 1024 | 1.6x: 1.7x, met "
        "| 1.25x: 1.1x, **missed** | 2.7x: 2.8x, met | 80%: 70%, **missed** |"
    )
    assert "NVIDIA H200, 2026-11-20, commit 0123456789." in text
    assert "1.4x: not measured" in text
    assert text.startswith("# A\n") and text.endswith("tail\n") and "old" not in text
    rows = (root / "kernels" / "README.md").read_text()
    assert (
        "| low_rank_linear[mixtral-8x7b-w1-R1024-M16-forward] | graph | 10.0 (9.0, 11.0) "
        "| cublas 1.80x, compiled 1.10x, dense 2.90x | 70 |"
    ) in rows
    assert tables.main(["--check"], root) == 0
    capsys.readouterr()


def test_the_newest_file_of_each_suite_counts(root):
    slow = {name: row(10, 10, cublas=1, compiled=1, dense=1) for name in ROWS}
    write(root, "nvidia-h200-2026-11-20-low_rank_linear.json", ROWS)
    write(root, "nvidia-a100-2026-09-01-low_rank_linear.json", slow)
    write(root, "nvidia-a100-2026-09-01-distill_loss.json", {"bench_distill_loss[x]": row(1, 1)})
    results = tables.read_results(root / "benchmarks" / "results")
    assert results is not None and results.stem == "nvidia-h200-2026-11-20"
    assert {name for name, _ in results.rows} == {*ROWS, "bench_distill_loss[x]"}
    assert dict(results.rows)[next(iter(ROWS))]["percent_of_ceiling"] == 85


def test_a_plot_is_drawn(root, capsys):
    write(root, "nvidia-h200-2026-11-20-low_rank_linear.json", ROWS)
    assert tables.main([], root) == 0
    data = (root / "benchmarks" / "results" / "nvidia-h200-2026-11-20-roofline.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 800 and height >= 500 and len(data) > 10_000
    capsys.readouterr()


def test_check_says_what_is_out_of_date(root, capsys):
    assert tables.main(["--check"], root) == 1
    error = capsys.readouterr().err
    assert "tables: README.md is out of date; make tables" in error
    assert (root / "README.md").read_text() == README


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("h200-2026-11-20-x.json", "{", "not a benchmark result"),
        ("h200-2026-11-20-x.json", "{}", "not a benchmark result"),
        ("h200-2026-11-20-x.json", "[]", "not a benchmark result"),
        ("notes.json", "{}", "results are called <gpu>-<date>-<suite>.json"),
    ],
    ids=["malformed", "empty", "list", "name"],
)
def test_a_bad_file_is_one_line(name, content, message, root, capsys):
    (root / "benchmarks" / "results" / name).write_text(content)
    assert tables.main([], root) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"tables: {name}: ") and message in error and error.count("\n") == 1


def test_a_row_of_an_older_format_is_one_line(root, capsys):
    write(root, "h200-2026-11-20-x.json", {"bench_x[y]": {"device": "NVIDIA H200"}})
    assert tables.main([], root) == 1
    assert "bench_x[y] lacks bytes_moved, ceilings" in capsys.readouterr().err


def test_a_readme_without_its_marker_is_one_line(root, capsys):
    (root / "README.md").write_text("# A\n")
    assert tables.main([], root) == 1
    assert "no <!-- benchmarks:begin targets -->" in capsys.readouterr().err


def test_the_readmes_of_this_repository_are_up_to_date():
    assert tables.main(["--check"], ROOT) == 0
