"""The watch over the two sides: silent while their ratio is its usual one, one warning each for what is not."""

from __future__ import annotations

import random

import pytest

from encore.train.balance import Balance


def norms(encoder: float, decoder: float) -> dict[str, float]:
    return {"gradient_norm_encoder": encoder, "gradient_norm_decoder": decoder}


def look(balance: Balance, start: int, steps: int, encoder: float, decoder: float) -> list[tuple[int, str]]:
    numbers = random.Random(start)
    seen = [
        (step, balance.look(step, norms(encoder * numbers.uniform(0.5, 2), decoder * numbers.uniform(0.5, 2))))
        for step in range(start, start + steps)
    ]
    return [(step, told) for step, told in seen if told]


@pytest.mark.parametrize(("side", "factor"), [("encoder", 1000.0), ("decoder", 1 / 1000)])
def test_a_side_that_runs_away_is_told_once(side: str, factor: float) -> None:
    balance = Balance()
    assert look(balance, 1, 50, 0.02, 1.0) == []  # unequal, but always so
    told = look(balance, 51, 30, 0.02 * factor, 1.0)
    assert [step for step, _ in told] == [55]
    assert f"the {side}'s gradient norm has run away" in told[0][1] and f"lower optim.{side}_rate" in told[0][1]


def test_single_jumps_and_the_first_steps_are_no_reason() -> None:
    balance = Balance()
    assert look(balance, 1, 10, 0.001, 1.0) == look(balance, 11, 9, 1.0, 1.0) == []  # not settled
    assert look(balance, 20, 40, 1.0, 1.0) == []
    for start in range(60, 120, 6):
        assert look(balance, start, 4, 1000.0, 1.0) == look(balance, start + 4, 2, 1.0, 1.0) == []


@pytest.mark.parametrize(("still", "pair"), [("encoder", (0.0, 1.0)), ("decoder", (1.0, 1e-9))])
def test_a_side_that_does_not_move_is_told_once(still: str, pair: tuple[float, float]) -> None:
    told = look(Balance(), 1, 20, *pair)
    assert [step for step, _ in told] == [5] and f"the {still} gets no gradient" in told[0][1]


def test_what_has_one_side_or_none_is_not_watched() -> None:
    balance = Balance()
    for step in range(40):
        assert balance.look(step, {"gradient_norm_decoder": 1.0}) is None
        assert balance.look(step, norms(0.0, 0.0)) is None
