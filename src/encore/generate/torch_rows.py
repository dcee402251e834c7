"""`rows.Rows` over a model in torch, on the CPU or on CUDA.

    T5Gemma   sources ─ encode once ─▶ keys and values of the memory, copied into its rows ─▶ step(<bos>) ─▶ step …
    Gemma     prompts but their last token ─ one pass fills the rows ─▶ step(last token) ─▶ step …

The head (the largest matrix) runs over the tokens of a step only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from encore.config import ModelConfig, StackConfig, T5GemmaConfig
from encore.generate.encoding import encode_sources
from encore.generate.padding import PicturesOfRows, join_pictures, pad_rows
from encore.generate.rows import RowLogits, Size
from encore.generate.rows_cache import RowsCache, target_slots
from encore.model.encoder import Memory
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma


def cache_tokens(config: ModelConfig, size: Size) -> tuple[StackConfig, int, int | None]:
    """The stack that is cached, the tokens a row may have there, and those of its memory, if it reads one."""
    if isinstance(config, T5GemmaConfig):
        return config.decoder, size.target_tokens, max(1, size.source_tokens)
    return config.stack, max(0, size.source_tokens - 1) + size.target_tokens, None


def memory_layers(config: ModelConfig) -> tuple[bool, ...]:
    """For each cached layer whether it reads a memory."""
    if isinstance(config, T5GemmaConfig):
        return config.memory_layers
    return (False,) * config.stack.num_hidden_layers


def cache_bytes(config: ModelConfig, size: Size, element_bytes: int) -> int:
    """Of the buffers of `TorchRows`."""
    stack, tokens, memory = cache_tokens(config, size)
    slots = sum(target_slots(stack, tokens, size.new_tokens)) + (memory or 0) * sum(memory_layers(config))
    return 2 * slots * size.rows * stack.num_key_value_heads * stack.head_dim * element_bytes


class TorchRows:
    """At most `size.rows` targets at a time; see `rows.Rows`."""

    log_sums = None

    @torch.inference_mode()
    def __init__(self, model: Gemma | T5Gemma, size: Size) -> None:
        self.model, self.size = model, size
        self.device = model.head_weight.device
        stack, tokens, memory = cache_tokens(model.config, size)
        self.cache = RowsCache(
            stack,
            max_rows=size.rows,
            max_tokens=tokens,
            max_new=size.new_tokens,
            max_memory=memory,
            memory_layers=memory_layers(model.config),
            dtype=model.head_weight.dtype,
            device=self.device,
        )

    @property
    def num_rows(self) -> int:
        return self.cache.num_rows

    @property
    def num_bytes(self) -> int:
        """Of the buffers."""
        return self.cache.num_bytes

    @torch.inference_mode()
    def join(self, sources: Sequence[Sequence[int]], copies: Sequence[int], pictures: PicturesOfRows = None) -> None:
        pixels = join_pictures(pictures, len(sources))
        if isinstance(self.model, T5Gemma):
            self._encode(self.model, sources, copies, pixels)
        else:
            self._read_prompts(self.model, sources, copies, pixels)
        self.cache.see_memory()

    def _encode(
        self, model: T5Gemma, sources: Sequence[Sequence[int]], copies: Sequence[int], pixels: Tensor | None
    ) -> None:
        memory = encode_sources(model.encoder, sources, pixels)
        rows = [self.cache.add_rows(n, len(source)) for source, n in zip(sources, copies, strict=True)]
        for computed, stored in zip(model.decoder.memory_keys_values(memory), self.cache.layers, strict=True):
            if computed is None:
                continue
            for buffer, new in zip(stored.stored, computed, strict=True):  # pyright: ignore[reportAttributeAccessIssue]
                for i, (source, of_source) in enumerate(zip(sources, rows, strict=True)):
                    buffer[of_source, :, : len(source)] = new[i, :, : len(source)]

    def _read_prompts(
        self, model: Gemma, prompts: Sequence[Sequence[int]], copies: Sequence[int], pixels: Tensor | None
    ) -> None:
        if pixels is not None and any(prompt[-1] == model.config.image_token_index for prompt in prompts):
            raise ValueError("a prompt ends inside a picture; end it with text, or with the end-of-image token")
        first = self.cache.num_rows
        for _ in prompts:
            self.cache.add_rows(1)
        counts = np.array([len(prompt) - 1 for prompt in prompts])
        if counts.max() > 0:
            rows = slice(first, self.cache.num_rows)
            tokens, _ = pad_rows(
                [prompt[:-1] for prompt in prompts], model.config.pad_token_id, side="right", device=self.device
            )
            mask = self.cache.begin(rows, counts)
            model.states(tokens, mask, self.cache, pictures=pixels)
            self.cache.finish()
        if any(n != 1 for n in copies):
            repeated = [first + i for i, n in enumerate(copies) for _ in range(n)]
            self.cache.select([*range(first), *repeated])

    @torch.inference_mode()
    def step(self, tokens: Sequence[Sequence[int]], *, summed: bool = False) -> list[RowLogits]:
        counts = np.array([len(new) for new in tokens])
        longest = int(counts.max())
        ids = torch.tensor([[*new, *[0] * (longest - len(new))] for new in tokens], device=self.device)
        mask = self.cache.begin(slice(0, len(tokens)), counts)
        if isinstance(self.model, T5Gemma):
            memory = self._memory_shape(len(tokens))
            logits = self.model.decode(ids, memory, self.cache, decoder_mask=mask)
        else:
            logits = self.model(ids, mask, self.cache)
        self.cache.finish()
        values = logits.float().cpu().numpy()
        return [values[row, : len(new)] for row, new in enumerate(tokens)]

    def _memory_shape(self, num_rows: int) -> Memory:
        """The memory's length and mask: its keys and values are in the cache, its states are not kept."""
        mask = self.cache.memory_mask
        keys = next(layer.memory for layer in self.cache.layers if layer.memory is not None)
        states = torch.zeros((), dtype=self.cache.dtype, device=self.device).expand(num_rows, keys[0].shape[2], 1)
        return Memory(states, mask)

    def rollback(self, counts: Sequence[int]) -> None:
        self.cache.lengths[: self.num_rows] -= np.asarray(counts)

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        self.cache.select(rows)
