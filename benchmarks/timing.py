"""Wall-clock times of several variants, taken in turn so that a busy or hot machine hits all alike.

CUDA work is synchronised before each clock reading: for calls under about 100 us that measures the
launch, not the kernel.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["interleaved", "record", "step"]


def step(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Mapping[str, Tensor], backward: bool
) -> Callable[[], None]:
    """A call of function(**inputs), with its first output's gradient in every input if `backward`.

    It returns when the GPU is done.
    """
    leaves = {name: t.detach().requires_grad_(backward) for name, t in inputs.items()}

    def call() -> None:
        outputs = function(**leaves)
        y = outputs if isinstance(outputs, Tensor) else outputs[0]
        if backward:
            torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
        if y.is_cuda:
            torch.cuda.synchronize(y.device)

    return call


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, warmup_rounds: int = 1
) -> dict[str, list[float]]:
    """Seconds of each variant: a round runs all variants once, the next starts with another one.

    Args:
        variants: name to callable without arguments.
        rounds: times measured per variant.
        warmup_rounds: rounds before those, not measured.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup_rounds + rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            _synchronise()
            start = time.perf_counter()
            variants[name]()
            _synchronise()
            if index >= warmup_rounds:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def record(
    benchmark: Any,
    seconds: Mapping[str, list[float]],
    baseline: str,
    *,
    shape: object,
    dtype: torch.dtype,
    device: torch.device,
    flop: float | None = None,
    bytes_moved: float | None = None,
) -> float:
    """Store what interleaved() measured in benchmark.extra_info.

    Args:
        benchmark: pytest-benchmark's fixture.
        seconds: times by variant; "ours" is one of them.
        baseline: the variant that "ours" is compared with.
        flop, bytes_moved: of one call of ours, the least that it needs.

    Returns:
        How many times faster ours is than the baseline, by medians.
    """
    middles = {}
    for name, times in seconds.items():
        shares = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        quantiles = torch.tensor(times, dtype=torch.float64).quantile(shares).tolist()
        middles[name] = quantiles[0]
        for label, value in zip(("median", "p20", "p80"), quantiles, strict=True):
            benchmark.extra_info[f"{name}_{label}_ms"] = 1e3 * value
    speedup = middles[baseline] / middles["ours"]
    benchmark.extra_info |= {
        "shape": str(shape),
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
        "baseline": baseline,
        "speedup_over_baseline": speedup,
    }
    if flop is not None:
        benchmark.extra_info["tflop_per_s"] = flop / middles["ours"] / 1e12
    if bytes_moved is not None:
        benchmark.extra_info["gb_per_s"] = bytes_moved / middles["ours"] / 1e9
    return speedup
