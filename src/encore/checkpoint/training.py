"""A training run on disk: checkpoints that are whole or absent, and from which a run continues bit for bit.

    RUN/
      recipe.toml                      what was asked, resolved
      metrics.jsonl                    one line per logged step
      checkpoints/step-000100/         a public model folder (float32), any tool can load it
        training/optimizer.safetensors   AdamW's moments by parameter name, the state of the random generators
        training/state.json              step, losses, threads, what is needed to check that resuming is the same run
        training/recipe.toml
      model/                           the finished model

A checkpoint is written into a hidden folder beside its place, flushed to disk and renamed: a crash at any moment leaves
the older ones untouched. Only safetensors and JSON are written, no pickle. Runs over many processes have the same
places, but write weights and moments in shards (`sharded.py`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_STEP = re.compile(r"step-(\d{6,})")
_WRITING = ".writing-"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter."""


class OutOfSpace(OSError):
    """The disk is full; says what to do and which checkpoint is safe."""


class RunBusy(ValueError):
    """Another process trains in this folder."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder on disk."""

    folder: Path
    step: int

    def state(self) -> dict[str, Any]:
        """The JSON part: at least "step"."""
        return json.loads((self.folder / "training" / "state.json").read_text(encoding="utf-8"))


class RunFolder:
    """The places of a run, and the list of its checkpoints."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints_folder = self.path / "checkpoints"
        self.model = self.path / "model"

    def checkpoints(self) -> list[Checkpoint]:
        """Oldest first; half-written ones are not among them."""
        if not self.checkpoints_folder.is_dir():
            return []
        found = [(entry, _STEP.fullmatch(entry.name)) for entry in self.checkpoints_folder.iterdir()]
        return sorted((Checkpoint(entry, int(m[1])) for entry, m in found if m), key=lambda c: c.step)

    def checkpoint_folder(self, step: int) -> Path:
        return self.checkpoints_folder / f"step-{step:06d}"

    def latest(self) -> Checkpoint | None:
        every = self.checkpoints()
        return every[-1] if every else None

    def clear(self) -> None:
        """Remove what a run wrote, and nothing else."""
        for folder in (self.checkpoints_folder, self.model):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.metrics, self.recipe):
            file.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the system lets go of it however the process ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunBusy(
                    f"another process is training in {self.path}; wait for it, or give another --out"
                ) from error
            yield

    def remove_leftovers(self) -> None:
        """Half-written folders of a process that was killed. Call while holding the lock."""
        for parent in (self.path, self.checkpoints_folder):
            if parent.is_dir():
                for entry in parent.glob(f"{_WRITING}*"):
                    shutil.rmtree(entry)

    def prune(self, keep_last: int, keep_steps: Collection[int] = ()) -> None:
        """Drop all checkpoints but the last `keep_last` and those of `keep_steps`."""
        for checkpoint in self.checkpoints()[:-keep_last]:
            if checkpoint.step not in keep_steps:
                doomed = checkpoint.folder.with_name(f"{_WRITING}{checkpoint.folder.name}-old")
                checkpoint.folder.rename(doomed)  # so that a crash never leaves half a checkpoint under its name
                shutil.rmtree(doomed)


def save_checkpoint(
    run: RunFolder,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    save_model: Callable[[Path], None],
    recipe: str = "",
) -> Checkpoint:
    """Write `checkpoints/step-…`, all or nothing.

    Args:
        save_model: writes the public model folder (weights in float32, as they are trained).
        state: JSON values; "step" is added.

    Raises OutOfSpace when the disk is full.
    """
    folder = run.checkpoint_folder(step)

    def write(temporary: Path) -> None:
        save_model(temporary)
        training = temporary / "training"
        training.mkdir()
        save_file(_optimizer_tensors(model, optimizer) | _random_tensors(), str(training / "optimizer.safetensors"))
        write_state(temporary, {"step": step, **state}, recipe)

    write_folder(folder, write, hint=_hint(run))
    return Checkpoint(folder, step)


def write_state(folder: Path, state: Mapping[str, Any], recipe: str) -> None:
    """The readable part of a checkpoint, in `folder`/training."""
    (folder / "training" / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    (folder / "training" / "recipe.toml").write_text(recipe, encoding="utf-8")


def _hint(run: RunFolder) -> str:
    last = run.latest()
    safe = f"the last whole checkpoint is {last.folder}" if last else "no checkpoint was written yet"
    return f"{safe}; free some space and give the same command again"


def restore_checkpoint(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    load_model: Callable[[Path], Mapping[str, Tensor]],
) -> dict[str, Any]:
    """Put weights, moments and random generators back; returns the JSON state."""
    model.load_state_dict(load_model(checkpoint.folder))
    file = checkpoint.folder / "training" / "optimizer.safetensors"
    with safe_open(str(file), framework="pt") as tensors:
        names = set(tensors.keys())
        for name, parameter in model.named_parameters():
            if f"{name}.step" not in names:
                continue
            optimizer.state[parameter] = {
                key: tensors.get_tensor(f"{name}.{key}").to(parameter.device) for key in MOMENTS
            }
        torch.set_rng_state(tensors.get_tensor("random.cpu"))
        if "random.cuda" in names and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors.get_tensor("random.cuda"))
    return checkpoint.state()


def write_folder(folder: Path, write: Callable[[Path], None], *, hint: str = "") -> None:
    """Let `write` fill a hidden folder, flush it to disk, and rename it to `folder` (replacing an older one)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = staging_folder(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        flush_folder(temporary)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            raise _out_of_space(folder, hint) from error
        raise
    put_in_place(temporary, folder)


def staging_folder(folder: Path) -> Path:
    """Where `folder` is written before it has its name."""
    return folder.with_name(f"{_WRITING}{folder.name}")


def flush_folder(folder: Path) -> None:
    """All of it on disk."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def put_in_place(staging: Path, folder: Path) -> None:
    """Rename a finished folder to its name, replacing an older one."""
    if folder.exists():
        old = folder.with_name(f"{_WRITING}{folder.name}-old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old)
    else:
        staging.rename(folder)
    _flush(folder.parent)


def storage_error(run: RunFolder, folder: Path, error: Exception) -> Exception:
    """OutOfSpace if that is what an error of a writing process means, else the error."""
    return _out_of_space(folder, _hint(run)) if is_disk_full(error) else error


def _out_of_space(folder: Path, hint: str) -> OutOfSpace:
    return OutOfSpace(errno.ENOSPC, f"no space left while writing {folder}; {hint}")


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _random_tensors() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: Exception) -> bool:
    """Whether an error of any library says that there is no space, or no quota, left."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error) for sign in ("No space left", "os error 28", "Disk quota", "os error 122"))
