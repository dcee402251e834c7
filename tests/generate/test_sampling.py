"""Sampling against transformers' logits processors, against its own definitions, and by counting draws."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from encore.generate.sampling import (
    SamplingSettings,
    apply_repetition_penalty,
    candidates,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_sum,
    sample,
)

LOGITS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-20, 20, width=32))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def filtered(logits: np.ndarray, settings: SamplingSettings, seen: list[int] | None = None) -> np.ndarray:
    """All logits, minus infinity where nothing is drawn."""
    result = np.full_like(logits, -np.inf)
    ids, values = candidates(logits, settings, seen or [])
    result[ids] = values
    return result


def kept(logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


def random_logits(seed: int, size: int = 500, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


# --- the filters equal transformers' ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "chosen",
    [
        SamplingSettings(temperature=0.7),
        SamplingSettings(temperature=1.0, top_k=7),
        SamplingSettings(temperature=1.0, top_p=0.83),
        SamplingSettings(temperature=1.0, min_p=0.05),
        SamplingSettings(temperature=0.9, repetition_penalty=1.3),
        SamplingSettings(temperature=1.6, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=0.8),
        SamplingSettings(temperature=1.0, top_k=1000, top_p=0.001),
    ],
    ids=str,
)
def test_equals_transformers_processors(chosen: SamplingSettings, seed: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as oracle

    processors: list[Any] = [oracle.TemperatureLogitsWarper(chosen.temperature)]
    if chosen.top_k:
        processors.append(oracle.TopKLogitsWarper(chosen.top_k))
    if chosen.top_p < 1:
        processors.append(oracle.TopPLogitsWarper(chosen.top_p))
    if chosen.min_p:
        processors.append(oracle.MinPLogitsWarper(chosen.min_p))
    if chosen.repetition_penalty != 1:
        processors.insert(0, oracle.RepetitionPenaltyLogitsProcessor(chosen.repetition_penalty))

    logits = random_logits(seed)
    seen = [3, 3, 17, 250, 499]
    expected = torch.from_numpy(logits.copy())[None]
    for process in processors:
        expected = process(torch.tensor([seen]), expected)
    ours = filtered(logits, chosen, seen)
    assert kept(ours) == kept(expected[0].numpy())
    np.testing.assert_allclose(softmax(ours), softmax(expected[0].numpy()), atol=1e-6)


# --- and their definitions -------------------------------------------------------------------------------------------


@given(LOGITS, st.integers(1, 50))
def test_top_k_keeps_the_k_greatest_and_what_ties_with_them(logits: np.ndarray, k: int) -> None:
    result = keep_top_k(logits, k)
    threshold = np.sort(logits)[::-1][min(k, logits.size) - 1]
    assert kept(result) == set(np.flatnonzero(logits >= threshold).tolist())
    assert len(kept(result)) >= min(k, logits.size)
    assert all(result[i] == logits[i] for i in kept(result))


@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_p(logits: np.ndarray, p: float) -> None:
    probabilities = softmax(logits)
    result = kept(keep_top_p(logits, p))
    mass = sum(probabilities[i] for i in result)
    assert mass >= p - 1e-6
    assert mass - min(probabilities[i] for i in result) < p + 1e-6, "one token fewer would have reached p"
    dropped = set(range(logits.size)) - result
    if dropped:
        assert min(probabilities[i] for i in result) >= max(probabilities[i] for i in dropped)


@given(LOGITS, st.floats(0.001, 1.0))
def test_min_p_is_relative_to_the_best(logits: np.ndarray, p: float) -> None:
    probabilities = softmax(logits)
    result = kept(keep_min_p(logits, p))
    assert int(logits.argmax()) in result
    for i, probability in enumerate(probabilities):
        if abs(probability - p * probabilities.max()) > 1e-6 * probabilities.max():
            assert (i in result) == (probability > p * probabilities.max())


@given(LOGITS, st.floats(1.01, 3.0), st.data())
def test_repetition_penalty_lowers_only_what_was_seen(logits: np.ndarray, penalty: float, data: st.DataObject) -> None:
    seen = data.draw(st.lists(st.integers(0, logits.size - 1), max_size=5))
    before = logits.copy()
    result = apply_repetition_penalty(logits, seen, penalty)
    np.testing.assert_array_equal(logits, before, "the input must not change")
    for i in range(logits.size):
        if i in seen:
            assert result[i] < logits[i] or abs(logits[i]) < 1e-30
        else:
            assert result[i] == logits[i]


def test_top_p_without_sorting_the_vocabulary_equals_sorting_it() -> None:
    logits = random_logits(1, size=262_144, scale=2.0)
    probabilities = softmax(logits)
    order = np.argsort(-probabilities)
    count = int(np.searchsorted(np.cumsum(probabilities[order]), 0.6)) + 1
    assert kept(keep_top_p(logits, 0.6)) == set(order[:count].tolist())


# --- draws -----------------------------------------------------------------------------------------------------------


def test_draws_follow_the_filtered_distribution() -> None:
    chosen = SamplingSettings(temperature=1.3, top_k=6, top_p=0.95, seed=0)
    logits = random_logits(2, size=30, scale=1.5)
    expected = softmax(filtered(logits, chosen))
    rng = chosen.generator()
    draws = 20_000
    counts = np.bincount([sample(logits, chosen, rng)[0] for _ in range(draws)], minlength=logits.size)
    assert counts[expected == 0].sum() == 0
    real = expected > 0
    chi_square = float((((counts - draws * expected) ** 2)[real] / (draws * expected[real])).sum())
    assert real.sum() >= 4
    assert chi_square < 25, f"{chi_square:.1f} with {real.sum() - 1} degrees of freedom"


def test_greedy_takes_the_best_and_needs_no_draw() -> None:
    logits = random_logits(3)
    rng = SamplingSettings(seed=5).generator()
    before = rng.bit_generator.state
    token, logprob = sample(logits, SamplingSettings(top_k=3, min_p=0.5, log_probabilities=True), rng)
    assert token == logits.argmax()
    assert logprob == pytest.approx(math.log(softmax(logits).max()), abs=1e-6)
    assert sample(logits, SamplingSettings(top_k=3, min_p=0.5), rng) == (token, None)
    assert rng.bit_generator.state == before


def test_greedy_obeys_the_repetition_penalty() -> None:
    logits = np.array([1.0, 3.0, 2.9], dtype=np.float32)
    assert sample(logits, SamplingSettings(repetition_penalty=1.5), np.random.default_rng(), [1])[0] == 2


@given(LOGITS, st.integers(0, 10_000))
@settings(max_examples=50)
def test_the_log_probability_is_the_models_own(logits: np.ndarray, seed: int) -> None:
    chosen = SamplingSettings(temperature=0.5, top_k=3, repetition_penalty=2.0, seed=seed, log_probabilities=True)
    token, logprob = sample(logits, chosen, chosen.generator(), [0])
    assert logprob == pytest.approx(float(np.log(softmax(logits)[token])), abs=1e-4)
    given = float(np.logaddexp.reduce(logits.astype(np.float64)))
    assert log_sum(logits) == pytest.approx(given, abs=1e-5)
    assert sample(logits, chosen, chosen.generator(), [0], given) == (token, float(logits[token]) - given)


def test_the_same_seed_repeats_and_another_differs() -> None:
    logits = random_logits(4, scale=0.5)

    def draws(seed: int | None) -> list[int]:
        chosen = SamplingSettings(temperature=1.0, seed=seed)
        rng = chosen.generator()
        return [sample(logits, chosen, rng)[0] for _ in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; expected 0"),
        ({"temperature": 1e-9}, "temperature is 1e-09; expected 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; expected a number above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": -3}, "seed is -3"),
        ({"max_target_tokens": 0}, "max_target_tokens is 0; expected at least 1"),
        ({"stop_strings": "end"}, "stop_strings is 'end'; expected a tuple"),
        ({"stop_strings": ("",)}, "stop_strings"),
        ({"stop_ids": (-1,)}, "stop_ids"),
    ],
)
def test_settings_refuse_what_makes_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**wrong)


def test_the_least_temperature_takes_the_best() -> None:
    logits = random_logits(6, scale=100.0)
    chosen = SamplingSettings(temperature=1e-4, top_p=0.9, min_p=0.1, seed=0)
    assert sample(logits, chosen, chosen.generator())[0] == logits.argmax()


def test_broken_logits_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="NaN"):
        sample(np.array([1.0, np.nan], dtype=np.float32), SamplingSettings(), rng)
    with pytest.raises(ValueError, match=r"expected \(V,\)"):
        sample(np.zeros((1, 4), dtype=np.float32), SamplingSettings(), rng)


def test_sampling_imports_no_torch() -> None:
    code = "import sys, encore.generate.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
