"""kill -9 at random moments, and again: does a run go on bit for bit?

    python benchmarks/kill_resume.py --kills 50                # each life a fresh `python -m encore pretrain`
    python benchmarks/kill_resume.py --kills 500 --warm        # lives forked with torch imported: six times as fast

A small T5Gemma 2 learns from shipped text on the CPU. It runs once undisturbed: that is the reference. Then the same
command is given again and again into another folder, and each life but a run's last is ended by SIGKILL, at a moment of
one of three kinds, drawn at random:

    writing     a hidden folder in which a checkpoint is being written (or dropped) has just appeared
    training    some time after the life has opened its metrics
    anywhere    some time after its start, imports included

After each kill every checkpoint under its final name must be one of the reference's: weights, AdamW's moments, the
state of the random generators and the counters byte for byte, but for times. No finished checkpoint may be lost but by
pruning, and the metrics must be the reference's first lines. A run that ends is held against the reference in the same
way, its model too. A kill counts as resumed bit for bit when all that its run shows from there to its end is equal.

SIGKILL leaves the system's page cache alone; a loss of power is not tried here (the files are flushed with fsync).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

RECIPE = """
objective = "t5gemma2"
[model]
tokenizer = "asset:tokenizer"
[model.architecture]
model_type = "t5gemma2"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
head_dim = 16
layer_types = ["sliding_attention", "full_attention"]
sliding_window = 16
[data]
train = ["asset:text/train"]
validation = ["asset:text/validation"]
max_tokens = 20000
window_tokens = 32
validation_windows = 4
cache_folder = "CACHE"
[train]
steps = STEPS
batch_size = 2
accumulation_steps = 2
checkpoint_every_steps = 2
evaluate_every_steps = 7
keep_last = 2
threads = THREADS
"""
KINDS = ("writing", "writing", "writing", "training", "training", "training", "anywhere")
WRITING = ".writing-*"
LOOK_EVERY = 0.0005
TRAINING_SECONDS = 0.8  # the latest moment of a kill of the kind "training"
STUCK_SECONDS = 300.0


@dataclass
class Kill:
    """One SIGKILL. `while_writing`: it left a half-written or half-dropped checkpoint behind."""

    run: int
    kind: str
    after_seconds: float
    while_writing: bool
    step: int
    """Of the last whole checkpoint; 0: none yet."""
    faults: list[str] = field(default_factory=list)
    same: bool = False


class Life:
    """One process that was given the command, and is to be killed or waited for."""

    def __init__(self, arguments: list[str], log: Path, forks: Any) -> None:
        self.started = time.monotonic()
        self.log = log
        if forks is None:
            with open(log, "ab") as out:
                command = [sys.executable, "-m", "encore", *arguments]
                self.process: subprocess.Popen[bytes] | BaseProcess = subprocess.Popen(command, stdout=out, stderr=out)
        else:
            self.process = forks.Process(target=live, args=(arguments, str(log)))
            self.process.start()

    def exit_code(self) -> int | None:
        process = self.process
        return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode

    def kill(self) -> bool:
        """False if it had ended before."""
        self.process.kill()
        return self.wait() == -9

    def wait(self) -> int | None:
        if isinstance(self.process, subprocess.Popen):
            return self.process.wait(STUCK_SECONDS)
        self.process.join(STUCK_SECONDS)
        return self.process.exitcode

    def until(self, happened: Callable[[], bool]) -> bool:
        """Wait until it happens; False if the life ends before."""
        while self.exit_code() is None:
            if happened():
                return True
            if time.monotonic() - self.started > STUCK_SECONDS:
                raise SystemExit(f"a life has been stuck for {STUCK_SECONDS:.0f} s; its log is {self.log}")
            time.sleep(LOOK_EVERY)
        return False


def live(arguments: list[str], log: str) -> None:
    """What a forked life does: the command line itself, in a process that has torch already."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["encore", *arguments]
    from encore.cli import main

    main()


@dataclass
class Reference:
    """The undisturbed run: digests of every checkpoint by step, of the model, and the metrics without times."""

    checkpoints: dict[int, dict[str, str]]
    model: dict[str, str]
    rows: list[dict[str, Any]]


def digests(folder: Path) -> dict[str, str]:
    """File -> SHA-256. Of state.json without the time that passed; not of recipe.toml, which says what is kept."""
    found: dict[str, str] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "recipe.toml"):
        content = path.read_bytes()
        if path.name == "state.json":
            state = {k: v for k, v in json.loads(content).items() if k != "wall_seconds"}
            content = json.dumps(state, sort_keys=True).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def rows_of(run: Path) -> list[dict[str, Any]]:
    from encore.train.metrics import TIME_FIELDS, read_metrics

    return [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in read_metrics(run / "metrics.jsonl")]


def checkpoints_of(run: Path) -> dict[int, Path]:
    from encore.checkpoint.training import RunFolder

    return {checkpoint.step: checkpoint.folder for checkpoint in RunFolder(run).checkpoints()}


def look(run: Path, reference: Reference, before: int) -> tuple[int, list[str]]:
    """The last checkpoint's step, and all that is not as in the reference."""
    faults: list[str] = []
    found = checkpoints_of(run)
    for step, folder in found.items():
        mine, theirs = digests(folder), reference.checkpoints.get(step, {})
        faults += [f"step {step}: {name}" for name in sorted(mine | theirs) if mine.get(name) != theirs.get(name)]
    last = max(found, default=0)
    if last < before:
        faults.append(f"the last checkpoint was of step {before}, is of step {last}")
    rows = rows_of(run)
    if rows != reference.rows[: len(rows)]:
        faults.append("metrics.jsonl")
    return last, faults


def look_at_end(run: Path, reference: Reference, before: int) -> list[str]:
    _, faults = look(run, reference, before)
    if digests(run / "model") != reference.model:
        faults.append("model")
    if rows_of(run) != reference.rows:
        faults.append("metrics.jsonl: not all lines")
    if left := leftovers(run):
        faults.append(f"left over: {left}")
    return faults


def leftovers(run: Path) -> list[str]:
    return [path.name for parent in (run, run / "checkpoints") for path in parent.glob(WRITING)]


def end(life: Life, run: Path, kind: str, chance: random.Random, startup: float) -> bool:
    """Kill the life at a moment of this kind; False if it ended by itself before."""
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    if kind == "anywhere":
        moment = life.started + chance.uniform(0, startup + TRAINING_SECONDS)
        return life.until(lambda: time.monotonic() >= moment) and life.kill()
    if not life.until(lambda: metrics.exists() and metrics.stat().st_mtime_ns != before):
        return False
    moment = time.monotonic() + chance.uniform(0, TRAINING_SECONDS)
    if not life.until(lambda: time.monotonic() >= moment):
        return False
    if kind == "writing":
        if not life.until(lambda: bool(leftovers(run))):
            return False
        time.sleep(chance.choice((0.0, chance.uniform(0, 0.02))))
    return life.kill()


@dataclass
class Setting:
    """What all lives share."""

    folder: Path
    chance: random.Random
    forks: Any
    startup: float = 0.0

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def start(self, run: Path, *changes: str) -> Life:
        arguments = ["pretrain", str(self.folder / "recipe.toml"), "--out", str(run), "--quiet", *changes]
        return Life(arguments, self.log, self.forks)


def make_reference(setting: Setting, steps: int) -> Reference:
    """The run that nobody disturbs; keeps all of its checkpoints."""
    run = setting.folder / "whole"
    life = setting.start(run, "--set", f"train.keep_last={steps}")
    life.until((run / "metrics.jsonl").exists)
    setting.startup = time.monotonic() - life.started
    if life.wait() != 0:
        raise SystemExit(f"the undisturbed run failed:\n{setting.log.read_text(errors='replace')}")
    every = {step: digests(folder) for step, folder in checkpoints_of(run).items()}
    reference = Reference(every, digests(run / "model"), rows_of(run))
    if len(every) < 2 or len(reference.rows) != steps + 1 or not reference.model:
        raise SystemExit("the undisturbed run has not written all that it should; nothing can be compared with it")
    return reference


def one_run(
    setting: Setting, number: int, most_kills: int, reference: Reference, advance: Callable[[], None]
) -> tuple[list[Kill], list[str]]:
    """A run from its first life to its end: its kills with their verdicts, and what is wrong at its end."""
    run = setting.folder / f"run-{number}"
    kills: list[Kill] = []
    last = 0
    while True:
        life, kind = setting.start(run), setting.chance.choice(KINDS)
        if len(kills) < most_kills and end(life, run, kind, setting.chance, setting.startup):
            seconds = time.monotonic() - life.started
            hit = bool(leftovers(run))
            last, faults = look(run, reference, last)
            kills.append(Kill(number, kind, round(seconds, 3), hit, last, faults))
            advance()
            continue
        status = life.wait()
        if status == 0:
            faults = look_at_end(run, reference, last)
        else:
            words = setting.log.read_text(errors="replace").splitlines()[-3:]
            faults = [f"a life ended with status {status}: {' '.join(words)}"]
        break
    good = not faults
    for kill in reversed(kills):
        good = good and not kill.faults
        kill.same = good
    return kills, [f"at the end of run {number}: {fault}" for fault in faults]


def measure(
    kills: int, steps: int, seed: int, threads: int, *, warm: bool, folder: Path
) -> tuple[list[Kill], list[str], int]:
    """So many kills, each with its verdict; what is wrong at the ends of runs; the number of runs."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    recipe = RECIPE.replace("STEPS", str(steps)).replace("THREADS", str(threads))
    recipe = recipe.replace('"CACHE"', json.dumps(str(folder / "cache")))
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    forks = None
    if warm:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["torch._dynamo", "encore.cli", "encore.train.pretrain"])
    setting = Setting(folder, random.Random(seed), forks)
    found: list[Kill] = []
    end_faults: list[str] = []
    runs = 0
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("undisturbed", total=kills)
        reference = make_reference(setting, steps)
        bar.update(task, description="kills")
        while len(found) < kills:
            runs += 1
            more, faults = one_run(setting, runs, kills - len(found), reference, lambda: bar.advance(task))
            found += more
            end_faults += faults
    return found, end_faults, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=80, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the runs")
    parser.add_argument("--warm", action="store_true", help="fork the lives from a process that has imported torch")
    parser.add_argument("--json", type=Path, help="write every kill and its verdict here")
    args = parser.parse_args()
    if args.kills < 1 or args.steps < 4:
        raise SystemExit(f"--kills is {args.kills} and --steps {args.steps}; expected at least 1 and 4")
    with tempfile.TemporaryDirectory(prefix="kill_resume-") as folder:
        kills, end_faults, runs = measure(
            args.kills, args.steps, args.seed, args.threads, warm=args.warm, folder=Path(folder)
        )
    same, hits = sum(kill.same for kill in kills), sum(kill.while_writing for kill in kills)
    for number, kill in enumerate(kills, start=1):
        for fault in kill.faults:
            print(f"after kill {number} (run {kill.run}, {kill.kind}): {fault}")
    for fault in end_faults:
        print(fault)
    if args.json:
        summary = {"kills": len(kills), "same": same, "while_writing": hits, "runs": runs, "warm": args.warm}
        args.json.write_text(json.dumps({**summary, "rows": [asdict(kill) for kill in kills]}, indent=1) + "\n")
    print(f"{hits} of {len(kills)} kills hit while a checkpoint was being written or dropped; {runs} runs")
    print(f"{same} of {len(kills)} resumed bit for bit")
    sys.exit(0 if same == len(kills) and not end_faults else 1)


if __name__ == "__main__":
    main()
