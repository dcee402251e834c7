"""Embeddings against the encoder run alone on each source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import encore
from encore.generate.embed import embed, embed_texts
from encore.generate.source import SourceReader
from encore.model.encoder import Encoder
from encore.tokenizer import Tokenizer

SOURCES = [[2, 5, 9, 33, 1], [2, 1], [2, *range(10, 30), 1], [2, 4, 4, 1]]

each_kind = pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2"])


def states(model, source: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model.encode(torch.tensor([source])).states[0].numpy()


@each_kind
@pytest.mark.parametrize("batch_size", [1, 4])
def test_pooling_counts_real_tokens_only(tiny: Callable, kind: str, batch_size: int) -> None:
    model = tiny(kind)
    pools = {"mean": lambda x: x.mean(0), "first": lambda x: x[0], "last": lambda x: x[-1], "none": lambda x: x}
    for pooling, pool in pools.items():
        for source, got in zip(SOURCES, embed(model, SOURCES, pooling=pooling, batch_size=batch_size), strict=True):
            assert got.tokens == source
            assert got.vectors.dtype == np.float32
            np.testing.assert_allclose(got.vectors, pool(states(model, source)), atol=1e-4)


def test_normalised_vectors_have_length_one_and_the_same_direction(tiny: Callable) -> None:
    model = tiny("t5gemma2")
    for pooling in ("mean", "none"):
        plain = embed(model, SOURCES, pooling=pooling)
        for before, after in zip(plain, embed(model, SOURCES, pooling=pooling, normalise=True), strict=True):
            length = np.linalg.norm(before.vectors, axis=-1, keepdims=True)
            np.testing.assert_allclose(np.linalg.norm(after.vectors, axis=-1), 1, atol=1e-5)
            np.testing.assert_allclose(after.vectors * length, before.vectors, atol=1e-5)


@each_kind
def test_the_encoder_alone_gives_the_same(speaker: Callable, tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    model = speaker(kind)
    encore.save(model, tmp_path / "model", tokenizer=tokenizer)
    encoder = encore.load(tmp_path / "model", part="encoder")
    assert isinstance(encoder, Encoder)
    reader = SourceReader(tokenizer, max_tokens=64)
    texts = ["Good morning.", "", "The cat is asleep on the warm stove."] * 4
    found = list(embed_texts(encoder, reader, iter(texts), batch_size=2))
    assert len(found) == len(texts)
    for text, got in zip(texts, found, strict=True):
        np.testing.assert_allclose(got.vectors, states(model, tokenizer.encode_source(text)).mean(0), atol=1e-4)


def test_errors(tiny: Callable) -> None:
    with pytest.raises(ValueError, match="pooling is 'max'; expected one of mean, first, last, none"):
        embed(tiny("t5gemma2"), SOURCES, pooling="max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="a Gemma has none"):
        embed(tiny("gemma3"), SOURCES)
    with pytest.raises(ValueError, match="source 1 has no tokens"):
        embed(tiny("t5gemma2"), [[3], []])
    with pytest.raises(ValueError, match="source 0 holds the id 99"):
        embed(tiny("t5gemma2"), [[99]])
