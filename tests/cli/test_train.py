"""`encore pretrain` and `encore tune`: recipes in, the model's folder out, and errors that take one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SMALL = [
    *("model.tokenizer=asset:tokenizer", "model.architecture.hidden_size=16", "model.architecture.head_dim=8"),
    *("model.architecture.num_hidden_layers=1", "model.architecture.intermediate_size=16", "train.steps=2"),
    *("train.batch_size=2", "data.window_tokens=16", "data.batch_tokens=128", "train.threads=1"),
]


def encore(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    sets = [word for change in SMALL for word in ("--set", change)]
    verb, *others = arguments
    return subprocess.run(
        [sys.executable, "-m", "encore", verb, *sets, *others],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
        env={**os.environ, "ENCORE_CACHE": str(folder / "cache")},
    )


def test_pretrain_then_tune(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "A tall man. " * 40}) + "\n", encoding="utf-8")
    first = encore(tmp_path, "pretrain", "--data", "text.jsonl", "--out", "first")
    assert first.returncode == 0, first.stderr
    assert first.stdout == "first/model\n" and "step 2/2" in first.stderr
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"src": "a man", "tgt": "ein Mann"}) + "\n", encoding="utf-8")
    (tmp_path / "tune.toml").write_text('objective = "pairs"\n[model]\ninit = "first/model"\n', encoding="utf-8")
    second = encore(tmp_path, "tune", "tune.toml", "--data", "pairs.jsonl", "--json", "--quiet", "--seed", "5")
    assert second.returncode == 0 and second.stderr == "", second.stderr
    result = json.loads(second.stdout)
    assert result["model_folder"] == "runs/tune/model" and (tmp_path / "runs/tune/model/config.json").is_file()
    assert [step for step, _ in result["losses"]] == [1, 2] and result["tokens"] > 0
    assert "seed = 5" in (tmp_path / "runs/tune/recipe.toml").read_text(encoding="utf-8")


def test_errors_take_one_line(tmp_path: Path) -> None:
    for arguments, expected in (
        (["pretrain", "--set", "train.stpes=3"], "did you mean train.steps?"),
        (["tune", "none.toml"], "cannot read the recipe none.toml"),
    ):
        failed = encore(tmp_path, *arguments)
        assert failed.returncode == 2 and failed.stdout == ""
        assert expected in failed.stderr and len(failed.stderr.splitlines()) == 1
