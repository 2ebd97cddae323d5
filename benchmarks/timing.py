"""Time variants of one operation against each other.

A variant is a list of calls, one for each set of inputs; running them in turn keeps each from
finding its weights in the cache. A sample is so many passes over that list that it lasts a
millisecond or more, since an event's clock ticks about every half microsecond. Variants are sampled
in turn, round by round, so that a busy or hot machine hits all alike.

On CUDA there are two modes, both read from the GPU's own events: "eager", as Python launches it,
and "graph", a sample captured in one CUDA graph and replayed, which leaves the launches out. On a
CPU there is "wall".
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "SAMPLE_S",
    "Call",
    "Mode",
    "captured",
    "cuda_clock",
    "in_turn",
    "interleaved",
    "measure",
    "modes_of",
    "num_input_sets",
    "quantiles",
    "step",
    "wall_clock",
]

Call = Callable[[], object]

SAMPLE_S = 1e-3
# of one sample; more would only make the graphs larger
MAX_PASSES = 200
# 60 MB of L2 are exceeded twice by this many sets of 2 MB
MAX_SETS = 64


# What is called
def step(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Mapping[str, Tensor], backward: bool
) -> Callable[[], list[Tensor]]:
    """A call of function(**inputs) that returns its outputs, and with `backward` the gradients of
    the first one in every input too. It does not wait for the GPU."""
    leaves = {name: t.detach().requires_grad_(backward) for name, t in inputs.items()}
    grads: list[Tensor] = []

    def call() -> list[Tensor]:
        outputs = function(**leaves)
        ys = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if not backward:
            return ys
        if not grads:
            grads.append(_grad_output(ys[0]))
        return [ys[0].detach(), *torch.autograd.grad(ys[0], list(leaves.values()), grads)]

    return call


def _grad_output(y: Tensor) -> Tensor:
    """Random (constants would cost a GPU less power), the same numbers in every dtype."""
    generator = torch.Generator(y.device).manual_seed(0)
    normal = torch.randn(y.shape, generator=generator, device=y.device, dtype=torch.float32)
    return normal.bfloat16().to(y.dtype)


def num_input_sets(bytes_per_set: float, device: torch.device, at_least: int = 2) -> int:
    """Sets of inputs that together are more than twice the L2 cache; 1 on a CPU."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_SETS, max(at_least, math.floor(2 * cache / bytes_per_set) + 1))


def in_turn(calls: Sequence[Call], passes: int) -> Call:
    """All calls, `passes` times. The results of a pass live until its end: if each were freed at
    once, all would be written to one place, which the cache holds."""

    def run() -> list[object]:
        results: list[object] = []
        for _ in range(passes):
            results = [call() for call in calls]
        return results

    return run


def captured(run: Call) -> Call:
    """The kernels of one run as a CUDA graph, whose memory lives as long as what is returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # what is compiled or allocated at first use must not be captured
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


# Clocks: seconds that run takes
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


class Mode(NamedTuple):
    """How samples run and are timed: prepare makes of a run what is then called again and again."""

    name: str
    clock: Callable[[Call], float]
    prepare: Callable[[Call], Call]


def _as_it_is(run: Call) -> Call:
    return run


def modes_of(device: torch.device, graph: bool = True) -> list[Mode]:
    """The modes of a device; graph: whether the variants can be captured."""
    if device.type == "cpu":
        return [Mode("wall", wall_clock, _as_it_is)]
    modes = [Mode("eager", cuda_clock, _as_it_is)]
    return [*modes, Mode("graph", cuda_clock, captured)] if graph else modes


# Sampling
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


def _sample(calls: Sequence[Call], mode: Mode, sample_s: float) -> tuple[Call, int]:
    """A run that lasts sample_s or more, and its passes over the calls."""
    once = mode.prepare(in_turn(calls, 1))
    if not sample_s:
        return once, 1
    once()  # the first run compiles and allocates
    taken = max(min(mode.clock(once) for _ in range(2)), 1e-9)
    passes = max(1, min(MAX_PASSES, math.ceil(sample_s / taken)))
    return (once if passes == 1 else mode.prepare(in_turn(calls, passes))), passes


def measure(
    variants: Mapping[str, Sequence[Call]],
    mode: Mode,
    *,
    rounds: int,
    warmup_rounds: int,
    sample_s: float = SAMPLE_S,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of one call of each variant in a mode, and why the others could not run.

    Args:
        variants: for each its calls, one a set of inputs.
        rounds, warmup_rounds: samples of each variant.
        sample_s: what a sample lasts at least; 0 for one pass whatever it takes.

    Raises:
        Exception: "ours" could not run.
    """
    samples: dict[str, tuple[Call, int]] = {}
    failed: dict[str, str] = {}
    for name, calls in variants.items():
        try:
            samples[name] = _sample(calls, mode, sample_s)
        except Exception as error:  # a rival that cannot be captured must not cost the row
            if name == "ours":
                raise
            failed[name] = f"{mode.name}: {type(error).__name__}: {str(error)[:300]}"
    runs = {name: run for name, (run, _) in samples.items()}
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        seconds = interleaved(runs, rounds, warmup_rounds, mode.clock)
    finally:
        if collects:
            gc.enable()
    each = {
        name: [taken / (samples[name][1] * len(variants[name])) for taken in times]
        for name, times in seconds.items()
    }
    return each, failed


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 in microseconds."""
    shares = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    values = torch.tensor(list(seconds), dtype=torch.float64).quantile(shares).tolist()
    labels = ("median_us", "p20_us", "p80_us")
    return {label: 1e6 * value for label, value in zip(labels, values, strict=True)}
