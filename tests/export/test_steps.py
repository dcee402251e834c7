"""Steps of several tokens, rows at different places, tokens taken back: against torch in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from encore.generate import onnx_cache
from encore.generate.onnx_backend import OnnxModel
from encore.generate.padding import pad_rows
from encore.model.t5gemma import T5Gemma

from .conftest import KINDS, WINDOW

each_kind = pytest.mark.parametrize("kind", KINDS)
LENGTHS = [3, 2 * WINDOW + 1, 1]
TARGET_TOKENS = 3 * WINDOW + 2
HEADS = {"two key heads": (2, 16), "one": (1, 24), "one, values in two columns": (1, 32)}
each_heads = pytest.mark.parametrize("heads", HEADS)


def with_heads(exported: Callable, kind: str, heads: str) -> tuple[T5Gemma, OnnxModel]:
    number, size = HEADS[heads]
    return exported(kind, changes={"num_key_value_heads": number, "head_dim": size})


def draw(seed: int) -> tuple[list[list[int]], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    sources = [rng.integers(3, 61, length).tolist() for length in LENGTHS]
    return sources, rng.integers(3, 61, (len(LENGTHS), TARGET_TOKENS))


def expected_logits(
    model: T5Gemma, sources: Sequence[Sequence[int]], targets: NDArray[np.int64]
) -> NDArray[np.float32]:
    with torch.no_grad():
        memory = model.encode(*pad_rows(sources, 0, side="right"))
        return model.decode(torch.from_numpy(targets), memory).numpy()


@each_kind
@pytest.mark.parametrize("first", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW])
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
@each_heads
def test_a_step_of_several_tokens_is_torch(
    exported: Callable, kind: str, heads: str, num_tokens: int, first: int
) -> None:
    """After `first` tokens, all the rest in steps of `num_tokens`."""
    model, graphs = with_heads(exported, kind, heads)
    sources, targets = draw(first)
    cache = graphs.make_cache(graphs.encode(sources), TARGET_TOKENS, max(num_tokens, first))
    found = [cache.advance(targets[:, :first]).copy()]
    assert cache.log_sums is None, "nobody asked"
    for start in range(first, TARGET_TOKENS - num_tokens + 1, num_tokens):
        found.append(cache.advance(targets[:, start : start + num_tokens], summed=True).copy())
        np.testing.assert_allclose(cache.log_sums, np.logaddexp.reduce(found[-1].astype(float), axis=2), atol=1e-5)
    together = np.concatenate(found, axis=1)
    expected = expected_logits(model, sources, targets)[:, : together.shape[1]]
    assert together.shape[1] > TARGET_TOKENS - num_tokens
    np.testing.assert_allclose(together, expected, atol=1e-4)


@each_kind
@pytest.mark.parametrize("num_tokens", [2, 5])
def test_the_ring_is_no_larger_than_needed(exported: Callable, kind: str, num_tokens: int) -> None:
    """With steps no longer than promised, past the window, from one token on: the tightest ring."""
    model, graphs = exported(kind)
    sources, targets = draw(0)
    cache = graphs.make_cache(graphs.encode(sources), TARGET_TOKENS, num_tokens)
    assert cache.rings["sliding_attention"] == WINDOW + num_tokens - 1
    starts = range(0, TARGET_TOKENS, num_tokens)
    found = [cache.advance(targets[:, start : start + num_tokens]).copy() for start in starts]
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected_logits(model, sources, targets), atol=1e-4)


@each_kind
@each_heads
def test_rows_go_at_their_own_pace_and_take_tokens_back(
    exported: Callable, kind: str, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random counts, padding, wrong drafts that are rolled back: each row's logits are those of its own tokens."""
    monkeypatch.setattr(onnx_cache, "GROWTH", 4)
    model, graphs = with_heads(exported, kind, heads)
    sources, targets = draw(1)
    expected, rng = expected_logits(model, sources, targets), np.random.default_rng(2)
    cache = graphs.make_cache(graphs.encode(sources), TARGET_TOKENS, 5)
    kept, rolled_back = np.zeros(len(sources), int), 0
    while (kept < TARGET_TOKENS).any():
        counts = np.minimum(rng.integers(0, 6, len(sources)), TARGET_TOKENS - kept)
        right = np.array([rng.integers(0, count + 1) for count in counts])
        tokens = rng.integers(3, 61, (len(sources), max(1, counts.max())))
        for row, number in enumerate(right):
            tokens[row, :number] = targets[row, kept[row] : kept[row] + number]
        logits = cache.advance(tokens, counts)
        for row, number in enumerate(right):
            np.testing.assert_allclose(logits[row, :number], expected[row, kept[row] :][:number], atol=1e-4)
        kept, rolled_back = kept + right, rolled_back + int((counts - right).sum())
        cache.rollback(kept)
        if rng.random() < 0.5:  # one token for all, as between drafts
            here = np.minimum(kept, TARGET_TOKENS - 1)
            alone = cache.advance(targets[np.arange(len(sources)), here][:, None], (kept < TARGET_TOKENS).astype(int))
            for row in np.flatnonzero(kept < TARGET_TOKENS):
                np.testing.assert_allclose(alone[row, 0], expected[row, kept[row]], atol=1e-4)
            kept = cache.lengths.copy()
    assert rolled_back > 20


@each_kind
@each_heads
def test_rows_join_while_others_run(exported: Callable, kind: str, heads: str) -> None:
    """A longer source and a shorter target join, twice, when another row has ended."""
    model, graphs = with_heads(exported, kind, heads)
    sources, targets = draw(3)
    expected = expected_logits(model, sources, targets)
    cache = graphs.make_cache(graphs.encode([sources[0], sources[2]]), TARGET_TOKENS, 2)
    for place in range(WINDOW + 2):
        cache.advance(targets[[0, 2], place : place + 1])
    joining = graphs.make_cache(graphs.encode([sources[1]]), TARGET_TOKENS, 2)
    joining.advance(targets[1:2, :2])
    cache.index_select([0])
    cache.extend(joining, [0, 0])
    for place in range(2, WINDOW + 8):
        tokens = [targets[0, place + WINDOW], targets[1, place], targets[1, place]]
        found = cache.advance(np.array(tokens)[:, None])
        np.testing.assert_allclose(found[0, 0], expected[0, place + WINDOW], atol=1e-4)
        np.testing.assert_allclose(found[1:, 0], expected[[1, 1], place], atol=1e-4)


def test_what_a_cache_cannot_hold_is_refused(exported: Callable[..., tuple[T5Gemma, OnnxModel]]) -> None:
    _, graphs = exported("t5gemma2")
    memory = graphs.encode([[5, 6], [7]])
    cache = graphs.make_cache(memory, 4, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected \(2, T\), with T from 1 to step_tokens = 2"):
        cache.advance([[1, 2, 3]] * 2)
    with pytest.raises(ValueError, match=r"expected 2 numbers from 0 to 2"):
        cache.advance([[1, 2]] * 2, [3, 0])
    with pytest.raises(ValueError, match=r"ids 0 to 60"):
        cache.advance([[1, 61]] * 2)
    cache.advance([[1, 2]] * 2)
    cache.advance([[1, 2]] * 2, [2, 1])
    with pytest.raises(ValueError, match=r"holds 4 target tokens and is full"):
        cache.advance([[1], [1]])
    for lengths in ([4, 4], [1, 3]):
        with pytest.raises(ValueError, match=r"from \[2, 2\] to \[4, 3\]"):
            cache.rollback(lengths)
    with pytest.raises(ValueError, match=r"hold 5 and 4 target tokens, 2 and 2 a step"):
        cache.extend(graphs.make_cache(memory, 5, 2), [0])
    with pytest.raises(ValueError, match=r"step_tokens is 0"):
        graphs.make_cache(memory, 5, 0)
