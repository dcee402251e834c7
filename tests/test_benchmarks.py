"""The benchmark scripts run, on a small model, and write the rows that they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


def test_against_transformers(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    sizes = ["--model", "encore-small-small", "--source", "32,80", "--batch", "1,5", "--steps", "3", "--rounds", "1"]
    command = [sys.executable, str(SCRIPTS / "against_transformers.py"), *sizes, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [(row["work"], row["batch"], row["source_tokens"]) for row in rows] == [
        ("encode", 1, 32),
        ("encode", 1, 80),
        ("decode", 1, 512),
        ("decode", 5, 512),
    ]
    for row in rows:
        assert row["peer"] == "transformers float32" and row["unit"] == "tokens/s"
        assert abs(row["ratio"] - row["ours"] / row["peer_value"]) < 1e-9


def test_long_context_refuses_a_peer_that_would_not_fit() -> None:
    command = [sys.executable, str(SCRIPTS / "long_context.py"), "--tokens", "32768", "--peer", "transformers"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "would not fit" in done.stderr
