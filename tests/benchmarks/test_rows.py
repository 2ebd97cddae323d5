"""A row: checked before it is timed, and what it says about the times."""

import functools
from types import SimpleNamespace

import pytest
import torch

from benchmarks import machine, rows
from benchmarks.rows import Variant, Work, check_call, compare, headline, variant
from benchmarks.timing import Mode, step

CPU = torch.device("cpu")
LIMITS = {"copy_gb_per_s": 1000.0, "read_gb_per_s": 1100.0, "bfloat16_tflop_per_s": 100.0}
READINGS = {"ours": 4e-6, "other": 12e-6, "dense": 16e-6}


@pytest.fixture
def benchmark_() -> SimpleNamespace:
    return SimpleNamespace(extra_info={}, pedantic=lambda *_, **__: None)


@pytest.fixture
def run(benchmark_, monkeypatch):
    """compare with a clock that knows what each call takes, in two modes."""
    calls: list[str] = []

    def clock(sample) -> float:
        calls.clear()
        sample()
        return sum(READINGS[name] for name in calls) / 1.0

    def made(name: str, **given) -> Variant:
        return Variant(calls=[lambda: calls.append(name)] * 2, **given)

    where = {"device": "NVIDIA H200", "ceilings": LIMITS, "triton": "3.6.0"}
    monkeypatch.setattr(machine, "describe", lambda device: where)
    modes = [Mode(name, clock, lambda run: run) for name in ("eager", "graph")]
    given = {"shape": "s", "dtype": torch.bfloat16, "device": CPU, "modes": modes}

    def compare_(work: Work, **variants) -> dict:
        made_variants = {name: made(name, **given) for name, given in variants.items()}
        return compare(benchmark_, made_variants, work=work, **given)

    return compare_


def test_a_row_compares_ours_with_the_others_and_with_the_ceiling(run, benchmark_):
    # 2 MB at 1000 GB/s take 2 us, 1e8 FLOP at 100 TFLOP/s take 1 us
    work, more = Work(flop=1e8, bytes_moved=2e6), Work(flop=1e8, bytes_moved=8e6)
    row = run(work, ours={}, other={}, dense={"work": more})
    assert row["floor_us"] == pytest.approx(2.0)
    assert row["speedup"]["graph"] == pytest.approx({"ours": 1.0, "other": 3.0, "dense": 4.0})
    assert row["modes"]["eager"]["ours"] == pytest.approx(
        {
            "median_us": 4.0,
            "p20_us": 4.0,
            "p80_us": 4.0,
            "gb_per_s": 500.0,
            "tflop_per_s": 25.0,
            "percent_of_ceiling": 50.0,
        }
    )
    # the dense layer by what it has to move itself: 8 us of 16
    assert row["modes"]["graph"]["dense"]["percent_of_ceiling"] == pytest.approx(50.0)
    assert (row["dtype"], row["input_sets"], row["triton"]) == ("bfloat16", 2, "3.6.0")
    assert row["failed"] == {} and benchmark_.extra_info == row


def test_arithmetic_can_be_the_floor():
    assert Work(flop=3e8, bytes_moved=2e6).floor_us(LIMITS, "bfloat16") == pytest.approx(3.0)


def wrong() -> None:
    raise AssertionError("far off")


def test_a_wrong_result_of_ours_is_not_timed(run, benchmark_):
    with pytest.raises(AssertionError, match="far off"):
        run(Work(), ours={"check": wrong}, other={})
    assert benchmark_.extra_info == {}


def test_a_wrong_rival_is_left_out_and_said(run, benchmark_):
    with pytest.raises(AssertionError, match="timed without .*other.*far off"):
        run(Work(bytes_moved=1.0), ours={}, other={"check": wrong}, dense={})
    row = benchmark_.extra_info
    assert row["modes"]["graph"].keys() == {"ours", "dense"}
    assert row["failed"] == {"other": "check: AssertionError: far off"}


def test_what_is_timed_is_what_is_checked():
    inputs = {"x": torch.randn(5, 8), "weight": torch.randn(3, 8)}
    oracle = torch.nn.functional.linear
    named = {"input": inputs["x"], "weight": inputs["weight"]}
    for backward in (False, True):
        for thorough in (False, True):
            made = variant(oracle, oracle, [named], backward, thorough)
            assert made.check is not None
            made.check()
    off = step(lambda input, weight: oracle(input, weight) + 1e-3, named, False)
    with pytest.raises(AssertionError, match="result 0"):
        check_call(off, oracle, named, False)
    off = step(lambda input, weight: oracle(input * 1.001 - input.detach() * 0.001, weight),
               named, True)  # fmt: skip
    with pytest.raises(AssertionError, match="result 1"):
        check_call(off, oracle, named, True)


def test_a_headline_names_the_fastest_rival():
    found = {name: {"median_us": us, "percent_of_ceiling": 81.2} for name, us in
             {"ours": 10.0, "ours_triton": 9.0, "cublas": 16.0, "dense": 30.0}.items()}  # fmt: skip
    line = headline("bench_low_rank_linear[x]", {"modes": {"eager": {}, "graph": found}})
    assert line.split() == "low_rank_linear[x] graph 10.0 us cublas 16.0 us = 1.60x 81%".split()
    alone = {"modes": {"wall": {"ours": found["ours"]}}}
    assert (
        headline("bench_x[y]", alone).split()[1:] == "wall 10.0 us ours 10.0 us = 1.00x 81%".split()
    )


def test_ceilings_are_measured():
    limits = machine.ceilings(CPU)
    assert limits.keys() == {"copy_gb_per_s", "read_gb_per_s", "float32_tflop_per_s"}
    assert all(0.001 < value < 1e5 for value in limits.values())
    described = machine.describe(CPU)
    assert described["device"] == "cpu" and described["ceilings"] is limits
    assert described["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("answer", "clock"),
    [("1980\n", 1980.0), ("", None), ("[N/A]\n", None), (OSError(), None)],
    ids=["read", "silent", "unknown", "absent"],
)
def test_the_clock_is_read_where_it_can_be(answer, clock, monkeypatch):
    def run(command, **_):
        assert "--query-gpu=clocks.sm" in command
        if isinstance(answer, OSError):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(machine.subprocess, "run", run)
    assert machine.sm_clock_mhz() == clock


def test_compiled_asks_for_the_best_without_graphs(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: asked.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda f, **given: functools.partial(asked.append, given))
    for function in rows.compiled(len, sum):
        function()
    best = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}
    assert asked == ["reset", best, best]
