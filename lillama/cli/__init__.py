"""The command line: one file a command."""

from lillama.cli.app import main

__all__ = ["main"]
