"""Keys and values of rows that join, leave, and differ in length: what `TorchRows` decodes with.

All buffers are made at the start, for the most rows and tokens there may be, so their size is known before anything
runs. The rows in use stand at the front. Index i of a target lies in slot i mod capacity:

    global layer   capacity = max_tokens + max_new - 1: never goes round
    local layer    capacity = window + max_new - 1: a ring; what a rolled-back token overwrote had left every window

so a step may write `max_new` tokens per row and forget some of them again, by shortening the row. A row's slots say
nothing of other rows: who sees which slot is computed from the row's own length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from encore.config import StackConfig
from encore.model.cache import Cache, LayerCache
from encore.model.masks import EVERYTHING, Visibility, Window, decoder_window


def target_slots(config: StackConfig, max_tokens: int, max_new: int) -> list[int]:
    """Slots per row of every layer."""
    lefts = (decoder_window(config, kind).left for kind in config.layer_types)
    return [min(max_tokens, max_tokens if left is None else left + 1) + max_new - 1 for left in lefts]


class SlotVisibility(Visibility):
    """Which slots (B, T, S) are hidden from each new token, written out; None = none."""

    def __init__(self, hidden: Bool[Tensor, "B T S"] | None, num_keys: int, device: torch.device) -> None:
        super().__init__(EVERYTHING, num_keys=num_keys, device=device)
        self._slots = hidden

    def hidden(self, rows: slice, keys: slice) -> Tensor | None:
        return None if self._slots is None else self._slots[:, rows, keys]


class RowsLayer(LayerCache):
    """One layer's buffers (rows, K, slots, E), seen through the rows that `owner` has in work."""

    def __init__(self, owner: RowsCache, shape: tuple[int, ...], memory_shape: tuple[int, ...] | None) -> None:
        super().__init__(owner.zeros(shape), owner.zeros(shape), None)
        self.owner = owner
        self.stored = None if memory_shape is None else (owner.zeros(memory_shape), owner.zeros(memory_shape))

    @property
    def buffers(self) -> list[Tensor]:
        return [self.keys, self.values, *(self.stored or ())]

    def past(self, length: int) -> tuple[Tensor, Tensor]:
        rows, kept = self.owner.rows, min(length, self.keys.shape[2])
        return self.keys[rows, :, :kept], self.values[rows, :, :kept]

    def append(self, length: int, keys: Float[Tensor, "B K T E"], values: Float[Tensor, "B K T E"]) -> None:
        """Writes the new tokens of each row behind its last."""
        self.owner.write(self.keys, keys)
        self.owner.write(self.values, values)


class RowsCache(Cache):
    """As `Cache`, to the decoder. `lengths` and `memory_lengths` are of all rows, `num_rows` are in use.

    `rows` are those that the next pass is about; `begin` says how many tokens each of them gets in it.
    """

    def __init__(
        self,
        config: StackConfig,
        *,
        max_rows: int,
        max_tokens: int,
        max_new: int,
        max_memory: int | None,
        memory_layers: Sequence[bool],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.max_tokens, self.max_new = config, max_tokens, max_new
        self.dtype, self.device = dtype, device
        self.num_rows, self.rows = 0, slice(0, 0)
        self.lengths = np.zeros(max_rows, np.int64)
        self.memory_lengths = np.zeros(max_rows, np.int64)
        self._sources = np.full(max_rows, -1)  # rows with the same number have the same memory
        self._next_source = 0
        heads = (max_rows, config.num_key_value_heads)
        memory = None if max_memory is None else (*heads, max(1, max_memory), config.head_dim)
        self.layers: list[LayerCache] = [
            RowsLayer(self, (*heads, slots, config.head_dim), memory if reads else None)
            for slots, reads in zip(target_slots(config, max_tokens, max_new), memory_layers, strict=True)
        ]
        self.memory_mask: Bool[Tensor, "B S"] | None = None
        self._slots: dict[int, tuple[int | None, Tensor | None]] = {}

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for layer in self._rows_layers() for buffer in layer.buffers)

    def _rows_layers(self) -> list[RowsLayer]:
        return [layer for layer in self.layers if isinstance(layer, RowsLayer)]

    # --- rows come and go

    def add_rows(self, copies: int, memory_length: int = 0) -> slice:
        """New empty rows behind the others, all of the same source."""
        rows = slice(self.num_rows, self.num_rows + copies)
        if rows.stop > len(self.lengths):
            raise ValueError(f"{copies} rows do not fit: {self.num_rows} of {len(self.lengths)} are in use")
        self.lengths[rows], self.memory_lengths[rows] = 0, memory_length
        self._sources[rows] = self._next_source
        self._next_source += 1
        self.num_rows = rows.stop
        return rows

    def see_memory(self) -> None:
        """Let the layers see the memories of the rows in use, as far as the longest; call when rows have changed."""
        n = self.num_rows
        lengths = self.memory_lengths[:n]
        longest = max(1, int(lengths.max(initial=0)))
        real = None if (lengths == longest).all() else np.arange(longest) < lengths[:, None]
        self.memory_mask = None if real is None else torch.from_numpy(real).to(self.device)
        for layer in self._rows_layers():
            if layer.stored is not None:
                layer.memory = (layer.stored[0][:n, :, :longest], layer.stored[1][:n, :, :longest])

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order (they may repeat): only what changes its place, or its source, is copied."""
        chosen = np.asarray(rows, np.int64)
        moved = np.flatnonzero(chosen != np.arange(len(chosen)))
        other_source = moved[self._sources[chosen[moved]] != self._sources[moved]]
        for layer in self._rows_layers():
            for buffer in (layer.keys, layer.values):
                self._move(buffer, chosen, moved)
            for buffer in layer.stored or ():
                self._move(buffer, chosen, other_source)
        for of_rows in (self.lengths, self.memory_lengths, self._sources):
            of_rows[: len(chosen)] = of_rows[chosen]
        self.num_rows = len(chosen)
        self.see_memory()

    def _move(self, buffer: Tensor, chosen: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        if len(places):
            to, origin = (torch.from_numpy(x).to(self.device) for x in (places, chosen[places]))
            buffer.index_copy_(0, to, buffer.index_select(0, origin))

    # --- one pass

    def begin(self, rows: slice, counts: NDArray[np.int64]) -> Bool[Tensor, "B T"] | None:
        """Prepare for `counts` new tokens of these rows; gives the mask of which are real (None = all)."""
        self.rows, self._counts = rows, counts
        num_new, lengths = int(counts.max()), self.lengths[rows]
        if int((lengths + counts).max()) > self.max_tokens:
            raise ValueError(
                f"a row has {int(lengths.max())} target tokens and {num_new} do not fit: it holds {self.max_tokens}"
            )
        self.length = int(lengths.max())
        same = bool((lengths == lengths[0]).all())
        start = int(lengths[0])
        self.next_position = start if same else torch.from_numpy(lengths[:, None]).to(self.device)
        self._slots.clear()
        for slots in {layer.keys.shape[2] for layer in self.layers}:
            place = start % slots
            if same and place + num_new <= slots:
                self._slots[slots] = place, None
            else:
                indices = torch.from_numpy((lengths[:, None] + np.arange(num_new)) % slots)
                self._slots[slots] = None, indices.to(self.device)
        if (counts == num_new).all():
            return None
        return torch.from_numpy(np.arange(num_new) < counts[:, None]).to(self.device)

    def finish(self) -> None:
        self.lengths[self.rows] += self._counts

    def write(self, buffer: Tensor, new: Float[Tensor, "B K T E"]) -> None:
        num_new, slots = new.shape[2], buffer.shape[2]
        place, indices = self._slots[slots]
        if num_new > self.max_new:  # a prompt: more than a ring may hold
            for row, count in zip(range(self.rows.start, self.rows.stop), self._counts.tolist(), strict=True):
                first = max(0, count - slots)
                kept = torch.arange(first, count, device=self.device)
                buffer[row, :, kept % slots] = new[row - self.rows.start, :, first:count]
        elif place is not None:
            buffer[self.rows, :, place : place + num_new] = new
        else:
            assert indices is not None
            of_rows = torch.arange(self.rows.start, self.rows.stop, device=self.device)[:, None]
            buffer[of_rows, :, indices] = new.transpose(1, 2)

    # --- what the decoder asks of a `Cache`

    def check_room(self, num_tokens: int) -> None:
        """Done by `begin`."""

    def remember_mask(self, mask: Bool[Tensor, "B T"] | None, batch_size: int, num_tokens: int) -> None:
        """Padding is behind the tokens of its row, where the next ones overwrite it."""

    def past_visibility(self, window: Window, num_new: int, device: torch.device) -> Visibility | None:
        """What the new tokens see of the slots: a single one is written before it looks, several afterwards."""
        lengths, single = self.lengths[self.rows], num_new == 1
        newest = lengths if single else lengths - 1
        slots = min(self.max_tokens, self.max_tokens if window.left is None else window.left + 1) + self.max_new - 1
        num_keys = min(int(newest.max()) + 1, slots)
        if num_keys == 0:
            return None
        left = window.left
        same, longest = bool((newest == newest[0]).all()), int(newest.max())
        if same and longest < slots and (left is None or longest + (0 if single else num_new) <= left):
            return SlotVisibility(None, num_keys, device)  # nothing has left the window, nothing lies beyond
        if single and left is not None and slots == left + 1 and int(newest.min()) >= left:
            return SlotVisibility(None, num_keys, device)  # full rings, without slack
        age = (newest[:, None] - np.arange(num_keys)) % slots  # how long before the newest a slot was written
        hidden = (age > newest[:, None])[:, None]
        if left is not None:
            distance = age[:, None] + (0 if single else np.arange(1, num_new + 1)[:, None])
            hidden = hidden | (distance > left)
        return SlotVisibility(torch.from_numpy(hidden).to(device), num_keys, device)
