"""Encoder states as vectors: one for each source (pooled), or one for each token.

The encoder alone is enough, so no decoder weights need to be read:

    model = encore.load(folder, part="encoder")
    vectors = [item.vectors for item in embed(model, sources)]      # (D,) each, or (S, D) with pooling="none"

An exported folder does too: `OnnxModel.load(folder, part="encoder")`. Sources are padded to batches, but all is counted
over real tokens. No torch here (`backends.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from encore.config import T5GemmaConfig
from encore.export.manifest import is_exported
from encore.generate.backends import backend_of
from encore.generate.onnx_backend import OnnxModel
from encore.generate.padding import PicturesOfRows, by_length
from encore.generate.rows import check_ids
from encore.generate.source import SourceReader, with_pictures

if TYPE_CHECKING:
    import torch

    from encore.images import PictureSource
    from encore.model.encoder import Encoder
    from encore.model.t5gemma import T5Gemma

Pooling = Literal["mean", "first", "last", "none"]


@dataclass(frozen=True)
class Embedding:
    """`vectors` is float32: (D,) when pooled, (S, D) when not, one row for each of `tokens`."""

    tokens: list[int]
    vectors: NDArray[np.float32]


def load(
    folder: Path,
    *,
    dtype: str | torch.dtype | None = "auto",
    device: torch.device | str = "cpu",
    vision: bool = False,
    threads: int | None = None,
) -> Encoder | OnnxModel:
    """The encoder of a checkpoint folder (torch; `vision` for pictures) or of an exported one (with `threads`)."""
    if is_exported(folder):
        if vision:
            raise ValueError(f"{folder} is exported: it reads text only; give the checkpoint folder it was made from")
        return OnnxModel.load(folder, threads=threads, part="encoder")
    from encore.checkpoint.pretrained import load
    from encore.model.encoder import Encoder

    encoder = load(folder, dtype=dtype, device=device, vision=vision, part="encoder")
    assert isinstance(encoder, Encoder)
    return encoder


def embed(
    model: Encoder | T5Gemma | OnnxModel,
    sources: Sequence[Sequence[int]],
    *,
    pooling: Pooling = "mean",
    normalise: bool = False,
    batch_size: int = 8,
    pictures: PicturesOfRows = None,
) -> list[Embedding]:
    """Embeddings of sources of ids, in their order. All is counted over real tokens only.

    Args:
        pooling: "mean" of a source's states, its "first" or "last" state, or "none": all of them.
        normalise: give every vector the length 1.
        pictures: for each source the pixels (N, 3, size, size) of its pictures, or None.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(get_args(Pooling))}")
    if not isinstance(model.config, T5GemmaConfig):
        raise ValueError(f"embedding needs an encoder; a {type(model).__name__} has none (adapt it first)")
    check_ids(sources, model.config.encoder.vocab_size, "source")
    for i, source in enumerate(sources):
        if not source:
            raise ValueError(f"source {i} has no tokens; an empty source has no states to pool")
    of_source: PicturesOfRows = [None] * len(sources) if pictures is None else pictures
    if len(of_source) != len(sources):
        raise ValueError(
            f"pictures has {len(of_source)} entries for {len(sources)} sources; give one (or None) for each"
        )
    found: dict[int, Embedding] = {}
    for rows in by_length(sources, batch_size):
        batch = [list(sources[row]) for row in rows]
        encoded = backend_of(model).encoder_states(model, batch, [of_source[row] for row in rows])
        for row, source, states in zip(rows, batch, encoded, strict=True):
            vectors = _pool(states, pooling)
            if normalise:
                norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
                vectors = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
            found[row] = Embedding(source, vectors)
    return [found[row] for row in range(len(sources))]


def embed_texts(
    model: Encoder | T5Gemma | OnnxModel,
    reader: SourceReader,
    texts: Iterable[str],
    *,
    pooling: Pooling = "mean",
    normalise: bool = False,
    batch_size: int = 8,
    pictures: Iterable[Sequence[PictureSource]] | None = None,
) -> Iterator[Embedding]:
    """As `embed`, for texts, while they are being read. `pictures` has an entry for each text (see `with_pictures`)."""
    numbered = enumerate(with_pictures(texts, pictures), start=1)
    while chunk := list(islice(numbered, batch_size * (4 if batch_size > 1 else 1))):
        read = [reader.read(text, number, of_text) for number, (text, of_text) in chunk]
        yield from embed(
            model,
            [source.tokens for source in read],
            pooling=pooling,
            normalise=normalise,
            batch_size=batch_size,
            pictures=[source.pictures for source in read],
        )


def _pool(states: NDArray[np.float32], pooling: Pooling) -> NDArray[np.float32]:
    if pooling == "mean":
        return states.mean(axis=0)
    if pooling == "none":
        return states.copy()  # the batch around it can go
    return states[0 if pooling == "first" else -1].copy()
