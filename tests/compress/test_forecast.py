"""Forecasts: their constants are what the script computes, and what they make of numbers."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import forecast as script
from lillama.compress import forecast, forecast_fit
from lillama.compress.plan import make_plan
from lillama.compress.speed import DeviceSpeed, measure_speed
from lillama.compress.work import Work
from lillama.config import PlanConfig
from lillama.config_advice import ADVISED_PRESETS

SPEED = DeviceSpeed("cpu", "float32", products=100.0, doubles=10.0, eigen=1.0, read_bytes=50.0)


def test_committed_constants_are_what_the_measured_runs_say():
    """After new results: python -m benchmarks.forecast --write"""
    assert script.MODULE.read_text("utf-8") == script.module_text()
    assert Path(forecast_fit.__file__) == script.MODULE
    assert ast.parse(script.module_text())


def test_points_leave_out_copies_and_other_presets():
    cell = {
        "teacher": "t", "reduction": 0.2, "predicted_loss_increase": 0.1,
        "texts": {"a": {"excess": 0.1, "kl": 0.2}, "b": {"excess": 0.3, "kl": 0.2}},
    }  # fmt: skip
    cells = [
        {**cell, "method": "fast"},
        {**cell, "method": "fast, blocks only"},
        {**cell, "method": "fast, then finetune"},
        {**cell, "method": "default"},
        {**cell, "method": "whitened", "predicted_loss_increase": None},
        {**cell, "method": "fast", "teacher": "u", "texts": {"a": {"excess": -0.1, "kl": 0.2}}},
    ]
    points = script.loss_points(cells, "fast", "excess")
    assert [(p["teacher"], p["method"], p["excess"], p["kl"]) for p in points] == [
        ("t", "fast", pytest.approx(0.2), pytest.approx(0.2))
    ]
    # a measure in which nothing was lost says nothing, the other does
    assert [p["teacher"] for p in script.loss_points(cells, "fast", "kl")] == ["t", "u"]


def test_fit_finds_a_power_law_and_how_far_points_left_out_lie():
    points = [
        {"teacher": "t", "reduction": x, "expected": x, "excess": 0.3 * x**1.5}
        for x in (0.01, 0.1, 0.5, 2.0)
    ]
    exact = script.fit_loss(points, "excess")
    assert exact["slope"] == 1.5 and exact["intercept"] == round(math.log(0.3), 3)
    assert exact["factor"] == 1.0 and (exact["smallest"], exact["largest"]) == (0.01, 2.0)
    points[1]["excess"] *= 3
    missed = script.left_out(points, "excess")
    assert missed[1] == pytest.approx(math.log(3))
    found = script.fit_loss(points, "excess")
    assert found["factor"] > 1.5 and found["worst"] == 3.0
    # a second seed beside it does not make it foretold
    assert script.fit_loss([*points, dict(points[1])], "excess")["worst"] == 3.0


def test_fit_of_seconds_takes_busy_clocks_for_the_error_bar_only():
    rows = [
        {"kind": "scan", "busy": False, "seconds": 2.0, "ideal_s": 1.0},
        {"kind": "scan", "busy": False, "seconds": 8.0, "ideal_s": 1.0},
        {"kind": "attention", "busy": False, "seconds": 90.0, "ideal_s": 1.0},
    ]
    alone = script.fit_seconds(rows, "scan")
    assert alone == {"excess": 4.0, "factor": 2.0, "runs": 2}
    rows.append({"kind": "scan", "busy": True, "seconds": 40.0, "ideal_s": 1.0})
    both = script.fit_seconds(rows, "scan")
    assert both["excess"] == 4.0 and both["factor"] > 3.5


@pytest.mark.parametrize("preset", ADVISED_PRESETS)
def test_cells_lie_within_the_error_bar_and_none_lost_more_than_the_worst(preset):
    cells = script.read_lines(list(script.CELLS.glob("*.jsonl")))
    points = script.loss_points(cells, preset, "excess")
    assert len(points) >= 5
    within = 0
    for point in points:
        found = forecast.loss(preset, point["expected"])
        assert not found["extrapolated"]
        within += found["excess_low"] <= point["excess"] <= found["excess_high"]
        # what a recommendation promises
        assert point["excess"] <= found["excess_worst"]
    assert within >= 0.6 * len(points)


def test_loss_is_ordered_and_knows_where_it_was_measured():
    among = [forecast_fit.LOSS["fast"]["excess"][key] for key in ("smallest", "largest")]
    small, large = (forecast.loss("fast", expected) for expected in among)
    for found in (small, large):
        assert found["excess_low"] < found["excess"] < found["excess_high"]
        assert found["retained_worst"] == math.exp(-found["excess_worst"]) < found["retained"]
        assert found["retained_low"] < found["retained"] < found["retained_high"]
        assert found["retained"] == math.exp(-found["excess"])
    assert small["excess"] < large["excess"] and not large["extrapolated"]
    assert not small["extrapolated"]
    assert forecast.loss("fast", 0.5 * among[0])["extrapolated"]
    assert forecast.loss("fast", 50.0)["extrapolated"]
    nothing = forecast.loss("default", 0.0)
    assert nothing["excess"] == nothing["excess_high"] == 0 and nothing["retained"] == 1


@pytest.mark.parametrize("expected", [0.001, 0.1, 1.0, 10.0])
def test_training_is_not_expected_to_lose_more(expected):
    untrained, trained = (forecast.loss(preset, expected) for preset in ADVISED_PRESETS)
    assert trained["excess"] <= untrained["excess"] and trained["kl"] <= untrained["kl"]
    assert trained["excess_low"] < trained["excess"] < trained["excess_worst"]


def test_seconds_are_work_over_rates_times_what_runs_took_more():
    work = {"a": Work(products=200.0), "b": Work(doubles=30.0, eigen=5.0)}
    assert forecast.ideal_seconds(work, SPEED) == {"a": 2.0, "b": 8.0}
    fitted = forecast_fit.SECONDS["scan"]
    found = forecast.seconds(work, SPEED, "scan")
    assert found["seconds"] == pytest.approx(10 * fitted["excess"])
    assert found["seconds_low"] == pytest.approx(found["seconds"] / fitted["factor"])
    assert found["seconds_high"] == pytest.approx(found["seconds"] * fitted["factor"])
    assert sum(found["phases"].values()) == pytest.approx(found["seconds"])


def test_decoding_is_bound_by_bytes():
    found = forecast.decoding(100.0, 80.0, 2.0, SPEED.read_bytes)
    assert (found["bytes_per_token_before"], found["bytes_per_token_after"]) == (200, 160)
    assert found["tokens_per_s_bound_after"] == 50 / 160
    assert found["speed_up_bound"] == 1.25


@pytest.mark.parametrize(("kind", "expected"), [("mixtral", "attention"), ("mamba", "scan")])
def test_model_speed_is_measured_at_the_models_shape(kind, expected, request, monkeypatch):
    options = PlanConfig(model=request.getfixturevalue(kind), reduction=0.2, seq_len=32)
    plan = make_plan(options)
    assert forecast.time_kind(plan.config) == expected
    asked = []
    monkeypatch.setattr(forecast, "measure_speed", lambda *a: asked.append(a) or SPEED)
    forecast.model_speed(replace(plan), options, torch.device("cpu"))
    _, N, K, rows, _ = asked[0]
    # an expert of the Mixtral sees half of the batch's tokens
    assert (N, K, rows) == ((64, 32, 128) if kind == "mixtral" else (128, 32, 256))


def test_measure_speed_counts_with_the_clock_that_it_is_given():
    """Every call takes one tick: rates are then known exactly."""
    ticks = iter(range(10**6))
    found = measure_speed(torch.device("cpu"), 32, 64, 100, lambda: float(next(ticks)))
    assert found.products == found.doubles == 2 * 100 * 32 * 64
    assert found.eigen == 9 * 32**3
    assert found.read_bytes == 4 * 4096**2
