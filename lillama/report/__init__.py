"""One page about a compression."""

from lillama.report.report import report

__all__ = ["report"]
