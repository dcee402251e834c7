"""Packing: every example is in the rows exactly once, whole or in pieces, no row is over its length, and rows fill."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encore.data.packing import AIM, Items, Piece, RowShape, fill, lengths_of, pack, row_shape, whole
from encore.objectives import ul2
from encore.objectives.denoise import Task


def text_items(tasks: list[Task], drawn: list[tuple[int, int]]) -> Items:
    """(tokens of text, task) -> items that may be cut."""
    rules = [partial(Task.lengths, task, source_extra_tokens=2) for task in tasks]
    lengths = np.array([rules[task](text) for text, task in drawn]).reshape(-1, 2)
    text, rule = (np.array([entry[side] for entry in drawn], dtype=np.int64) for side in (0, 1))
    return Items(lengths, text, rule, rules)


def check(items: Items, rows: list[list[Piece]], shape: RowShape) -> None:
    found: dict[int, list[Piece]] = {}
    for row in rows:
        assert row
        used = np.sum([lengths_of(items, piece) for piece in row], axis=0)
        assert used[0] <= shape.encoder and used[1] <= shape.decoder
        for piece in row:
            found.setdefault(piece.item, []).append(piece)
    assert sorted(found) == list(range(len(items.text)))
    for item, pieces in found.items():
        pieces.sort(key=lambda piece: piece.start)
        assert pieces[0].start == 0 and pieces[-1].stop == items.text[item]
        assert all(left.stop == right.start for left, right in itertools.pairwise(pieces))
        assert all(piece.stop > piece.start for piece in pieces)
        assert items.rule[item] >= 0 or len(pieces) == 1


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 4)), max_size=60), st.integers(40, 200))
def test_text_is_packed_once_in_whole_or_in_pieces(drawn: list[tuple[int, int]], room: int) -> None:
    items = text_items(list(ul2.MIXTURES["t5gemma2"]), drawn)
    shape = RowShape(room, room + 7)
    rows = pack(items, shape)
    check(items, rows, shape)
    assert rows == pack(items, shape)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=60), st.integers(20, 70))
def test_pairs_are_packed_once_and_never_cut(lengths: list[tuple[int, int]], room: int) -> None:
    items = whole(lengths)
    shape = RowShape(room, room)
    check(items, pack(items, shape), shape)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_decoder_only_rows_have_one_side(lengths: list[int]) -> None:
    items = whole([(0, length) for length in lengths])
    shape = row_shape(items, items.lengths.mean(axis=0))
    assert shape.encoder == 0
    check(items, pack(items, shape), shape)


def test_what_fits_no_row_says_what_to_raise() -> None:
    with pytest.raises(ValueError, match=r"30 input and 4 target tokens .* data\.encoder_row_tokens"):
        pack(whole([(1, 1), (30, 4)]), RowShape(20, 20))


def test_the_rows_of_the_docstring() -> None:
    shape = RowShape(10, 10)
    items = whole([(6, 5), (3, 1), (1, 4)])
    (row,) = pack(items, shape)
    assert sorted(piece.item for piece in row) == [0, 1, 2] and fill(items, [row], shape) == (1.0, 1.0)


@pytest.mark.parametrize("mixture", ["t5gemma2", "ul2", "prefixlm"])
@pytest.mark.parametrize("window", [256, 1024, 4096])
def test_mixtures_fill_rows_to_more_than_the_aim(mixture: str, window: int) -> None:
    tasks = list(ul2.MIXTURES[mixture])
    weights = np.array([task.weight for task in tasks])
    drawn = np.random.default_rng(0).choice(len(tasks), size=512, p=weights / weights.sum())
    items = text_items(tasks, [(window, int(task)) for task in drawn])
    means = items.lengths.mean(axis=0)
    shape = row_shape(items, means)
    assert min(fill(items, pack(items, shape), shape)) > AIM
    assert shape.encoder / shape.decoder == pytest.approx(means[0] / means[1], rel=0.02)


def test_a_length_that_is_given_stays_and_the_other_follows_the_ratio() -> None:
    items = whole([(10, 30), (20, 30)])
    means = items.lengths.mean(axis=0)
    assert row_shape(items, means, encoder_row_tokens=96) == RowShape(96, 192)
    assert row_shape(items, means, decoder_row_tokens=96) == RowShape(48, 96)
    assert row_shape(items, means, encoder_row_tokens=50, decoder_row_tokens=60) == RowShape(50, 60)
