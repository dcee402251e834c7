"""kill -9 at any moment, and again, and the run ends as if nothing had happened: the same weights, the same lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import encore
from encore.train.metrics import TIME_FIELDS, Silent, read_metrics
from encore.train.pretrain import pretrain
from encore.train.recipe_file import to_toml
from encore.train.sft import tune

# Imports once, then forks a child per attempt, which trains until SIGKILL finds it. The last one is let live.
KILLER = """
import os, random, signal, sys, time
recipe, out, verb, kills, seed = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
import torch
torch.set_num_threads(1)
from encore.train.metrics import Silent
from encore.train.pretrain import pretrain
from encore.train.recipe_file import load_recipe
from encore.train.sft import tune
wait = random.Random(seed)
killed = 0
while True:
    child = os.fork()
    if child == 0:
        try:
            (pretrain if verb == "pretrain" else tune)(load_recipe(recipe), out, progress=Silent())
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if killed < kills:
        time.sleep(wait.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        break
    killed += 1
print(killed)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def without_times(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in read_metrics(path)]


@pytest.mark.parametrize(("objective", "kind"), [("t5gemma2", "t5gemma2"), ("pairs", "gemma3_text")])
def test_killed_at_random_moments_it_ends_the_same(tiny: Any, objective: str, kind: str) -> None:
    data = tiny.pairs if objective == "pairs" else tiny.text
    recipe = tiny.recipe(
        objective,
        f"model.architecture.model_type={kind}",
        f"data.validation={json.dumps([data])}",
        *("train.steps=20", "train.checkpoint_every_steps=3", "train.evaluate_every_steps=7", "train.threads=1"),
        "train.accumulation_steps=2",
    )
    path = tiny.folder / "resume.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    whole = (tune if objective == "pairs" else pretrain)(recipe, tiny.folder / "whole", progress=Silent())
    verb = "tune" if objective == "pairs" else "pretrain"
    run = tiny.folder / "killed"
    arguments = [str(path), str(run), verb, "6", "1"]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) >= 3, "too few kills: the run is over too soon to prove anything"

    assert without_times(run / "metrics.jsonl") == without_times(tiny.folder / "whole" / "metrics.jsonl")
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(21))
    mine, theirs = encore.load(run / "model").state_dict(), encore.load(whole.model_folder).state_dict()
    for name, weight in theirs.items():
        assert torch.equal(mine[name], weight), name
    assert not list(run.rglob(".writing-*"))
    last = "checkpoints/step-000020/training/optimizer.safetensors"
    assert (run / last).read_bytes() == (tiny.folder / "whole" / last).read_bytes()
