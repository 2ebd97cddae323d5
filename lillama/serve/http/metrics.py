"""What GET /metrics shows, in Prometheus's text format."""

from collections.abc import Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from lillama.serve.engine import LocalEngine

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

GAUGES = {
    "running": "requests in the batch",
    "waiting": "requests in the queue",
    "max_batch": "requests that fit in the batch",
}
COUNTERS = {
    "prompt_tokens": "prompt tokens read",
    "generated_tokens": "tokens generated",
    "requests": "requests that the engine took",
    "errors": "requests that the engine failed",
    "steps": "steps of the engine",
}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics(Collector):
    """The server's own counts, beside the engine's, which is asked each time, and the process's
    (memory, open files)."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=SECONDS)
        self.answers = counter(
            "lillama_http_requests",
            "HTTP requests by route and status; 499: the client left before an answer began",
            ("route", "status"),
        )
        self.seconds = histogram(
            "lillama_http_request_seconds",
            "from a request's header to the end of its answer",
            ("route",),
        )
        self.finished = counter("lillama_choices", "generations by how they ended", ("reason",))
        self.first_token_s = histogram(
            "lillama_time_to_first_token_seconds",
            "from the request to the first token, time in the queue included",
        )
        self.per_token_s = histogram(
            "lillama_time_per_output_token_seconds",
            "mean of a generation's tokens after its first",
            buckets=TOKEN_SECONDS,
        )
        self.refused_connections = counter(
            "lillama_refused_connections", "connections beyond --max-connections"
        )

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        for family, texts in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, text in texts.items():
                yield family(f"lillama_{name}", text, value=stats[name])

    def text(self) -> bytes:
        return generate_latest(self.registry)
