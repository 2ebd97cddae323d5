"""An engine for many requests at once: batching over slots, sampling, requests and their text."""

from lillama.serve.engine.batching import LocalEngine

__all__ = ["LocalEngine"]
