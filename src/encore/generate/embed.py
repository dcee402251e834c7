"""Encoder states as vectors: one for each source (pooled), or one for each token.

The encoder alone is enough, so no decoder weights need to be read:

    model = encore.load(folder, part="encoder")
    vectors = [item.vectors for item in embed(model, sources)]      # (D,) each, or (S, D) with pooling="none"

Sources are padded to batches, but all is counted over real tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from encore.generate.padding import by_length, check_ids, pad_rows
from encore.generate.source import SourceReader
from encore.model.encoder import Encoder
from encore.model.t5gemma import T5Gemma

Pooling = Literal["mean", "first", "last", "none"]


@dataclass(frozen=True)
class Embedding:
    """`vectors` is float32: (D,) when pooled, (S, D) when not, one row for each of `tokens`."""

    tokens: list[int]
    vectors: NDArray[np.float32]


def embed(
    model: Encoder | T5Gemma,
    sources: Sequence[Sequence[int]],
    *,
    pooling: Pooling = "mean",
    normalise: bool = False,
    batch_size: int = 8,
) -> list[Embedding]:
    """Embeddings of sources of ids, in their order. All is counted over real tokens only.

    Args:
        pooling: "mean" of a source's states, its "first" or "last" state, or "none": all of them.
        normalise: give every vector the length 1.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(get_args(Pooling))}")
    encoder = model.encoder if isinstance(model, T5Gemma) else model
    if not isinstance(encoder, Encoder):
        raise ValueError(f"embedding needs an encoder; a {type(model).__name__} has none (adapt it first)")
    check_ids(sources, encoder.config.encoder.vocab_size, "source")
    for i, source in enumerate(sources):
        if not source:
            raise ValueError(f"source {i} has no tokens; an empty source has no states to pool")
    found: dict[int, Embedding] = {}
    for rows in by_length(sources, batch_size):
        batch = [list(sources[row]) for row in rows]
        for row, source, states in zip(rows, batch, _encode(encoder, batch), strict=True):
            vectors = _pool(states, pooling)
            if normalise:
                norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
                vectors = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
            found[row] = Embedding(source, vectors)
    return [found[row] for row in range(len(sources))]


def embed_texts(
    model: Encoder | T5Gemma,
    reader: SourceReader,
    texts: Iterable[str],
    *,
    pooling: Pooling = "mean",
    normalise: bool = False,
    batch_size: int = 8,
) -> Iterator[Embedding]:
    """As `embed`, for texts, while they are being read."""
    numbered = enumerate(texts, start=1)
    while chunk := list(islice(numbered, batch_size * (4 if batch_size > 1 else 1))):
        sources = [reader.read(text, number).tokens for number, text in chunk]
        yield from embed(model, sources, pooling=pooling, normalise=normalise, batch_size=batch_size)


@torch.inference_mode()
def _encode(encoder: Encoder, sources: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """The states (S, D) of each source, without padding."""
    device = encoder.embed_tokens.weight.device
    tokens, mask = pad_rows(sources, encoder.config.pad_token_id, side="right", device=device)
    states = encoder(tokens, mask).states.float().cpu().numpy()
    return [states[row, : len(source)] for row, source in enumerate(sources)]


def _pool(states: NDArray[np.float32], pooling: Pooling) -> NDArray[np.float32]:
    if pooling == "mean":
        return states.mean(axis=0)
    if pooling == "none":
        return states.copy()  # the batch around it can go
    return states[0 if pooling == "first" else -1].copy()
