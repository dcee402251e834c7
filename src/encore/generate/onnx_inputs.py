"""What the exported encoder is fed with beside the ids: rotations, blocks of queries, who sees whom. numpy only.

A short source is one block that sees everything. A longer one is cut into blocks, so that a local layer computes
O(S x window) scores and a global one holds no more than a block's rows of them at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encore.config import Rope, StackConfig, T5GemmaConfig

HIDDEN = np.float32(-1e30)
"""As in `export/graph.py`: what hides a key from a softmax without making a NaN."""

MAX_SCORES = 1 << 23
"""Scores that a global layer of the encoder holds at a time: 32 MiB."""

MIN_BLOCK, MAX_BLOCK = 32, 512
"""Queries per block of a local layer: about half of what a query sees, within these bounds."""

Feeds = dict[str, NDArray[Any]]


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
    """All inputs of encoder.onnx for a batch of ids; rows are padded on the right to whole blocks."""
    stack = config.encoder
    lengths = np.array([len(source) for source in sources], np.int64)
    longest = max(1, int(lengths.max(initial=0)))
    left, right = reach(config)
    local_block = longest
    if "sliding_attention" in stack.layer_types and longest > 2 * (left + right + 1) and longest > 2 * MIN_BLOCK:
        local_block = int(np.clip((left + right + 1) // 2, MIN_BLOCK, MAX_BLOCK))
    num_blocks = 1
    if "full_attention" in stack.layer_types:
        rows = max(MIN_BLOCK, MAX_SCORES // (len(sources) * stack.num_attention_heads * longest))
        num_blocks = -(-longest // rows)
    unit = local_block if local_block < longest else 1  # a global block is made of whole local ones
    global_block = -(-longest // (num_blocks * unit)) * unit
    num_tokens = -(-longest // global_block) * global_block
    if unit == 1:
        local_block = num_tokens
    tokens = np.full((len(sources), num_tokens), config.pad_token_id, np.int64)
    for row, source in enumerate(sources):
        tokens[row, : len(source)] = source
    feeds: Feeds = {"tokens": tokens}
    for kind in dict.fromkeys(stack.layer_types):
        name = "local" if kind == "sliding_attention" else "global"
        feeds[f"cos_{name}"], feeds[f"sin_{name}"] = rotation(stack.rope(kind), stack.head_dim, num_tokens)
    if "full_attention" in stack.layer_types:
        real = np.arange(num_tokens) < lengths[:, None]
        feeds["hidden"] = np.where(real, np.float32(0), HIDDEN)[:, None, None, None, :]
        feeds["global_blocks"] = np.array([num_tokens // global_block], np.int64)
    if "sliding_attention" in stack.layer_types:
        feeds.update(_local_feeds(stack, lengths, num_tokens, local_block, left, right))
    return feeds


def _local_feeds(
    stack: StackConfig, lengths: NDArray[np.int64], num_tokens: int, block: int, left: int, right: int
) -> Feeds:
    if block == num_tokens:  # one block sees all
        keys, query = np.arange(num_tokens)[None], np.arange(num_tokens)
    else:
        keys = np.arange(0, num_tokens, block)[:, None] + np.arange(-left, block + right)
        query = np.arange(block)
    distance = query[:, None] - keys[0]
    window = np.where((distance <= left) & (-distance <= right), np.float32(0), HIDDEN)
    real = (keys >= 0) & (keys < lengths[:, None, None])  # (B, N, J)
    hidden = np.where(real, np.float32(0), HIDDEN).transpose(1, 0, 2)[:, :, None, None, None, :]
    return {
        "local_keys": np.clip(keys, 0, num_tokens - 1),
        "local_window": window,
        "local_hidden": np.ascontiguousarray(hidden),
    }
