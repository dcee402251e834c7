"""The demo, shortened: the whole main job through the command line, twice, the second time from what is there."""

from __future__ import annotations

import json
import subprocess
import sys


def test_short_demo_runs_end_to_end_and_repeats(tmp_path):
    command = [sys.executable, "-m", "encore", "demo", "--short", "--json", "--threads", "1", "--out"]
    first = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert [c["name"] for c in result["contestants"]] == ["adapted", "source", "random"]
    for contestant in result["contestants"]:
        assert 0 < contestant["validation_loss"] < 10
        assert 0 <= contestant["bleu"] <= 100
    losses = {c["name"]: c["validation_loss"] for c in result["contestants"]}
    assert losses["source"] != losses["adapted"] != losses["random"]
    assert all(
        {"input", "reference", "adapted", "source", "random", "shipped translator"} <= set(row)
        for row in result["answers"]
    )
    report = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert report.count("data:image/png;base64,") == 3

    again = subprocess.run([*command, str(tmp_path / "b")], capture_output=True, text=True, timeout=300)
    other = json.loads(again.stdout)
    for one, two in zip(result["contestants"], other["contestants"], strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in two.items() if "seconds" not in k
        }
    assert result["answers"] == other["answers"]

    model = tmp_path / "a" / "adapted" / "tune" / "model"
    said = subprocess.run(
        [sys.executable, "-m", "encore", "generate", "--model", str(model), "--max-target-tokens", "3", "Hello."],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.returncode == 0, said.stderr
