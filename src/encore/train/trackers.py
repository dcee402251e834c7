"""Who else watches a run: TensorBoard where it is installed, Weights & Biases where it is asked for.

    RUN/metrics.jsonl     always, and the one that counts
                          `train.tracker` is
    RUN/tensorboard/      "auto" (the default) and a package for it is installed, or "tensorboard"
    RUN/wandb/            "wandb"; without a network as `WANDB_MODE=offline encore …`, then `wandb sync`
                          "none": neither

Trackers get the rows of metrics.jsonl, key by key under the same names, and none twice. A run that resumes from step s
has lost what came after s. TensorBoard is told so in its own words (a new file that begins by purging from s + 1, see
`SummaryWriter`), and its file is flushed before a checkpoint is saved, so that nothing up to s is missing either.
Weights & Biases continues the run under the id that is kept in RUN/wandb: on its server rows that it has are not sent
again (they would be equal); offline, the folder of the lost life is replaced by one with all rows up to s.
"""

from __future__ import annotations

import importlib.util
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from encore.train.metrics import MetricsFile, read_metrics

Row = Mapping[str, Any]
TENSORBOARD_PACKAGES = ("tensorboard", "tensorboardX")


class Tracker(Protocol):
    """Takes the rows of a run, in the order of their steps."""

    def write(self, row: Row) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class TrackedMetrics(MetricsFile):
    """metrics.jsonl, and trackers that are told the same."""

    def __init__(self, path: Path, *, step: int, trackers: Sequence[Tracker]) -> None:
        super().__init__(path, step=step)
        self.trackers = trackers

    def write(self, row: Row) -> None:
        super().write(row)
        for tracker in self.trackers:
            tracker.write(row)

    def sync(self) -> None:
        super().sync()
        for tracker in self.trackers:
            tracker.sync()

    def close(self) -> None:
        super().close()
        for tracker in self.trackers:
            tracker.close()


def open_metrics(
    path: Path, tracker: str, *, step: int, settings: Mapping[str, Any], note: Callable[[str], None]
) -> TrackedMetrics:
    """The metrics file of a run with what `train.tracker` asks for beside it, ready for the row after `step`.

    Args:
        path: of metrics.jsonl; trackers write beside it.
        step: the last step that stays; -1 for a run from its beginning, which drops what an earlier one wrote.
        settings: the recipe's keys and values, shown beside the curves.
        note: where what the user should know is said.

    Raises ValueError when the tracker asked for is not installed, or cannot be reached.
    """
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    folder = path.parent
    trackers: list[Tracker] = []
    if tracker == "wandb":
        trackers.append(WeightsAndBiases(folder, kept, settings))
    elif tracker == "tensorboard":
        trackers.append(TensorBoard(folder / "tensorboard", step))
    elif tracker == "auto" and any(importlib.util.find_spec(name) for name in TENSORBOARD_PACKAGES):
        try:
            trackers.append(TensorBoard(folder / "tensorboard", step))
        except Exception as error:  # a broken installation of something that nobody asked for must not stop a run
            note(f"note: no TensorBoard, its installation is broken ({error}); train.tracker=none leaves it out")
    return TrackedMetrics(path, step=step, trackers=trackers)


class TensorBoard:
    """Event files in `folder`, by the writer of torch or, without the tensorboard package, that of tensorboardX."""

    def __init__(self, folder: Path, step: int) -> None:
        writer = _summary_writer()
        if step < 0:
            for file in folder.glob("events.out.tfevents.*"):
                file.unlink()
        self._writer = writer(str(folder), purge_step=step + 1 if step >= 0 else None)

    def write(self, row: Row) -> None:
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, row["step"])

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _summary_writer() -> Callable[..., Any]:
    if importlib.util.find_spec("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

        return cast("Callable[..., Any]", SummaryWriter)
    if importlib.util.find_spec("tensorboardX"):
        return importlib.import_module("tensorboardX").SummaryWriter
    raise ValueError(_missing("tensorboard", "tensorboard"))


class WeightsAndBiases:
    """A run of Weights & Biases. WANDB_PROJECT, WANDB_MODE and the others of its variables have their usual effect."""

    def __init__(self, folder: Path, kept: Sequence[Row], settings: Mapping[str, Any]) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            if error.name != "wandb":
                raise
            raise ValueError(_missing("wandb", "wandb")) from None
        files = folder / "wandb"
        files.mkdir(exist_ok=True)
        name = files / "run-id"
        if not kept or not name.is_file():
            name.write_text(secrets.token_hex(4), encoding="utf-8")
        run_id = name.read_text(encoding="utf-8")
        for lost in files.glob(f"offline-run-*-{run_id}"):
            shutil.rmtree(lost)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "encore"),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=dict(settings),
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f'train.tracker is "wandb", but no run can be opened there: {error} Log in, set WANDB_MODE=offline and '
                "send the run later with `wandb sync`, or leave train.tracker out"
            ) from error
        self._next = self._run.step
        for row in kept:
            self.write(row)

    def write(self, row: Row) -> None:
        if row["step"] >= self._next:
            self._run.log(_numbers(row), step=row["step"])

    def sync(self) -> None:
        """It sends what it has by itself."""

    def close(self) -> None:
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))


def _numbers(row: Row) -> dict[str, float]:
    """What can be drawn: every finite number but the step."""
    return {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float) and math.isfinite(v)}


def _missing(tracker: str, package: str) -> str:
    return (
        f'train.tracker is "{tracker}", but {package} is not installed; install it with: '
        "pip install 'encore-lm[track]', or leave train.tracker out"
    )
