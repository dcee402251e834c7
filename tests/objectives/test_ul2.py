"""The mixtures: every task's example rebuilds its text, and the table is the published one."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encore.objectives.denoise import Example, SentinelShortage, Task, longest_raw_length
from encore.objectives.ul2 import MIXTURES, apply, expected_corruption, mixture_rows, sample_task

EOS = 1
SENTINELS = tuple(range(1000, 1400))
ALL_TASKS = [task for rows in MIXTURES.values() for task in rows]
tasks = st.sampled_from(ALL_TASKS)
texts = st.lists(st.integers(2, 999), min_size=1, max_size=600)
seeds = st.integers(0, 2**32 - 1)


def rebuild(example: Example, sentinels: Sequence[int]) -> list[int]:
    """The text from its example, as a reader would: put each span where its sentinel stands, append the rest."""
    *targets, last = example.targets.tolist()
    assert last == EOS and EOS not in targets and EOS not in example.inputs
    spans: dict[int, list[int]] = {}
    rest: list[int] = []
    current = rest
    for token in targets:
        if token in sentinels:
            assert token not in spans, "a sentinel stands twice in the targets"
            current = spans[token] = []
        else:
            current.append(token)
    text: list[int] = []
    for token in example.inputs.tolist():
        text += spans.pop(token) if token in sentinels else [token]
    assert not spans, "a span has no place in the inputs"
    return text + rest


@given(tasks, texts, seeds)
def test_nothing_is_lost_or_doubled(task: Task, text: list[int], seed: int) -> None:
    example = apply(task, text, SENTINELS, EOS, np.random.default_rng(seed))
    assert rebuild(example, SENTINELS) == text
    assert (len(example.inputs), len(example.targets)) == task.lengths(len(text))
    used = [token for token in example.inputs.tolist() if token in SENTINELS]
    assert used == list(SENTINELS[: task.num_sentinels(len(text))])
    assert used == [token for token in example.targets.tolist() if token in SENTINELS]


@given(tasks, texts, seeds)
def test_the_same_seed_gives_the_same_example(task: Task, text: list[int], seed: int) -> None:
    one, two = (apply(task, text, SENTINELS, EOS, np.random.default_rng(seed)) for _ in range(2))
    assert one.inputs.tolist() == two.inputs.tolist() and one.targets.tolist() == two.targets.tolist()


def test_different_draws_differ() -> None:
    rng = np.random.default_rng(0)
    drawn = {tuple(apply(MIXTURES["t5gemma2"][0], range(2, 202), SENTINELS, EOS, rng).inputs) for _ in range(20)}
    assert len(drawn) == 20


@given(st.integers(1, 500), seeds)
def test_the_single_span_is_at_the_end_without_sentinel(length: int, seed: int) -> None:
    text = list(range(2, 2 + length))
    example = apply(MIXTURES["t5gemma2"][4], text, (), EOS, np.random.default_rng(seed))
    prefix = len(example.inputs)
    assert example.inputs.tolist() == text[:prefix] and example.targets.tolist() == [*text[prefix:], EOS]
    assert length < 2 or abs(prefix - length / 4) <= 0.5 or prefix == 1


def test_halves_and_causal() -> None:
    rng, text = np.random.default_rng(0), list(range(2, 12))
    halves = apply(MIXTURES["prefixlm"][0], text, (), EOS, rng)
    assert halves.inputs.tolist() == text[:5] and halves.targets.tolist() == [*text[5:], EOS]
    causal = apply(MIXTURES["causal"][0], text, (), EOS, rng)
    assert causal.inputs.size == 0 and causal.targets.tolist() == [*text, EOS]


@pytest.mark.parametrize("task", ALL_TASKS, ids=lambda task: task.name)
def test_texts_of_one_two_and_three_tokens(task: Task) -> None:
    for length in (1, 2, 3):
        text = [7, 8, 9][:length]
        example = apply(task, text, SENTINELS, EOS, np.random.default_rng(0))
        assert rebuild(example, SENTINELS) == text
        if task.rate < 1:
            kept = [token for token in example.inputs.tolist() if token not in SENTINELS]
            assert len(kept) >= 1 and (length == 1 or len(kept) < length)


def test_the_table_of_t5gemma_2() -> None:
    rows = [(row.mean_span, row.rate, row.num_spans, row.weight) for row in MIXTURES["t5gemma2"]]
    assert rows == [(3, 0.15, None, 1), (12, 0.5, None, 1), (32, 0.15, None, 1), (32, 0.5, None, 1), (None, 0.75, 1, 4)]
    assert expected_corruption("t5gemma2") == pytest.approx(0.5375, abs=1e-12)
    assert expected_corruption("prefixlm") == 0.5 and expected_corruption("causal") == 1.0


def test_ul2_kinds_come_equally_often() -> None:
    shares: dict[str | None, float] = {}
    for row in MIXTURES["ul2"]:
        shares[row.mode] = shares.get(row.mode, 0) + row.weight
    assert shares == {"[NLU]": 4, "[S2S]": 4, "[NLG]": 4}


def test_tasks_come_in_proportion() -> None:
    rng = np.random.default_rng(0)
    counts = Counter(sample_task("t5gemma2", rng).name for _ in range(16_000))
    for row in MIXTURES["t5gemma2"]:
        expected = 2000 * row.weight
        assert abs(counts[row.name] - expected) < 5 * expected**0.5
    again = [sample_task("t5gemma2", np.random.default_rng(3)).name for _ in range(5)]
    assert len(set(again)) == 1


@pytest.mark.parametrize("length", [400, 1000])
def test_noise_share_of_the_mixture_is_0_5375(length: int) -> None:
    """Counted on the examples themselves: each row as often as its weight, hidden tokens over all tokens."""
    rng, text, shares = np.random.default_rng(1), np.full(length, 2), []
    for row in MIXTURES["t5gemma2"]:
        for _ in range(int(row.weight)):
            targets = apply(row, text, SENTINELS, EOS, rng).targets
            shares.append(np.sum(targets == 2) / length)
    assert len(shares) == 8
    assert np.mean(shares) == pytest.approx(0.5375, abs=0.5 / length)


def test_noise_share_of_sampled_examples() -> None:
    rng = np.random.default_rng(2)
    text = np.full(200, 2)
    drawn = [apply(sample_task("t5gemma2", rng), text, SENTINELS, EOS, rng).targets for _ in range(4000)]
    share = np.mean([np.sum(targets == 2) for targets in drawn]) / 200
    assert share == pytest.approx(0.5375, abs=0.02)  # five standard errors of the choice of rows


@given(tasks, st.integers(20, 200), st.integers(20, 200), st.integers(1, 12), seeds)
def test_examples_of_the_longest_length_fit_the_budget(
    task: Task, max_inputs: int, max_targets: int, sentinels: int, seed: int
) -> None:
    length = longest_raw_length(task, max_inputs, max_targets, source_extra_tokens=2, num_sentinels=sentinels)
    text = np.arange(2, 2 + length)
    example = apply(task, text, SENTINELS[:sentinels], EOS, np.random.default_rng(seed))
    assert len(example.inputs) + 2 <= max_inputs and len(example.targets) <= max_targets


@given(st.sampled_from([task for task in ALL_TASKS if not task.is_prefix_lm]), st.integers(1, 5), seeds)
def test_sentinel_shortage_is_refused_or_shortened(task: Task, sentinels: int, seed: int) -> None:
    few, text = SENTINELS[:sentinels], [token % 900 + 2 for token in range(3000)]
    with pytest.raises(SentinelShortage, match=rf"has {sentinels}; give at most (\d+) tokens") as refusal:
        apply(task, text, few, EOS, np.random.default_rng(seed))
    longest = int(str(refusal.value).split("at most ")[1].split()[0])
    example = apply(task, text, few, EOS, np.random.default_rng(seed), on_shortage="shorten")
    assert rebuild(example, few) == text[:longest]
    assert task.num_sentinels(longest) == sentinels < task.num_sentinels(longest + 1)


def test_no_sentinels_at_all_leaves_one_token() -> None:
    example = apply(MIXTURES["t5gemma2"][0], [5, 6, 7], (), EOS, np.random.default_rng(0), on_shortage="shorten")
    assert example.inputs.tolist() == [5] and example.targets.tolist() == [EOS]


def test_mode_tokens_only_when_asked_for() -> None:
    modes = {"[NLU]": 2001, "[NLG]": 2002, "[S2S]": 2003}
    for row in MIXTURES["ul2"]:
        plain = apply(row, range(2, 52), SENTINELS, EOS, np.random.default_rng(0))
        marked = apply(row, range(2, 52), SENTINELS, EOS, np.random.default_rng(0), mode_ids=modes)
        assert marked.inputs.tolist() == [modes[row.mode or ""], *plain.inputs]
        assert marked.targets.tolist() == plain.targets.tolist()
    with pytest.raises(ValueError, match=r"mode \[NLU\]"):
        apply(MIXTURES["ul2"][0], [5, 6], SENTINELS, EOS, np.random.default_rng(0), mode_ids={"[S2S]": 1})


def test_unknown_mixtures_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="no mixture 'ul3'; expected one of t5gemma2"):
        mixture_rows("ul3")
    with pytest.raises(ValueError, match="no rows"):
        sample_task((), np.random.default_rng(0))
    with pytest.raises(ValueError, match="on_shortage is 'cut'"):
        apply(ALL_TASKS[0], [1, 2], SENTINELS, EOS, np.random.default_rng(0), on_shortage="cut")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="non-empty row"):
        apply(MIXTURES["t5gemma2"][4], np.zeros((2, 3), int), SENTINELS, EOS, np.random.default_rng(0))


def test_denoising_imports_no_torch() -> None:
    code = "import sys, encore.objectives.ul2; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
