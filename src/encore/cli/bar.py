"""The bar that verbs show which move many bytes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

_SILENT_SECONDS = 2.0


@contextlib.contextmanager
def bytes_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, once the work has taken two seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    started = time.monotonic()
    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TimeRemainingColumn())
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
