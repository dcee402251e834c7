"""`encore average` and `encore runs plot`, on runs made by `encore pretrain`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    *("model.tokenizer=asset:tokenizer", "model.architecture.hidden_size=16", "model.architecture.head_dim=8"),
    *("model.architecture.num_hidden_layers=1", "model.architecture.intermediate_size=16", "train.steps=4"),
    *("train.batch_size=2", "data.window_tokens=16", "train.threads=1", "train.checkpoint_every_steps=2"),
    *("objective=t5gemma2", "model.architecture.model_type=t5gemma2", "train.average_last=2"),
]


def encore(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "encore", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
        env={**os.environ, "ENCORE_CACHE": str(folder / "cache")},
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run runs/a."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.jsonl").write_text(json.dumps({"text": "A tall man. " * 40}) + "\n", encoding="utf-8")
    sets = [word for change in SMALL for word in ("--set", change)]
    done = encore(folder, "pretrain", *sets, "--data", "text.jsonl", "--out", "runs/a", "--quiet")
    assert done.returncode == 0, done.stderr
    return folder


def test_average_of_a_runs_checkpoints_is_its_averaged_model(workplace: Path) -> None:
    steps = [f"runs/a/checkpoints/step-{step:06d}" for step in (2, 4)]
    done = encore(workplace, "average", *steps, "--out", "mean", "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    summary = json.loads(done.stdout)
    assert summary["folders"] == steps and summary["out"] == "mean" and summary["dtype"] == "float32"
    weights = "model.safetensors"
    assert (workplace / "mean" / weights).read_bytes() == (workplace / "runs/a/model" / weights).read_bytes()
    again = encore(workplace, "average", *steps, "--out", "mean")
    assert again.returncode == 2 and "--force" in again.stderr and again.stderr.count("\n") == 1


def test_plot_writes_one_picture(workplace: Path) -> None:
    done = encore(workplace, "runs", "plot", "runs/a", "runs/a", "--out", "pictures/curves.png")
    assert (done.returncode, done.stdout, done.stderr) == (0, "pictures/curves.png\n", "")
    assert (workplace / "pictures/curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none"], "none is no run folder with a finished step"),
        (["runs/a", "--out", "curves.pdf"], "expected a name that ends in .png"),
    ],
)
def test_errors_take_one_line(workplace: Path, arguments: list[str], expected: str) -> None:
    failed = encore(workplace, "runs", "plot", *arguments)
    assert failed.returncode == 2 and failed.stdout == ""
    assert expected in failed.stderr and failed.stderr.count("\n") == 1


def test_help_has_examples(workplace: Path) -> None:
    for words, example in (
        (["average"], "--out a"),
        (["runs"], "plot runs/a runs/b"),
        (["runs", "plot"], "curves.png"),
    ):
        shown = encore(workplace, *words, "--help")
        assert shown.returncode == 0 and "Example: encore" in shown.stdout and example in " ".join(shown.stdout.split())
