"""How benchmarks turn clock readings into a row."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import ceilings, compare, interleaved, num_input_sets, quantiles, step

CPU = torch.device("cpu")


def test_quantiles_are_in_microseconds():
    assert quantiles([1e-6 * n for n in range(11)]) == pytest.approx(
        {"median_us": 5.0, "p20_us": 2.0, "p80_us": 8.0}
    )


def test_interleaved_runs_every_variant_each_round_and_starts_with_another():
    order: list[str] = []
    variants = {name: (lambda name=name: order.append(name)) for name in "abc"}

    def clock(run) -> float:
        run()
        return float(len(order))

    seconds = interleaved(variants, rounds=2, warmup_rounds=1, clock=clock)
    assert order == [*"abc", *"bca", *"cab"]
    # the warm-up's readings 1, 2, 3 are left out
    assert seconds == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}


@pytest.mark.parametrize(("bytes_per_set", "count"), [(1e9, 2), (30e6, 4), (1e6, 16)])
def test_input_sets_are_more_than_the_cache(bytes_per_set, count, monkeypatch):
    properties = SimpleNamespace(L2_cache_size=60_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert num_input_sets(bytes_per_set, torch.device("cuda")) == count
    assert num_input_sets(bytes_per_set, CPU) == 1


def test_step_calls_with_and_without_gradients():
    seen = []

    def double(x: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), x.requires_grad))
        return 2 * x

    for backward in (False, True):
        step(double, {"x": torch.ones(3)}, backward)()
    assert seen == [(False, False), (True, True)]


def test_a_row_compares_ours_with_the_others_and_with_the_ceiling(monkeypatch):
    """Of two input sets, with a clock that says 8 us for ours and 24 us for the other."""
    readings = {"ours": 8e-6, "other": 24e-6}
    calls: list[str] = []

    def clock(run) -> float:
        calls.clear()
        run()
        assert calls in (["ours"] * 2, ["other"] * 2)
        return readings[calls[0]]

    limits = {"copy_gb_per_s": 1000.0, "read_gb_per_s": 1000.0, "matmul_tflop_per_s": 100.0}
    monkeypatch.setattr(timing, "wall_clock", clock)
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: limits)
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda *_, **__: None)
    variants = {name: [lambda name=name: calls.append(name)] * 2 for name in readings}
    row = compare(
        benchmark, variants, shape="s", dtype=torch.bfloat16, device=CPU, flop=1e8, bytes_moved=2e6
    )
    # a call is half a run: 4 us; 2 MB at 1000 GB/s take 2 us, 1e8 FLOP at 100 TFLOP/s take 1 us
    assert row["modes"]["wall"]["ours"]["median_us"] == pytest.approx(4.0)
    assert row["speedup"]["wall"] == pytest.approx({"ours": 1.0, "other": 3.0})
    assert row["floor_us"] == pytest.approx(2.0)
    assert row["percent_of_ceiling"] == pytest.approx(50.0)
    assert row["gb_per_s"] == pytest.approx(500.0)
    assert row["tflop_per_s"] == pytest.approx(25.0)
    assert benchmark.extra_info == row and row["dtype"] == "bfloat16" and row["input_sets"] == 2


def test_ceilings_are_measured():
    limits = ceilings(CPU, torch.float32)
    assert limits.keys() == {"copy_gb_per_s", "read_gb_per_s", "matmul_tflop_per_s"}
    assert all(0.001 < value < 1e5 for value in limits.values())
