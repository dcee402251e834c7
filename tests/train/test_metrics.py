"""The metrics file: whole lines, none twice; what is shown of them; and the trackers that are told the same."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing import event_accumulator

from encore.train.metrics import Lines, MetricsFile, Silent, default_progress, read_metrics
from encore.train.pretrain import pretrain
from encore.train.trackers import TrackedMetrics, open_metrics


def test_lines_after_the_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, step=-1)
    for step in range(5):
        first.write({"step": step, "loss": step / 2})
    first.close()
    second = MetricsFile(path, step=2)
    second.write({"step": 3, "loss": 9.0})
    second.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 9.0)]
    MetricsFile(path, step=-1).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b"\xff\xfe\n", b"[1]\n", b"{}\n"])
def test_a_damaged_end_is_left_out(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + tail)
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    MetricsFile(path, step=9).close()
    assert path.read_bytes() == b'{"step": 1, "loss": 2.0}\n'


def test_each_line_is_json_even_without_a_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "loss": float("nan")})
    file.close()
    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail) == {"step": 1, "loss": None}


def test_without_a_terminal_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    progress = default_progress()
    assert isinstance(progress, Lines)
    progress.start("toy", 100, 0)
    for step in range(1, 101):
        progress.step({"step": step, "loss": 1.5, "tokens_per_second": 10.0})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["1/100", "100/100"]
    assert lines[0].startswith("toy: step") and "loss 1.500" in lines[0]


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds: name -> (step, value)."""
    reader = event_accumulator.EventAccumulator(str(folder), {"scalars": 0}).Reload()
    return {tag: [(e.step, float(f"{e.value:.6g}")) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def opened(path: Path, step: int, tracker: str = "auto") -> TrackedMetrics:
    return open_metrics(path, tracker, step=step, settings={"train.steps": 9}, note=pytest.fail)


def test_tensorboard_has_every_number_of_the_metrics(tmp_path: Path) -> None:
    metrics = opened(tmp_path / "metrics.jsonl", -1)
    metrics.write({"step": 0, "validation_loss": 5.0})
    metrics.write({"step": 1, "loss": 4.0, "gradient_norm": float("nan"), "note": "text", "tokens": 7})
    metrics.close()
    assert points(tmp_path / "tensorboard") == {"validation_loss": [(0, 5.0)], "loss": [(1, 4.0)], "tokens": [(1, 7.0)]}


def test_a_resumed_run_has_each_point_once(tmp_path: Path) -> None:
    """Killed after step 6 with 4 saved, twice; the file of the lost life even ends in the middle of a record."""
    path = tmp_path / "metrics.jsonl"
    for life, (last, until) in enumerate([(-1, 6), (4, 7), (4, 9)]):
        metrics = opened(path, last)
        for step in range(max(last + 1, 1), until + 1):
            metrics.write({"step": step, "loss": step + life / 10})
            if step == 4:
                metrics.sync()  # as before a checkpoint
        if until < 9:  # a kill: what lies in the writer's queue is lost
            metrics.sync()
            newest = max((tmp_path / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns)
            newest.write_bytes(newest.read_bytes()[:-11])
        metrics.close()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), *((step, step + 0.2) for step in range(5, 10))]
    assert points(tmp_path / "tensorboard") == {"loss": expected}
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == expected


def test_a_run_from_its_beginning_drops_the_curves_of_an_earlier_one(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        metrics = opened(tmp_path / "metrics.jsonl", -1)
        metrics.write({"step": 1, "loss": value})
        metrics.close()
    assert points(tmp_path / "tensorboard") == {"loss": [(1, 2.0)]}


def test_nothing_else_is_written_when_nobody_else_watches(tmp_path: Path) -> None:
    metrics = opened(tmp_path / "metrics.jsonl", -1, "none")
    metrics.write({"step": 1, "loss": 1.0})
    metrics.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("tracker", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboard")])
def test_a_tracker_that_is_missing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name.startswith(package) else find(name, *more)
    )
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'train.tracker is "{tracker}".*encore-lm\[track\]'):
        opened(tmp_path / "metrics.jsonl", -1, tracker)


def test_fit_tells_tensorboard_what_it_tells_the_metrics(tiny: Any) -> None:
    """Through the loop: a run that is stopped, loses its end, and goes on has the points of its metrics, each once."""
    out = tiny.folder / "run"
    pretrain(tiny.recipe("causal", "train.steps=6", "train.checkpoint_every_steps=4"), out, progress=Silent())
    shutil.rmtree(out / "checkpoints" / "step-000006")
    shutil.rmtree(out / "model")
    pretrain(tiny.recipe("causal", "train.steps=6", "train.checkpoint_every_steps=4"), out, progress=Silent())
    found = points(out / "tensorboard")
    rows = read_metrics(out / "metrics.jsonl")
    assert {"loss", "learning_rate", "gradient_norm", "tokens_per_second"} <= set(found)
    for key, values in found.items():
        assert values == [(r["step"], pytest.approx(r[key], rel=1e-5)) for r in rows if key in r], key


@pytest.mark.wandb
def test_wandb_offline_has_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back from the file of the run that `wandb sync` would send."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    path = tmp_path / "metrics.jsonl"
    for last, until in [(-1, 6), (4, 8)]:
        metrics = opened(path, last, "wandb")
        for step in range(max(last + 1, 0), until + 1):
            metrics.write({"step": step, "loss": step * 0.5})
        metrics.close()
    importlib.import_module("wandb").teardown()  # waits until all is in the file
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert wandb_history(file) == [(step, step * 0.5) for step in range(9)]


def wandb_history(file: Path) -> list[tuple[int, float]]:
    """(step, loss) of each history record: protocol buffers in the log format of LevelDB, after 7 bytes of header."""
    from wandb.proto import wandb_internal_pb2

    content, at, record, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        rest = 32768 - at % 32768
        if rest < 7:
            at += rest
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if parsed.WhichOneof("record_type") == "history":
                values = {"/".join(item.nested_key) or item.key: item.value_json for item in parsed.history.item}
                found.append((int(values["_step"]), float(values["loss"])))
    return found
