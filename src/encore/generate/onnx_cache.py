"""What decoding with exported graphs remembers: keys and values of memory and target, bound to the step graph.

    cache = model.make_cache(memory, max_target_tokens=64, step_tokens=5)
    logits = cache.advance([[2], [2]])                      # (B, 1, V), after one token of each row
    logits = cache.advance([[8, 4, 9], [5, 0, 0]], [3, 1])  # (B, 3, V); row 1 had one token, the rest is padding
    cache.rollback([2, 2])                                  # forgets the last two of row 0

Row b with m_b source tokens has its memory in slots 0 … m_b - 1 (T5Gemma 2; T5Gemma keeps it apart) and token i of
the target in slot m_b + i mod R, where R is the room for all tokens on global layers, window + step_tokens - 1 on local
ones: a step of `step_tokens` then overwrites only what its first token sees no more. So each of its tokens sees what it
should, and all of them may be rolled back. Rows differ in source and in target length; `extend` adds rows,
`index_select` keeps some. Buffers grow with the longest row, and no further than all rows full.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from encore.config import LayerType, T5GemmaConfig
from encore.generate.onnx_inputs import HIDDEN, rotation

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ALIGNMENT = 64

GROWTH = 64
"""Buffers grow by an eighth, to a multiple of this many slots: copying stays a small part of decoding."""

NAMES: dict[LayerType, str] = {"sliding_attention": "local", "full_attention": "global"}
_DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}


class OnnxCache:
    """Made by `OnnxModel.make_cache`. `lengths` counts the target tokens of each row, `memory_lengths` its source's.

    `buffers[name]` is (B, heads, slots, width), for every input of the step graph that begins with past_ or memory_.
    """

    def __init__(
        self,
        config: T5GemmaConfig,
        session: InferenceSession,
        memory_lengths: NDArray[np.int64],
        max_tokens: int,
        step_tokens: int = 1,
    ) -> None:
        stack = config.decoder
        self.config, self.session, self.max_tokens, self.step_tokens = config, session, max_tokens, step_tokens
        self.merged = config.model_type == "t5gemma2"
        self.memory_lengths = memory_lengths.astype(np.int64)
        self.lengths = np.zeros_like(self.memory_lengths)
        self._written = self.lengths.copy()  # the most tokens that ever lay in the slots of a row
        room = max_tokens + step_tokens  # a full row may still have padding in a step
        self.rings: dict[LayerType, int] = {
            kind: room if kind == "full_attention" else min(room, stack.sliding_window + step_tokens - 1)
            for kind in dict.fromkeys(stack.layer_types)
        }
        positions = max(room, step_tokens * stack.num_attention_heads)  # the graph turns heads as if they were tokens
        self.rotations = {kind: rotation(stack.rope(kind), stack.head_dim, positions) for kind in self.rings}
        self.buffers: dict[str, NDArray[Any]] = {}
        for value in session.get_inputs():
            if value.name.startswith(("past_", "memory_")):
                shape = (len(self.lengths), value.shape[1], 0, value.shape[3])
                self.buffers[value.name] = np.zeros(shape, _DTYPES[value.type])
        self.log_sums: NDArray[np.float32] | None = None
        """After a step that was asked for it: the logarithm of the summed exponentials of its logits, (B, T)."""
        self._slots: dict[str, int] = {}
        self._steps: dict[int, _Step] = {}
        self._tokens_left = 0
        """How many tokens a row need neither more room nor a look at how many the cache may hold."""
        self._make_room(step_tokens, 0)

    @property
    def in_front(self) -> NDArray[np.int64]:
        """The slots of each row that the memory takes."""
        return self.memory_lengths if self.merged else np.zeros_like(self.memory_lengths)

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def num_slots(self, place: str) -> int:
        return self._slots[place]

    def put_memory(self, start: int, computed: Mapping[str, NDArray[Any]]) -> None:
        """Take over what memory.onnx made of the source positions from `start`."""
        for name, array in computed.items():
            target = self.buffers["past_" + name.removeprefix("memory_") if self.merged else name]
            for row, length in enumerate(self.memory_lengths):
                stop = min(int(length), start + array.shape[2])
                if stop > start:
                    target[row, :, start:stop] = array[row, :, : stop - start]

    def advance(
        self,
        tokens: ArrayLike,
        counts: ArrayLike | None = None,
        wanted: ArrayLike | None = None,
        *,
        summed: bool = False,
    ) -> NDArray[np.float32]:
        """Logits (B, T, V) after each of T more tokens (B, T) of each row, which the cache now holds.

        `counts` (B,): how many of a row's tokens are real, the first ones; None = all. What follows them in the row is
        padding and leaves no trace. `wanted` (B, T): an id for each, whose logit a head of two passes computes in full
        even if it is none of the best. `summed` asks for `log_sums`. The array is overwritten by the next step of T
        tokens.
        """
        ids = np.asarray(tokens, np.int64)
        batch_size = len(self.lengths)
        if ids.ndim != 2 or len(ids) != batch_size or not 1 <= ids.shape[1] <= self.step_tokens:
            raise ValueError(
                f"the tokens have the shape {ids.shape}; expected ({batch_size}, T), with T from 1 to step_tokens = "
                f"{self.step_tokens}"
            )
        num_tokens, vocab_size = ids.shape[1], self.config.decoder.vocab_size
        new = num_tokens if counts is None else np.asarray(counts, np.int64)
        if not isinstance(new, int) and (new.shape != (batch_size,) or new.min() < 0 or new.max() > num_tokens):
            raise ValueError(f"counts is {counts}; expected {batch_size} numbers from 0 to {num_tokens}")
        if int(ids.view(np.uint64).max()) >= vocab_size:  # a negative one is a very large one
            raise ValueError(f"target tokens are {ids.tolist()}; the vocabulary has ids 0 to {vocab_size - 1}")
        if num_tokens > self._tokens_left:
            self._make_room(num_tokens, new)
        self._tokens_left -= num_tokens
        step = self._steps.get(num_tokens)
        if step is None:
            step = self._steps[num_tokens] = _Step(self, num_tokens)
        step.prepare(ids)
        if wanted is not None and step.wanted is not None:
            step.wanted[..., 0] = wanted
        step.summed[...] = summed
        self.session.run_with_iobinding(step.binding)
        self._written = np.maximum(self._written, self.lengths + num_tokens)
        self.lengths = self.lengths + new
        step.follows = self.lengths if num_tokens == 1 and counts is None else None
        self.log_sums = step.log_sums if summed else None
        return step.logits

    def rollback(self, lengths: ArrayLike) -> None:
        """Forget the last tokens of rows, down to these lengths: no more than `step_tokens` of those ever written."""
        wanted = np.asarray(lengths, np.int64)
        least = np.maximum(self._written - self.step_tokens, 0)  # what came later overwrote what these would see
        if wanted.shape != self.lengths.shape or (wanted < least).any() or (wanted > self.lengths).any():
            raise ValueError(
                f"rollback to lengths {wanted.tolist()}: expected, row by row, from {least.tolist()} "
                f"to {self.lengths.tolist()}"
            )
        self.lengths = wanted.copy()

    def index_select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, in this order (rows may repeat)."""
        chosen = list(rows)
        self.memory_lengths, self.lengths = self.memory_lengths[chosen], self.lengths[chosen]
        self._written = self._written[chosen]
        for place, slots in self._needed(self.step_tokens).items():
            self._slots[place] = min(self._slots[place], -(-slots // GROWTH) * GROWTH)
        self._rebuild(chosen)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` is, which has the same source: only targets are copied, in place."""
        chosen = np.asarray(rows)
        moved = [(i, int(row)) for i, row in enumerate(chosen) if i != row]
        in_front = self.in_front
        for name, buffer in self.buffers.items():
            if name.startswith("memory_"):
                continue
            ring = self.rings[self.config.decoder.layer_types[int(name.rsplit("_", 1)[1])]]
            slots = [slice(int(in_front[row]), int(in_front[row] + min(self.lengths[row], ring))) for _, row in moved]
            copies = [buffer[row, :, of_row].copy() for (_, row), of_row in zip(moved, slots, strict=True)]
            for (i, _), of_row, copy in zip(moved, slots, copies, strict=True):
                buffer[i, :, of_row] = copy
        if (self.lengths[chosen] != self.lengths).any():
            self.lengths = self.lengths[chosen]
        self._written = self._written[chosen]

    def extend(self, other: OnnxCache, rows: Sequence[int]) -> None:
        """Add these rows (they may repeat) of another cache made for the same model, max_target_tokens and step_tokens.

        Everything is copied once, into one new array: at most both caches and their sum are held.
        """
        if (other.rings, other.buffers.keys()) != (self.rings, self.buffers.keys()):
            raise ValueError(
                f"the caches hold {other.max_tokens} and {self.max_tokens} target tokens, "
                f"{other.step_tokens} and {self.step_tokens} a step; rows join only caches made alike"
            )
        chosen, first = list(rows), len(self.lengths)
        self.memory_lengths = np.concatenate([self.memory_lengths, other.memory_lengths[chosen]])
        self.lengths = np.concatenate([self.lengths, other.lengths[chosen]])
        self._written = np.concatenate([self._written, other._written[chosen]])
        for place, slots in self._needed(self.step_tokens).items():
            self._slots[place] = max(self._slots[place], self._rounded_up(place, slots))
        self._rebuild(range(first), len(chosen))
        for name, buffer in self.buffers.items():
            found = other.buffers[name]
            slots = min(found.shape[2], buffer.shape[2])
            for row, former in enumerate(chosen, first):
                buffer[row, :, :slots] = found[former, :, :slots]

    def place(self, name: str) -> str:
        """Which slots a buffer has: those of "local" or "global" layers, or of the "memory" where it lies apart."""
        layer = int(name.rsplit("_", 1)[1])
        return "memory" if name.startswith("memory_") else NAMES[self.config.decoder.layer_types[layer]]

    def _needed(self, num_tokens: int) -> dict[str, int]:
        """The slots of each place that a step of so many tokens needs."""
        in_front = self.in_front
        found = {
            NAMES[kind]: int((in_front + np.minimum(self.lengths + num_tokens, ring)).max(initial=0))
            for kind, ring in self.rings.items()
        }
        return found if self.merged else {**found, "memory": max(1, int(self.memory_lengths.max(initial=0)))}

    def _make_room(self, num_tokens: int, new: int | NDArray[np.int64]) -> None:
        """For a step of so many tokens a row, of which `new` are real; and how many more would need no room."""
        if int((self.lengths + new).max(initial=0)) > self.max_tokens:
            raise ValueError(
                f"the cache holds {self.max_tokens} target tokens and is full: make it with a larger max_target_tokens"
            )
        needed = self._needed(num_tokens)
        larger = {place: self._rounded_up(place, n) for place, n in needed.items() if n > self._slots.get(place, 0)}
        if larger:
            self._slots |= larger
            self._rebuild(range(len(self.lengths)))
        left = [self.max_tokens - num_tokens - int(self.lengths.max(initial=0))]
        growing = [place for place in needed if self._slots[place] < self._most(place)]
        left += [self._slots[place] - needed[place] for place in growing]
        self._tokens_left = num_tokens + max(0, min(left))

    def _rebuild(self, rows: Sequence[int], more: int = 0) -> None:
        """Buffers of these rows, and `more` empty ones, with as many slots as `_slots` says: views of one array.

        Of a large array the kernel makes huge pages where it can (numpy asks for them): reading it is a tenth faster.
        """
        shapes = {
            name: (len(rows) + more, buffer.shape[1], self._slots[self.place(name)], buffer.shape[3])
            for name, buffer in self.buffers.items()
        }
        sizes = [-(-math.prod(shapes[name]) * b.itemsize // ALIGNMENT) * ALIGNMENT for name, b in self.buffers.items()]
        self._steps.clear()  # they are bound to the former buffers
        self._tokens_left = 0
        whole = np.zeros(sum(sizes) + ALIGNMENT, np.uint8)
        place = -whole.ctypes.data % ALIGNMENT
        for (name, old), size in zip(self.buffers.items(), sizes, strict=True):
            shape = shapes[name]
            new = whole[place : place + math.prod(shape) * old.itemsize].view(old.dtype).reshape(shape)
            slots = min(shape[2], old.shape[2])
            for row, former in enumerate(rows):
                new[row, :, :slots] = old[former, :, :slots]
            self.buffers[name] = new
            place += size

    def _most(self, place: str) -> int:
        """The slots of a place when all rows are full."""
        if place == "memory":
            return int(self.memory_lengths.max(initial=0))
        ring = next(ring for kind, ring in self.rings.items() if NAMES[kind] == place)
        return int(self.in_front.max(initial=0)) + ring

    def _rounded_up(self, place: str, slots: int) -> int:
        if place == "memory":
            return slots
        return min(self._most(place), -(-max(slots, self._slots.get(place, 0) * 9 // 8) // GROWTH) * GROWTH)


class _Step:
    """The step graph bound to a cache, for T tokens a row: where everything lies that it reads and writes."""

    def __init__(self, cache: OnnxCache, num_tokens: int) -> None:
        self.cache: OnnxCache = weakref.proxy(cache)  # no circle: a cache that nobody needs is freed at once
        self.num_tokens = num_tokens
        stack, batch_size = cache.config.decoder, len(cache.lengths)
        groups = stack.num_attention_heads // stack.num_key_value_heads
        self.binding = cache.session.io_binding()
        self.inputs: dict[str, NDArray[Any]] = {}
        self.tokens = np.zeros((batch_size, num_tokens), np.int64)
        self.positions = np.zeros((batch_size, num_tokens), np.int64)
        self.logits = np.zeros((batch_size, num_tokens, stack.vocab_size), np.float32)
        self.slots: dict[LayerType, list[NDArray[np.int64]]] = {kind: [] for kind in cache.rings}
        self.hidden: dict[LayerType, NDArray[np.float32]] = {}
        self.follows: NDArray[np.int64] | None = None
        """The lengths for which `hidden` needs only the change that one token makes."""
        self._input("tokens", self.tokens)
        self._input("positions", self.positions)
        self.wanted: NDArray[np.int64] | None = None
        shapes = {value.name: value.shape for value in cache.session.get_inputs()}
        if "wanted" in shapes:
            self.wanted = np.zeros((batch_size, num_tokens, 1), np.int64)
            self._input("wanted", self.wanted)
        self._output("logits", self.logits)
        if any(value.name == "first_logits" for value in cache.session.get_outputs()):
            self._output("first_logits", self.logits)  # the last pass changes a few of them in place
        self.log_sums = np.zeros((batch_size, num_tokens), np.float32)
        self._output("log_sums", self.log_sums)
        self.summed = np.zeros((), np.bool_)
        if "summed" in shapes:  # graphs of earlier versions always sum
            self._input("summed", self.summed)
        queries = 1 if num_tokens == 1 else num_tokens * groups
        for kind in cache.rings:
            name = NAMES[kind]
            for slots_name in {f"slots_{name}", f"value_slots_{name}"} & shapes.keys():
                heads = shapes[slots_name][1]
                slots = np.zeros((batch_size, heads, num_tokens, 3), np.int64)
                slots[..., 0] = np.arange(batch_size)[:, None, None]
                slots[..., 1] = np.arange(heads)[:, None]
                self.slots[kind].append(slots)
                self._input(slots_name, slots)
            self.hidden[kind] = np.zeros((batch_size, 1, queries, cache.num_slots(name)), np.float32)
            self._input(f"hidden_{name}", self.hidden[kind])
            for part, table in zip(("cos", "sin"), cache.rotations[kind], strict=True):
                self._input(f"{part}_{name}", table)
        for name, buffer in cache.buffers.items():
            self._input(name, buffer)
            if name.startswith("past_"):
                self._output("new_" + name.removeprefix("past_"), buffer)
        if not cache.merged:
            self.hidden_memory = np.zeros((batch_size, 1, 1, cache.num_slots("memory")), np.float32)
            here = np.arange(self.hidden_memory.shape[3]) < cache.memory_lengths[:, None]
            self.hidden_memory[:, 0, 0] = np.where(here, np.float32(0), HIDDEN)  # the slots behind each row's source
            self._input("hidden_memory", self.hidden_memory)

    def prepare(self, ids: NDArray[np.int64]) -> None:
        """Everything but the buffers, for the tokens that come after the first `cache.lengths` of each row."""
        cache = self.cache
        self.tokens[:] = ids
        if self.follows is cache.lengths:
            self._prepare_one_more()
            return
        self.positions[:] = cache.lengths[:, None] + np.arange(self.num_tokens)
        in_front = cache.in_front[:, None]
        for kind, ring in cache.rings.items():
            slots = in_front + self.positions % ring
            for written in self.slots[kind]:
                written[..., 2] = slots[:, None]
            self._hide(self.hidden[kind], in_front, ring, self._window(kind))

    def _window(self, kind: LayerType) -> int | None:
        return self.cache.config.decoder.sliding_window if kind == "sliding_attention" else None

    def _prepare_one_more(self) -> None:
        """After a step of one token: only what one more changes, number by number, as calls of numpy cost more."""
        cache = self.cache
        fronts, lengths = cache.in_front.tolist(), cache.lengths.tolist()
        self.positions[:, 0] = cache.lengths
        for kind, ring in cache.rings.items():
            hidden, window = self.hidden[kind], self._window(kind)
            for row, (front, length) in enumerate(zip(fronts, lengths, strict=True)):
                if window is not None and length >= window:  # the token that has just left the window
                    hidden[row, 0, 0, front + (length - window) % ring] = HIDDEN
                slot = front + length % ring
                for written in self.slots[kind]:
                    written[row, :, 0, 2] = slot
                hidden[row, 0, 0, slot] = 0

    def _hide(self, hidden: NDArray[np.float32], in_front: NDArray[np.int64], ring: int, window: int | None) -> None:
        place = np.arange(hidden.shape[3]) - in_front  # (B, L)
        newest = self.positions[:, -1:]
        token = newest - (newest - place) % ring  # the newest that lies there; below 0 = none yet
        token = np.where(place < ring, token, -1)[:, None]
        query = self.positions[:, :, None]
        seen = (token >= 0) & (token <= query)
        if window is not None:
            seen &= token > query - window
        seen |= (place < 0)[:, None]  # the memory
        hidden[:, 0] = np.repeat(np.where(seen, np.float32(0), HIDDEN), hidden.shape[2] // self.num_tokens, axis=1)

    def _input(self, name: str, array: NDArray[Any]) -> None:
        self.inputs[name] = array
        self.binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _output(self, name: str, array: NDArray[Any]) -> None:
        self.binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
