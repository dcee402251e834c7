"""MRCR: repeated requests in a conversation, the right one to repeat, and the published score."""

from __future__ import annotations

import re

import pytest

from encore.evaluate.examples import match_ratio
from encore.evaluate.haystack import Library
from encore.evaluate.mrcr import MRCR_TASKS, mrcr_examples


def count(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("task, needles", list(zip(MRCR_TASKS, (2, 4, 8), strict=True)))
def test_the_answer_is_the_one_asked_for(task: str, needles: int) -> None:
    ordinals = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
    seen = set()
    for example in mrcr_examples(task, 900, 6, count):
        assert 0.95 * 900 <= example.tokens <= 900
        asked = re.fullmatch(
            r"Write (\w+) and then repeat the (\w+) (.+) about the (\w+), word for word.", example.question
        )
        assert asked
        code, ordinal, form, topic = asked.groups()
        turns = re.findall(rf"User: Write a {form} about the {topic}\.\nAssistant: (.*)", example.prompt)
        assert len(turns) == needles and len(set(turns)) == needles
        assert example.answers == (turns[ordinals.index(ordinal)],)
        assert example.target == f"{code} {example.answers[0]}" and example.score(example.target) == 1.0
        assert example.score(example.answers[0]) == 0.0  # without the code
        other = turns[(ordinals.index(ordinal) + 1) % needles]
        assert 0 < example.score(f"{code} {other}") < 1
        seen.add(ordinal)
    assert len(seen) > 1


def test_the_seed_decides() -> None:
    one, again, other = (list(mrcr_examples("mrcr_2", 500, 2, count, seed=seed)) for seed in (0, 0, 1))
    assert one == again != other


def test_the_ratio() -> None:
    assert match_ratio("x7 abcd", "abcd", "x7") == 1.0
    assert match_ratio("x7 abxd", "abcd", "x7") == pytest.approx(0.75)
    assert match_ratio("abcd", "abcd", "x7") == 0.0


def test_unknown_tasks() -> None:
    with pytest.raises(ValueError, match="expected one of mrcr_2"):
        list(mrcr_examples("mrcr_3", 500, 1, count))


def test_too_little_text() -> None:
    library = Library(texts=("It is in the nature of a house that the people of it have to live with the cold. " * 3,))
    with pytest.raises(ValueError, match="4 different sentences and the text has 1"):
        list(mrcr_examples("mrcr_4", 500, 1, count, library=library))
