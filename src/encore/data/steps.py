"""A mixture -> the arrays of a step: so many examples, one per row or packed. A pure function of the step's number.

    examples of a step ──lengths──▶ sorted, cut into batches, padded                  (one example per row)
    examples of a pool of steps ──lengths──▶ rows ──shuffled, dealt out to the steps  (packed)

Packing looks at the lengths of a whole pool of examples (some steps' worth) before it reads any text, so that rows are
full; the pool's rows are dealt out to its steps evenly, so a step may have a row more than another. Whatever step is
asked for first, on whichever machine, its pool comes out the same. No torch here: workers run this.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from encore.data.examples import Framing, SpecialIds
from encore.data.layout import Arrays, Row, lay_out
from encore.data.mixture import Mixture
from encore.data.packing import Items, Piece, RowShape, pack, row_shape

_SAMPLE = 4096


@dataclass(frozen=True)
class Packing:
    """How rows are packed: their lengths (0: from the data), and how many examples at least are packed together."""

    encoder_row_tokens: int = 0
    decoder_row_tokens: int = 0
    pool_examples: int = 1024


@dataclass(frozen=True)
class Pool:
    """The examples (source, index) packed together, and the rows they came to."""

    examples: list[tuple[int, int]]
    items: Items
    rows: list[list[Piece]]


class Steps:
    """`steps.arrays(step)`: `batch_size` examples per step, as the arrays of `accumulation_steps` batches."""

    def __init__(
        self,
        mixture: Mixture,
        framing: Framing,
        *,
        batch_size: int,
        accumulation_steps: int = 1,
        seed: int = 0,
        packing: Packing | None = None,
    ) -> None:
        if batch_size % accumulation_steps:
            raise ValueError(f"a batch of {batch_size} examples cannot be cut into {accumulation_steps} equal parts")
        self.mixture, self.framing, self.packing = mixture, SpecialIds.of(framing), packing
        self.batch_size, self.accumulation_steps, self.seed = batch_size, accumulation_steps, seed
        self.pool_steps = -(-packing.pool_examples // batch_size) if packing else 1
        self._pools: dict[int, Pool] = {}

    def arrays(self, step: int) -> list[Arrays]:
        """The batches of a step."""
        if self.packing is None:
            examples = self.mixture.between(step * self.batch_size, (step + 1) * self.batch_size)
            return self.padded(examples, self.accumulation_steps)
        number, place = divmod(step, self.pool_steps)
        pool = self.pool(number)
        begin, end = (len(pool.rows) * n // self.pool_steps for n in (place, place + 1))
        rows = [[self._example(pool, piece) for piece in row] for row in pool.rows[begin:end]]
        parts = min(self.accumulation_steps, len(rows))
        cuts = [len(rows) * n // parts for n in range(parts + 1)] if parts else []
        return [self._lay_out(rows[a:b], self.shape) for a, b in itertools.pairwise(cuts)]

    def padded(self, examples: Iterable[tuple[int, int]], parts: int) -> list[Arrays]:
        """Examples (source, index), one per row, sorted by length and cut into `parts` batches of like length.

        The loss is a mean over the whole step's tokens, so the cut does not change what is learned.
        """
        rows = sorted((self.mixture.sources[source].row(index) for source, index in examples), key=_length_key)
        size = -(-len(rows) // parts)
        return [self._lay_out([[row] for row in rows[i : i + size]]) for i in range(0, len(rows), size)]

    @cached_property
    def shape(self) -> RowShape:
        """The lengths of packed rows: as asked for, else after the first examples' own."""
        asked = self.packing or Packing()
        sample = self._items(self.mixture.between(0, max(_SAMPLE, self.batch_size * self.pool_steps)))
        tried = self._items(self.mixture.between(0, self.batch_size * self.pool_steps))
        return row_shape(
            tried,
            sample.lengths.mean(axis=0),
            encoder_row_tokens=asked.encoder_row_tokens,
            decoder_row_tokens=asked.decoder_row_tokens,
            least_rows=self.pool_steps * self.accumulation_steps,
        )

    def pool(self, number: int) -> Pool:
        """The packed examples of pool `number`."""
        if number not in self._pools:
            examples_per_pool = self.batch_size * self.pool_steps
            examples = self.mixture.between(number * examples_per_pool, (number + 1) * examples_per_pool)
            items = self._items(examples)
            rows = pack(items, self.shape)
            if len(rows) < self.pool_steps:
                raise ValueError(
                    f"{self.batch_size} examples a step fill less than one row of {self.shape.encoder} input and "
                    f"{self.shape.decoder} target tokens; raise train.batch_size, or give shorter rows with "
                    "data.encoder_row_tokens and data.decoder_row_tokens"
                )
            order = np.random.default_rng([self.seed, number, 2]).permutation(len(rows))
            self._pools = dict(list(self._pools.items())[-1:])  # this one and the last
            self._pools[number] = Pool(examples, items, [rows[int(i)] for i in order])
        return self._pools[number]

    def _items(self, examples: list[tuple[int, int]]) -> Items:
        sources = self.mixture.sources
        rules = [rule for source in sources for rule in source.rules]
        first = np.cumsum([0, *(len(source.rules) for source in sources)])
        made: list[tuple[int, int, int, int]] = []
        for source, index in examples:
            text, rule = sources[source].text(index)
            inputs, targets = sources[source].lengths(index) if rule < 0 else rules[first[source] + rule](text)
            made.append((inputs, targets, text, rule if rule < 0 else int(first[source]) + rule))
        table = np.array(made, dtype=np.int64)
        return Items(table[:, :2], table[:, 2], table[:, 3], rules)

    def _example(self, pool: Pool, piece: Piece) -> Row:
        source, index = pool.examples[piece.item]
        return self.mixture.sources[source].row(index, piece.start, piece.stop)

    def _lay_out(self, rows: list[list[Row]], shape: RowShape | None = None) -> Arrays:
        return lay_out(
            rows,
            bos_id=self.framing.bos_id,
            pad_id=self.framing.pad_id,
            encoder_tokens=shape.encoder if shape else 0,
            decoder_tokens=shape.decoder if shape else 0,
            segments=shape is not None,
        )

    def __getstate__(self) -> dict[str, object]:
        if self.packing:
            _ = self.shape  # found once, before a copy goes to each worker
        return {**self.__dict__, "_pools": {}}


def _length_key(row: Row) -> tuple[int, int]:
    return (len(row.target), 0 if row.source is None else len(row.source))
