"""The bars that verbs show whose work takes more than two seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

_SILENT_SECONDS = 2.0


Update = Callable[[int, int], None]


@contextlib.contextmanager
def bytes_bar(name: str) -> Iterator[Update]:
    """For verbs that move many bytes."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    with _bar(name, TextColumn(name), BarColumn(), DownloadColumn(), TimeRemainingColumn()) as update:
        yield update


@contextlib.contextmanager
def count_bar(name: str, unit: str) -> Iterator[Update]:
    """For verbs that work through many things: how many, of how many, time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with _bar(name, *columns) as update:
        yield update


@contextlib.contextmanager
def _bar(name: str, *columns: ProgressColumn) -> Iterator[Update]:
    """On stderr, once the work has taken two seconds."""
    from rich.console import Console
    from rich.progress import Progress

    started = time.monotonic()
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(name)
    shown = False

    def update(done: int, total: int) -> None:
        nonlocal shown
        bar.update(task, completed=done, total=total)
        if not shown and time.monotonic() - started > _SILENT_SECONDS:
            bar.start()
            shown = True

    try:
        yield update
    finally:
        if shown:
            bar.stop()
