"""What may go wrong in a run, for real: each ends in one clear line and status 2, with the last good checkpoint kept.

After the cause is gone the same command goes on, and the run ends as one that nothing happened to.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import encore
from encore.checkpoint.training import OutOfSpace, RunFolder
from encore.data.batch import encoder_decoder_batch
from encore.train.distill_logits import distill_logits
from encore.train.faults import culprits, first_not_finite, full_disk_explained
from encore.train.loss import summed_loss
from encore.train.metrics import Silent
from encore.train.models import open_model
from encore.train.pretrain import pretrain
from encore.train.recipe import Recipe
from encore.train.recipe_file import to_toml
from encore.train.signals import Interrupted

Cli = Callable[..., tuple[int, str, str]]


def written(recipe: Recipe, path: Path) -> Path:
    path.write_text(to_toml(recipe), encoding="utf-8")
    return path


def checkpoint_bytes(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("checkpoints/**/*")) if p.is_file()}


def assert_alike(run: Path, whole: Path) -> None:
    """The same weights and moments to the last bit."""
    last = "checkpoints/step-000008"
    for file in ("model/model.safetensors", f"{last}/model.safetensors", f"{last}/training/optimizer.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_batch_that_gives_nan(tiny: Any, cli: Cli) -> None:
    """Stored teacher logits with a damaged token, which some step meets after the checkpoint of step 4."""
    teacher = open_model(tiny.recipe("causal").model, tiny.tokenizer, seed=9)
    encore.save(teacher, tiny.folder / "teacher", tokenizer=tiny.tokenizer)
    recipe = tiny.recipe("t5gemma2", f"distill.teacher={tiny.folder / 'teacher'}", "distill.top_k=4")
    logits = tiny.folder / "logits"
    distill_logits(recipe, logits)
    recipe = replace(recipe, distill=replace(recipe.distill, logits=str(logits)))
    file = written(recipe, tiny.folder / "nan.toml")
    pretrain(recipe, tiny.folder / "whole", progress=Silent())

    good = (logits / "log_rest.npy").read_bytes()
    rest = np.load(logits / "log_rest.npy")
    rest[-20:] = np.nan  # of the last example, in step 8
    np.save(logits / "log_rest.npy", rest)
    run = tiny.folder / "run"
    status, _, said = cli("pretrain", file, "--out", run, "--quiet")
    assert status == 2 and len(said.splitlines()) == 1
    assert re.search(
        r"training diverged in step 8: the loss of batch 1 of 1 is nan, from row \d \('.+'\) of 4, counted from 0, "
        rf".* the last good checkpoint is {re.escape(str(run))}/checkpoints/step-000004\.",
        said,
    )
    assert [c.step for c in RunFolder(run).checkpoints()] == [4] and not (run / "model").exists()
    (logits / "log_rest.npy").write_bytes(good)
    assert cli("pretrain", file, "--out", run, "--quiet")[0] == 0
    assert_alike(run, tiny.folder / "whole")


def test_rows_that_give_no_number_are_named(tiny: Any) -> None:
    """A word whose embedding is infinite, in two of the rows; then all weights."""
    tokenizer = tiny.tokenizer
    rows = [tokenizer.encode(text, eos=True) for text in ("abc def", "hi", "jja " * 40, "abc")]
    rows[1][0], rows[2][3] = 444, 444
    batch = encoder_decoder_batch([[2, 400, 1]] * 4, rows, bos_id=2, pad_id=0)
    model = open_model(tiny.recipe("t5gemma2", "model.architecture.model_type=t5gemma").model, tokenizer, seed=3)
    assert culprits(model, batch, summed_loss, tokenizer) == "no row alone gives it"

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return summed_loss(model, batch) * (torch.nan if bool((batch.decoder_target_tokens == 444).any()) else 1.0)

    said = culprits(model, batch, loss, tokenizer)
    assert said.startswith("from row 1 (") and ", 2 (" in said and "…'" in said and " of 4, counted from 0" in said
    with torch.no_grad():
        model.decoder.norm.weight[0] = torch.inf
    assert first_not_finite(model) == "decoder.norm.weight"
    assert "the weights are not finite any more (first decoder.norm.weight)" in culprits(
        model, batch, summed_loss, tokenizer
    )


def test_weights_that_are_no_numbers_are_never_saved(tiny: Any, cli: Cli) -> None:
    """One step at an absurd rate: the loss before it was finite, and so were the gradients."""
    recipe = tiny.recipe("causal", "train.checkpoint_every_steps=1", "optim.learning_rate=1e38", "optim.warmup_steps=2")
    run = tiny.folder / "run"
    status, _, said = cli("pretrain", written(recipe, tiny.folder / "fast.toml"), "--out", run, "--quiet")
    assert status == 2 and "not finite any more" in said
    for checkpoint in RunFolder(run).checkpoints():
        assert all(bool(p.isfinite().all()) for p in encore.load(checkpoint.folder).parameters())


def tmpfs() -> bool:
    """Whether a small file system of one's own can be had (no root: a user namespace)."""
    if sys.platform != "linux" or not shutil.which("unshare"):
        return False
    tried = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


# The command on a small file system, then the same command on the same one grown.
FULL_DISK = """
import os, shutil, subprocess, sys
from encore.cli import main
recipe, run, size, kept = sys.argv[1:]
os.mkdir(run)
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", run], check=True)
for last in (False, True):
    sys.argv = ["encore", "pretrain", recipe, "--out", run, "--quiet"]
    try:
        main()
    except SystemExit as ended:
        print("status", ended.code or 0, *sorted(os.listdir(f"{run}/checkpoints")), flush=True)
    subprocess.run(["mount", "-o", "remount,size=200m", run], check=True)
shutil.copytree(run, kept)
"""


@pytest.mark.skipif(not tmpfs(), reason="needs `unshare -rm` to mount a small file system")
def test_a_full_disk(tiny: Any) -> None:
    """A file system with room for a checkpoint and a half; then it grows."""
    recipe = tiny.recipe("causal", "train.threads=1")
    file = written(recipe, tiny.folder / "full.toml")
    pretrain(recipe, tiny.folder / "whole", progress=Silent())
    size = sum(len(data) for data in checkpoint_bytes(tiny.folder / "whole").values()) // 2
    run, kept = tiny.folder / "run", tiny.folder / "kept"
    arguments = [file, run, f"{size * 3 // 2048}k", kept]
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", FULL_DISK, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    first, second = re.findall(r"status (.*)", done.stdout) or (done.stderr, "")
    assert (first, second) == ("2 step-000004", "0 step-000004 step-000008")
    (line,) = done.stderr.splitlines()
    assert re.search(
        rf"no space left while writing {run}/checkpoints/step-000008; .*checkpoint is {run}/checkpoints/step-000004; "
        "free some space and give the same command again",
        line,
    )
    assert_alike(kept, tiny.folder / "whole")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_outside_of_checkpoints(tmp_path: Path) -> None:
    with (
        pytest.raises(OutOfSpace, match=r"no space left while writing .*; all is well at 4; free some space") as caught,
        full_disk_explained(tmp_path, lambda: "all is well at 4"),
        open("/dev/full", "w", encoding="utf-8", buffering=1) as file,
    ):
        file.write("{}\n")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError), full_disk_explained(tmp_path, lambda: ""):
        (tmp_path / "absent").read_bytes()


class StopAtThree(Silent):
    def step(self, row: Any) -> None:
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("damage", ["all of it", "gone"])
def test_an_unreadable_shard(tiny: Any, cli: Cli, damage: str) -> None:
    """An interrupted run whose shard cannot be read when it is to go on (and whose cache was emptied)."""
    recipe = tiny.recipe("causal")
    file = written(recipe, tiny.folder / "shard.toml")
    pretrain(recipe, tiny.folder / "whole", progress=Silent())
    run, shard = tiny.folder / "run", Path(tiny.text)
    with pytest.raises(Interrupted):
        pretrain(recipe, run, progress=StopAtThree())
    before, good = checkpoint_bytes(run), shard.read_bytes()
    shutil.rmtree(tiny.folder / "cache")
    shard.unlink()
    if damage == "all of it":
        shard.write_bytes(b"\x93\xff\x00 this is no text \xfe\n" * 50)
    status, _, said = cli("pretrain", file, "--out", run, "--quiet")
    assert status == 2 and str(shard) in said.splitlines()[-1], said
    assert sum(line.startswith("encore: error:") for line in said.splitlines()) == 1
    assert checkpoint_bytes(run) == before
    shard.write_bytes(good)
    assert cli("pretrain", file, "--out", run, "--quiet")[0] == 0
    assert_alike(run, tiny.folder / "whole")


class KillAWorker(Silent):
    """Kills a data worker of this process after step 5, as the system does when memory is short."""

    def step(self, row: Any) -> None:
        if row["step"] == 5:
            for child in psutil.Process().children():
                if "encore.data.workers" in child.cmdline():
                    child.kill()


def test_the_death_of_a_data_worker(tiny: Any) -> None:
    recipe = tiny.recipe("causal", "data.workers=1", "train.steps=8")
    pretrain(replace(recipe, data=replace(recipe.data, workers=0)), tiny.folder / "whole", progress=Silent())
    run = tiny.folder / "run"
    with pytest.raises(ValueError, match=r"a worker that prepares the data was killed by SIGKILL .*same command again"):
        pretrain(recipe, run, progress=KillAWorker())
    assert [c.step for c in RunFolder(run).checkpoints()] == [4]
    pretrain(recipe, run, progress=Silent())
    assert_alike(run, tiny.folder / "whole")
    assert not [c for c in psutil.Process().children() if "encore.data.workers" in c.cmdline()]


def test_the_death_of_a_data_worker_takes_one_line(tiny: Any, cli: Cli) -> None:
    """Through the command, killed from outside once there is a checkpoint."""
    recipe = tiny.recipe("causal", "data.workers=1", "train.steps=20000", "train.checkpoint_every_steps=3")
    run = tiny.folder / "run"

    def kill() -> None:
        deadline = time.monotonic() + 60
        while RunFolder(run).latest() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        for child in psutil.Process().children():
            if "encore.data.workers" in child.cmdline():
                child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    status, _, said = cli("pretrain", written(recipe, tiny.folder / "worker.toml"), "--out", run, "--quiet")
    killer.join()
    assert status == 2
    assert re.fullmatch(r"encore: error: a worker that prepares the data was killed by SIGKILL .*\n", said), said
    latest = RunFolder(run).latest()
    assert latest is not None and latest.state()["step"] >= 3
