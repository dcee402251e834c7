"""Drafted tokens change the number of steps, never the target: any drafter, any kind of model, past every window."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from encore.generate.batch import generate
from encore.generate.drafts import Drafting, DraftSettings, NgramDrafter, StepTimes
from encore.generate.request import Generation, Request
from encore.generate.sampling import SamplingSettings

WINDOW = 6
KINDS = ("gemma2", "gemma3", "t5gemma", "t5gemma2")
each_kind = pytest.mark.parametrize("kind", KINDS)
GREEDY = SamplingSettings(max_target_tokens=4 * WINDOW, stop_ids=(), log_probabilities=True)
ALWAYS = DraftSettings(max_tokens=4, adaptive=False)


def sources(count: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 61, rng.integers(1, longest)).tolist() for _ in range(count)]


def same(ours: Sequence[Generation], expected: Sequence[Generation]) -> int:
    """Asserts equal targets, up to a near tie; gives how many differed at one."""
    parted = 0
    for a, b in zip(ours, expected, strict=True):
        if a.tokens != b.tokens:
            assert a.near_ties, (a.tokens, b.tokens)
            parted += 1
            continue
        np.testing.assert_allclose(a.log_probabilities, b.log_probabilities, atol=1e-4)
        assert (a.finish_reason, a.stop, a.text) == (b.finish_reason, b.stop, b.text)
    return parted


class Guessing:
    """Drafts what the targets really are, with mistakes, so that every length of agreement occurs."""

    kinds, free = 1, True

    def __init__(self, targets: Sequence[list[int]], seed: int = 0) -> None:
        self.targets, self.rng = targets, np.random.default_rng(seed)
        self.rows: list[int] = []

    def join(self, sources: Sequence[Sequence[int]], copies: Sequence[int]) -> None:
        self.rows += range(len(self.rows), len(self.rows) + len(sources))

    def select(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def propose(self, targets: Sequence[list[int]], limits: Sequence[int]) -> list[tuple[list[int], int]]:
        found = []
        for row, target, limit in zip(self.rows, targets, limits, strict=True):
            draft = self.targets[row][len(target) : len(target) + self.rng.integers(0, limit + 1)]
            found.append(([int(t) if self.rng.random() < 0.8 else int(self.rng.integers(3, 61)) for t in draft], 0))
        return found


@each_kind
@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_any_draft_gives_the_same_target(tiny: Callable, kind: str, drawn: bool, monkeypatch) -> None:
    model = tiny(kind)
    rows = sources(10, seed=1)
    settings = [
        dataclasses.replace(
            GREEDY,
            repetition_penalty=1.3,
            max_target_tokens=int(n),
            **({"temperature": 1.5, "top_k": 30, "seed": i} if drawn else {}),
        )
        for i, n in enumerate(np.random.default_rng(2).integers(1, 4 * WINDOW, len(rows)))
    ]
    expected = generate(model, rows, settings)
    targets = [
        g.tokens for g in generate(model, rows, [dataclasses.replace(s, max_target_tokens=40) for s in settings])
    ]
    monkeypatch.setattr("encore.generate.batch.make_drafting", lambda drafts, *_: Drafting(Guessing(targets), drafts))
    ours = generate(model, rows, settings, drafts=ALWAYS)
    assert same(ours, expected) <= 1
    assert 0.3 < sum(g.accepted for g in ours) / sum(g.drafted for g in ours) < 0.95


@each_kind
def test_copied_drafts_over_many_random_sources(tiny: Callable, kind: str) -> None:
    model, rows = tiny(kind), sources(40)
    ours = generate(model, rows, GREEDY, drafts=DraftSettings(max_tokens=5, ngram=2, adaptive=False))
    assert same(ours, generate(model, rows, GREEDY)) <= 1 and sum(g.accepted for g in ours) > 0


def test_a_small_model_drafts(tiny: Callable) -> None:
    """Any model with the vocabulary: itself (nearly all is accepted), another kind, decoder-only or not."""
    rows = sources(5, seed=3)
    for kind, other in (("t5gemma2", "t5gemma2"), ("gemma3", "t5gemma")):
        model = tiny(kind)
        settings = [dataclasses.replace(GREEDY, max_target_tokens=n) for n in (1, 2, 9, 14, 18)]
        expected = generate(model, rows, settings)
        ours = generate(model, rows, settings, drafts=dataclasses.replace(ALWAYS, model=tiny(other)))
        assert same(ours, expected) <= 1
        drafted, accepted = (sum(getattr(g, name) for g in ours) for name in ("drafted", "accepted"))
        assert drafted and (accepted > 0.9 * drafted if kind == other else accepted < 0.9 * drafted)
        expected = generate(model, rows, settings, drafts=DraftSettings(model=tiny(other)))
        assert same(expected, ours) <= 1, "with measured times, and so drafts of changing length"


def test_a_draft_model_of_another_vocabulary_is_refused(tiny: Callable) -> None:
    with pytest.raises(ValueError, match="a vocabulary of 70, the model one of 61"):
        generate(tiny("gemma3"), [[5]], GREEDY, drafts=DraftSettings(model=tiny("gemma3", vocab_size=70)))
    with pytest.raises(ValueError, match="max_tokens is 0"):
        DraftSettings(max_tokens=0)


DRAWS = 4_000


def test_drawn_targets_keep_their_distribution() -> None:
    """The three tokens of 4,000 targets with drafts, against their exact probabilities: chi-square."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(5, 5, 4)).astype(np.float32)  # logits of the next token, by the last two
    settings = SamplingSettings(temperature=1.3, max_target_tokens=3, stop_ids=())

    def probabilities(a: int, b: int) -> np.ndarray:
        weights = np.exp(table[a, b].astype(np.float64) / 1.3)
        return weights / weights.sum()

    counts, accepted = np.zeros((4, 4, 4)), 0
    for seed in range(DRAWS):
        request = Request(0, dataclasses.replace(settings, seed=seed), stop_ids=())
        while not request.finished:
            written = [4, 4, *request.tokens]
            draft = [(seed + i) % 3 for i in range(min(2, 2 - len(request.tokens)))]
            text = [*written, *draft]
            logits = np.stack([table[text[i - 2], text[i - 1]] for i in range(len(written), len(text) + 1)])
            request.accept_drafted(logits, draft)
        counts[tuple(request.tokens)] += 1
        accepted += request.result().accepted
    first = probabilities(4, 4)
    expected = np.array([[first[a] * probabilities(4, a)[b] * probabilities(a, b) for b in range(4)] for a in range(4)])
    assert accepted > DRAWS / 10
    statistic = ((counts - expected * DRAWS) ** 2 / (expected * DRAWS)).sum()
    assert statistic < 103.4, "chi-square with 63 degrees of freedom: the quantile of 0.999"


def test_what_followed_the_longest_match_is_copied() -> None:
    drafter = NgramDrafter(3)
    drafter.join([[5, 6, 7, 8, 9, 6, 10], [1, 2]], [2, 1])
    targets = [[3], [8, 5, 6, 7], [1, 5, 4, 1, 5]]
    assert drafter.propose(targets, [4, 4, 4]) == [([], 0), ([8, 9, 6, 10], 2), ([4, 1, 5], 1)]
    assert drafter.propose([[3, 6], [8, 5, 6, 7, 9], targets[2]], [4, 1, 0]) == [([10], 0), ([6], 0), ([], 1)]
    drafter.select([1, 1])
    targets = [[8, 5, 6, 7, 9, 2, 3, 9], [8, 5, 6, 7, 9, 4, 5, 9]]
    assert drafter.propose(targets, [2, 2]) == [([2, 3], 0), ([4, 5], 0)]


def test_times_are_measured_and_forgotten() -> None:
    times = StepTimes()
    assert times.estimate(1, 4) > times.estimate(1, 1)
    times.record(1, 1, 0.010)
    times.record(1, 4, 0.030)
    assert times.estimate(1, 1) == 0.010 and times.estimate(1, 4) == 0.030
    assert 0.030 < times.estimate(1, 5) < 0.034
    times.record(1, 4, 10.0)
    assert times.estimate(1, 4) < 0.046, "one hiccup"
    for _ in range(300):
        times.record(1, 1, 0.010)
    assert times.estimate(1, 4) < 0.014, "forgotten"


def drive(drafting: Drafting, right: float, cost: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The drafted tokens of 200 steps. A token is right with this probability and costs so much of a step."""
    now, rng = [0.0], np.random.default_rng(0)
    monkeypatch.setattr("encore.generate.drafts.time.perf_counter", lambda: now[0])
    request = Request(0, SamplingSettings(max_target_tokens=10_000), stop_ids=())
    drafting.join([[5]], [1])
    used = []
    for _ in range(200):
        (draft,) = drafting.propose([request])
        used.append(len(draft))
        now[0] += 1.0 + cost * len(draft)
        drafting.measured()
        wrong = next((i for i in range(len(draft)) if rng.random() > right), len(draft))
        written = [*draft[:wrong], 8 if rng.random() > right else 7]
        request.tokens += written
        drafting.learn([written])
    return used


class Sevens:
    kinds, free = 1, True

    def join(self, sources: Sequence[Sequence[int]], copies: Sequence[int]) -> None: ...

    def select(self, rows: Sequence[int]) -> None: ...

    def propose(self, targets: Sequence[list[int]], limits: Sequence[int]) -> list[tuple[list[int], int]]:
        return [([7] * limit, 0) for limit in limits]


def test_drafting_switches_itself_off_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    mostly_right = drive(Drafting(Sevens(), DraftSettings()), 0.9, 0.05, monkeypatch)
    assert np.mean(mostly_right[20:]) > 6
    rarely_right = drive(Drafting(Sevens(), DraftSettings()), 0.05, 0.2, monkeypatch)
    assert np.mean(rarely_right[20:]) < 0.2
    too_dear = drive(Drafting(Sevens(), DraftSettings()), 0.7, 1.0, monkeypatch)
    assert np.mean(too_dear[20:]) < 0.5
    assert drive(Drafting(Sevens(), DraftSettings(adaptive=False)), 0.0, 1.0, monkeypatch) == [7] * 200
