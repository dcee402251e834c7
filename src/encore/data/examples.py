"""Examples: what the encoder reads and the decoder writes, made of a window of text or of a pair.

    TextExamples    stretches of text x an objective (causal, or a mixture of denoising tasks)
    PairExamples    pairs of texts

Example i is a pure function of i (and of the seed): `lengths(i)` without reading anything, `row(i)` in full. A row may
be made of a part of the text only, which is what packing asks for (`encore.data.packing`). No torch here.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from encore.data.layout import Row
from encore.data.token_cache import Table
from encore.data.windows import Order, Stretches
from encore.objectives import ul2
from encore.objectives.denoise import Task, longest_raw_length
from encore.tokenizer import SourceFormat

Ids = np.ndarray
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 x (golden ratio - 1)


class Framing(Protocol):
    """What examples need to know of a tokenizer; `Tokenizer` is one."""

    @property
    def pad_id(self) -> int: ...

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def source_format(self) -> SourceFormat: ...

    @property
    def sentinel_ids(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class SpecialIds:
    """The same without the vocabulary, which is light to send to another process."""

    pad_id: int
    bos_id: int
    eos_id: int
    source_format: SourceFormat
    sentinel_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Framing) -> SpecialIds:
        t = tokenizer
        return cls(t.pad_id, t.bos_id, t.eos_id, t.source_format, t.sentinel_ids)


def source_extra_tokens(framing: Framing) -> int:
    """How many tokens the source format adds."""
    return int(framing.source_format.bos) + int(framing.source_format.eos)


def source_tokens(ids: Ids, framing: Framing) -> Ids:
    """Plain ids -> what the encoder reads, in the tokenizer's source format (the same as `tokenizer.encode_source`)."""
    front = [framing.bos_id] if framing.source_format.bos else []
    back = [framing.eos_id] if framing.source_format.eos else []
    return np.concatenate([np.asarray(front, np.int64), np.asarray(ids, np.int64), np.asarray(back, np.int64)])


class Objective(Protocol):
    """Text -> example, by one of several tasks, each of which has the share of examples that its weight says."""

    tasks: Sequence[Task]

    def make(self, task: int, window: Ids, random: np.random.Generator) -> Row:
        """The example of task number `task`. The generator belongs to it alone."""
        ...

    def lengths(self, task: int, text_tokens: int) -> tuple[int, int]:
        """Its input and target tokens, for so much text."""
        ...

    def longest_text(self, task: int, max_source_tokens: int, max_target_tokens: int) -> int:
        """The most text whose example fits."""
        ...


class Causal:
    """Plain text for a decoder-only model: every token of the window is learned, the first one from BOS."""

    tasks: Sequence[Task] = ul2.MIXTURES["causal"]

    def make(self, task: int, window: Ids, random: np.random.Generator) -> Row:
        return Row(None, window)

    def lengths(self, task: int, text_tokens: int) -> tuple[int, int]:
        return 0, text_tokens

    def longest_text(self, task: int, max_source_tokens: int, max_target_tokens: int) -> int:
        return max_target_tokens


causal = Causal()


class Denoise:
    """A mixture of denoising tasks. `mode_ids`: the token before the inputs for each mode of UL2; None for none."""

    def __init__(self, mixture: ul2.Mixture, framing: Framing, *, mode_ids: Mapping[str, int] | None = None) -> None:
        self.tasks: Sequence[Task] = ul2.mixture_rows(mixture)
        self.framing, self.mode_ids = SpecialIds.of(framing), mode_ids

    def make(self, task: int, window: Ids, random: np.random.Generator) -> Row:
        f = self.framing
        example = ul2.apply(self.tasks[task], window, f.sentinel_ids, f.eos_id, random, mode_ids=self.mode_ids)
        return Row(source_tokens(example.inputs, f), example.targets)

    def lengths(self, task: int, text_tokens: int) -> tuple[int, int]:
        return _task_lengths(self.tasks[task], text_tokens, self._extra(task))

    def longest_text(self, task: int, max_source_tokens: int, max_target_tokens: int) -> int:
        """The most text whose example fits (spec: the budget rule of UL2), given the sentinels that there are."""
        return longest_raw_length(
            self.tasks[task],
            max_source_tokens,
            max_target_tokens,
            source_extra_tokens=self._extra(task),
            num_sentinels=len(self.framing.sentinel_ids),
        )

    def _extra(self, task: int) -> int:
        mode = self.mode_ids is not None and self.tasks[task].mode is not None
        return source_extra_tokens(self.framing) + int(mode)


@lru_cache(maxsize=1 << 16)
def _task_lengths(task: Task, text_tokens: int, extra: int) -> tuple[int, int]:
    return task.lengths(text_tokens, source_extra_tokens=extra)


class Examples(Protocol):
    """The examples of one source, in an order fixed by the seed, without end."""

    per_epoch: int

    def lengths(self, index: int) -> tuple[int, int]:
        """Input and target tokens of example `index`."""
        ...

    def text(self, index: int) -> tuple[int, int]:
        """How many tokens of text it is made of, and which of `rules` gives the lengths of a part (-1: uncuttable)."""
        ...

    @property
    def rules(self) -> Sequence[Callable[[int], tuple[int, int]]]: ...

    def row(self, index: int, start: int = 0, stop: int | None = None) -> Row:
        """The example, or the one made of tokens start to stop of its text."""
        ...

    def kind(self, index: int) -> str:
        """The name of the task, for people."""
        ...


class TextExamples:
    """Stretches of text under an objective. `stretches` has one entry for all tasks, or one per task.

    Which task example i is for comes from the fractional part of start + i x golden ratio, a sequence that fills the
    interval evenly: any stretch of examples, so any step, holds the tasks in very nearly the mixture's shares.
    """

    def __init__(self, stretches: Sequence[Stretches], objective: Objective, *, seed: int, source: int = 0) -> None:
        self.stretches, self.objective, self.seed, self.source = tuple(stretches), objective, seed, source
        self.per_epoch = min(part.per_epoch for part in self.stretches)
        weights = np.cumsum([task.weight for task in objective.tasks])
        self._edges = (weights[:-1] / weights[-1]).tolist()
        self._start = int(np.random.default_rng([seed, source, 3]).integers(1 << 63))

    def task(self, index: int) -> int:
        """Which of the objective's tasks example `index` is for."""
        return bisect.bisect_right(self._edges, ((self._start + index * _GOLDEN) % (1 << 64)) / (1 << 64))

    def _stretches(self, task: int) -> Stretches:
        return self.stretches[task if len(self.stretches) > 1 else 0]

    def lengths(self, index: int) -> tuple[int, int]:
        tokens, task = self.text(index)
        return self.objective.lengths(task, tokens)

    def text(self, index: int) -> tuple[int, int]:
        task = self.task(index)
        return self._stretches(task).tokens(index), task

    @property
    def rules(self) -> Sequence[Callable[[int], tuple[int, int]]]:
        return [
            lambda tokens, task=task: self.objective.lengths(task, tokens) for task in range(len(self.objective.tasks))
        ]

    def row(self, index: int, start: int = 0, stop: int | None = None) -> Row:
        random, task = np.random.default_rng([self.seed, 1, index, self.source, start]), self.task(index)
        return self.objective.make(task, self._stretches(task)[index][start:stop], random)

    def kind(self, index: int) -> str:
        return self.objective.tasks[self.task(index)].name


@dataclass(frozen=True)
class TokenPair:
    """A pair as plain ids, without any special token."""

    source: Ids
    target: Ids


def pair_row(pair: TokenPair, framing: Framing, *, encoder: bool) -> Row:
    """A pair -> an example: for an encoder-decoder, or for a decoder-only model, which learns only the target.

    The EOS between source and target is the boundary: no text contains it, and pretraining has taught that something
    new begins after it.
    """
    end = np.asarray([framing.eos_id], np.int64)
    if encoder:
        return Row(source_tokens(pair.source, framing), np.concatenate([pair.target.astype(np.int64), end]))
    text = np.concatenate([pair.source.astype(np.int64), end, pair.target.astype(np.int64), end])
    return Row(None, text, prompt_tokens=len(pair.source) + 1)


class TablePairs(Sequence[TokenPair]):
    """The pairs of some tables that have both sides, neither over its limit; the ids stay on disk."""

    def __init__(
        self, tables: Sequence[Table], max_source_tokens: int, max_target_tokens: int, max_pairs: int = 0
    ) -> None:
        self.tables = tuple(tables)
        lengths = np.concatenate([np.diff(table.ends, prepend=0).reshape(-1, 2) for table in self.tables])
        where = [(t, p) for t, table in enumerate(self.tables) for p in (0, len(table.ends) // 2)]
        self._starts = np.cumsum([0, *(stop for (_, stop) in where[1::2])])
        lengths = lengths[: max_pairs or None]
        self.read = len(lengths)
        self.empty = int((lengths == 0).any(axis=1).sum())
        fits = (lengths <= (max_source_tokens, max_target_tokens)).all(axis=1)
        good = fits & (lengths > 0).all(axis=1)
        self.too_long = self.read - self.empty - int(good.sum())
        self._numbers = np.flatnonzero(good)
        self.side_lengths = lengths[good]

    def __len__(self) -> int:
        return len(self._numbers)

    def lengths(self, index: int) -> tuple[int, int]:
        """The tokens of a pair's sides, found without reading them."""
        source, target = self.side_lengths[index]
        return int(source), int(target)

    def __getitem__(self, index: int) -> TokenPair:  # pyright: ignore[reportIncompatibleMethodOverride]
        number = int(self._numbers[index])
        table = int(np.searchsorted(self._starts, number, side="right")) - 1
        place = 2 * (number - int(self._starts[table]))
        tokens, ends = self.tables[table].tokens, self.tables[table].ends
        begin = int(ends[place - 1]) if place else 0
        middle, end = int(ends[place]), int(ends[place + 1])
        return TokenPair(np.asarray(tokens[begin:middle]), np.asarray(tokens[middle:end]))


class Pairs(Protocol):
    """Pairs of texts as ids, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TokenPair: ...

    def lengths(self, index: int) -> tuple[int, int]: ...


class PairExamples:
    """Pairs, in another order in each epoch: `order` says in which, if it is not any."""

    rules: Sequence[Callable[[int], tuple[int, int]]] = ()

    def __init__(
        self,
        pairs: Pairs,
        framing: Framing,
        *,
        encoder: bool,
        seed: int,
        source: int = 0,
        shuffle: bool = True,
        order: Callable[[int], int] | None = None,
    ) -> None:
        self.pairs, self.framing, self.encoder = pairs, SpecialIds.of(framing), encoder
        self.per_epoch = len(pairs)
        self._order = order or Order(len(pairs), seed, source, shuffle=shuffle)
        self._extra = source_extra_tokens(framing)

    def lengths(self, index: int) -> tuple[int, int]:
        source, target = self.pairs.lengths(self._order(index))
        return (source + self._extra, target + 1) if self.encoder else (0, source + target + 2)

    def text(self, index: int) -> tuple[int, int]:
        return sum(self.lengths(index)), -1

    def row(self, index: int, start: int = 0, stop: int | None = None) -> Row:
        return pair_row(self.pairs[self._order(index)], self.framing, encoder=self.encoder)

    def kind(self, index: int) -> str:
        return "pairs"
