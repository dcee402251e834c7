"""Layers split over processes: attention by heads, feed-forward by columns, the vocabulary by rows.

As in Megatron-LM (arXiv 1909.08053, section 3):

    q_proj, gate_proj, up_proj     rows of the matrix: each process has some heads, some of the inner width
    k_proj, v_proj                 the same; with fewer key heads than processes, whole on each, which uses one head
    o_proj, down_proj              columns of the matrix; the sum over processes is the output
    q_norm, k_norm                 whole on each, seeing its own heads only
    embed_tokens                   rows: each process has some words, looks up those, and the sum is the embedding
    the other norms                whole on each, seeing the whole width

States are whole on every process between layers. Splitting is done to a finished model: its parameters become DTensors
on a one-dimensional mesh and some modules get another `forward`; the model's own code stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.func import functional_call

from encore.model.attention import Attention
from encore.model.layers import GatedMLP, RMSNorm, ScaledEmbedding


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split `model` over the processes of a one-dimensional mesh, in place.

    Raises ValueError for heads, a feed-forward width or a vocabulary that do not divide.
    """
    plan: dict[str, ParallelStyle] = {}
    for path, module in model.named_modules():
        if isinstance(module, Attention):
            plan |= _attention_plan(path, module, mesh)
        elif isinstance(module, GatedMLP):
            _check_divides(module.gate_proj.out_features, mesh, f"the feed-forward width of {path}")
            columns = {f"{path}.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
            plan |= columns | {f"{path}.down_proj": RowwiseParallel()}
        elif isinstance(module, ScaledEmbedding):
            _check_divides(module.weight.shape[0], mesh, f"the vocabulary of {path}")
            plan[path] = _Vocabulary()
    for path, style in plan.items():  # one by one: a module that stands in two places is found under both paths
        parallelize_module(model.get_submodule(path), mesh, style, src_data_rank=None)
    _split_head(model)


def _attention_plan(path: str, attention: Attention, mesh: DeviceMesh) -> dict[str, ParallelStyle]:
    size = mesh.size()
    heads, key_heads = (p.out_features // attention.head_dim for p in (attention.q_proj, attention.k_proj))
    _check_divides(heads, mesh, f"the number of heads of {path}")
    if key_heads % size and size % key_heads:
        raise ValueError(
            f"train.tensor_parallel is {size}, but {path} has {key_heads} key heads, which are neither a multiple nor "
            "a divisor of that; choose another number"
        )
    plan: dict[str, ParallelStyle] = {"q_proj": ColwiseParallel(), "o_proj": RowwiseParallel()}
    for name in ("k_proj", "v_proj"):
        plan[name] = ColwiseParallel() if key_heads % size == 0 else _OneHead(attention.head_dim, size // key_heads)
    for name in ("q_norm", "k_norm"):
        if isinstance(getattr(attention, name), RMSNorm):
            plan[name] = _NormOfHeads()
    return {f"{path}.{name}": style for name, style in plan.items()}


def _check_divides(number: int, mesh: DeviceMesh, what: str) -> None:
    if number % mesh.size():
        raise ValueError(f"train.tensor_parallel is {mesh.size()}, but {what} is {number}, which it does not divide")


class _OneHead(ParallelStyle):
    """A projection to key heads, whole on each of several processes that share one head; each uses that head."""

    def __init__(self, head_dim: int, processes_per_head: int) -> None:
        super().__init__()
        self.head_dim, self.processes_per_head = head_dim, processes_per_head

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, device_mesh, Replicate())
        start = device_mesh.get_local_rank() // self.processes_per_head * self.head_dim

        def forward(x: Tensor) -> Tensor:
            y = F.linear(_into(x, device_mesh), _local(cast("Tensor", module.weight)))
            return y[..., start : start + self.head_dim]

        _set_forward(module, forward)
        return module


class _NormOfHeads(ParallelStyle):
    """A norm over the head width, whole on each process; its gradient is the sum over the heads of all."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, device_mesh, Replicate())
        with torch.device("meta"):
            norm = RMSNorm(cast("Tensor", module.weight).shape[0], cast("RMSNorm", module).eps)
        _set_forward(module, lambda x: functional_call(norm, {"weight": _local(cast("Tensor", module.weight))}, (x,)))
        return module


class _Vocabulary(ParallelStyle):
    """An embedding of which each process has some rows: it looks those up, zeros for others, and all is summed."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, ScaledEmbedding)
        if isinstance(module.weight, DTensor):  # shared by encoder and decoder, split already
            return module
        num_rows = module.weight.shape[0] // device_mesh.size()
        first = device_mesh.get_local_rank() * num_rows
        eoi = None if module.eoi_token_index is None else module.eoi_token_index - first
        with torch.device("meta"):
            mine = ScaledEmbedding(num_rows, module.weight.shape[1], eoi)
        _distribute(module, device_mesh, Replicate(), weight=Shard(0))

        def forward(tokens: Tensor) -> Tensor:
            here = tokens - first
            held = (here >= 0) & (here < num_rows)
            parameters = {name: _local(parameter) for name, parameter in module.named_parameters()}
            x = functional_call(mine, parameters, (here.clamp(0, num_rows - 1),))
            return _summed(torch.where(held[..., None], x, 0.0), device_mesh)

        _set_forward(module, forward)
        return module


class VocabularyRows:
    """The head weight of a split model: what a loss needs to work on this process's rows and hear of the others'.

    `rows` may be read only while the whole of it is gathered: after `model.states(…)`, before the backward has ended.
    A loss that knows nothing of split vocabularies and asks for anything else raises ValueError.
    """

    def __init__(self, weight: DTensor) -> None:
        self._weight = weight
        self.shape, self.dtype, self.device, self.ndim = weight.shape, weight.dtype, weight.device, 2

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ValueError(
            "train.tensor_parallel splits the vocabulary over processes, and this loss needs all of it; "
            "set train.tensor_parallel to 1"
        )

    @property
    def rows(self) -> Tensor:
        if self._weight.device_mesh.ndim > 1:
            raise RuntimeError("the head weight is sharded; it is whole only after model.states() in the same step")
        return self._weight.to_local()

    @property
    def first_row(self) -> int:
        mesh = self._weight.device_mesh
        return mesh.get_local_rank() * (self.shape[0] // mesh.size())

    def states(self, states: Tensor) -> Tensor:
        """The same states, whose gradient will be the sum of all processes' shares."""
        return _into(states, self._weight.device_mesh)

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        dist.all_reduce(values, dist.ReduceOp.SUM, self._weight.device_mesh.get_group())
        return values

    def greatest(self, values: Tensor) -> Tensor:
        """The maximum over processes, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, self._weight.device_mesh.get_group())
        return values


def _split_head(model: nn.Module) -> None:
    """Let `model.head_weight` be VocabularyRows, by a subclass made for this model."""
    kind = type(model)
    head_weight = cast("property", kind.head_weight)  # pyright: ignore[reportAttributeAccessIssue]
    split_weight = property(lambda self: VocabularyRows(head_weight.fget(self)))  # pyright: ignore[reportOptionalCall]
    model.__class__ = type(f"Split{kind.__name__}", (kind,), {"head_weight": split_weight})


def _distribute(module: nn.Module, mesh: DeviceMesh, usual: Placement, **placements: Placement) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        placed = distribute_tensor(parameter.data, mesh, [placements.get(name, usual)], src_data_rank=None)
        setattr(module, name, nn.Parameter(placed, requires_grad=parameter.requires_grad))


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = forward


def _local(parameter: Tensor) -> Tensor:
    """What this process holds of a DTensor; the gradients of whole ones are summed over processes."""
    assert isinstance(parameter, DTensor)
    placement = parameter.placements[-1]
    return parameter.to_local(grad_placements=[Partial() if isinstance(placement, Replicate) else placement])


def _into(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x as it is; backward: the sum of the processes' gradients."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over processes; backward: the gradient as it is."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()]).to_local()
