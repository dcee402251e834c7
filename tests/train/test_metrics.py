"""The metrics file: whole lines, none twice; and what is shown of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from encore.train.metrics import Lines, MetricsFile, default_progress, read_metrics


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
