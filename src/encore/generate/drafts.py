"""Drafts: tokens proposed for the next places of a target, verified by the model in one step. No torch.

A `Drafter` proposes. `NgramDrafter` copies what followed the same n-gram in the source or in what was written
(Saxena, prompt lookup decoding, 2023; LLMA, arXiv 2304.04487): summaries, rewriting and translation keep names,
numbers and whole passages. `ModelDrafter` asks a smaller model with the same vocabulary (Leviathan et al., arXiv
2211.17192), greedily, so that every draft is certain of itself. `Request.accept_drafted` verifies.

`Drafting` decides how many tokens to draft. With the probability a that a drafted token is right, a step over k of
them writes 1 + a + … + a^k tokens. It takes the k that writes most per second, by the step times it has measured:
none, where drafts do not pay. Copying is tried on all that is written, so a is known even while nothing is drafted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from encore.config import ModelConfig
from encore.generate.request import Request
from encore.generate.rows import HasConfig, RowLogits, Rows, first_token

GUESSED_SHARE = 0.08
"""What a further token per row adds to the time of a step, as a share of it, before any was measured."""

IDLE_STEPS = 64
"""After so many steps in which no draft paid, copies are looked for now and then only, and a draft model is tried."""

LOOK_AGAIN = 8
"""Every so many steps, then."""

REMEMBERED_STEPS = 256
"""After so many steps a measured time is forgotten, so that what was too dear once is tried again."""

Tokens = list[int]


@dataclass(frozen=True)
class DraftSettings:
    """max_tokens   the most tokens to draft for a row in one step
    ngram        the longest n-gram that is looked up
    adaptive     draft only as many tokens as pay; otherwise always as many as are found
    model        a small model that drafts instead, any with the same tokenizer
    """

    max_tokens: int = 7
    ngram: int = 3
    adaptive: bool = True
    model: HasConfig | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "ngram"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


class Drafter(Protocol):
    """Proposes for all rows of a batch; rows join, leave and move as those of the model do."""

    kinds: int
    """Drafts are of kinds 0 to `kinds` - 1, whose success is counted apart."""

    free: bool
    """Whether proposing costs next to nothing."""

    def join(self, sources: Sequence[Sequence[int]], copies: Sequence[int]) -> None: ...

    def select(self, rows: Sequence[int]) -> None: ...

    def propose(self, targets: Sequence[Tokens], limits: Sequence[int]) -> list[tuple[Tokens, int]]:
        """For each row what may follow its target, at most so many tokens, and the kind of the draft."""
        ...


class NgramDrafter:
    """Copies what followed the longest n-gram, of up to `ngram` tokens, that the target ends with.

    What was written lately goes before the source. A draft is of kind n - 1.
    """

    free = True

    def __init__(self, ngram: int) -> None:
        self.kinds = self.ngram = ngram
        self._rows: list[_Text] = []

    def join(self, sources: Sequence[Sequence[int]], copies: Sequence[int]) -> None:
        for source, n in zip(sources, copies, strict=True):
            first = _Text(list(source), self.ngram)
            self._rows += [first, *(first.copy() for _ in range(n - 1))]

    def select(self, rows: Sequence[int]) -> None:
        taken: set[int] = set()
        chosen = [self._rows[row].copy() if row in taken or taken.add(row) else self._rows[row] for row in rows]
        self._rows = chosen

    def propose(self, targets: Sequence[Tokens], limits: Sequence[int]) -> list[tuple[Tokens, int]]:
        found: list[tuple[Tokens, int]] = []
        for text, target, limit in zip(self._rows, targets, limits, strict=True):
            text.extend(target)
            found.append(text.following(limit))
        return found


class _Text:
    """A source and the target so far, with the place after the last occurrence of every n-gram."""

    def __init__(self, source: Tokens, ngram: int) -> None:
        self.ngram = ngram
        self.tokens, self.start = source, len(source)
        self._written = 0
        self._after: dict[tuple[int, ...], int] = {}
        for place in range(1, len(source)):
            self._note(place, 0)

    def copy(self) -> _Text:
        other = _Text([], self.ngram)
        other.tokens, other.start, other._written = list(self.tokens), self.start, self._written
        other._after = dict(self._after)
        return other

    def _note(self, place: int, first: int) -> None:
        """The n-grams that end before `place`, in the text from `first`."""
        for n in range(1, min(self.ngram, place - first) + 1):
            self._after[tuple(self.tokens[place - n : place])] = place

    def extend(self, target: Tokens) -> None:
        for token in target[self._written :]:
            if self._written:
                self._note(len(self.tokens), self.start)
            self.tokens.append(token)
            self._written += 1

    def following(self, limit: int) -> tuple[Tokens, int]:
        for n in range(min(self.ngram, self._written), 0, -1):
            place = self._after.get(tuple(self.tokens[-n:]))
            if place is not None:
                end = place + limit
                return self.tokens[place : min(end, self.start) if place < self.start else end], n - 1
        return [], 0


class ModelDrafter:
    """A smaller model writes the draft: rows of its own follow those of the model."""

    free = False
    kinds = 1

    def __init__(self, config: ModelConfig, rows: Rows, max_new: int) -> None:
        self.config, self.rows, self.max_new = config, rows, max_new
        self._read: list[Tokens] = []  # what each row's cache holds of its target, the first token included
        self._first: list[int] = []

    def join(self, sources: Sequence[Sequence[int]], copies: Sequence[int]) -> None:
        self.rows.join(sources, copies)
        for source, n in zip(sources, copies, strict=True):
            self._read += [[] for _ in range(n)]
            self._first += [first_token(self.config, source)] * n

    def select(self, rows: Sequence[int]) -> None:
        self.rows.select(rows)
        self._read = [list(self._read[row]) for row in rows]
        self._first = [self._first[row] for row in rows]

    def propose(self, targets: Sequence[Tokens], limits: Sequence[int]) -> list[tuple[Tokens, int]]:
        if not any(limits):
            return [([], 0) for _ in targets]
        texts = [[first, *target] for first, target in zip(self._first, targets, strict=True)]
        wrong = [len(read) - _agreeing(read, text) for read, text in zip(self._read, texts, strict=True)]
        # At least one token is read, to have logits to go on from.
        wrong = [n + (len(read) - n == len(text)) for n, read, text in zip(wrong, self._read, texts, strict=True)]
        if any(wrong):
            self.rows.rollback(wrong)
        behind = [text[len(read) - n :] for n, read, text in zip(wrong, self._read, texts, strict=True)]
        drafts: list[Tokens] = [[] for _ in targets]
        for place in range(max(limits)):
            # Rows that need no more run on with the others; what they read too much is rolled back the next time.
            new = behind if place == 0 else [[draft[-1]] for draft in drafts]
            for draft, logits in zip(drafts, self._in_pieces(new), strict=True):
                draft.append(int(logits.argmax()))
        self._read = [[*text, *draft[:-1]] for text, draft in zip(texts, drafts, strict=True)]
        return [(draft[:limit], 0) for draft, limit in zip(drafts, limits, strict=True)]

    def _in_pieces(self, tokens: Sequence[Tokens]) -> list[RowLogits]:
        """Logits after the last token of each row, which may be more than a step takes."""
        width, longest = self.max_new, max(map(len, tokens))
        for left in range((longest - 1) // width * width, 0, -width):  # aligned at the end, where each row has one
            self.rows.step([new[: -left or None][-width:] if len(new) > left else [] for new in tokens])
        return [logits[-1] for logits in self.rows.step([new[-width:] for new in tokens])]


class StepTimes:
    """Seconds of a step by its rows and the tokens it reads of each: measured, or guessed from the nearest measured."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[float, int]] = {}
        self._steps = 0

    def record(self, rows: int, width: int, seconds: float) -> None:
        self._steps += 1
        before = self._fresh(rows, width)
        if before is not None:  # one hiccup of the machine is no reason to think again
            seconds = before + 0.25 * (min(seconds, 3 * before) - before)
        self._known[rows, width] = seconds, self._steps

    def knows(self, rows: int, width: int) -> bool:
        return self._fresh(rows, width) is not None

    def estimate(self, rows: int, width: int) -> float:
        """In seconds; in steps of one token if nothing is known."""
        known = self._fresh(rows, width)
        if known is not None:
            return known
        near = [other for of_rows, other in self._known if of_rows == rows and self.knows(rows, other)]
        nearest = min(near, key=lambda other: abs(other - width), default=1)
        seconds = self._fresh(rows, nearest) or 1.0
        return seconds * (1 + GUESSED_SHARE * (width - 1)) / (1 + GUESSED_SHARE * (nearest - 1))

    def _fresh(self, rows: int, width: int) -> float | None:
        seconds, step = self._known.get((rows, width), (0.0, -REMEMBERED_STEPS))
        return seconds if self._steps - step < REMEMBERED_STEPS else None


@dataclass
class Success:
    """How often the next drafted token was right, by the kind of the draft; lately counts more."""

    right: list[float]
    tried: list[float]

    @classmethod
    def of(cls, kinds: int, tried: float) -> Success:
        return cls([0.5 * tried] * kinds, [tried] * kinds)

    def rate(self, kind: int, before: float = 0.5) -> float:
        """`before` is what is thought likely without trying, worth two trials."""
        return (self.right[kind] + 2 * before) / (self.tried[kind] + 2)

    def learn(self, kind: int, right: int, tried: int) -> None:
        forget = 0.98**tried
        self.right[kind] = self.right[kind] * forget + right
        self.tried[kind] = self.tried[kind] * forget + tried


class Drafting:
    """What a scheduler asks for drafts, and tells what became of them."""

    def __init__(self, drafter: Drafter, settings: DraftSettings) -> None:
        self.drafter, self.settings = drafter, settings
        self.times = StepTimes()
        self._of_all = Success.of(drafter.kinds, 2.0)
        self._of_rows: list[Success] = []
        self._found: list[tuple[Tokens, int]] = []
        self._width, self._started, self._idle = 1, 0.0, 0

    def join(self, sources: Sequence[Sequence[int]], copies: Sequence[int]) -> None:
        self.drafter.join(sources, copies)
        self._of_rows += [Success.of(self.drafter.kinds, 0.0) for _ in range(sum(copies))]

    def select(self, rows: Sequence[int]) -> None:
        self.drafter.select(rows)
        self._of_rows = [self._of_rows[row] for row in rows]

    def propose(self, requests: Sequence[Request]) -> list[Tokens]:
        """A draft for each row, empty where none is found, or none pays."""
        self._started = time.perf_counter()
        most = self.settings.max_tokens
        limits = [max(0, min(most, r.settings.max_target_tokens - len(r.tokens) - 1)) for r in requests]
        targets = [request.tokens for request in requests]
        if self.drafter.free and self._idle >= IDLE_STEPS and self._idle % LOOK_AGAIN:
            self._idle += 1
            self._found, width = [([], 0)] * len(requests), 0
        elif self.drafter.free:
            self._found = self.drafter.propose(targets, limits)
            width = self._pays([len(draft) for draft, _ in self._found], [kind for _, kind in self._found])
            self._idle = 0 if width else self._idle + any(draft for draft, _ in self._found)
        else:
            width = self._pays(limits, [0] * len(requests))
            self._idle = 0 if width else self._idle + 1
            if self._idle >= IDLE_STEPS:  # what is never tried cannot be known to have improved
                width, self._idle = 1, 0
            self._found = self.drafter.propose(targets, [min(limit, width) for limit in limits])
        drafts = [draft[:width] for draft, _ in self._found]
        self._width = 1 + max(map(len, drafts))
        return drafts

    def _pays(self, lengths: Sequence[int], kinds: Sequence[int]) -> int:
        """The most tokens to draft for a row, of drafts of these lengths."""
        if not self.settings.adaptive or not any(lengths):
            return max(lengths)
        rows = len(lengths)
        if not self.times.knows(rows, 1):  # what all else is compared with
            return 0
        rates = [
            success.rate(kind, self._of_all.rate(kind)) for success, kind in zip(self._of_rows, kinds, strict=True)
        ]

        def speed(width: int) -> float:
            pairs = zip(lengths, rates, strict=True)
            written = sum((1 - rate ** (min(width, length) + 1)) / (1 - rate) for length, rate in pairs)
            return written / self.times.estimate(rows, 1 + width)

        return max(range(max(lengths) + 1), key=speed)

    def measured(self) -> None:
        """The step over the drafts has ended."""
        self.times.record(len(self._found), self._width, time.perf_counter() - self._started)

    def learn(self, written: Sequence[Tokens]) -> None:
        """What each row has got in the step."""
        for (draft, kind), tokens, success in zip(self._found, written, self._of_rows, strict=True):
            compared = min(len(draft), len(tokens))
            right = _agreeing(draft[:compared], tokens)
            for counts in (success, self._of_all):
                counts.learn(kind, right, min(right + 1, compared))


def _agreeing(a: Tokens, b: Tokens) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
