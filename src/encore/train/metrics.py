"""What a run tells: `metrics.jsonl`, one line per logged step, and progress on the terminal.

    {"step": 12, "loss": 4.1, "learning_rate": 0.001, "tokens": 49152, "gradient_norm": 0.8, …,
     "validation_loss": 4.3, "tokens_per_second": 5210.0, "wall_seconds": 9.4}

`step` counts finished steps; `loss` is nats per learned token of that step; `tokens` are real tokens read and written
so far. Only the fields of TIME_FIELDS may differ between a run and the same run interrupted and resumed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

TIME_FIELDS = ("tokens_per_second", "wall_seconds")


class MetricsFile:
    """Appends lines; opening at a step drops whatever was logged after it, so no line is ever doubled."""

    def __init__(self, path: Path, *, step: int = 0) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        temporary = path.with_name(f".{path.name}.writing")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(_line(row) for row in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for as long as the run)

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def sync(self) -> None:
        """On disk before a checkpoint says that the step is done."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line cut short by a crash is left out. No file: no lines."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            break
        if not isinstance(row, dict) or "step" not in row:
            break
        rows.append(cast("dict[str, Any]", row))
    return rows


def _line(row: Mapping[str, Any]) -> str:
    finite = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


class Progress(Protocol):
    """Where a run reports to. `demo` and the command line give their own; `Silent` says nothing."""

    def start(self, name: str, total_steps: int, done_steps: int) -> None: ...

    def step(self, row: Mapping[str, Any]) -> None: ...

    def note(self, message: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Says nothing."""

    def start(self, name: str, total_steps: int, done_steps: int) -> None:
        pass

    def step(self, row: Mapping[str, Any]) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def close(self) -> None:
        pass


class Lines(Silent):
    """A line on stderr now and then, for logs and pipes."""

    def __init__(self, every_seconds: float = 15.0) -> None:
        self.every_seconds = every_seconds
        self._name, self._total, self._next = "", 0, 0.0

    def start(self, name: str, total_steps: int, done_steps: int) -> None:
        self._name, self._total, self._next = name, total_steps, 0.0

    def step(self, row: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if now >= self._next or row["step"] == self._total or "validation_loss" in row:
            self._next = now + self.every_seconds
            self.note(f"step {row['step']}/{self._total}  {describe(row)}")

    def note(self, message: str) -> None:
        print(f"{self._name}: {message}", file=sys.stderr, flush=True)


class Bar(Silent):
    """A rich progress bar on stderr: steps, loss, tokens per second, time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: Any = None
        self._validation = ""

    def start(self, name: str, total_steps: int, done_steps: int) -> None:
        self._bar.start()
        self._task = self._bar.add_task(name, total=total_steps, completed=done_steps, figures="")

    def step(self, row: Mapping[str, Any]) -> None:
        if "validation_loss" in row:
            self._validation = f"  held out {row['validation_loss']:.3f}"
        figures = describe({k: v for k, v in row.items() if k != "validation_loss"}) + self._validation
        self._bar.update(self._task, completed=row["step"], figures=figures)

    def note(self, message: str) -> None:
        self._bar.console.print(message, highlight=False, markup=False)

    def close(self) -> None:
        self._bar.stop()


def describe(row: Mapping[str, Any]) -> str:
    """The figures of a step for people."""
    text = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s"
    return text + (f"  validation {row['validation_loss']:.3f}" if "validation_loss" in row else "")


def default_progress() -> Progress:
    """A bar at a terminal, lines elsewhere."""
    return Bar() if sys.stderr.isatty() else Lines()
