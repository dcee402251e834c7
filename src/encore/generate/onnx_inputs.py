"""What the exported encoder is fed with beside the ids: rotations, and blocks of queries. numpy only.

The sources of a batch lie one after the other, so none is padded. A local layer goes through each in blocks of queries,
with the keys that these reach, so that it computes O(S x window) scores; a global one in larger blocks, or in smaller
ones where the graph holds all the scores that it computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encore.config import Rope, T5GemmaConfig

HIDDEN = np.float32(-1e30)
"""As in `export/graph.py`: what hides a key from a softmax without making a NaN."""

MAX_SCORES = 1 << 23
"""Scores that are held at a time: 32 MiB."""

MIN_BLOCK, MAX_BLOCK = 32, 128
"""Queries per block of a local layer: about a quarter of what a query sees, within these bounds. Smaller ones compute
fewer scores outside the window, larger ones pay less for reading the keys; 64 to 128 were equally fast at 512."""

GLOBAL_BLOCK = 2048
"""Queries per block of a global layer: enough to make little of slicing the keys for each."""

TOKEN_BLOCK = 512
"""Tokens that go through a feed-forward part at a time: what lies between its products stays in the cache."""

Feeds = dict[str, NDArray[Any]]
Block = tuple[int, int, int, int]


def rotation(rope: Rope, head_dim: int, num_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines (positions, head_dim / 2) of position / factor * theta^(-2i / head_dim)."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1) / np.float32(rope.theta) ** exponent / np.float32(rope.factor)
    angle = np.arange(num_positions, dtype=np.float32)[:, None] * frequency
    return np.cos(angle), np.sin(angle)


def reach(config: T5GemmaConfig) -> tuple[int, int]:
    """How many keys to its left and right a query of a local encoder layer sees (see `model/masks.py`)."""
    width = config.encoder.sliding_window
    return ((width + 1) // 2 - 1, width // 2) if config.model_type == "t5gemma2" else (width, width)


def encoder_feeds(config: T5GemmaConfig, sources: Sequence[Sequence[int]]) -> Feeds:
    """All inputs of encoder.onnx for a batch of ids, which lie one after the other."""
    stack = config.encoder
    if not any(map(len, sources)):
        sources = [[config.pad_token_id]]
    lengths = [len(source) for source in sources]
    feeds: Feeds = {
        "tokens": np.concatenate([np.asarray(source, np.int64) for source in sources])[None],
    }
    starts = np.arange(0, sum(lengths), TOKEN_BLOCK)
    feeds["token_blocks"] = np.stack([starts, np.minimum(starts + TOKEN_BLOCK, sum(lengths))], axis=1)
    longest, (left, right) = max(lengths), reach(config)
    for kind in dict.fromkeys(stack.layer_types):
        name = "local" if kind == "sliding_attention" else "global"
        for part, values in zip(("cos", "sin"), rotation(stack.rope(kind), stack.head_dim, longest), strict=True):
            feeds[f"{part}_{name}"] = np.concatenate([values[:length] for length in lengths])
        before, after, block = longest, longest, GLOBAL_BLOCK
        if name == "local":
            before, after = min(left, longest), min(right, longest)
            block = int(np.clip((left + right + 1) // 4, MIN_BLOCK, MAX_BLOCK))
        if name == "local" or stack.attn_logit_softcapping is not None:
            groups, seen = stack.num_attention_heads // stack.num_key_value_heads, min(longest, before + block + after)
            block = min(block, max(MIN_BLOCK, MAX_SCORES // (groups * seen)))
        heads = [list(_blocks(lengths, block, before, after, head)) for head in range(stack.num_key_value_heads)]
        table = np.array([row for rows in heads for row in rows], np.int64)
        if name == "local":
            places, window = _windows(table, before, after)
            table, feeds["local_window"] = np.concatenate([table, places], axis=1), window
        feeds[f"{name}_blocks"] = table
    return feeds


def _blocks(lengths: Sequence[int], block: int, before: int, after: int, head: int) -> Iterator[Block]:
    """(first query and end, first key and end) of a key head's blocks: at most `block` queries, about equally many."""
    start = head * sum(lengths)
    for length in filter(None, lengths):
        count = -(-length // block)
        ends = [length * i // count for i in range(count + 1)]
        for first, end in pairwise(ends):
            yield start + first, start + end, start + max(0, first - before), start + min(length, end + after)
        start += length


def _windows(table: NDArray[np.int64], before: int, after: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What is added to the scores of a whole block (C, 1, J), and where each block's part of it begins and ends."""
    first, end, first_key, end_key = table.T
    size = int((end - first).max())
    distance = np.arange(before + size + after) - before - np.arange(size)[:, None]
    window = np.where((distance >= -before) & (distance <= after), np.float32(0), HIDDEN)
    column = first_key - first + before
    places = np.stack([np.zeros_like(first), column, end - first, column + end_key - first_key], axis=1)
    return places, window[:, None]
