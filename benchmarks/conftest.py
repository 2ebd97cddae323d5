"""Where and in what precision the benchmarks run: `pytest benchmarks --device=cuda`.

Run them with
    pytest benchmarks -o python_files='bench_*.py' -o python_functions='bench_*'
from the repository's root. Shapes of large models run on a GPU only.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.rows import headline
from benchmarks.shapes import Shape


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lillama benchmarks")
    group.addoption(
        "--device", default="cpu", choices=["cpu", "cuda"], help="where the benchmarks compute"
    )
    group.addoption("--full", action="store_true", help="every layer, rank and number of rows")
    group.addoption(
        "--deadline-s",
        type=float,
        metavar="T",
        help="start no row after T, in seconds since 1970; those left out are named as skipped",
    )
    group.addoption("--commit", help="what is measured, where git cannot say")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: only with --full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cuda, full = config.getoption("--device") == "cuda", config.getoption("--full")
    kept, left = [], []
    for item in items:
        callspec = getattr(item, "callspec", None)
        shape = None if callspec is None else callspec.params.get("shape")
        fits = isinstance(shape, Shape) and (cuda or not shape.needs_gpu)
        asked = full or not (item.get_closest_marker("full") or getattr(shape, "full", False))
        (kept if fits and asked else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline_s = item.config.getoption("--deadline-s")
    if deadline_s is not None and time.time() > deadline_s:
        pytest.skip("out of time")


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    if config.getoption("--commit"):
        commit_info |= {"id": config.getoption("--commit"), "dirty": False}


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Nothing but the rows: pytest-benchmark's own clock reads one call without waiting for it."""
    info = output_json["commit_info"]
    commit = info["id"][:10] + ("-dirty" if info.get("dirty") else "")
    output_json["benchmarks"] = [
        {"name": row["name"], "extra_info": row["extra_info"] | {"commit": commit}}
        for row in output_json["benchmarks"]
    ]


def pytest_benchmark_group_stats() -> list[Any]:
    """No table of that clock either."""
    return []


@pytest.fixture(autouse=True)
def _printed(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[None]:
    """A line for each row as it is measured, so that a run that is killed has shown something."""
    yield
    if "modes" in benchmark.extra_info:
        capture: Any = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print("", headline(request.node.name, benchmark.extra_info), flush=True)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(str(request.config.getoption("--device")))


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# With more threads than free cores every small op waits at a barrier: measured on a busy machine
# with 2 cores, up to 170x slower at 2 threads than at 1. One thread compares alike everywhere.
@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
