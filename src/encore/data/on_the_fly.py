"""Stretches and pairs of a `Corpus`, tokenised when they are asked for: what runs without a token cache read.

Like their kin over token tables (`windows.Windows`, `windows.Documents`, `examples.TablePairs`), what number i is
depends on nothing but i, the seed and the data. Two things differ, because nobody knows where a token stands before
all tokens before it are counted:

    places     a window begins at a word after a number of characters, not of tokens, and is as many tokens long as it
               should: neighbours may overlap, or leave a few words out, which in the next epoch lie elsewhere
    order      blocks of text are shuffled, and what lies in 16 M characters of them is shuffled together, so that what
               is needed next is in memory; of files that can only be read from the front the blocks stay in order
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from encore.data.corpus import Corpus
from encore.data.examples import TokenPair

Ids = np.ndarray
_GROUP_CHARACTERS = 1 << 24
_HELD_TOKENS = 1 << 23
_SHORTEST_DOCUMENT = 3  # two tokens and EOS
_ROOM = 1.1  # so much more than the expected tokens of a document find a place in its windows


class LocalOrder:
    """An order, epoch after epoch, of things that lie in blocks, of which only some fit into memory at a time.

    Args:
        counts: how many things each block has. They are numbered through, block after block.
        characters, cheap: of each block its size, and whether it may be read without the one before it.
    """

    def __init__(
        self, counts: np.ndarray, characters: np.ndarray, cheap: np.ndarray, *, seed: int, stream: int
    ) -> None:
        self.counts, self.characters, self.seed, self.stream = counts, characters, seed, stream
        self.number = int(counts.sum())
        self._first = np.cumsum(counts) - counts
        self._run = np.cumsum(cheap) - 1
        self._epoch = self._group = -1

    def __call__(self, index: int) -> int:
        """The thing at place `index`, counted from the beginning of training."""
        epoch, place = divmod(index, self.number)
        self._open(epoch)
        group = int(np.searchsorted(self._edges, place, side="right")) - 1
        if group != self._group:
            size = int(self._edges[group + 1] - self._edges[group])
            random = np.random.default_rng([self.seed, epoch, 5, self.stream, group])
            self._group, self._within = group, random.permutation(size)
        begin = int(self._edges[group])
        return int(self._thing(begin + self._within[place - begin]))

    def groups(self, epoch: int) -> list[np.ndarray]:
        """The things of each group of an epoch, not shuffled yet."""
        self._open(epoch)
        edges = zip(self._edges[:-1], self._edges[1:], strict=True)
        return [self._thing(np.arange(begin, end)) for begin, end in edges if end > begin]

    def _thing(self, place: np.ndarray) -> np.ndarray:
        at = np.searchsorted(self._starts, place, side="right") - 1
        return self._first[self._order[at]] + place - self._starts[at]

    def _open(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch, self._group = epoch, -1
        runs = np.random.default_rng([self.seed, epoch, 4, self.stream]).permutation(int(self._run[-1]) + 1)
        self._order = np.argsort(runs[self._run], kind="stable")
        counts = self.counts[self._order]
        self._starts = np.cumsum(counts) - counts
        group = (np.cumsum(self.characters[self._order]) - 1) // _GROUP_CHARACTERS
        firsts = np.flatnonzero(np.diff(group, prepend=-1))
        self._edges = np.append(self._starts[firsts], self.number)

    def __getstate__(self) -> dict[str, object]:
        left = {"_within", "_order", "_starts", "_edges"}
        kept = {key: value for key, value in self.__dict__.items() if key not in left}
        return {**kept, "_epoch": -1, "_group": -1}


class LiveWindows:
    """Windows of equal lengths across documents. `max_tokens`: of the text, from its beginning, or so; 0 for all."""

    def __init__(
        self, corpus: Corpus, window_tokens: int, *, seed: int = 0, source: int = 0, max_tokens: int = 0
    ) -> None:
        self.corpus, self.window_tokens, self.seed, self.source = corpus, window_tokens, seed, source
        self.end = _characters(corpus, max_tokens)
        self.span = max(1, round(window_tokens / corpus.tokens_per_character))
        if self.end < 2 * self.span:
            tokens = int(self.end * corpus.tokens_per_character)
            raise ValueError(
                f"the text has some {tokens} tokens, too few for windows of {window_tokens}; give more text, or "
                f"data.window_tokens of at most {max(1, tokens // 2)}"
            )
        self.per_epoch = self.end // self.span
        firsts = np.minimum(-(-corpus.character_starts // self.span), self.per_epoch)
        self._order = LocalOrder(np.diff(firsts), corpus.block_characters, corpus.cheap, seed=seed, stream=source)

    def __getitem__(self, index: int) -> Ids:
        offset = int(np.random.default_rng([self.seed, index // self.per_epoch, 6, self.source]).integers(self.span))
        position = (self._order(index) * self.span + offset) % self.end
        return self.corpus.ids_from(position, self.window_tokens, self.end)

    def tokens(self, index: int) -> int:
        return self.window_tokens


class LiveDocuments:
    """Windows that never cross from one document into the next; a document is tokenised when one of its is needed.

    How many windows a document has follows from its characters, with a tenth to spare. What a document of unusually
    many tokens has beyond them is left out.
    """

    def __init__(
        self,
        corpus: Corpus,
        window_tokens: int,
        *,
        seed: int = 0,
        source: int = 0,
        max_tokens: int = 0,
        keep_eos: bool = True,
    ) -> None:
        self.corpus, self.window_tokens, self.keep_eos = corpus, window_tokens, keep_eos
        characters = corpus.record_lengths()[:, 0].astype(np.int64)
        expected = characters * (_ROOM * corpus.tokens_per_character)
        pieces = np.maximum(np.ceil(expected / window_tokens).astype(np.int64), 1)
        pieces[np.cumsum(characters) - characters >= _characters(corpus, max_tokens)] = 0
        self.last_pieces = np.cumsum(pieces)  # the number of pieces up to and with each document
        self.per_epoch = int(self.last_pieces[-1])
        before = np.concatenate([[0], self.last_pieces])[corpus.record_starts]
        self._order = LocalOrder(np.diff(before), corpus.block_characters, corpus.cheap, seed=seed, stream=source)
        self._ids = _Held()

    def __getitem__(self, index: int) -> Ids:
        piece = self._order(index)
        for _ in range(self.per_epoch):
            document = int(np.searchsorted(self.last_pieces, piece, side="right"))
            before = int(self.last_pieces[document - 1]) if document else 0
            number, pieces = piece - before, int(self.last_pieces[document]) - before
            ids = self._document(document)
            length = min(len(ids), pieces * self.window_tokens)
            begin, end = length * number // pieces, length * (number + 1) // pieces
            if end - begin >= _SHORTEST_DOCUMENT - (not self.keep_eos):
                return ids[begin:end].astype(np.int64)
            piece = (piece + 1) % self.per_epoch  # too short for anything: the next one stands in
        raise ValueError(f"the text has no document of {_SHORTEST_DOCUMENT - 1} tokens or more")

    def tokens(self, index: int) -> int:
        return len(self[index])

    def _document(self, number: int) -> Ids:
        if (held := self._ids.get(number)) is not None:
            return held
        record, tokenizer = self.corpus.record(number), self.corpus.tokenizer
        ids = tokenizer.encode(record.values[0], eos=record.last and self.keep_eos)
        return self._ids.keep(number, np.asarray(ids, np.uint32))


class LivePairs:
    """Pairs of texts. One that is longer than a limit, or has an empty side, is replaced by the next that is not.

    `side_lengths` (N, 2) are those to expect, from the characters; `lengths(i)` are those there are.
    """

    def __init__(
        self,
        corpus: Corpus,
        max_source_tokens: int,
        max_target_tokens: int,
        *,
        max_pairs: int = 0,
        max_tokens: int = 0,
        seed: int = 0,
        number: int = 0,
    ) -> None:
        self.corpus, self.limits = corpus, (max_source_tokens, max_target_tokens)
        self.max_tokens = max_tokens or sum(self.limits)
        self.number = min(corpus.num_records, max_pairs or corpus.num_records)
        expected = np.ceil(corpus.record_lengths()[: self.number] * corpus.tokens_per_character).astype(np.int64)
        source, target = np.clip(expected, 1, self.limits).T
        source = np.minimum(source, self.max_tokens - 1)
        self.side_lengths = np.stack([source, np.minimum(target, self.max_tokens - source)], axis=1)
        counts = np.diff(np.minimum(corpus.record_starts, self.number))
        self.order = LocalOrder(counts, corpus.block_characters, corpus.cheap, seed=seed, stream=number)
        self._ids = _Held()

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> TokenPair:
        for number in range(index, index + self.number):
            source, target = self._pair(number % self.number)
            sides = len(source), len(target)
            if 0 < sides[0] <= self.limits[0] and 0 < sides[1] <= self.limits[1] and sum(sides) <= self.max_tokens:
                return TokenPair(source, target)
        raise ValueError(
            f"none of the {self.number} pairs can be used; see data.max_source_tokens and data.max_target_tokens"
        )

    def lengths(self, index: int) -> tuple[int, int]:
        pair = self[index]
        return len(pair.source), len(pair.target)

    def groups(self, epoch: int) -> list[Ids]:
        """The pairs that are read together, group by group."""
        return self.order.groups(epoch)

    def _pair(self, number: int) -> tuple[Ids, Ids]:
        both = self._ids.get(number)
        if both is None:
            sides = self.corpus.tokenizer.encode_batch(self.corpus.record(number).values)
            both = self._ids.keep(number, np.asarray([len(sides[0]), *sides[0], *sides[1]], np.uint32))
        middle = 1 + int(both[0])
        return both[1:middle], both[middle:]


class _Held:
    """The ids last used, by number: `_HELD_TOKENS` of them at most."""

    def __init__(self) -> None:
        self._arrays: OrderedDict[int, Ids] = OrderedDict()
        self._tokens = 0

    def get(self, number: int) -> Ids | None:
        if number in self._arrays:
            self._arrays.move_to_end(number)
        return self._arrays.get(number)

    def keep(self, number: int, ids: Ids) -> Ids:
        self._arrays[number] = ids
        self._tokens += len(ids)
        while self._tokens > _HELD_TOKENS and len(self._arrays) > 1:
            self._tokens -= len(self._arrays.popitem(last=False)[1])
        return ids

    def __reduce__(self) -> tuple[type[_Held], tuple[()]]:
        return _Held, ()


def _characters(corpus: Corpus, max_tokens: int) -> int:
    """So many characters of a corpus have about `max_tokens` tokens."""
    everything = corpus.num_characters
    return min(everything, round(max_tokens / corpus.tokens_per_character)) if max_tokens else everything
