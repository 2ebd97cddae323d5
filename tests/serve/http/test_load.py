"""benchmarks/load.py counts what it says it counts."""

import asyncio
from copy import deepcopy

import pytest

pytest.importorskip("fastapi", reason="needs lillama[serve]")

from benchmarks.load import Load, percentiles, report, run  # noqa: E402
from tests.serve.http.running import running  # noqa: E402

BODY = {"max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}


def load_on(server, prompt: str, timeout_s: float = 10.0) -> Load:
    body = {**BODY, "prompt": prompt}
    return Load(server.host, server.port, "/v1/completions", body, timeout_s, None)


def test_percentiles_by_nearest_rank():
    found = percentiles([float(i) for i in range(100, 0, -1)])
    assert found == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0, "max": 3.0}
    assert percentiles([]) is None


def test_load_of_clients_and_of_a_rate(tokenizer):
    with running(deepcopy(tokenizer), step_s=0.01) as server:
        load = load_on(server, "a")
        document = report(load, asyncio.run(run(load, 4, None, 0.15)))
        assert document["errors"] == {} and document["answered"] == document["sent"] > 4
        assert load.tokens == 5 * document["answered"]
        assert 0 < document["first_token_s"]["p50"] < document["total_s"]["p50"]
        assert document["rss_bytes_start"] > 2**24 and document["rss_bytes_end"] > 2**24
        load = load_on(server, "a")
        document = report(load, asyncio.run(run(load, None, 100, 0.1)))
        assert (document["sent"], document["answered"]) == (10, 10)


def test_load_names_errors(tokenizer):
    with running(deepcopy(tokenizer), step_s=0.01, max_batch=1, max_queue=1) as server:
        load = load_on(server, "a~")
        asyncio.run(run(load, 1, None, 0.05))
        assert set(load.errors) == {"stream: engine_error"} and not load.total_s
        server.engine.paused = True
        load = load_on(server, "a", timeout_s=0.2)
        asyncio.run(run(load, 3, None, 0.1))
        assert load.errors["429"] >= 1 and load.errors["timeout"] >= 1
    load = load_on(server, "a")  # it is gone
    asyncio.run(run(load, 1, None, 0.05))
    assert load.errors["ConnectionRefusedError"] == 1
