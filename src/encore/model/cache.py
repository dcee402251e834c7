"""What decoding remembers: keys and values of the target so far, and of the memory, computed once.

A global layer keeps every target token in a buffer made at the start. A local layer with window W keeps the last W in a
ring: slot = index mod W. A single new token is put over the oldest before it attends, so it sees the whole ring and
needs no mask; several new ones attend to the ring as it was and to each other, and are written afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from encore.config import StackConfig
from encore.model.masks import EVERYTHING, Visibility, Window, decoder_window


class LayerCache:
    """Target keys and values (B, K, capacity, E) of one layer, and those of the memory (B, K, S, E) if it reads one."""

    def __init__(
        self, keys: Tensor, values: Tensor, memory: tuple[Float[Tensor, "B K S E"], Float[Tensor, "B K S E"]] | None
    ) -> None:
        self.keys, self.values, self.memory = keys, values, memory

    def past(self, length: int) -> tuple[Tensor, Tensor]:
        """What is kept of the first `length` tokens, in slot order."""
        kept = min(length, self.keys.shape[2])
        return self.keys[:, :, :kept], self.values[:, :, :kept]

    def append(self, length: int, keys: Float[Tensor, "B K T E"], values: Float[Tensor, "B K T E"]) -> None:
        """Writes tokens `length`, `length + 1`, … over the oldest slots."""
        capacity = self.keys.shape[2]
        kept = min(keys.shape[2], capacity)
        if kept == 0:
            return
        first = length + keys.shape[2] - kept
        start = first % capacity
        before_end = min(kept, capacity - start)
        for buffer, new in ((self.keys, keys[:, :, -kept:]), (self.values, values[:, :, -kept:])):
            buffer[:, :, start : start + before_end] = new[:, :, :before_end]
            if before_end < kept:
                buffer[:, :, : kept - before_end] = new[:, :, before_end:]


class Cache:
    """Made by `make_cache`, given to `decode` again and again. `length` counts tokens so far, padding included."""

    def __init__(
        self,
        config: StackConfig,
        *,
        batch_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        memories: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    ) -> None:
        self.config = config
        self.max_tokens = max_tokens
        self.length = 0
        self.mask: Bool[Tensor, "B max_tokens"] | None = None
        self.next_position: int | Int[Tensor, "B 1"] = 0
        self.layers: list[LayerCache] = []
        for i, kind in enumerate(config.layer_types):
            capacity = self._capacity(decoder_window(config, kind))
            shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
            keys = torch.zeros(shape, dtype=dtype, device=device)
            memory = memories[i] if memories is not None else None
            self.layers.append(LayerCache(keys, torch.zeros_like(keys), memory))

    def check_room(self, num_tokens: int) -> None:
        if self.length + num_tokens > self.max_tokens:
            raise ValueError(
                f"the cache holds {self.max_tokens} target tokens and has {self.length}; {num_tokens} more do not fit: "
                "make it with a larger max_target_tokens"
            )

    def remember_mask(self, mask: Bool[Tensor, "B T"] | None, batch_size: int, num_tokens: int) -> None:
        """Keeps which target tokens are real. Costs nothing until the first padded one."""
        if mask is None and self.mask is None:
            return
        device = self.layers[0].keys.device
        if self.mask is None:
            self.mask = torch.ones(batch_size, self.max_tokens, dtype=torch.bool, device=device)
        if mask is not None:
            self.mask[:, self.length : self.length + num_tokens] = mask

    def past_visibility(self, window: Window, num_new: int, device: torch.device) -> Visibility | None:
        """What `num_new` next tokens see of the kept ones. A single one is kept before it looks, and sees all."""
        single = num_new == 1
        length = self.length + single
        if length == 0:
            return None
        capacity = self._capacity(window)
        mask = None if self.mask is None else self.mask[:, :length]
        index = None
        if length > capacity:  # slot s holds the last index that is s modulo the capacity
            index = length - 1 - (length - 1 - torch.arange(capacity, device=device)) % capacity
            mask = None if mask is None else mask[:, index]
        return Visibility(
            EVERYTHING if single else window,
            num_keys=min(length, capacity),
            offset=self.length,
            key_mask=mask,
            key_index=None if single else index,
            device=device,
        )

    def _capacity(self, window: Window) -> int:
        return self.max_tokens if window.left is None else min(window.left + 1, self.max_tokens)

    def index_select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keeps these rows of the batch, in this order (rows may repeat), in place."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
            if layer.memory is not None:
                layer.memory = (layer.memory[0].index_select(0, rows), layer.memory[1].index_select(0, rows))
        if self.mask is not None:
            self.mask = self.mask.index_select(0, rows)
        if isinstance(self.next_position, Tensor) and self.next_position.shape[0] > 1:
            self.next_position = self.next_position.index_select(0, rows)
