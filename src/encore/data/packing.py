"""Examples of two lengths (input, target) into rows of two lengths, with little left empty on either side.

This is vector bin packing. Rows are filled one after the other: the largest example that is left opens a row, then
comes, again and again, the example that leaves the least squared remainder, both sides measured in shares of the row
(the norm-based greedy of Panigrahy, Talwar, Uyeda and Wieder, "Heuristics for Vector Bin Packing", 2011). A row whose
encoder side is full and whose decoder side is not is what to avoid, so the squared difference of the sides is added.

Running text can be cut anywhere, so where no whole example fits any more, a piece of one does: its rest is an example
of its own, among those that still wait. Nothing is lost and nothing is doubled. Pairs are never cut.

    lengths (6, 5) (3, 1) (1, 4)   row (10, 10)   ->   one row, 10 and 10 of 10

Rows are as long on each side as the mean lengths of what is packed ask for (`row_shape`), unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

AIM = 0.95
_MEAN_EXAMPLES = (4, 6, 8, 12, 16)  # how many mean examples make a row, when nothing is said
_SHORTER = (1.5, 2, 3)  # where rows of four would leave a step without any
_MULTIPLE = 8
_SHORTEST_PIECE = 8  # tokens of text
_BALANCE = 3.0  # what it counts that the two sides fill up alike
_TAKEN = np.iinfo(np.int64).max

LengthsOf = Callable[[int], tuple[int, int]]
"""Tokens of text -> lengths of the example made of them. Neither falls as the text grows."""


class Piece(NamedTuple):
    """Tokens start to stop of the text of example `item`; all of it, unless the example was cut."""

    item: int
    start: int
    stop: int


@dataclass(frozen=True)
class RowShape:
    """Tokens of a row on each side; `encoder` is 0 for a decoder-only model."""

    encoder: int
    decoder: int


@dataclass(frozen=True)
class Items:
    """What is to be packed: `lengths` (N, 2), input and target tokens of each example.

    `text` (N,) is how many tokens of text each is made of, and `rule` (N,) which of `rules` gives the lengths of a
    piece of it; -1 for what must stay whole.
    """

    lengths: np.ndarray
    text: np.ndarray
    rule: np.ndarray
    rules: Sequence[LengthsOf] = ()


def whole(lengths: Sequence[tuple[int, int]] | np.ndarray) -> Items:
    """Items that must not be cut."""
    array = np.asarray(lengths, dtype=np.int64).reshape(-1, 2)
    return Items(array, array.sum(axis=1), np.full(len(array), -1))


def pack(items: Items, shape: RowShape) -> list[list[Piece]]:
    """The pieces of each row. Depends on nothing but the arguments.

    Raises ValueError for an example that must stay whole and is longer than a row.
    """
    return _Packing(items, shape).rows()


class _Packing:
    """What is waiting: a place per example or rest of one, the largest example first; taken places are closed."""

    def __init__(self, items: Items, shape: RowShape) -> None:
        self.items = items
        self.room = np.array([shape.encoder, shape.decoder], dtype=np.int64)
        self.capacity = np.maximum(self.room, 1)  # to divide by
        over = (items.lengths > self.room).any(axis=1)
        if (stuck := np.flatnonzero(over & (items.rule < 0))).size:
            inputs, targets = (int(n) for n in items.lengths[stuck[0]])
            raise ValueError(
                f"an example of {inputs} input and {targets} target tokens does not fit a row of {shape.encoder} and "
                f"{shape.decoder}; raise data.encoder_row_tokens and data.decoder_row_tokens, or shorten the examples"
            )
        order = np.argsort(-(items.lengths / self.capacity).max(axis=1, initial=0), kind="stable")
        self.pieces = [Piece(int(item), 0, int(items.text[item])) for item in order]
        self.inputs, self.targets = (np.ascontiguousarray(items.lengths[order, side]) for side in (0, 1))
        self.rule = items.rule[order]
        self.first = 0
        self.waiting = len(order)

    def rows(self) -> list[list[Piece]]:
        made: list[list[Piece]] = []
        while self.waiting:
            row: list[Piece] = []
            left = self.room.copy()
            place = self._largest(left)
            while place is not None:
                left -= (self.inputs[place], self.targets[place])
                row.append(self._take(place))
                place = self._best(left)
            while (piece := self._cut(left)) is not None:
                left -= self.items.rules[self.items.rule[piece.item]](piece.stop - piece.start)
                row.append(piece)
            made.append(row)
            if 2 * self.waiting < len(self.pieces):
                self._close_ranks()
        return made

    def _largest(self, left: np.ndarray) -> int | None:
        """What opens a row: the largest that waits, if it fits at all."""
        while self.inputs[self.first] == _TAKEN:
            self.first += 1
        fits = self.inputs[self.first] <= left[0] and self.targets[self.first] <= left[1]
        return self.first if fits else self._best(left)

    def _best(self, left: np.ndarray) -> int | None:
        fitting = np.flatnonzero((self.inputs <= left[0]) & (self.targets <= left[1]))
        if not fitting.size:
            return None
        inputs = (left[0] - self.inputs[fitting]) / self.capacity[0]
        targets = (left[1] - self.targets[fitting]) / self.capacity[1]
        return int(fitting[np.argmin(_badness(inputs, targets))])

    def _take(self, place: int) -> Piece:
        self.inputs[place] = _TAKEN
        self.waiting -= 1
        return self.pieces[place]

    def _close_ranks(self) -> None:
        open_places = np.flatnonzero(self.inputs < _TAKEN)
        self.pieces = [self.pieces[place] for place in open_places]
        self.inputs, self.targets, self.rule = (a[open_places] for a in (self.inputs, self.targets, self.rule))
        self.first = 0

    def _cut(self, left: np.ndarray) -> Piece | None:
        """The piece that fills the rest of a row best; what it was cut from goes on waiting, shorter."""
        best: tuple[float, int, int] | None = None
        for number, rule in enumerate(self.items.rules):
            place = int(np.argmax((self.rule == number) & (self.inputs < _TAKEN)))  # the largest of its kind
            if self.rule[place] != number or self.inputs[place] == _TAKEN:
                continue
            piece = self.pieces[place]
            tokens = _longest(rule, left, piece.stop - piece.start - _SHORTEST_PIECE)
            if tokens < _SHORTEST_PIECE:
                continue
            inputs, targets = (left - rule(tokens)) / self.capacity
            badness = _badness(inputs, targets)
            if best is None or badness < best[0]:
                best = (badness, place, tokens)
        if best is None:
            return None
        _, place, tokens = best
        piece = self.pieces[place]
        middle = piece.start + tokens
        self.pieces[place] = Piece(piece.item, middle, piece.stop)
        self.inputs[place], self.targets[place] = self.items.rules[self.rule[place]](piece.stop - middle)
        return Piece(piece.item, piece.start, middle)


def _badness(inputs: Any, targets: Any) -> Any:
    """Of what is left of a row on each side, in shares of it."""
    return inputs * inputs + targets * targets + _BALANCE * (inputs - targets) ** 2


def _longest(lengths: LengthsOf, left: np.ndarray, most: int) -> int:
    """The most tokens of text, up to `most`, whose example fits into `left`; 0 if none do."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        inputs, targets = lengths(middle)
        low, high = (middle, high) if inputs <= left[0] and targets <= left[1] else (low, middle)
    return low


def fill(items: Items, rows: Sequence[Sequence[Piece]], shape: RowShape) -> tuple[float, float]:
    """The share of each side's places that hold a token, over all rows."""
    used = np.zeros(2, dtype=np.int64)
    for piece in (piece for row in rows for piece in row):
        used += lengths_of(items, piece)
    encoder, decoder = (int(n) for n in used)
    places = len(rows) * shape.encoder
    return encoder / places if places else 1.0, decoder / (len(rows) * shape.decoder)


def lengths_of(items: Items, piece: Piece) -> tuple[int, int]:
    """Input and target tokens of a piece."""
    if piece.stop - piece.start < items.text[piece.item]:
        return items.rules[items.rule[piece.item]](piece.stop - piece.start)
    inputs, targets = items.lengths[piece.item]
    return int(inputs), int(targets)


def row_shape(
    items: Items,
    means: np.ndarray,
    *,
    encoder_row_tokens: int = 0,
    decoder_row_tokens: int = 0,
    least_rows: int = 1,
) -> RowShape:
    """The shape of rows for examples like these; a length that is given (not 0) stays as it is.

    The sides are in the ratio of `means`, the mean lengths. With neither given, rows are the shortest of a few that
    hold every example and fill to more than AIM on both sides; where none does, the one that fills best. Rows are not
    so long that `items` come to fewer than `least_rows`, if they hold the longest example even so.
    """
    has_inputs = means[0] > 0
    if encoder_row_tokens and decoder_row_tokens:
        return RowShape(encoder_row_tokens if has_inputs else 0, decoder_row_tokens)
    if encoder_row_tokens and has_inputs:
        return RowShape(encoder_row_tokens, _rounded(encoder_row_tokens * means[1] / means[0]))
    if decoder_row_tokens:
        return RowShape(_rounded(decoder_row_tokens * means[0] / means[1]) if has_inputs else 0, decoder_row_tokens)
    longest = items.lengths.max(axis=0)
    smallest = max(float(n / mean) for n, mean in zip(longest, means, strict=True) if mean > 0)
    best: tuple[bool, float, RowShape] | None = None
    for examples in (n for n in (*_MEAN_EXAMPLES, *_SHORTER[::-1], smallest) if n >= smallest):
        if best and best[0] and examples < _MEAN_EXAMPLES[0]:
            break  # shorter ones only where the others are too long
        shape = RowShape(_rounded(examples * means[0]), _rounded(examples * means[1]))
        rows = pack(items, shape)
        tried = len(rows) >= least_rows, min(fill(items, rows, shape)), shape
        best = tried if best is None else max(best, tried, key=lambda entry: entry[:2])
        if best[0] and best[1] > AIM:
            break
    assert best is not None
    return best[2]


def _rounded(tokens: float) -> int:
    return -(-int(np.ceil(tokens)) // _MULTIPLE) * _MULTIPLE
