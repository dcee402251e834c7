"""Checkpoints of a run: whole or absent, the last few and the best, one process at a time."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from encore.checkpoint.training import (
    OutOfSpace,
    RunBusy,
    RunFolder,
    restore_checkpoint,
    save_checkpoint,
    write_folder,
)


def trained(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def save_weights(model: nn.Module, folder: Path) -> None:
    save_file(model.state_dict(), str(folder / "weights.safetensors"))


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "weights.safetensors"))


def save(run: RunFolder, step: int, seed: int = 0) -> nn.Module:
    model, optimizer = trained(seed)
    save_checkpoint(run, step, model, optimizer, {"tokens": step}, save_model=lambda f: save_weights(model, f))
    return model


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    model, optimizer = trained(0)
    save_checkpoint(run, 7, model, optimizer, {"x": 1.1}, save_model=lambda f: save_weights(model, f), recipe="r")
    expected = torch.rand(3)
    other, other_optimizer = trained(1)
    latest = run.latest()
    assert latest is not None and latest.step == 7
    state = restore_checkpoint(latest, other, other_optimizer, load_model=load_weights)
    assert state == {"step": 7, "x": 1.1}
    assert torch.equal(torch.rand(3), expected), "the random generator does not go on where it was"
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[one][key], other_optimizer.state[two][key])
    assert (latest.folder / "training" / "recipe.toml").read_text(encoding="utf-8") == "r"


def test_a_failed_write_leaves_the_older_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_folder(folder, lambda path: (path / "a").write_text("old", encoding="utf-8") and None)

    def fail(path: Path) -> None:
        (path / "a").write_text("new", encoding="utf-8")
        raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        write_folder(folder, fail)
    assert (folder / "a").read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    write_folder(folder, lambda path: (path / "b").write_text("new", encoding="utf-8") and None)
    assert [path.name for path in folder.iterdir()] == ["b"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_names_the_last_whole_checkpoint(tmp_path: Path, error: Exception) -> None:
    run = RunFolder(tmp_path)
    save(run, 3)
    model, optimizer = trained(0)

    def fill(folder: Path) -> None:
        raise error

    with pytest.raises(OutOfSpace, match=r"no space left.*last whole checkpoint is .*step-000003; free some space"):
        save_checkpoint(run, 6, model, optimizer, {}, save_model=fill)
    assert [c.step for c in run.checkpoints()] == [3] and not list(tmp_path.rglob(".writing-*"))


def test_half_written_folders_are_no_checkpoints_and_are_removed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    save(run, 3)
    (run.checkpoints_folder / ".writing-step-000006").mkdir()
    (run.checkpoints_folder / "step-notes").mkdir()
    assert [c.step for c in run.checkpoints()] == [3]
    run.remove_leftovers()
    assert sorted(path.name for path in run.checkpoints_folder.iterdir()) == ["step-000003", "step-notes"]


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (1, 2, 3, 4, 1_000_000):
        save(run, step)
    run.prune(2, {2})
    assert [c.step for c in run.checkpoints()] == [2, 4, 1_000_000]
    run.prune(9)
    assert len(run.checkpoints()) == 3


def test_clear_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    save(run, 1)
    for path in (run.metrics, run.recipe, tmp_path / "mine.txt"):
        path.write_text("x", encoding="utf-8")
    run.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with RunFolder(tmp_path).lock(), pytest.raises(RunBusy, match="another process"), RunFolder(tmp_path).lock():
        pass
    with RunFolder(tmp_path).lock():
        pass
