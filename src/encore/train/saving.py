"""What a run leaves on disk: its checkpoints, and at the end its model. One process or many, it is asked the same way.

One process writes a public folder and goes on when it is written (`checkpoint/training.py`). Many begin to write their
shards and train on (`checkpoint/sharded.py`); when each has told the others that its part is on disk, all end it at
the same step. A run is continued from either kind, on any number of processes.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from encore.checkpoint.averaging import average
from encore.checkpoint.pretrained import load, save
from encore.checkpoint.sharded import Writing, is_sharded, load_sharded, restore_sharded, restore_whole
from encore.checkpoint.training import (
    Checkpoint,
    RunFolder,
    restore_checkpoint,
    save_checkpoint,
    staging_folder,
    write_folder,
)
from encore.tokenizer import Tokenizer
from encore.train.loss import Model
from encore.train.parallel import Processes
from encore.train.recipe import Recipe
from encore.train.recipe_file import differences, load_recipe, to_toml

MAY_CHANGE = {
    *(f"data.{key}" for key in ("cache", "cache_folder", "workers")),
    *(f"train.{key}" for key in ("threads", "device", "keep_last", "output_dtype", "tracker")),
    *(f"train.{key}" for key in ("data_parallel", "tensor_parallel", "shard", "activation_checkpointing", "compile")),
    *(f"train.{event}_every_steps" for event in ("log", "evaluate", "checkpoint")),
}
"""Keys that a resumed run may have changed: none of them touches what is learned."""


class Saver:
    """The checkpoints of one run. All processes call the same methods at the same points of the run."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        processes: Processes,
        model: Model,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
    ) -> None:
        self.folder, self.recipe, self.processes = folder, recipe, processes
        self.model, self.optimizer, self.tokenizer = model, optimizer, tokenizer
        self.origin = model.origin
        self.last: Checkpoint | None = None
        """The last one that is whole."""
        self._writing: Writing | None = None
        self._keep: set[int] = set()

    def open(self) -> Checkpoint | None:
        """What the run continues from; where there is nothing, the folder is cleared."""
        latest = self.folder.latest() if self.processes.is_first else None
        step = self.processes.told(-1 if latest is None else latest.step)
        self.last = None if step < 0 else Checkpoint(self.folder.checkpoint_folder(step), step)
        if self.processes.is_first:
            if self.last is None:
                self.folder.clear()
            self.folder.path.mkdir(parents=True, exist_ok=True)
        return self.last

    def check_continues(self, checkpoint: Checkpoint, data_fingerprint: str) -> None:
        """Raises ValueError when the folder holds a run of another recipe, or on other data."""
        before = load_recipe(checkpoint.folder / "training" / "recipe.toml")
        averaged = self.recipe.train.average_last > 1  # then what is kept when makes the model
        may_change = MAY_CHANGE - ({"train.checkpoint_every_steps"} if averaged else set())
        changed = {k: v for k, v in differences(before, self.recipe).items() if k not in may_change}
        if changed:
            listed = ", ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
            raise ValueError(
                f"{self.folder.path} holds a run of another recipe ({listed}); give another --out, "
                "or --no-resume to start anew"
            )
        if checkpoint.state()["data"] != data_fingerprint:
            raise ValueError(
                f"{self.folder.path} holds a run on other data, or with another tokenizer or teacher; give another "
                "--out, or --no-resume to start anew"
            )

    def restore(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Put weights, moments and random generators back; returns the JSON state."""
        if is_sharded(checkpoint):
            return restore_sharded(checkpoint, self.model, self.optimizer)
        if self.processes.mesh is not None:
            return restore_whole(checkpoint, self.model, self.optimizer)
        return restore_checkpoint(
            checkpoint, self.model, self.optimizer, load_model=lambda path: load(path, torch.float32).state_dict()
        )

    def save(self, step: int, state: Mapping[str, Any], keep: Collection[int]) -> None:
        """Write a checkpoint, or begin to; then all but the last few and the steps of `keep` are dropped."""
        self.finish()
        self._keep = set(keep)
        recipe = to_toml(self.recipe)
        if self.processes.saving is not None:
            group = self.processes.saving
            self._writing = Writing(self.folder, step, self.model, self.optimizer, state, recipe=recipe, group=group)
            return
        self.last = save_checkpoint(
            self.folder, step, self.model, self.optimizer, state, save_model=self._save_model, recipe=recipe
        )
        self.folder.prune(self.recipe.train.keep_last, self._keep)

    @property
    def written(self) -> bool:
        """Whether this process has nothing left to write."""
        return self._writing is None or self._writing.written

    def finish(self) -> None:
        """Wait for a checkpoint that is being written, and give it its name."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        self.last = writing.finish()
        if self.processes.is_first:
            self.folder.prune(self.recipe.train.keep_last, self._keep)

    def write_model(self) -> str:
        """RUN/model: the weights as they are, or the mean of the last checkpoints; returns what is to be said of it."""
        if self.processes.is_first:
            hint = f"the last good checkpoint is {self.last.folder if self.last else 'not written yet'}; "
            write_folder(
                self.folder.model, self._write_result, hint=f"{hint}free some space and give the same command again"
            )
        self.processes.barrier()
        steps = self.recipe.train.averaged_steps
        if len(steps) == 1:
            return ""
        return f"the model is the mean of the checkpoints of steps {', '.join(map(str, steps))}"

    def _write_result(self, folder: Path) -> None:
        dtype, steps = getattr(torch, self.recipe.train.output_dtype), self.recipe.train.averaged_steps
        if len(steps) == 1:
            self._save_model(folder, dtype)
            return
        kept = {checkpoint.step: checkpoint for checkpoint in self.folder.checkpoints()}
        if missing := [str(step) for step in steps if step not in kept]:
            raise ValueError(
                f"{self.folder.checkpoints_folder} lacks step {', '.join(missing)}, which RUN/model should be averaged "
                "from; average the others with `encore average`, or train anew with --no-resume"
            )
        whole = {step: self._public_folder(kept[step]) for step in steps}
        average(list(whole.values()), folder, dtype=dtype)
        for step, path in whole.items():
            if path != kept[step].folder:
                shutil.rmtree(path)

    def _public_folder(self, checkpoint: Checkpoint) -> Path:
        """The checkpoint itself, or what is made of its shards, in a hidden folder that goes away."""
        if not is_sharded(checkpoint):
            return checkpoint.folder
        folder = staging_folder(self.folder.path / checkpoint.folder.name)
        save(self._whole_model(checkpoint), folder, tokenizer=self.tokenizer)
        return folder

    def _whole_model(self, checkpoint: Checkpoint) -> Model:
        model = load_sharded(checkpoint, self.model.config)
        model.origin = self.origin  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        return model  # pyright: ignore[reportReturnType]

    def _save_model(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        if self.processes.mesh is not None:
            assert self.last is not None, "a run ends with a checkpoint of its last step"
            whole = self.last if is_sharded(self.last) else None
            model = self._whole_model(self.last) if whole else load(self.last.folder, torch.float32)
            save(model.to(dtype), folder, tokenizer=self.tokenizer)
            return
        model = self.model if dtype == torch.float32 else copy.deepcopy(self.model).to(dtype)
        save(model, folder, tokenizer=self.tokenizer)
