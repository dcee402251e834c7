"""Training runs side by side: the lines of their metrics become panels of curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from encore.evaluate.report import Curve, Panel

Rows = Sequence[Mapping[str, Any]]
"""The lines of one `metrics.jsonl`."""


def run_panels(runs: Mapping[str, Rows]) -> list[Panel]:
    """Loss, validation loss, and the norms of the gradients, whole and by part: a line for each run that has them."""
    norms = dict.fromkeys(key for rows in runs.values() for row in rows for key in row if key.startswith("gradient_"))
    panels = [
        _panel("Loss", "nats per token", "loss", runs),
        _panel("Validation loss", "nats per token", "validation_loss", runs),
        *(_panel(_title(key), "norm before clipping", key, runs, log_y=True) for key in norms),
    ]
    return [panel for panel in panels if panel.curves]


def _panel(title: str, y_label: str, key: str, runs: Mapping[str, Rows], *, log_y: bool = False) -> Panel:
    curves = {name: _curve(rows, key) for name, rows in runs.items()}
    return Panel(title, "step", y_label, {name: points for name, points in curves.items() if points}, log_y)


def _curve(rows: Rows, key: str) -> Curve:
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]


def _title(key: str) -> str:
    part = key.removeprefix("gradient_norm").strip("_")
    return f"Gradients of the {part}" if part else "Gradients"
