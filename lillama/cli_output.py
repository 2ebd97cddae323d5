"""What the commands write to the terminal: progress on stderr, results on stdout."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["errors", "print_json", "print_rows", "progress_bar"]

errors = Console(stderr=True)


class _Rate(ProgressColumn):
    """Tokens a second."""

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:,.0f} tok/s")


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr with stage, rate and time left; silent where stderr is no terminal."""
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeRemainingColumn(),
    )
    # on a file or pipe rich would still write an empty line
    bar = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
    task = bar.add_task("start", total=None)

    def update(stage: str, done: int, total: int) -> None:
        bar.start()  # only now: before, downloads draw their own bars
        bar.update(task, description=stage, completed=done, total=total)

    try:
        yield update
    finally:
        bar.stop()


def print_json(document: Any) -> None:
    print(json.dumps(document), flush=True)


def _flat(rows: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in rows.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", found) for inner, found in _flat(value))
        else:
            yield key, value


def print_rows(title: str, rows: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False)
    for key, value in _flat(rows):
        table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)
