"""Checkpoints of a run over many processes: each writes what it holds, while training goes on.

    step-000100/training/shards/shard-00001-….safetensors     one file per process: slices of these tensors
                    model.NAME, optimizer.NAME.{exp_avg,exp_avg_sq,step}, random.cpu
    step-000100/training/state.json, recipe.toml              as in a checkpoint of one process (`training.py`)

torch.distributed.checkpoint does the work: it copies what each process holds, plans who writes what (a tensor that
several hold is written once), writes in a thread, and reads slices back on any number of processes, one included. Its
usual storage keeps metadata as pickle; this is its safetensors storage, which keeps them in the files' headers.

As with one process, all goes to a hidden folder, and the first process gives it its name when all have written.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from encore.checkpoint.pretrained import Model, build_on_meta, check_folder
from encore.checkpoint.training import (
    MOMENTS,
    Checkpoint,
    RunFolder,
    flush_folder,
    put_in_place,
    staging_folder,
    storage_error,
    write_state,
)
from encore.config import ModelConfig

SHARDS = "shards"


def is_sharded(checkpoint: Checkpoint) -> bool:
    return (checkpoint.folder / "training" / SHARDS).is_dir()


class _Copies(AsyncStager):
    """What is written is a copy in the host's memory, so that training may go on at once."""

    @property
    def should_synchronize_after_execute(self) -> bool:
        return False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor.to("cpu", copy=True) for name, tensor in state_dict.items()}

    def synchronize_staging(self) -> None:
        pass

    def close(self) -> None:
        pass


class Writing:
    """A sharded checkpoint on its way to disk. All processes make it, and end it, at the same point of the run."""

    def __init__(
        self,
        run: RunFolder,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        *,
        recipe: str,
        group: dist.ProcessGroup,
    ) -> None:
        """Copies what is to be written and begins to write; `group` is used by nobody else, and speaks for the CPU."""
        self.run, self.step = run, step
        self.folder = run.checkpoint_folder(step)
        self._staging = staging_folder(self.folder)
        self._state, self._recipe = {"step": step, **state}, recipe
        if dist.get_rank() == 0:
            shutil.rmtree(self._staging, ignore_errors=True)
            (self._staging / "training" / SHARDS).mkdir(parents=True)
        dist.barrier(group)
        writer = HuggingFaceStorageWriter(str(self._staging / "training" / SHARDS), save_distributed=True)
        tensors: dict[str, Any] = run_tensors(model, optimizer)
        saved = async_save(tensors, storage_writer=writer, process_group=group, async_stager=_Copies())
        self._written = cast("Future[Any]", saved)

    @property
    def written(self) -> bool:
        """Whether this process's part is on disk, or has failed."""
        return self._written.done()

    def finish(self) -> Checkpoint:
        """Wait until all is on disk, and name it. Raises OutOfSpace, or what else went wrong, on all processes."""
        try:
            self._written.result()
        except CheckpointException as error:
            if dist.get_rank() == 0:
                shutil.rmtree(self._staging, ignore_errors=True)
            raise storage_error(self.run, self.folder, RuntimeError(str(error))) from error
        if dist.get_rank() == 0:
            write_state(self._staging, self._state, self._recipe)
            flush_folder(self._staging)
            put_in_place(self._staging, self.folder)
        return Checkpoint(self.folder, self.step)


def run_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a run continues from, by name; each process's share of it."""
    tensors = {"random.cpu": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value.detach() if value.dim() else value.view(1)
    return tensors


def restore_sharded(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put weights, moments and the random generator back, on any number of processes; returns the JSON state."""
    reader = HuggingFaceStorageReader(str(checkpoint.folder / "training" / SHARDS))
    stored = reader.read_metadata().state_dict_metadata
    for name, parameter in model.named_parameters():
        if f"optimizer.{name}.step" in stored:
            optimizer.state[parameter] = _empty_moments(parameter)
    tensors = run_tensors(model, optimizer)
    _read(reader, tensors)
    torch.set_rng_state(tensors["random.cpu"])
    return checkpoint.state()


def restore_whole(checkpoint: Checkpoint, model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The same from a checkpoint that one process has written, for a model that is spread over several."""
    stored = check_folder(checkpoint.folder).tensors
    weights = {stored[name].name: parameter.detach() for name, parameter in model.named_parameters()}
    _read(HuggingFaceStorageReader(str(checkpoint.folder)), weights)
    reader = HuggingFaceStorageReader(str(checkpoint.folder / "training"))
    names = reader.read_metadata().state_dict_metadata
    tensors = {"random.cpu": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        if f"{name}.step" in names:
            optimizer.state[parameter] = _empty_moments(parameter)
            tensors |= {f"{name}.{key}": optimizer.state[parameter][key] for key in MOMENTS}
    _read(reader, tensors)
    torch.set_rng_state(tensors["random.cpu"])
    return checkpoint.state()


def load_sharded(checkpoint: Checkpoint, config: ModelConfig) -> Model:
    """The model of a sharded checkpoint, whole, in this process: to be saved as a public folder."""
    model = build_on_meta(config)
    model.to_empty(device="cpu")
    reader = HuggingFaceStorageReader(str(checkpoint.folder / "training" / SHARDS))
    _read(reader, {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()})
    return model


def _empty_moments(parameter: Tensor) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def _read(reader: HuggingFaceStorageReader, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors in place; each process opens the files and reads its slices, asking no other one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            load(dict(tensors), storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise ValueError(f"{Path(reader.path)} cannot be read: {error}; remove this checkpoint") from error
