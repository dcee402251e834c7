"""Many processes: which this one is, how a model is spread over them, and what they tell each other.

    torchrun --nproc-per-node 4 -m encore pretrain RECIPE --set train.tensor_parallel=2

                    tensor 0   tensor 1        the processes of a row take the same rows of a batch and split each layer
        data 0         0          1            (`tensor_parallel.py`); those of a column take different rows and shard
        data 1         2          3            the parameters, gradients and AdamW's moments (FSDP, arXiv 2304.11277)

The model's code knows nothing of this: `shard` is done to a finished model, and the loop asks `Processes` for its rows
of each batch and for sums over all. A process that was started alone is a `Processes` of one, which asks nobody.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from encore.data.batch import Batch
from encore.train.faults import Decodes, culprits, first_not_finite
from encore.train.loss import Model
from encore.train.optim import local_part, squared_norms
from encore.train.recipe import TrainRecipe
from encore.train.tensor_parallel import split

Loss = Callable[[Model, Batch], Tensor]
PATIENCE = datetime.timedelta(minutes=30)
"""How long a process waits in a step for the others before it gives up; that one has died is noticed sooner."""
LONG_PATIENCE = datetime.timedelta(days=2)
"""The same where one process works alone: it tokenises, or writes the finished model."""


class ProcessLost(Exception):
    """Another process of the run is gone, so that this one cannot go on."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. `mesh` None: it is alone."""

    device: torch.device
    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None
    saving: dist.ProcessGroup | None = None
    """For checkpoints that are written while training goes on: a group of its own, so that messages do not mix."""

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes metrics and shows progress."""
        return self.rank == 0

    @property
    def data_parallel(self) -> int:
        return 1 if self.mesh is None else self.mesh["data"].size()

    @property
    def tensor_parallel(self) -> int:
        return 1 if self.mesh is None else self.mesh["tensor"].size()

    def rows(self, batch: Batch) -> Batch:
        """What this process works on of a batch that all have."""
        return batch if self.mesh is None else batch.shard(self.mesh["data"].get_local_rank(), self.data_parallel)

    def every(self, *values: float) -> list[tuple[float, ...]]:
        """These values of each process, by rank."""
        if self.mesh is None:
            return [values]
        mine = torch.tensor(values, dtype=torch.float64)
        all_values = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(all_values, mine)
        return [tuple(entry.tolist()) for entry in all_values]

    def total_losses(self, mine: Sequence[float]) -> list[float]:
        """Of each batch the sum of what the processes made of their rows; those of one tensor group made the same."""
        return [sum(losses) for losses in zip(*self.every(*mine)[:: self.tensor_parallel], strict=True)]

    def squared_norms(self, gradients: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
        """The squared norm of each part's gradients, over all processes' shards."""
        if self.mesh is None:
            return squared_norms(gradients)
        mine = torch.tensor([self._squared_norm(part) for part in gradients.values()], dtype=torch.float64)
        dist.all_reduce(mine)
        return dict(zip(gradients, mine.tolist(), strict=True))

    def _squared_norm(self, gradients: Sequence[Tensor]) -> float:
        """This process's share: each local square, divided by how many processes hold the same shard."""
        local = torch.stack([local_part(gradient).norm() for gradient in gradients]).double()
        shares = [_number_of_shards(gradient) / self.world for gradient in gradients]
        return float((local.square() * torch.tensor(shares, dtype=torch.float64, device=local.device)).sum())

    def first_not_finite(self, model: Model) -> str | None:
        """The name of a parameter that holds, on any process, a number that is none; if there is one."""
        if self.mesh is None:
            return first_not_finite(model)
        names = [name for name, _ in model.named_parameters()]
        finite = [bool(local_part(parameter).isfinite().all()) for parameter in model.parameters()]
        (first,) = min(self.every(finite.index(False) if False in finite else len(finite)))
        return names[int(first)] if first < len(names) else None

    def culprits(self, model: Model, batch: Batch, loss: Loss, tokenizer: Decodes) -> str:
        """Where a loss that is not finite comes from; all processes look at all rows of the batch, one by one."""
        if self.mesh is not None and (weight := self.first_not_finite(model)):
            return f"the weights are not finite any more (first {weight}), so it is no single row"
        return culprits(model, batch, loss, tokenizer)

    def told(self, value: int) -> int:
        """The first process's value."""
        return int(self.every(value)[0][0])

    def barrier(self) -> None:
        """Wait for all, however long the first one takes."""
        if self.mesh is not None:
            dist.barrier(self.saving)

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The first process does this, then the others find what it has left on disk."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    @contextmanager
    def watched(self, where: Callable[[], str]) -> Iterator[None]:
        """Turn the loss of another process into ProcessLost; `where()` says how far the run has come."""
        try:
            yield
        except RuntimeError as error:
            if self.mesh is None or not _is_connection(error):
                raise
            raise ProcessLost(
                f"process {self.rank} of {self.world} lost contact with another one, which was killed or has failed "
                f"({_first_line(error)}); {where()}. Give the same command again, on as many processes or on another "
                "number"
            ) from error


def _number_of_shards(tensor: Tensor) -> int:
    """Into how many different pieces it is cut."""
    if not isinstance(tensor, DTensor):
        return 1
    cut = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in cut if not placement.is_replicate())


def _is_connection(error: RuntimeError) -> bool:
    signs = ("gloo", "connection closed", "connection reset", "broken pipe", "nccl", "timed out", "socket")
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in signs)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


@contextmanager
def open_processes(recipe: TrainRecipe) -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone.

    May be entered again while it is open: the same processes, and who opened them first closes them.

    Raises ValueError where the number of processes does not fit the recipe.
    """
    mine = not dist.is_initialized()
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world = (int(os.environ["WORLD_SIZE"]) if launched else 1) if mine else dist.get_world_size()
    data, tensor = mesh_shape(recipe, world)
    if mine and not launched:
        yield Processes(torch.device(recipe.device))
        return
    device = torch.device(recipe.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if mine:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    replicas = ("data", "shard") if recipe.shard == "none" else ("data",)
    mesh = init_device_mesh(
        device.type,
        (data, 1, tensor) if recipe.shard == "none" else (data, tensor),
        mesh_dim_names=(*replicas, "tensor"),
    )
    saving = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=LONG_PATIENCE))
    yield Processes(device, dist.get_rank(), world, mesh, saving)
    if mine:  # not after an error: the others may be gone, and closing waits for them
        dist.destroy_process_group()


def mesh_shape(recipe: TrainRecipe, world: int) -> tuple[int, int]:
    """(data, tensor): how `world` processes are laid out."""
    data, tensor = recipe.data_parallel, recipe.tensor_parallel
    if world % tensor or (data and data * tensor != world):
        wanted = f"{data} x {tensor} = {data * tensor}" if data else f"a multiple of {tensor}"
        raise ValueError(
            f"{world} {'process was' if world == 1 else 'processes were'} started, but train.data_parallel = {data} "
            f"and train.tensor_parallel = {tensor} ask for {wanted}: torchrun --nproc-per-node "
            f"{max(data, 1) * tensor} -m encore pretrain …"
        )
    return world // tensor, tensor


def shard(model: nn.Module, processes: Processes, recipe: TrainRecipe, precision: torch.dtype) -> None:
    """Spread a model over the processes, in place; for one that learns, or for a frozen teacher.

    Afterwards its parameters are DTensors, float32 as they were; `model.states(…)` and `model(…)` gather them layer by
    layer in `precision`, and `head_weight` is whole from then to the end of the backward (`reshard` gives it up
    without one). Every process must make the same calls in the same order. Alone, only what the recipe asks of the
    layers is done (activation checkpointing, compilation).
    """
    layers = layers_of(model)
    for layer in layers:
        _adapt_layer(layer, recipe, spread=processes.mesh is not None)
    if processes.mesh is None:
        model.to(processes.device)
        return
    if processes.tensor_parallel > 1:
        split(model, processes.mesh["tensor"])
    mesh = processes.mesh["data", "shard"] if recipe.shard == "none" else processes.mesh["data"]
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*units_of(layers), model):
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)  # sums: the loss is divided by the weight of all processes' tokens
        sharded.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "states")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of its stacks, each once."""
    stacks = [module for path, module in model.named_modules() if path.rpartition(".")[2] == "layers"]
    return list(dict.fromkeys(layer for stack in stacks if isinstance(stack, nn.ModuleList) for layer in stack))


def units_of(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that are gathered one by one; layers that share a parameter with another stay with the whole model."""
    users: dict[nn.Parameter, set[nn.Module]] = {}
    for layer in layers:
        for parameter in layer.parameters():
            users.setdefault(parameter, set()).add(layer)
    return [layer for layer in layers if all(len(users[parameter]) == 1 for parameter in layer.parameters())]


def synchronise_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward sums gradients over the processes, or keeps them for one that will."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def reshard(model: nn.Module) -> None:
    """Give up what the last forward gathered; needed where no backward follows."""
    if isinstance(model, FSDPModule):
        model.reshard()


def products_in(precision: torch.dtype, processes: Processes) -> AbstractContextManager[Any]:
    """Autocast for a model that is not sharded; a sharded one is gathered in its precision already."""
    if precision == torch.float32 or processes.mesh is not None:
        return nullcontext()
    return torch.autocast(processes.device.type, dtype=precision)


def _adapt_layer(layer: nn.Module, recipe: TrainRecipe, *, spread: bool) -> None:
    """Give a layer a forward that does all of its work, recomputes it in the backward, or is compiled.

    A decoder layer makes keys and values of the memory in a call of its own, before its forward. That would gather the
    layer twice, and keep them where activations should be made anew; so the call passes the memory on, and the
    forward begins with it.
    """
    forward: Any = layer.forward
    read: Any = getattr(layer, "memory_keys_values", None)
    if read is not None and (spread or recipe.activation_checkpointing):
        whole = forward

        def forward_from_memory(x: Tensor, view: Any, cache: Any, memory: Any, *rest: Any, **named: Any) -> Tensor:
            return whole(x, view, cache, read(memory) if isinstance(memory, Tensor) else memory, *rest, **named)

        forward = forward_from_memory
        layer.memory_keys_values = lambda states: states  # pyright: ignore[reportArgumentType]
    if recipe.activation_checkpointing:
        kept = forward

        def forward_again(*arguments: Any, **named: Any) -> Tensor:
            if not torch.is_grad_enabled():
                return kept(*arguments, **named)
            return checkpoint(kept, *arguments, use_reentrant=False, preserve_rng_state=False, **named)  # type: ignore

        forward = forward_again
    if recipe.compile:
        forward = torch.compile(forward, backend=recipe.compile_backend)
    layer.forward = forward
