"""One long-context question, how it is scored, and how it is made to fill a given length."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from encore.evaluate.haystack import largest_that_fits

Count = Callable[[str], int]
"""How many tokens a text has."""
Scoring = Literal["all", "any", "ratio"]
Place = Literal["end", "start", "both"]
"""Where the question stands: after the text (as published), before it, or on both sides."""


@dataclass(frozen=True)
class Example:
    """One question about a long text.

    `prompt` is all that is read, the question included; `target` is what a model is trained to write. `opening` is how
    an answer may begin: a model that only continues text reads it behind the prompt. `scoring`:

        all     the share of `answers` that the written text contains, whatever the case (RULER)
        any     1 if it contains any of them (RULER's questions)
        ratio   0 unless it begins with `code`; then difflib's similarity of the rest with the answer (MRCR)
    """

    task: str
    length: int
    index: int
    prompt: str
    question: str
    target: str
    answers: tuple[str, ...]
    scoring: Scoring
    tokens: int
    opening: str = ""
    code: str = ""

    def score(self, written: str) -> float:
        """0..1, by the rule of the task."""
        if self.scoring == "ratio":
            return match_ratio(written, self.answers[0], self.code)
        return match_all(written, self.answers) if self.scoring == "all" else match_any(written, self.answers)


def match_all(written: str, expected: Sequence[str]) -> float:
    """The share of `expected` that the text contains: RULER's recall."""
    text = written.lower()
    return sum(wanted.lower() in text for wanted in expected) / len(expected)


def match_any(written: str, expected: Sequence[str]) -> float:
    """1 if the text contains any of `expected`, else 0."""
    text = written.lower()
    return float(any(wanted.lower() in text for wanted in expected))


def match_ratio(written: str, expected: str, code: str) -> float:
    """MRCR's score: 0 without the code in front, else the ratio of difflib.SequenceMatcher for what follows it."""
    if not written.startswith(code):
        return 0.0
    return SequenceMatcher(None, written.removeprefix(code).strip(), expected).ratio()


@dataclass(frozen=True)
class Draft:
    """An example while its length is being sought: `before`, the long `text` and the `question` make the prompt."""

    before: str
    text: str
    question: str
    answers: tuple[str, ...]
    target: str
    opening: str = ""
    scoring: Scoring = "all"
    code: str = ""

    def prompt(self, place: Place) -> str:
        front = f"{self.before}\n{self.question}" if place == "both" else self.before
        parts = (self.question, self.before, self.text) if place == "start" else (front, self.text, self.question)
        return "\n".join(part for part in parts if part)

    def written(self, sentence: bool) -> str:
        """The target: the answer alone, or behind the opening."""
        return f"{self.opening} {self.target}".strip() if sentence else self.target


Make = Callable[[int, int, random.Random], Draft]
"""(units of filler, words to top up with, random numbers) -> a draft; more of either never makes it shorter."""


@dataclass(frozen=True)
class Style:
    """How questions and answers are put. `sentence`: targets begin with the opening, which the text repeats."""

    place: Place = "end"
    sentence: bool = False


def fill(
    task: str, length: int, index: int, count: Count, make: Make, *, seed: int = 0, style: Style | None = None
) -> Example:
    """The longest example of at most `length` tokens, its target included; the same for the same arguments.

    Units of filler are added while they fit, then words where the task has them.

    Raises:
        DoesNotFit: it is longer without any filler.
    """
    style = style or Style()
    memo: dict[tuple[int, int], tuple[Draft, int]] = {}

    def tried(units: int, words: int) -> tuple[Draft, int]:
        if (units, words) not in memo:
            draft = make(units, words, random.Random(f"{seed}/{task}/{length}/{index}"))
            read, target = draft.prompt(style.place), draft.written(style.sentence)
            tokens = count(read if style.sentence else f"{read} {draft.opening}".strip()) + count(target)
            memo[units, words] = (draft, tokens)
        return memo[units, words]

    what = f"{task} of {length} tokens"
    units = largest_that_fits(lambda n: tried(n, 0)[1], length, what)
    words = 0
    if tried(units, 1)[1] != tried(units, 0)[1]:
        words = largest_that_fits(lambda n: tried(units, n)[1], length, what)
    draft, tokens = tried(units, words)
    return Example(
        task=task,
        length=length,
        index=index,
        prompt=draft.prompt(style.place),
        question=draft.question,
        target=draft.written(style.sentence),
        answers=draft.answers,
        scoring=draft.scoring,
        tokens=tokens,
        opening=draft.opening,
        code=draft.code,
    )
