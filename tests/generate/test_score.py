"""Scores against a plain softmax over the whole sequence, against generation, and batched against alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from encore.generate import decoding as module
from encore.generate.batch import generate
from encore.generate.sampling import SamplingSettings
from encore.generate.score import score, score_texts
from encore.generate.text import TextGenerator
from encore.tokenizer import Tokenizer

KINDS = ("gemma2", "gemma3", "t5gemma", "t5gemma2")
SOURCES = [[2, 5, 9, 33], [2, 8], [2, *range(10, 30)], [2, 4, 4]]
TARGETS = [[7, 7, 1], [55, 3, 2, 60, 12, 1], [9], list(range(20, 34))]

each_kind = pytest.mark.parametrize("kind", KINDS)


def plain(model, source: list[int], target: list[int]) -> np.ndarray:
    with torch.no_grad():
        if hasattr(model, "encode"):
            logits = model(torch.tensor([source]), torch.tensor([[2, *target[:-1]]]))[0]
        else:
            logits = model(torch.tensor([[*source, *target]]))[0, len(source) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)].numpy()


@each_kind
def test_equals_the_softmax_row_by_row(tiny: Callable, kind: str) -> None:
    model = tiny(kind)
    for batch_size in (1, 3):
        for source, target, got in zip(
            SOURCES, TARGETS, score(model, SOURCES, TARGETS, batch_size=batch_size), strict=True
        ):
            expected = plain(model, source, target)
            np.testing.assert_allclose(got.log_probabilities, expected, atol=1e-4)
            assert got.total == pytest.approx(expected.sum(), abs=1e-3)
            assert got.mean == pytest.approx(expected.mean(), abs=1e-4)
            assert got.tokens == target


@each_kind
def test_is_what_generation_reported(tiny: Callable, kind: str) -> None:
    settings = SamplingSettings(
        temperature=1.5, top_k=20, repetition_penalty=1.4, seed=0, max_target_tokens=12, log_probabilities=True
    )
    answers = generate(tiny(kind), SOURCES, settings)
    scores = score(tiny(kind), SOURCES, [answer.tokens for answer in answers])
    for answer, got in zip(answers, scores, strict=True):
        np.testing.assert_allclose(got.log_probabilities, answer.log_probabilities, atol=1e-4)


def test_a_few_positions_at_a_time_give_the_same(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score(tiny("t5gemma2"), SOURCES, TARGETS)
    monkeypatch.setattr(module, "MAX_LOGITS", 2 * 61)
    calls: list[int] = []
    model = tiny("t5gemma2")
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: (calls.append(len(x)), logits(x))[1])
    for a, b in zip(whole, score(model, SOURCES, TARGETS), strict=True):
        np.testing.assert_allclose(a.log_probabilities, b.log_probabilities, atol=1e-5)
    assert max(calls) == 2 and sum(calls) == sum(map(len, TARGETS))


def test_a_decoder_only_source_may_be_empty(tiny: Callable) -> None:
    (alone,), (with_bos,) = score(tiny("gemma3"), [[]], [[7, 9]]), score(tiny("gemma3"), [[2]], [[7, 9]])
    assert alone.log_probabilities == with_bos.log_probabilities
    np.testing.assert_allclose(alone.log_probabilities, plain(tiny("gemma3"), [2], [7, 9]), atol=1e-4)


@pytest.mark.parametrize("kind", ["t5gemma2", "gemma3"])
def test_texts(speaker: Callable, tokenizer: Tokenizer, kind: str) -> None:
    model = speaker(kind)
    pairs = [("Good morning.", "Guten Morgen."), ("Why?", ""), ("The cat sleeps.", " Die Katze schläft.")] * 5
    reader = TextGenerator(model, tokenizer).reader(1)
    scores = list(score_texts(model, tokenizer, reader, iter(pairs), batch_size=2))
    assert len(scores) == len(pairs)
    for (source, target), got in zip(pairs, scores, strict=True):
        assert got.tokens == [*tokenizer.encode(target), tokenizer.eos_id]
        np.testing.assert_allclose(
            got.log_probabilities, plain(model, reader.read(source).tokens, got.tokens), atol=1e-3
        )


def test_errors(tiny: Callable) -> None:
    model = tiny("t5gemma2")
    with pytest.raises(ValueError, match="1 sources and 2 targets"):
        score(model, [[2]], [[1], [1]])
    with pytest.raises(ValueError, match="target 1 has no tokens"):
        score(model, [[2], [2]], [[1], []])
    with pytest.raises(ValueError, match="target 0 has 129 tokens; the model has 128 positions"):
        score(model, [[2]], [[5] * 129])
    with pytest.raises(ValueError, match="source 0 has 129 tokens; the model has 128 positions"):
        score(model, [[5] * 129], [[5]])
    with pytest.raises(ValueError, match="source with target 0 has 130 tokens"):
        score(tiny("gemma3"), [[5] * 100], [[5] * 30])
    with pytest.raises(ValueError, match="target 0 holds the id 61"):
        score(model, [[5]], [[61]])
