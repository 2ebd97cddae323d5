"""Time variants of one operation against each other, and say how close each is to the hardware.

Variants run in turn, round by round, so that a busy or hot machine hits all alike. A variant is a
list of calls, one for each set of inputs: a round runs all of them, so that no call finds its
weights in the cache. On a CPU the clock is the wall's and there is one set. On CUDA each variant is
timed twice with the GPU's own events: "eager", as Python launches it, and "graph", captured once in
a CUDA graph and replayed, which leaves the launches out.
"""

import functools
import math
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "captured",
    "ceilings",
    "compare",
    "cuda_clock",
    "interleaved",
    "num_input_sets",
    "quantiles",
    "step",
    "wall_clock",
]

Call = Callable[[], object]


def step(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Mapping[str, Tensor], backward: bool
) -> Call:
    """A call of function(**inputs), with its first output's gradient in every input if `backward`;
    without it, under no_grad. It does not wait for the GPU."""
    leaves = {name: t.detach().requires_grad_(backward) for name, t in inputs.items()}
    ones: list[Tensor] = []

    def call() -> None:
        with torch.set_grad_enabled(backward):
            outputs = function(**leaves)
        y = outputs if isinstance(outputs, Tensor) else outputs[0]
        if backward:
            if not ones:
                ones.append(torch.ones_like(y))
            torch.autograd.grad(y, list(leaves.values()), ones)

    return call


def num_input_sets(bytes_per_set: float, device: torch.device) -> int:
    """Sets of inputs that together are twice the L2 cache and more, at most 16; 1 on a CPU."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(16, max(2, math.ceil(2 * cache / bytes_per_set)))


# Clocks: seconds of one call of run
def wall_clock(run: Call) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_clock(run: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(run: Call) -> Call:
    """The kernels of one run as a graph; its memory stays allocated while the graph lives."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is compiled or allocated at first use must not be captured
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _all(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def interleaved(
    variants: Mapping[str, Call], rounds: int, warmup_rounds: int, clock: Callable[[Call], float]
) -> dict[str, list[float]]:
    """Seconds of each variant: a round runs all of them once, the next starts with another one."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup_rounds + rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            taken = clock(variants[name])
            if index >= warmup_rounds:
                seconds[name].append(taken)
    return seconds


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 in microseconds."""
    shares = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    values = torch.tensor(list(seconds), dtype=torch.float64).quantile(shares).tolist()
    labels = ("median_us", "p20_us", "p80_us")
    return {label: 1e6 * value for label, value in zip(labels, values, strict=True)}


# Ceilings
def _gpu_clock_mhz() -> float | None:
    """The SM clock now, None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        return float(text.splitlines()[0])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measured here and now: GB/s of a large copy (bytes read plus written) and of a large read,
    and TFLOP/s of a large matrix product of random numbers in dtype."""
    cuda = device.type == "cuda"
    clock, rounds = (cuda_clock, 20) if cuda else (wall_clock, 3)
    numbers, side = (2**30, 8192) if cuda else (2**24, 768)
    source = torch.ones(numbers, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    variants: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "read": lambda: source.sum(),
        "matmul": lambda: a @ b,
    }
    seconds = interleaved(variants, rounds, 2, clock)
    best = {name: quantiles(times)["median_us"] / 1e6 for name, times in seconds.items()}
    return {
        "copy_gb_per_s": 8.0 * numbers / best["copy"] / 1e9,
        "read_gb_per_s": 4.0 * numbers / best["read"] / 1e9,
        "matmul_tflop_per_s": 2.0 * side**3 / best["matmul"] / 1e12,
    }


def _row(
    modes: Mapping[str, Mapping[str, Sequence[float]]],
    limits: Mapping[str, float],
    flop: float,
    bytes_moved: float,
) -> dict[str, Any]:
    """What a row says about times: quantiles, speedups of "ours", and the share of the ceiling."""
    floor_us = 1e6 * max(
        bytes_moved / limits["copy_gb_per_s"] / 1e9, flop / limits["matmul_tflop_per_s"] / 1e12
    )
    row: dict[str, Any] = {"flop": flop, "bytes_moved": bytes_moved, "floor_us": floor_us}
    row["modes"] = {
        mode: {name: quantiles(times) for name, times in variants.items()}
        for mode, variants in modes.items()
    }
    row["speedup"] = {
        mode: {name: v["median_us"] / found["ours"]["median_us"] for name, v in found.items()}
        for mode, found in row["modes"].items()
    }
    ours = min(found["ours"]["median_us"] for found in row["modes"].values())
    row["percent_of_ceiling"] = 100 * floor_us / ours
    row["gb_per_s"] = bytes_moved / ours / 1e3
    row["tflop_per_s"] = flop / ours / 1e6
    return row


def compare(
    benchmark: Any,
    variants: Mapping[str, Sequence[Call]],
    *,
    shape: object,
    dtype: torch.dtype,
    device: torch.device,
    flop: float = 0.0,
    bytes_moved: float = 0.0,
    rounds: int = 20,
    warmup_rounds: int = 2,
    graph: bool = True,
) -> dict[str, Any]:
    """Time the variants ("ours" is one of them) and store the row in benchmark.extra_info.

    Args:
        benchmark: pytest-benchmark's fixture; its own columns are "ours" again, wall clock.
        variants: for each its calls, one a set of inputs.
        flop, bytes_moved: of one call, the least that the operation needs.
        rounds, warmup_rounds: how often each is run.
        graph: whether the variants can be captured in a CUDA graph.

    Returns:
        The row: see benchmarks/README.md.
    """
    runs = {name: _all(calls) for name, calls in variants.items()}
    modes: dict[str, dict[str, list[float]]] = {}
    if device.type == "cuda":
        modes["eager"] = interleaved(runs, rounds, warmup_rounds, cuda_clock)
        if graph:
            replays = {name: captured(run) for name, run in runs.items()}
            modes["graph"] = interleaved(replays, rounds, warmup_rounds, cuda_clock)
    else:
        modes["wall"] = interleaved(runs, rounds, warmup_rounds, wall_clock)
    each = {
        mode: {name: [s / len(variants[name]) for s in times] for name, times in found.items()}
        for mode, found in modes.items()
    }
    limits = ceilings(device, dtype)
    row = _row(each, limits, flop, bytes_moved) | {
        "shape": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "input_sets": len(variants["ours"]),
        "ceilings": limits,
    }
    if device.type == "cuda":
        row["sm_clock_mhz"] = _gpu_clock_mhz()
    benchmark.extra_info |= row
    benchmark.pedantic(variants["ours"][0], rounds=min(rounds, 5), warmup_rounds=0)
    return row
