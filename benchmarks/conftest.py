"""Where and in what precision the benchmarks run: `pytest benchmarks --device=cuda`.

Run them with
    pytest benchmarks -o python_files='bench_*.py' -o python_functions='bench_*'
from the repository's root. Shapes of large models run on a GPU only.
"""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.shapes import Shape


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", choices=["cpu", "cuda"], help="where the benchmarks compute"
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(str(request.config.getoption("--device")))


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(autouse=True)
def _fitting_shape(request: pytest.FixtureRequest, device: torch.device) -> None:
    shape = request.node.callspec.params.get("shape")
    if isinstance(shape, Shape) and shape.needs_gpu and device.type == "cpu":
        pytest.skip("a shape for GPUs; pass --device=cuda")


# With more threads than free cores every small op waits at a barrier: measured on a busy machine
# with 2 cores, up to 170x slower at 2 threads than at 1. One thread compares alike everywhere.
@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
