"""One page about a compression."""

from lillama.report.page import report

__all__ = ["report"]
