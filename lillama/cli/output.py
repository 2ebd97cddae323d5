"""What the commands write to the terminal: progress on stderr, results on stdout."""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["errors", "print_json", "print_rows", "progress_bar"]

errors = Console(stderr=True)
LINE_SECONDS = 30.0


class _Rate(ProgressColumn):
    """Tokens a second."""

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:,.0f} tok/s")


class _Lines:
    """Progress as plain lines for a log file, none within LINE_SECONDS of the last or of the
    start. The time left is by the speed of the last ten lines."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.began = self.printed = clock()
        self.total = -1
        self.seen: deque[tuple[float, int]] = deque(maxlen=10)

    def update(self, stage: str, done: int, total: int) -> None:
        now = self.clock()
        if total != self.total or done < self.seen[-1][1]:  # another job, with units of its own
            self.total = total
            self.seen.clear()
            self.seen.append((now, done))
        if now - self.printed < LINE_SECONDS:
            return
        self.printed = now
        share = f" ({done / total:.1%})" if total else ""
        line = f"lillama: {stage} {done:,}/{total:,}{share}, {_hours(now - self.began)} elapsed"
        (then, before), *_ = self.seen
        if done > before:
            line += f", {_hours((total - done) * (now - then) / (done - before))} left"
        print(line, file=sys.stderr, flush=True)
        self.seen.append((now, done))


def _hours(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def progress_bar(
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr with stage, rate and time left; where stderr is no terminal, a line now and
    then."""
    if not errors.is_terminal:
        yield _Lines(clock).update
        return
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=errors, transient=True)
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


def _shown(value: Any) -> str:
    if isinstance(value, bool | str) or value is None:
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def print_rows(title: str, rows: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for key, value in _flat(rows):
        table.add_row(key, _shown(value) if not isinstance(value, list) else str(value))
    console = Console()
    console.print(title, soft_wrap=True, markup=False, highlight=False)
    console.print(table)
