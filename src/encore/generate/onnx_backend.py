"""Exported folders with onnxruntime and numpy alone: encode, then one step at a time with caches in place. No torch.

    model = OnnxModel.load("exported")
    memory = model.encode([[2, 17, 4, 1]])               # sources of ids -> OnnxMemory
    cache = model.make_cache(memory, max_target_tokens=64)
    logits = model.step([2], cache)                      # (B, V): after <bos>; the cache now holds it

A cache is bound to the step graph once (IO binding): the graph reads and writes it where it lies, and a step is one
call. Rows may differ in source length and in target length. How its slots are used is told in `export/step.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from encore.checkpoint.config_json import read_config_file
from encore.checkpoint.hub import resolve
from encore.config import LayerType, T5GemmaConfig
from encore.export import ExportError
from encore.export.manifest import Manifest, check_folder
from encore.generate.onnx_inputs import HIDDEN, encoder_feeds, rotation
from encore.generate.request import Event, Generation, Request
from encore.generate.rows import make_requests, run_rows
from encore.generate.sampling import Logits, SamplingSettings

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from encore.generate.padding import PicturesOfRows
    from encore.tokenizer import Tokenizer

MEMORY_SLICE = 1024
"""Source positions whose keys and values are computed at a time, so that they are never held twice."""

_NAMES: dict[LayerType, str] = {"sliding_attention": "local", "full_attention": "global"}


@dataclass(frozen=True)
class OnnxMemory:
    """The encoder's states (B, S, D), float32, and how many of each row are real."""

    states: NDArray[np.float32]
    lengths: NDArray[np.int64]

    def index_select(self, rows: Sequence[int]) -> OnnxMemory:
        """These rows of the batch, in this order."""
        return OnnxMemory(self.states[list(rows)], self.lengths[list(rows)])


class OnnxModel:
    """An exported encoder-decoder, or its encoder alone."""

    def __init__(self, manifest: Manifest, config: T5GemmaConfig, sessions: dict[str, InferenceSession]) -> None:
        self.manifest, self.config, self._sessions = manifest, config, sessions

    @classmethod
    def load(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        threads: int | None = None,
        part: Literal["all", "encoder"] = "all",
    ) -> OnnxModel:
        """Open a folder that `encore export` wrote; `threads` None = one per core. Raises ExportError."""
        folder = resolve(name_or_folder)
        manifest = check_folder(folder)
        config = read_config_file(folder)
        if not isinstance(config, T5GemmaConfig):
            raise ExportError(f"{folder}/config.json describes a {config.model_type}, which has no encoder")
        wanted = ("encoder",) if part == "encoder" else ("encoder", "memory", "step")
        paths = {name: manifest.graph(name) for name in wanted}
        return cls(manifest, config, {name: _session(path, threads) for name, path in paths.items()})

    def encode(self, sources: Sequence[Sequence[int]]) -> OnnxMemory:
        """Sources of ids (padded to a batch here) to a memory."""
        if not sources:
            raise ValueError("there are no sources to encode; give at least one row of ids")
        feeds = encoder_feeds(self.config, sources)
        (states,) = self._sessions["encoder"].run(["states"], feeds)
        lengths = np.array([len(source) for source in sources], np.int64)
        return OnnxMemory(np.asarray(states)[:, : max(1, int(lengths.max()))], lengths)

    def make_cache(self, memory: OnnxMemory, max_target_tokens: int) -> OnnxCache:
        """Keys and values of the memory, computed once, and room for `max_target_tokens` tokens."""
        if "step" not in self._sessions:
            raise ExportError(f"{self.manifest.folder} was opened, or exported, as an encoder alone; it cannot decode")
        if max_target_tokens < 1:
            raise ValueError(f"max_target_tokens is {max_target_tokens}; expected at least 1")
        cache = OnnxCache(self.config, self._sessions["step"], memory.lengths, max_target_tokens)
        for start in range(0, int(memory.lengths.max()), MEMORY_SLICE):
            part = np.ascontiguousarray(memory.states[:, start : start + MEMORY_SLICE])
            cache.put_memory(start, self._sessions["memory"].run(None, {"states": part}))
        return cache

    def step(self, tokens: Sequence[int], cache: OnnxCache) -> NDArray[np.float32]:
        """Logits (B, V) after one more token of each row, which the cache now holds.

        The array is overwritten by the next step.
        """
        return cache.advance(tokens)


class OnnxCache:
    """Keys and values of memory and target of a batch, bound to the step graph. Made by `OnnxModel.make_cache`.

    `keys_values[kind]` is (layers of the kind, 2, B, K, slots, E). `lengths` counts target tokens, row by row.
    """

    def __init__(
        self, config: T5GemmaConfig, session: InferenceSession, memory_lengths: NDArray[np.int64], max_tokens: int
    ) -> None:
        stack = config.decoder
        self.config, self.session, self.max_tokens = config, session, max_tokens
        self.merged = config.model_type == "t5gemma2"
        self.memory_lengths = memory_lengths.copy()
        self.lengths = np.zeros_like(memory_lengths)
        batch_size, source = len(memory_lengths), int(memory_lengths.max())
        self.window = stack.sliding_window
        in_front = source if self.merged else 0
        room = {"sliding_attention": min(self.window, max_tokens), "full_attention": max_tokens}
        heads = (batch_size, stack.num_key_value_heads)
        self.layers: dict[LayerType, list[int]] = {
            kind: [i for i, other in enumerate(stack.layer_types) if other == kind]
            for kind in dict.fromkeys(stack.layer_types)
        }
        self.keys_values: dict[LayerType, NDArray[np.float32]] = {
            kind: np.zeros((len(layers), 2, *heads, in_front + room[kind], stack.head_dim), np.float32)
            for kind, layers in self.layers.items()
        }
        self.memory: NDArray[np.float32] | None = None
        if not self.merged:
            shape = (stack.num_hidden_layers, 2, *heads, max(1, source), stack.head_dim)
            self.memory = np.zeros(shape, np.float32)
        # The operator wants a row per slot, memory included, but reads only those of target positions.
        self._rotations: dict[LayerType, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        for kind in self.layers:
            cos, sin = np.zeros((2, in_front + max_tokens, stack.head_dim // 2), np.float32)
            cos[:max_tokens], sin[:max_tokens] = rotation(stack.rope(kind), stack.head_dim, max_tokens)
            self._rotations[kind] = cos, sin
        self._bind()

    @property
    def in_front(self) -> NDArray[np.int64]:
        """The slots of each row that the memory takes."""
        return self.memory_lengths if self.merged else np.zeros_like(self.memory_lengths)

    def put_memory(self, start: int, computed: Sequence[Any]) -> None:
        """Take over what memory.onnx made of the positions from `start`: keys, values, keys, values, …"""
        for row, length in enumerate(self.memory_lengths):
            stop = min(int(length), start + computed[0].shape[2])
            if stop <= start:
                continue
            for kind, layers in self.layers.items():
                for place, layer in enumerate(layers):
                    target = self.keys_values[kind][place] if self.memory is None else self.memory[layer]
                    for part in (0, 1):
                        target[part, row, :, start:stop] = computed[2 * layer + part][row, :, : stop - start]

    def advance(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        if len(tokens) != len(self.lengths):
            raise ValueError(f"{len(tokens)} tokens for {len(self.lengths)} rows; give one for each")
        if int(self.lengths.max()) >= self.max_tokens:
            raise ValueError(
                f"the cache holds {self.max_tokens} target tokens and is full: make it with a larger max_target_tokens"
            )
        vocab_size = self.config.decoder.vocab_size
        self._tokens[:, 0] = tokens
        if int(self._tokens.min()) < 0 or int(self._tokens.max()) >= vocab_size:
            raise ValueError(f"target tokens are {list(tokens)}; the vocabulary has ids 0 to {vocab_size - 1}")
        self._positions[:, 0] = self.lengths
        for kind, seen in self._seen.items():
            before = self.lengths
            if kind == "sliding_attention":
                self._leave_window()
                before = np.minimum(before, self.window - 1)
            seen[:] = self.in_front + before
            self._total[kind][...] = seen.max() + 1
        self.session.run_with_iobinding(self._binding)
        self.lengths += 1
        return self._logits[:, 0]

    def _leave_window(self) -> None:
        """Move the newest token over the oldest, in rows whose window is full: the graph writes the last slot."""
        if self.window == 1:
            return
        buffer, in_front = self.keys_values["sliding_attention"], self.in_front
        for row in np.flatnonzero(self.lengths >= self.window):
            first = int(in_front[row])
            oldest = first + int(self.lengths[row] - self.window) % (self.window - 1)
            buffer[:, :, row, :, oldest] = buffer[:, :, row, :, first + self.window - 1]

    def index_select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, in this order (rows may repeat)."""
        chosen = list(rows)
        self.memory_lengths, self.lengths = self.memory_lengths[chosen], self.lengths[chosen]
        for kind in self.layers:
            self.keys_values[kind] = np.ascontiguousarray(self.keys_values[kind][:, :, chosen])
        if self.memory is not None:
            self.memory = np.ascontiguousarray(self.memory[:, :, chosen])
        self._bind()

    def _bind(self) -> None:
        """Tell the graph where everything lies, for all steps to come."""
        batch_size = len(self.lengths)
        self._binding = self.session.io_binding()
        self._tokens = np.zeros((batch_size, 1), np.int64)
        self._positions = np.zeros((batch_size, 1), np.int64)
        self._logits = np.zeros((batch_size, 1, self.config.decoder.vocab_size), np.float32)
        self._seen = {kind: np.zeros(batch_size, np.int32) for kind in self.layers}
        self._total = {kind: np.zeros((), np.int32) for kind in self.layers}
        self._bind_input("tokens", self._tokens)
        self._bind_input("positions", self._positions)
        self._bind_output("logits", self._logits)
        for kind, layers in self.layers.items():
            name = _NAMES[kind]
            self._bind_input(f"seen_{name}", self._seen[kind])
            self._bind_input(f"total_{name}", self._total[kind])
            self._bind_input(f"cos_{name}", self._rotations[kind][0])
            self._bind_input(f"sin_{name}", self._rotations[kind][1])
            for place, layer in enumerate(layers):
                for part, array in zip(("keys", "values"), self.keys_values[kind][place], strict=True):
                    self._bind_input(f"past_{part}_{layer}", array)
                    self._bind_output(f"new_{part}_{layer}", array)
        if self.memory is not None:
            places = np.arange(self.memory.shape[4])
            hidden = np.where(places < self.memory_lengths[:, None], np.float32(0), HIDDEN)
            self._hidden = hidden[:, None, None, :]
            self._bind_input("hidden", self._hidden)
            for layer, (keys, values) in enumerate(self.memory):
                self._bind_input(f"memory_keys_{layer}", keys)
                self._bind_input(f"memory_values_{layer}", values)

    def _bind_input(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class OnnxSteps:
    """`rows.Steps` over an exported model."""

    def __init__(self, model: OnnxModel, sources: Sequence[Sequence[int]], max_target_tokens: int) -> None:
        self.model = model
        self.cache = model.make_cache(model.encode(sources), max_target_tokens)

    def first(self) -> list[Logits]:
        return self.next([self.model.config.bos_token_id] * len(self.cache.lengths))

    def next(self, tokens: Sequence[int]) -> list[Logits]:
        return list(self.model.step(tokens, self.cache))

    def keep(self, rows: Sequence[int]) -> None:
        self.cache.index_select(rows)


def generate(
    model: OnnxModel,
    sources: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    pictures: PicturesOfRows = None,
) -> list[Generation]:
    """As `decoding.generate`, with an exported model."""
    _refuse(pictures)
    requests = make_requests(model, sources, settings, tokenizer)
    for _ in _run(model, sources, requests):
        pass
    return [request.result() for request in requests]


def stream(
    model: OnnxModel,
    sources: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    pictures: PicturesOfRows = None,
) -> Iterator[Event]:
    """As `decoding.stream`, with an exported model."""
    _refuse(pictures)
    return _run(model, sources, make_requests(model, sources, settings, tokenizer))


def _run(model: OnnxModel, sources: Sequence[Sequence[int]], requests: Sequence[Request]) -> Iterator[Event]:
    return run_rows(lambda length: OnnxSteps(model, sources, length), requests, model.config.pad_token_id)


def encoder_states(
    model: OnnxModel, sources: Sequence[Sequence[int]], pictures: PicturesOfRows = None
) -> list[NDArray[np.float32]]:
    """The states (S, D) of each source, without padding."""
    _refuse(pictures)
    states = model.encode(sources).states
    return [states[row, : len(source)] for row, source in enumerate(sources)]


def log_probabilities(
    model: OnnxModel, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> list[list[float]]:
    """log p of each target's ids after its source's, step by step; rows that have ended run on as padding."""
    longest = max(len(target) for target in targets)
    cache = model.make_cache(model.encode(sources), longest)
    found: list[list[float]] = [[] for _ in targets]
    following = [model.config.bos_token_id] * len(targets)
    for place in range(longest):
        logits = model.step(following, cache)
        for row, target in enumerate(targets):
            following[row] = target[place] if place < len(target) else model.config.pad_token_id
            if place < len(target):
                values = logits[row].astype(np.float64)
                top = values.max()
                found[row].append(float(values[target[place]] - top - np.log(np.exp(values - top).sum())))
    return found


def _refuse(pictures: PicturesOfRows) -> None:
    if any(pixels is not None for pixels in pictures or ()):
        raise ExportError("exported models read text only; give pictures to the checkpoint it was made from")


def _session(path: Path, threads: int | None) -> InferenceSession:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ExportError("exported folders need onnxruntime; install it with: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen classes of its own, without a common one
        raise ExportError(f"{path} cannot be opened: {error}; export the model again") from error
