"""The denoising algebra: nothing lost, nothing doubled, counts and lengths exactly as asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encore.objectives.denoise import (
    SentinelShortage,
    Task,
    causal_lm,
    drop_noise_tokens,
    drop_nonnoise_tokens,
    longest_for_sentinels,
    longest_raw_length,
    noise_and_spans,
    noise_span_to_unique_sentinel,
    nonnoise_span_to_unique_sentinel,
    prefix_lm,
    random_spans_noise_mask,
    span_corruption,
)

lengths = st.integers(1, 700)
seeds = st.integers(0, 2**32 - 1)
tasks = st.one_of(
    st.builds(Task, st.just("spans"), st.floats(1, 70), st.floats(0.01, 0.99)),
    st.builds(Task, st.just("fixed"), st.none(), st.floats(0.01, 0.99), st.integers(1, 40)),
    st.just(Task("causal", None, 1.0, 1)),
)


def runs(mask: np.ndarray) -> list[tuple[bool, int]]:
    """Run-length encoding by a plain loop."""
    found: list[tuple[bool, int]] = []
    for value in mask.tolist():
        if found and found[-1][0] == value:
            found[-1] = (value, found[-1][1] + 1)
        else:
            found.append((value, 1))
    return found


def test_the_drawing_in_the_docstring() -> None:
    tokens, mask = np.arange(10, 18), np.array([0, 0, 1, 1, 0, 0, 0, 1], dtype=bool)
    assert noise_span_to_unique_sentinel(tokens, mask, (90, 91, 92)).tolist() == [10, 11, 90, 14, 15, 16, 91]
    assert nonnoise_span_to_unique_sentinel(tokens, mask, (90, 91, 92)).tolist() == [90, 12, 13, 91, 17]
    assert drop_noise_tokens(tokens, mask).tolist() == [10, 11, 14, 15, 16]
    assert drop_nonnoise_tokens(tokens, mask).tolist() == [12, 13, 17]
    example = span_corruption(tokens, mask, (90, 91), eos_id=1)
    assert example.inputs.tolist() == [10, 11, 90, 14, 15, 16, 91]
    assert example.targets.tolist() == [90, 12, 13, 91, 17, 1]
    assert tokens.tolist() == list(range(10, 18)), "the caller's tokens were changed"


@given(lengths, tasks, seeds)
def test_mask_has_the_counts_asked_for(length: int, task: Task, seed: int) -> None:
    mask = random_spans_noise_mask(
        length, task.rate, np.random.default_rng(seed), mean_span=task.mean_span, num_spans=task.num_spans
    )
    noise, spans = noise_and_spans(length, task.rate, task.mean_span, task.num_spans)
    found = runs(mask)
    assert mask.shape == (length,) and mask.sum() == noise
    assert sum(value for value, _ in found) == spans
    if 0 < noise < length:
        assert abs(noise - length * task.rate) <= 0.5 or noise in (1, length - 1)
        assert found[0][0] is False and found[-1][0] is True
    if task.mean_span is not None and noise >= task.mean_span and spans < min(noise, length - noise):
        assert abs(noise / task.mean_span - spans) <= 0.5


@pytest.mark.parametrize(
    ("length", "rate", "mean_span", "num_spans", "expected"),
    [
        (1, 0.15, 3.0, None, (0, 0)),
        (2, 0.15, 3.0, None, (1, 1)),
        (3, 0.99, 1.0, None, (2, 1)),
        (1, 0.75, None, 1, (0, 0)),
        (4, 0.75, None, 1, (3, 1)),
        (5, 1.0, None, 1, (5, 1)),
        (100, 0.5, 3.0, None, (50, 17)),
        (1024, 0.15, 3.0, None, (154, 51)),
    ],
)
def test_counts_by_hand(
    length: int, rate: float, mean_span: float | None, num_spans: int | None, expected: tuple[int, int]
) -> None:
    assert noise_and_spans(length, rate, mean_span, num_spans) == expected


def test_spans_are_uniform_among_compositions() -> None:
    """Six hidden tokens in two spans: each of the 5 x 5 ways to cut noise and rest comes equally often."""
    rng = np.random.default_rng(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(5000):
        cut = tuple(size for _, size in runs(random_spans_noise_mask(12, 0.5, rng, num_spans=2)))
        counts[cut] = counts.get(cut, 0) + 1
    assert len(counts) == 25
    assert min(counts.values()) > 140 and max(counts.values()) < 260  # 200 each, standard deviation 14


@given(st.integers(1, 200), seeds)
def test_any_mask_splits_the_text(length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, mask = rng.integers(0, 50, length), rng.random(length) < 0.5
    kept, hidden = iter(drop_noise_tokens(tokens, mask)), iter(drop_nonnoise_tokens(tokens, mask))
    assert [next(hidden) if noise else next(kept) for noise in mask] == tokens.tolist()
    assert next(kept, None) is None and next(hidden, None) is None


@given(lengths, st.data())
def test_prefix_lm_is_the_text_cut_in_two(length: int, data: st.DataObject) -> None:
    split = data.draw(st.integers(0, length))
    tokens = np.arange(100, 100 + length)
    example = prefix_lm(tokens, split, eos_id=1)
    assert len(example.inputs) == split
    assert [*example.inputs, *example.targets] == [*tokens, 1]
    causal = causal_lm(tokens, eos_id=1)
    assert len(causal.inputs) == 0 and causal.targets.tolist() == [*tokens, 1]


@pytest.mark.parametrize(
    ("mean_span", "rate", "length", "spans"),
    [(3, 0.15, 18_204, 910), (12, 0.5, 30_246, 1_260), (32, 0.15, 19_168, 90), (32, 0.5, 31_774, 496)],
)
def test_longest_texts_at_16_384(mean_span: float, rate: float, length: int, spans: int) -> None:
    """The published mixture's spans with both sides, EOS included, capped at 16,384."""
    task = Task("spans", mean_span, rate)
    assert longest_raw_length(task, 16_384, 16_384, source_extra_tokens=1) == length
    assert task.num_sentinels(length) == spans


def test_longest_prefix_lm_and_causal() -> None:
    three_quarters, causal = Task("prefix", None, 0.75, 1), Task("causal", None, 1.0, 1)
    length = longest_raw_length(three_quarters, 16_384, 16_384, source_extra_tokens=2)
    assert three_quarters.lengths(length)[1] == 16_384 and length == 21_844
    assert longest_raw_length(causal, 0, 1_024) == 1_023


@given(tasks, st.integers(4, 300), st.integers(2, 300), st.integers(0, 3), st.none() | st.integers(1, 30))
def test_longest_length_fits_and_no_longer_one_does(
    task: Task, max_inputs: int, max_targets: int, extra: int, sentinels: int | None
) -> None:
    longest = longest_raw_length(task, max_inputs, max_targets, source_extra_tokens=extra, num_sentinels=sentinels)

    def fits(length: int) -> bool:
        inputs, targets = task.lengths(length, source_extra_tokens=extra)
        return (
            inputs <= max_inputs
            and targets <= max_targets
            and task.num_sentinels(length) <= (length if sentinels is None else sentinels)
        )

    assert fits(longest) and not any(fits(longer) for longer in range(longest + 1, longest + 60))


def test_a_budget_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="even one token takes 3 and 1"):
        longest_raw_length(Task("spans", 3, 0.15), 2, 8, source_extra_tokens=2)


@given(tasks, st.integers(0, 40))
def test_longest_for_sentinels(task: Task, sentinels: int) -> None:
    longest = longest_for_sentinels(task, sentinels)
    if longest is None:
        assert max(task.num_sentinels(length) for length in (1, 10, 10_000)) <= sentinels
    else:
        assert task.num_sentinels(longest) <= sentinels < task.num_sentinels(longest + 1)


def test_operators_refuse_what_does_not_fit() -> None:
    tokens, mask = np.arange(5), np.array([0, 1, 0, 1, 1], dtype=bool)
    with pytest.raises(SentinelShortage, match="2 spans to mark but the tokenizer has 1"):
        noise_span_to_unique_sentinel(tokens, mask, (9,))
    with pytest.raises(ValueError, match="start with a kept token"):
        span_corruption(tokens, ~mask, (8, 9), 1)
    with pytest.raises(ValueError, match=r"expected \(5,\) booleans"):
        drop_noise_tokens(tokens, mask[:4])
    with pytest.raises(ValueError, match="non-empty row"):
        causal_lm([], 1)
    with pytest.raises(ValueError, match="split 5 tokens after 6"):
        prefix_lm(tokens, 6, 1)
    with pytest.raises(ValueError, match="at least 1"):
        noise_and_spans(0, 0.5, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("t", 3, 0.0), "above 0"),
        (("t", 3, 1.5), "at most 1"),
        (("t", None, 0.5), "exactly one"),
        (("t", 3, 0.5, 2), "exactly one"),
        (("t", 0.5, 0.5), "at least 1 token"),
        (("t", None, 0.5, 0), "at least 1"),
        (("t", 3, 1.0), "num_spans=1"),
        (("t", 3, 0.5, None, 0.0), "positive"),
    ],
)
def test_impossible_tasks_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(*arguments)
