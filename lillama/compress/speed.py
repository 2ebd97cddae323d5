"""How fast a device is at what a compression consists of: measured for about a second."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["DeviceSpeed", "measure_speed"]

SECONDS = 0.25  # for each of the four
# FLOPs of one product: long enough for a clock, short enough to be repeated
PRODUCT_FLOPS = 1e10
EIGEN_SIDE = 512
# rows and columns of a matrix far larger than any cache
READ_SIDE = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class DeviceSpeed:
    """Medians. products, doubles: FLOP/s of matrix products in the dtype to compute in and in fp64.
    eigen: FLOP/s of a symmetric eigendecomposition, counted as 9 n^3. read_bytes: bytes/s of a
    large matrix times one vector, as in decoding."""

    device: str
    dtype: str
    products: float
    doubles: float
    eigen: float
    read_bytes: float

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {
            "device": values["device"],
            "dtype": values["dtype"],
            "product_flops_per_s": values["products"],
            "fp64_product_flops_per_s": values["doubles"],
            "eigen_flops_per_s": values["eigen"],
            "read_bytes_per_s": values["read_bytes"],
        }


def _median_s(
    device: torch.device, call: Callable[[], object], clock: Callable[[], float]
) -> float:
    """Seconds of one call, after one that warms up."""

    def once() -> float:
        started = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - started

    once()
    taken: list[float] = []
    while not taken or (sum(taken) < SECONDS and len(taken) < 200):
        taken.append(once())
    return statistics.median(taken)


def measure_speed(
    device: torch.device,
    N: int,
    K: int,
    rows: int,
    clock: Callable[[], float] = time.perf_counter,
) -> DeviceSpeed:
    """With products of the model's own shape: [rows, K] times a weight [N, K], fewer rows where
    that would take long."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    rows = max(16, min(rows, round(PRODUCT_FLOPS / (2 * N * K))))
    x = torch.randn(rows, K, device=device)
    weight = torch.randn(N, K, device=device)
    side = min(EIGEN_SIDE, N, K)
    square = torch.randn(side, side, device=device, dtype=torch.float64)
    square = square @ square.mT
    large = torch.zeros(READ_SIDE[device.type], READ_SIDE[device.type], device=device, dtype=dtype)
    vector = torch.zeros(len(large), device=device, dtype=dtype)

    def rate(work: float, call: Callable[[], object]) -> float:
        return work / _median_s(device, call, clock)

    def product(dtype: torch.dtype) -> float:
        a, b = x.to(dtype), weight.to(dtype)
        return rate(2.0 * rows * N * K, lambda: a @ b.mT)

    return DeviceSpeed(
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        products=product(dtype),
        doubles=product(torch.float64),
        eigen=rate(9.0 * side**3, lambda: torch.linalg.eigh(square)),
        read_bytes=rate(large.nbytes, lambda: large @ vector),
    )
