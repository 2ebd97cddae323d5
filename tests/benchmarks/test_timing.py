"""How benchmarks turn clock readings into seconds of one call."""

import gc
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import (
    Mode,
    captured,
    in_turn,
    interleaved,
    measure,
    modes_of,
    num_input_sets,
    quantiles,
    step,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Machine:
    """Calls that take a fixed time each on a clock that only they move."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.order, self.seconds = 0.0, [], seconds

    def call(self, name: str):
        def run() -> str:
            self.now += self.seconds[name]
            self.order.append(name)
            return name

        return run

    def clock(self, run) -> float:
        start = self.now
        run()
        return self.now - start


def test_quantiles_are_in_microseconds():
    assert quantiles([1e-6 * n for n in range(11)]) == pytest.approx(
        {"median_us": 5.0, "p20_us": 2.0, "p80_us": 8.0}
    )


def test_interleaved_runs_every_variant_each_round_and_starts_with_another():
    machine = Machine(a=1, b=10, c=100)
    runs = {name: machine.call(name) for name in "abc"}
    seconds = interleaved(runs, rounds=2, warmup_rounds=1, clock=machine.clock)
    assert "".join(machine.order) == "abcbcacab"
    assert seconds == {"a": [1, 1], "b": [10, 10], "c": [100, 100]}


def test_measure_divides_a_sample_by_its_calls():
    """Two sets of inputs of 100 us each: five passes make a sample of a millisecond."""
    machine = Machine(ours=1e-4, slow=4e-3)
    prepared = []
    mode = Mode("fake", machine.clock, lambda run: prepared.append(run) or run)
    calls = {name: [machine.call(name)] * 2 for name in machine.seconds}
    seconds, failed = measure(calls, mode, rounds=3, warmup_rounds=1, sample_s=1e-3)
    assert failed == {}
    assert seconds["ours"] == pytest.approx([1e-4] * 3)
    assert seconds["slow"] == pytest.approx([4e-3] * 3)
    # once to estimate and once for the sample, which for the slow one is the same
    assert len(prepared) == 3
    # a warm-up, two estimates, four rounds
    assert machine.order.count("ours") == 2 * (1 + 2 + 4 * 5)
    assert machine.order.count("slow") == 2 * (1 + 2 + 4)
    assert gc.isenabled()


def test_measure_without_a_least_time_runs_nothing_twice():
    machine = Machine(ours=1e-4)
    mode = Mode("fake", machine.clock, lambda run: run)
    measure({"ours": [machine.call("ours")]}, mode, rounds=1, warmup_rounds=0, sample_s=0)
    assert machine.order == ["ours"]


def test_measure_goes_on_without_a_rival_that_cannot_run():
    machine = Machine(ours=1e-4, good=2e-4)

    def broken() -> None:
        raise RuntimeError("cannot be captured")

    mode = Mode("graph", machine.clock, lambda run: run)
    calls = {"bad": [broken], "ours": [machine.call("ours")], "good": [machine.call("good")]}
    seconds, failed = measure(calls, mode, rounds=2, warmup_rounds=0)
    assert seconds.keys() == {"ours", "good"}
    assert failed == {"bad": "graph: RuntimeError: cannot be captured"}
    with pytest.raises(RuntimeError, match="cannot be captured"):
        measure({"ours": [broken]}, mode, rounds=2, warmup_rounds=0)


def test_results_of_a_pass_live_until_its_end():
    """So that two calls of one pass never write to the same memory."""
    alive: list[int] = []

    class Result:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    most = []
    in_turn([Result, Result, lambda: most.append(len(alive))], 2)()
    assert most[0] == 2
    assert alive == []


@pytest.mark.parametrize(
    ("bytes_per_set", "at_least", "count"),
    [(1e9, 2, 2), (1e9, 4, 4), (30e6, 2, 5), (5e6, 4, 25), (1e3, 4, timing.MAX_SETS)],
)
def test_input_sets_are_more_than_twice_the_cache(bytes_per_set, at_least, count, monkeypatch):
    properties = SimpleNamespace(L2_cache_size=60_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert num_input_sets(bytes_per_set, CUDA, at_least) == count
    assert num_input_sets(bytes_per_set, CPU, at_least) == 1


def test_step_calls_with_and_without_gradients():
    inputs = {"x": torch.randn(3, 4), "w": torch.randn(2, 4)}
    (y,) = step(torch.nn.functional.linear, {"input": inputs["x"], "weight": inputs["w"]}, False)()
    assert not y.requires_grad
    torch.testing.assert_close(y, inputs["x"] @ inputs["w"].T)
    call = step(lambda x, w: x @ w.T, inputs, True)
    y, dx, dw = call()
    assert not y.requires_grad and dx.shape == inputs["x"].shape and dw.shape == inputs["w"].shape
    assert dx.unique().numel() > 4, "a constant gradient would be easy work"
    for one, two in zip(call(), (y, dx, dw), strict=True):
        assert torch.equal(one, two), "every call takes the same incoming gradient"
    doubled = step(lambda x, w: x @ w.T, {n: t.double() for n, t in inputs.items()}, True)()
    torch.testing.assert_close(dx.double(), doubled[1], rtol=1e-5, atol=1e-5)


class Stream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.log.append(f"on {self.name}")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"off {self.name}")


def test_a_graph_is_warmed_up_on_a_side_stream_and_captured_once(monkeypatch):
    log: list[str] = []
    main, side = Stream(log, "main"), Stream(log, "side")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: Stream(log, "capture"))
    replay = captured(lambda: log.append("run"))
    assert log == [
        *("side waits for main", "on side", "run", "run", "off side", "main waits for side"),
        *("on capture", "run", "off capture"),
    ]
    replay()
    assert log[-1] == "replay"


def test_modes_of_a_device():
    assert [mode.name for mode in modes_of(CPU)] == ["wall"]
    assert [mode.name for mode in modes_of(CUDA)] == ["eager", "graph"]
    assert [mode.name for mode in modes_of(CUDA, graph=False)] == ["eager"]
