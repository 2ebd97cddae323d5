"""What ran the benchmarks: its ceilings, measured in the same session, its clock and versions."""

import functools
import importlib.metadata
import subprocess
from typing import Any

import torch

from benchmarks.timing import Call, cuda_clock, interleaved, quantiles, wall_clock

__all__ = ["ceilings", "describe", "sm_clock_mhz"]

# on a CPU half precision is emulated and would take seconds
DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.float32,)}


def sm_clock_mhz() -> float | None:
    """The clock now, None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        return float(text.splitlines()[0])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None


@functools.cache
def ceilings(device: torch.device) -> dict[str, float]:
    """GB/s of a large copy (bytes read plus written) and of a large read, TFLOP/s of a large matrix
    product of random numbers in each dtype, by medians; and the clock right after."""
    cuda = device.type == "cuda"
    clock, rounds = (cuda_clock, 10) if cuda else (wall_clock, 3)
    # 4 GiB is far more than any cache
    numbers, side = (2**30, 8192) if cuda else (2**23, 512)
    source = torch.ones(numbers, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    variants: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "read": lambda: source.sum(),
    }
    for dtype in DTYPES[device.type]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        variants[str(dtype).removeprefix("torch.")] = functools.partial(torch.matmul, a, b)
    seconds = interleaved(variants, rounds, 2, clock)
    best = {name: quantiles(times)["median_us"] / 1e6 for name, times in seconds.items()}
    limits = {
        "copy_gb_per_s": 8e-9 * numbers / best.pop("copy"),
        "read_gb_per_s": 4e-9 * numbers / best.pop("read"),
    }
    limits |= {f"{dtype}_tflop_per_s": 2e-12 * side**3 / taken for dtype, taken in best.items()}
    if cuda and (mhz := sm_clock_mhz()) is not None:
        limits["sm_clock_mhz"] = mhz
    return limits


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: torch.device) -> dict[str, Any]:
    """What a row says about where it ran."""
    cuda = device.type == "cuda"
    found = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "num_threads": torch.get_num_threads(),
        "ceilings": ceilings(device),
    }
    return found | {"sm_clock_mhz": sm_clock_mhz()} if cuda else found
