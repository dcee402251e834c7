"""The batches of a step, as a pure function of the step's number.

    token tables ──windows, objectives──▶ examples ──mixture──▶ steps ──padded or packed──▶ batches   (pretrain)
    token tables ──pairs──▶ examples ──sorted by length under a token budget──▶ batches               (tune)

A step may hold several batches (gradient accumulation). Because `batches(step)` depends on nothing but the data, the
seed and `step`, the whole state of the data is the step's number, and a run that stopped continues with the very
batch it would have had, on any number of devices and with any number of workers. Window `i` of a text is the same for
every objective: a decoder-only model that learns it as plain text and an encoder-decoder that denoises it read the
same text in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from encore.data.batch import Batch
from encore.data.examples import Framing, Objective, TablePairs, TextExamples, TokenPair, pair_row
from encore.data.layout import Arrays, Row, lay_out
from encore.data.mixture import Mixture
from encore.data.on_the_fly import LivePairs
from encore.data.steps import Steps
from encore.data.windows import Windows
from encore.data.workers import MakesArrays, Prefetched

Ids = np.ndarray
BatchesOf = Callable[[int], Sequence[Batch]]
"""Step number (from 0) -> the batches of that step."""


def collate(rows: Sequence[Row], framing: Framing) -> Batch:
    """Rows of one kind -> Batch, one example per row."""
    return Batch.of(lay_out([[row] for row in rows], bos_id=framing.bos_id, pad_id=framing.pad_id))


class Batches:
    """The batches of steps, made here or by `workers` processes ahead of time."""

    def __init__(self, source: MakesArrays, *, workers: int = 0, num_steps: int = 0) -> None:
        self.source = source
        self._arrays = Prefetched(source, workers, num_steps)

    def __call__(self, step: int) -> list[Batch]:
        return [Batch.of(arrays) for arrays in self._arrays.arrays(step)]

    def close(self) -> None:
        """End the workers, if there are any."""
        self._arrays.close()


class WindowBatches(Steps):
    """Windows of one text under one objective, `batch_size` per step, one per row."""

    def __init__(
        self,
        windows: Windows,
        objective: Objective,
        framing: Framing,
        *,
        batch_size: int,
        accumulation_steps: int = 1,
        seed: int = 0,
    ) -> None:
        mixture = Mixture([TextExamples([windows], objective, seed=seed)])
        super().__init__(mixture, framing, batch_size=batch_size, accumulation_steps=accumulation_steps, seed=seed)

    def row(self, index: int) -> Row:
        return self.mixture.sources[0].row(index)

    def __call__(self, step: int) -> list[Batch]:
        return [Batch.of(arrays) for arrays in self.arrays(step)]

    def batches(self, indices: Iterable[int]) -> list[Batch]:
        return [Batch.of(arrays) for arrays in self.padded(((0, index) for index in indices), self.accumulation_steps)]


class PairBatches:
    """Batches of pairs of like length, each at most `batch_tokens` ids with padding, in an order fixed by the seed.

    The plan depends on the pairs' own lengths only, so both kinds of model get the same pairs in the same batches. For
    pairs that are tokenised on the fly it is made of the lengths to expect, and a batch that comes out longer is cut.
    """

    def __init__(
        self,
        pairs: Sequence[TokenPair] | LivePairs,
        framing: Framing,
        *,
        encoder: bool,
        batch_tokens: int,
        accumulation_steps: int = 1,
        seed: int = 0,
    ) -> None:
        self.pairs, self.framing, self.encoder = pairs, framing, encoder
        self.batch_tokens, self.accumulation_steps, self.seed = batch_tokens, accumulation_steps, seed
        if isinstance(pairs, TablePairs | LivePairs):
            self._lengths = pairs.side_lengths
        else:
            self._lengths = np.array([(len(pair.source), len(pair.target)) for pair in pairs], dtype=np.int64)
        longest = int(self._lengths.sum(axis=1).max())
        if longest > batch_tokens:
            raise ValueError(
                f"the longest pair has {longest} tokens, more than a batch of {batch_tokens}; raise data.batch_tokens, "
                "or lower data.max_source_tokens and data.max_target_tokens"
            )
        self._starts = [0]  # the number of the first batch of each epoch planned so far
        self._epoch = -1
        self._plan: list[Ids] = []

    def __call__(self, step: int) -> list[Batch]:
        return [Batch.of(arrays) for arrays in self.arrays(step)]

    def arrays(self, step: int) -> list[Arrays]:
        """The batches of a step, without torch."""
        first = step * self.accumulation_steps
        return [
            self._lay_out(part)
            for number in range(first, first + self.accumulation_steps)
            for part in self._fitting(self.indices(number))
        ]

    def indices(self, number: int) -> Ids:
        """Which pairs batch `number` holds, counted from the beginning of training."""
        if self._epoch < 0 or not self._starts[self._epoch] <= number < self._starts[self._epoch] + len(self._plan):
            epoch = max(e for e, start in enumerate(self._starts) if start <= number)
            self._open(epoch)
            while number >= self._starts[epoch] + len(self._plan):
                if len(self._starts) == epoch + 1:
                    self._starts.append(self._starts[epoch] + len(self._plan))
                epoch += 1
                self._open(epoch)
        return self._plan[number - self._starts[self._epoch]]

    def in_order(self, max_pairs: int) -> list[Batch]:
        """The first `max_pairs` pairs, sorted by length (validation)."""
        lengths = self._lengths[:max_pairs]
        order = np.lexsort((lengths[:, 1], lengths[:, 0]))
        return [self.collate(indices) for indices in _fill(order, self._lengths, self.batch_tokens)]

    def collate(self, indices: Ids) -> Batch:
        return Batch.of(self._lay_out(indices))

    def _lay_out(self, indices: Ids) -> Arrays:
        rows = [[pair_row(self.pairs[int(i)], self.framing, encoder=self.encoder)] for i in indices]
        return lay_out(rows, bos_id=self.framing.bos_id, pad_id=self.framing.pad_id)

    def _open(self, epoch: int) -> None:
        random = np.random.default_rng([self.seed, epoch])
        total = self._lengths.sum(axis=1)
        noisy = total + random.random(len(total)) * (2 + 0.1 * total)  # so that neighbours differ from epoch to epoch
        self._plan, self._epoch = [], epoch
        for group in self.pairs.groups(epoch) if isinstance(self.pairs, LivePairs) else [np.arange(len(total))]:
            order = group[np.argsort(noisy[group], kind="stable")]
            batches = _fill(order, self._lengths, self.batch_tokens)
            self._plan += [batches[int(i)] for i in random.permutation(len(batches))]

    def _fitting(self, indices: Ids) -> list[Ids]:
        """A batch, in parts if it holds more than was expected."""
        if not isinstance(self.pairs, LivePairs):
            return [indices]
        lengths = np.array([self.pairs.lengths(int(index)) for index in indices], dtype=np.int64)
        return [indices[part] for part in _fill(np.argsort(lengths.sum(axis=1)), lengths, self.batch_tokens)]


def _fill(order: Ids, lengths: np.ndarray, batch_tokens: int) -> list[Ids]:
    batches: list[Ids] = []
    start = 0
    longest = np.zeros(2, dtype=np.int64)
    for end, index in enumerate(order):
        longer = np.maximum(longest, lengths[index])
        if end > start and int(longer.sum()) * (end - start + 1) > batch_tokens:
            batches.append(order[start:end])
            start, longer = end, lengths[index]
        longest = longer
    batches.append(order[start:])
    return batches
