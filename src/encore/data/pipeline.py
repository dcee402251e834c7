"""From token stream or pairs to the batches of a step. Every stage is a pure function of the step's number.

    token stream ──Windows──▶ raw tokens ──causal or denoise──▶ rows ──sort, cut──▶ batches   (pretrain)
    pairs ─────────tokenise──▶ rows ──PairBatches: sort by length under a token budget──▶ batches   (tune)

A step may hold several batches (gradient accumulation). Because `batches(step)` depends on nothing but the data, the
seed and `step`, the whole state of the data is the step's number, and a run that stopped continues with the very
batch it would have had. Window `i` of the stream is the same for every objective: a decoder-only model that learns it
as plain text and an encoder-decoder that denoises it read the same text in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from encore.data.batch import Batch, decoder_batch, encoder_decoder_batch
from encore.data.sources import Pair, note
from encore.tokenizer import Tokenizer

Ids = np.ndarray
BatchesOf = Callable[[int], Sequence[Batch]]
"""Step number (from 0) -> the batches of that step."""


@dataclass(frozen=True)
class Row:
    """One example: the encoder reads `source` (None: no encoder); the first `prompt_tokens` of `target` are given."""

    source: Ids | None
    target: Ids
    prompt_tokens: int = 0


Objective = Callable[[Ids, np.random.Generator], Row]
"""Raw tokens and a random generator -> an example. The generator belongs to this example alone."""


class Windows:
    """Fixed-length cuts of a token stream in an order fixed by the seed: `windows[i]` for any i >= 0.

    Each pass over the text (epoch) starts its cuts at another offset and visits them in another order.
    With `shuffle=False` the cuts start at 0 and come in order (validation).
    """

    def __init__(self, stream: np.ndarray, window_tokens: int, *, seed: int = 0, shuffle: bool = True) -> None:
        if len(stream) < 2 * window_tokens:
            raise ValueError(
                f"the text has {len(stream)} tokens, too few for windows of {window_tokens}; "
                f"give more text, or data.window_tokens of at most {len(stream) // 2}"
            )
        self.stream, self.window_tokens, self.seed, self.shuffle = stream, window_tokens, seed, shuffle
        self.per_epoch = (len(stream) - (window_tokens - 1 if shuffle else 0)) // window_tokens
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)
        self._offset = 0

    def __getitem__(self, index: int) -> Ids:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._open(epoch)
        start = self._offset + int(self._order[place]) * self.window_tokens
        return np.asarray(self.stream[start : start + self.window_tokens], dtype=np.int64)

    def _open(self, epoch: int) -> None:
        self._epoch = epoch
        if self.shuffle:
            random = np.random.default_rng([self.seed, epoch])
            self._offset = int(random.integers(self.window_tokens))
            self._order = random.permutation(self.per_epoch)
        else:
            self._order = np.arange(self.per_epoch)


def causal(window: Ids, random: np.random.Generator) -> Row:
    """Plain text for a decoder-only model: every token of the window is learned, the first one from BOS."""
    return Row(None, window)


class WindowBatches:
    """Batches of `batch_size` windows per step, cut into `accumulation_steps` batches of rows of like length.

    Rows are sorted by length before they are cut, so that a mixture of objectives with short and long targets costs
    little padding; the loss is a mean over the whole step's tokens, so the cut does not change what is learned.
    """

    def __init__(
        self,
        windows: Windows,
        objective: Objective,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        accumulation_steps: int = 1,
        seed: int = 0,
    ) -> None:
        if batch_size % accumulation_steps:
            raise ValueError(f"a batch of {batch_size} windows cannot be cut into {accumulation_steps} equal parts")
        self.windows, self.objective, self.tokenizer = windows, objective, tokenizer
        self.batch_size, self.accumulation_steps, self.seed = batch_size, accumulation_steps, seed

    def row(self, index: int) -> Row:
        return self.objective(self.windows[index], np.random.default_rng([self.seed, 1, index]))

    def __call__(self, step: int) -> list[Batch]:
        return self.batches(range(step * self.batch_size, (step + 1) * self.batch_size))

    def batches(self, indices: Iterable[int]) -> list[Batch]:
        rows = sorted((self.row(index) for index in indices), key=_length_key)
        size = -(-len(rows) // self.accumulation_steps)
        return [collate(rows[i : i + size], self.tokenizer) for i in range(0, len(rows), size)]


@dataclass(frozen=True)
class TokenPair:
    """A pair as plain ids, without any special token."""

    source: Ids
    target: Ids


def tokenize_pairs(
    pairs: Iterable[Pair], tokenizer: Tokenizer, *, max_source_tokens: int, max_target_tokens: int
) -> list[TokenPair]:
    """Pairs -> ids. Pairs over a limit, or empty on a side, are left out, and a note says how many; none is cut."""
    kept: list[TokenPair] = []
    too_long = empty = 0
    waiting = list(pairs)
    sources = tokenizer.encode_batch([pair.source for pair in waiting])
    targets = tokenizer.encode_batch([pair.target for pair in waiting])
    for source, target in zip(sources, targets, strict=True):
        if not source or not target:
            empty += 1
        elif len(source) > max_source_tokens or len(target) > max_target_tokens:
            too_long += 1
        else:
            kept.append(TokenPair(np.asarray(source, dtype=np.int32), np.asarray(target, dtype=np.int32)))
    if too_long or empty:
        note(
            f"left out {too_long} of {len(waiting)} pairs that are longer than {max_source_tokens} source or "
            f"{max_target_tokens} target tokens, and {empty} with an empty side"
        )
    if not kept:
        raise ValueError(
            f"none of the {len(waiting)} pairs can be used; see data.max_source_tokens and data.max_target_tokens"
        )
    return kept


def source_tokens(ids: Ids, tokenizer: Tokenizer) -> Ids:
    """Plain ids -> what the encoder reads, in the tokenizer's source format (the same as `tokenizer.encode_source`)."""
    front = [tokenizer.bos_id] if tokenizer.source_format.bos else []
    back = [tokenizer.eos_id] if tokenizer.source_format.eos else []
    return np.concatenate([np.asarray(front, np.int64), np.asarray(ids, np.int64), np.asarray(back, np.int64)])


def pair_row(pair: TokenPair, tokenizer: Tokenizer, *, encoder: bool) -> Row:
    """A pair -> an example: for an encoder-decoder, or for a decoder-only model, which learns only the target.

    The EOS between source and target is the boundary: no text contains it, and pretraining has taught that something
    new begins after it.
    """
    end = np.asarray([tokenizer.eos_id], np.int64)
    if encoder:
        return Row(source_tokens(pair.source, tokenizer), np.concatenate([pair.target.astype(np.int64), end]))
    text = np.concatenate([pair.source.astype(np.int64), end, pair.target.astype(np.int64), end])
    return Row(None, text, prompt_tokens=len(pair.source) + 1)


class PairBatches:
    """Batches of pairs of like length, each at most `batch_tokens` ids with padding, in an order fixed by the seed.

    The plan depends on the pairs' own lengths only, so both kinds of model get the same pairs in the same batches.
    """

    def __init__(
        self,
        pairs: Sequence[TokenPair],
        tokenizer: Tokenizer,
        *,
        encoder: bool,
        batch_tokens: int,
        accumulation_steps: int = 1,
        seed: int = 0,
    ) -> None:
        self.pairs, self.tokenizer, self.encoder = pairs, tokenizer, encoder
        self.batch_tokens, self.accumulation_steps, self.seed = batch_tokens, accumulation_steps, seed
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
        first = step * self.accumulation_steps
        return [self.collate(self.indices(number)) for number in range(first, first + self.accumulation_steps)]

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
        rows = [pair_row(self.pairs[int(i)], self.tokenizer, encoder=self.encoder) for i in indices]
        return collate(rows, self.tokenizer)

    def _open(self, epoch: int) -> None:
        random = np.random.default_rng([self.seed, epoch])
        total = self._lengths.sum(axis=1)
        noisy = total + random.random(len(total)) * (2 + 0.1 * total)  # so that neighbours differ from epoch to epoch
        batches = _fill(np.argsort(noisy, kind="stable"), self._lengths, self.batch_tokens)
        self._plan = [batches[int(i)] for i in random.permutation(len(batches))]
        self._epoch = epoch


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


def collate(rows: Sequence[Row], tokenizer: Tokenizer) -> Batch:
    """Rows of one kind -> Batch."""
    targets = [row.target for row in rows]
    sources = [row.source for row in rows if row.source is not None]
    if not sources:
        prompts = [row.prompt_tokens for row in rows]
        return decoder_batch(targets, prompts, bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id)
    if len(sources) != len(rows):
        raise ValueError(
            f"{len(rows) - len(sources)} of {len(rows)} rows have no source; a batch holds rows of one kind"
        )
    return encoder_decoder_batch(sources, targets, bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id)


def _length_key(row: Row) -> tuple[int, int]:
    return (len(row.target), 0 if row.source is None else len(row.source))
