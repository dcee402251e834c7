"""How much memory training takes on each of N devices, computed from the configuration; nothing is allocated.

What is counted is what `encore.train` does when it is started by torchrun (one process too): float32 weights and AdamW
moments sharded over all devices (FSDP2, arXiv 2304.11277), each layer a unit, the embeddings and norms outside of
layers in the root unit, products in bfloat16, the chunked loss of `objectives/sweep.py`. P parameters, E of them in the
root unit, U in the largest layer, in bytes per device:

    sharded         4P/N weights + 8P/N moments + 4P/N gradients
    root            2E + 2E        its bfloat16 copy from the first layer to the last gradient, and its gradient
    layers          2 x 2U         the layer at work and the next one, gathered
    at the loss     the gradient of the head in float32, and in bfloat16; or the logits of a chunk beside the first
    at a layer      what its backward holds beside what the forward kept, and 4U to sum its gradients over devices
    at the end      4E to sum the root's gradients; no activations any more

    peak = sharded + root + max(kept + max(loss, layers + layer at work), end)

Activations and the loss are not estimated by a formula: the model's own forward and backward run on tensors without
memory (torch's meta device) with at most two layers of each kind, and what autograd keeps, and what is alive at any
moment, is counted; a second layer of a kind stands for all further ones. With activation checkpointing the forward
keeps the layers' inputs, and the layer at work makes the rest anew. Attention is that of `kernels/attention.py`, in
blocks of rows; a fused kernel keeps less.

Left out: the libraries' own memory and what the allocator loses (some GB on a GPU), tensor parallelism, the vision
tower, a teacher.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from encore.config import GemmaConfig, LayerType, ModelConfig, StackConfig
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.objectives.sweep import default_chunk_tokens, swept_loss

GIGABYTE = 1_000_000_000


@dataclass(frozen=True)
class Activations:
    """Bytes of one row, beside weights: `kept` by the forward, and what the `layer` at work adds in the backward."""

    kept: int
    layer: int


@dataclass(frozen=True)
class DevicePlan:
    """Bytes on one of `devices` for `rows` rows of source and target at once."""

    devices: int
    rows: int
    checkpointing: bool
    weights: int
    moments: int
    gradients: int
    root: int
    activations: int
    at_work: int
    """The greatest of what the loss, a layer and the end need on top."""

    @property
    def sharded(self) -> int:
        return self.weights + self.moments + self.gradients

    @property
    def peak(self) -> int:
        return self.sharded + self.root + self.activations + self.at_work

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "sharded": self.sharded, "peak": self.peak}


@dataclass(frozen=True)
class Planner:
    """A model's sizes and traced activations, from which a plan for any number of devices is arithmetic."""

    parameters: int
    root: int
    largest_layer: int
    loss: int
    """Bytes that the loss and its backward need beside the head's bfloat16 gradient."""
    traced: Mapping[bool, Activations]
    """By whether activations are checkpointed."""

    def plan(self, devices: int, rows: int = 1, *, checkpointing: bool = False) -> DevicePlan:
        """Raises ValueError for numbers below 1."""
        if devices < 1 or rows < 1:
            raise ValueError(f"devices is {devices} and rows {rows}; expected at least 1")
        share = -(-self.parameters // devices)
        activations = self.traced[checkpointing]
        layer = 4 * self.largest_layer + 4 * self.largest_layer + rows * activations.layer
        kept = rows * activations.kept
        return DevicePlan(
            devices=devices,
            rows=rows,
            checkpointing=checkpointing,
            weights=4 * share,
            moments=8 * share,
            gradients=4 * share,
            root=4 * self.root,
            activations=kept,
            at_work=max(self.loss, layer, 4 * self.root - kept),
        )

    def rows_that_fit(self, devices: int, memory_bytes: int, *, checkpointing: bool) -> int:
        """The most rows on one device; 0 if not one fits."""
        low, high = 0, 1
        while high < 1 << 20 and self.plan(devices, high, checkpointing=checkpointing).peak <= memory_bytes:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.plan(devices, middle, checkpointing=checkpointing).peak <= memory_bytes:
                low = middle
            else:
                high = middle
        return low


def make_planner(config: ModelConfig, source_tokens: int, target_tokens: int) -> Planner:
    """Sizes from the shapes, activations from a trace; takes seconds.

    A decoder-only model reads source and target as one row. Raises ValueError for lengths below 1.
    """
    if source_tokens < 1 or target_tokens < 1:
        raise ValueError(f"rows of {source_tokens}/{target_tokens} tokens; expected at least 1 on each side")
    model = _on_meta(config, torch.float32)
    layers, root = units(model)
    tokens = target_tokens if isinstance(model, T5Gemma) else source_tokens + target_tokens
    loss = loss_peak(model.head_weight.shape, tokens, config.final_logit_softcapping, device="cuda")
    return Planner(
        parameters=sum(p.numel() for p in model.parameters()),
        root=root,
        largest_layer=max(layers, default=0),
        loss=loss - 2 * model.head_weight.numel(),
        traced=trace(config, source_tokens, target_tokens),
    )


def units(model: nn.Module) -> tuple[list[int], int]:
    """Parameters of each layer, and of the root unit: all others, and those that several layers share."""
    names: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        before, found, after = name.partition("layers.")
        names.setdefault(parameter, set()).add(f"{before}{found}{after.partition('.')[0]}" if found else "")
    sizes: Counter[str] = Counter()
    for parameter, users in names.items():
        sizes["" if len(users) > 1 else next(iter(users))] += parameter.numel()
    root = sizes.pop("", 0)
    return list(sizes.values()), root


def loss_peak(head: Sequence[int], tokens: int, softcap: float | None, *, device: str) -> int:
    """Bytes of the loss of so many states and its backward in bfloat16, without the states and the head (V, D)."""
    vocab_size, width = head
    with FakeTensorMode():
        states, weight = (torch.empty(n, width, dtype=torch.bfloat16, requires_grad=True) for n in (tokens, vocab_size))
        chunk = default_chunk_tokens(vocab_size, torch.device(device))
        with LiveBytes((states, weight)) as live:
            loss = swept_loss(states, weight, torch.empty(tokens), softcap, lambda here, y, wanted: y[:, 0], chunk)
            loss.backward(torch.tensor(1.0))
    return live.peak


def trace(
    config: ModelConfig, source_tokens: int, target_tokens: int, dtype: torch.dtype = torch.bfloat16
) -> dict[bool, Activations]:
    """Activations of one row by whether they are checkpointed; `dtype`: of weights and activations."""
    tracer = _Tracer(_shortened(config), dtype)
    tracer.run(source_tokens, target_tokens)
    stacks = _stacks(config)
    shared = tracer.kept["rest"]
    layers: list[tuple[int, int, int]] = []  # in the forward's order: kept, input, beside them at work
    for side, stack in stacks.items():
        short = _short_types(stack.layer_types)
        first = {kind: f"{side}.{short.index(kind)}" for kind in short}
        last = {kind: f"{side}.{len(short) - 1 - short[::-1].index(kind)}" for kind in short}
        shared += sum(tracer.kept[first[kind]] - tracer.kept[last[kind]] for kind in first)
        tokens = source_tokens if side == "encoder" else target_tokens
        tokens += source_tokens if len(stacks) == 1 else 0
        size = dtype.itemsize * stack.hidden_size * tokens
        layers += [(tracer.kept[last[kind]], size, tracer.working[last[kind]]) for kind in stack.layer_types]
    plain = _beside([(kept, working) for kept, _, working in layers])
    again = _beside([(size, kept + working) for kept, size, working in layers])
    return {
        False: Activations(shared + sum(kept for kept, _, _ in layers), plain),
        True: Activations(shared + sum(size for _, size, _ in layers), again),
    }


def _beside(layers: Sequence[tuple[int, int]]) -> int:
    """Given what each layer keeps and what its backward adds: the peak of the backward beside all that is kept.

    The backward begins with the last layer, and a layer that is through keeps nothing any more.
    """
    freed = highest = 0
    for kept, working in reversed(layers):
        highest = max(highest, working - freed)
        freed += kept
    return highest


def _stacks(config: ModelConfig) -> dict[str, StackConfig]:
    if isinstance(config, GemmaConfig):
        return {"decoder": config.stack}
    return {"encoder": config.encoder, "decoder": config.decoder}


def _short_types(types: Sequence[LayerType]) -> tuple[LayerType, ...]:
    """The kinds in their order, and once more: the first of a kind also makes what all of them share (masks)."""
    kinds: tuple[LayerType, ...] = tuple(dict.fromkeys(types))
    again: list[LayerType] = [kind for kind in kinds if types.count(kind) > 1]
    return (*kinds, *again)


def _shortened(config: ModelConfig) -> ModelConfig:
    def short(stack: StackConfig) -> StackConfig:
        types = _short_types(stack.layer_types)
        return dataclasses.replace(stack, layer_types=types, num_hidden_layers=len(types))

    if isinstance(config, GemmaConfig):
        return dataclasses.replace(config, stack=short(config.stack))
    return dataclasses.replace(config, encoder=short(config.encoder), decoder=short(config.decoder))


def _on_meta(config: ModelConfig, dtype: torch.dtype) -> Gemma | T5Gemma:
    with torch.device("meta"):
        model = Gemma(config) if isinstance(config, GemmaConfig) else T5Gemma(config)
    return model.to(dtype).requires_grad_(True)


class _Tracer:
    """One forward and backward: bytes kept by each layer, and what its backward needs beside them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.model = _on_meta(config, dtype)
        self.live = LiveBytes(self.model.parameters())
        self.kept: Counter[str] = Counter()
        self.working: Counter[str] = Counter()
        self._now = "rest"
        self._entered = 0
        self._seen = {id(p.untyped_storage()): p.untyped_storage() for p in self.model.parameters()}
        sides = ["decoder"] if isinstance(self.model, Gemma) else ["encoder", "decoder"]
        for side in sides:
            stack: Any = self.model if isinstance(self.model, Gemma) else getattr(self.model, side)
            for i, layer in enumerate(stack.layers):
                layer.register_forward_hook(self._after(side, i, last=i + 1 == len(stack.layers)))
        self._sides = iter(sides)
        for embedding in {m for name, m in self.model.named_modules() if name.endswith("embed_tokens")}:
            embedding.register_forward_hook(self._begin)

    def run(self, source_tokens: int, target_tokens: int) -> None:
        source, target = (torch.zeros(1, n, dtype=torch.int64, device="meta") for n in (source_tokens, target_tokens))
        with self.live, torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            if isinstance(self.model, Gemma):
                states = self.model.states(torch.cat((source, target), dim=1))
            else:
                states = self.model.states(source, target)
        with self.live:
            states.backward(torch.empty_like(states))
            self._leave()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._seen:
            self._seen[id(storage)] = storage
            self.kept[self._now] += storage.nbytes()
        return tensor

    def _begin(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """A side's tokens are embedded: what follows belongs to its first layer."""
        self._now = f"{next(self._sides)}.0"

    def _after(self, side: str, index: int, *, last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._now = "rest" if last else f"{side}.{index + 1}"
            output.register_hook(lambda gradient: self._enter(f"{side}.{index}"))

        return hook

    def _enter(self, place: str) -> None:
        self._leave()
        self._now, self._entered = place, self.live.now
        self.live.peak = self.live.now

    def _leave(self) -> None:
        if self._now != "rest":
            self.working[self._now] = self.live.peak - self._entered


class LiveBytes(TorchDispatchMode):
    """While entered, counts the bytes of all tensors made and not yet freed: `now`, and their `peak`.

    `there`: tensors that there are before, whose views are not counted either.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._there = [tensor.untyped_storage() for tensor in there]
        self._alive = {id(storage) for storage in self._there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._alive:
            return
        size = storage.nbytes()
        self._alive.add(id(storage))
        weakref.finalize(storage, self._forget, id(storage), size).atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size
