"""Which stretch of a text is the i-th window, for any i >= 0: an order fixed by the seed, epoch after epoch.

joined      | doc one EOS doc | two EOS doc thre | e EOS …      `Windows`: equal lengths, across documents
separate    | doc one EOS | doc two EOS | doc th | ree EOS |    `Documents`: within one document, at most as long
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from encore.data.token_cache import TokenStream

Ids = np.ndarray
_SHORTEST_DOCUMENT = 3  # two tokens and EOS
_LARGEST_TABLE = 1 << 22  # of an epoch's order in memory
_ROUNDS = 6
_MULTIPLIER = 0x9E3779B97F4A7C15
_SIXTY_FOUR_BITS = (1 << 64) - 1


class Stretches(Protocol):
    """A text cut into windows."""

    per_epoch: int

    def __getitem__(self, index: int) -> Ids: ...

    def tokens(self, index: int) -> int:
        """The length of `self[index]`, found without reading it."""
        ...


class Order:
    """The order of `number` things in each epoch: of place i, counted from the beginning of training, the thing."""

    def __init__(self, number: int, seed: int, stream: int, *, shuffle: bool, span: int = 1) -> None:
        self.number, self.seed, self.stream, self.shuffle = number, seed, stream, shuffle
        self.span = span
        self.offset = 0  # a whole number below `span`, drawn anew for each epoch
        self._epoch = -1
        self._order: np.ndarray | Permutation = np.zeros(0, dtype=np.int64)

    def __call__(self, index: int) -> int:
        epoch, place = divmod(index, self.number)
        if epoch != self._epoch:
            self._open(epoch)
        return int(self._order[place]) if self.shuffle else place

    def _open(self, epoch: int) -> None:
        self._epoch = epoch
        if self.shuffle:
            random = np.random.default_rng([self.seed, epoch, 0, self.stream])
            self.offset = int(random.integers(self.span))
            large = self.number > _LARGEST_TABLE
            self._order = Permutation(self.number, random) if large else random.permutation(self.number)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epoch": -1, "_order": np.zeros(0, dtype=np.int64)}


class Permutation:
    """An order of many things that takes no memory: a Feistel network on the bits of their numbers.

    Numbers that leave the range are sent through again until they are back in it (cycle walking), which keeps it a
    permutation (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """

    def __init__(self, number: int, random: np.random.Generator) -> None:
        self.number = number
        self._bits = max(1, ((number - 1).bit_length() + 1) // 2)
        self._keys = [int(key) for key in random.integers(1 << 63, size=_ROUNDS)]

    def __getitem__(self, place: int) -> int:
        mask = (1 << self._bits) - 1
        while True:
            left, right = place >> self._bits, place & mask
            for key in self._keys:
                mixed = ((right ^ key) * _MULTIPLIER) & _SIXTY_FOUR_BITS
                mixed = ((mixed ^ (mixed >> 32)) * _MULTIPLIER) & _SIXTY_FOUR_BITS
                left, right = right, left ^ (mixed >> (64 - self._bits))
            place = left << self._bits | right
            if place < self.number:
                return place


class Windows:
    """Fixed-length cuts of a token stream: `windows[i]` for any i >= 0.

    Each pass over the text (epoch) starts its cuts at another offset and visits them in another order.
    With `shuffle=False` the cuts start at 0 and come in order (validation).
    """

    def __init__(
        self,
        stream: TokenStream | np.ndarray,
        window_tokens: int,
        *,
        seed: int = 0,
        source: int = 0,
        shuffle: bool = True,
    ) -> None:
        if len(stream) < 2 * window_tokens:
            raise ValueError(
                f"the text has {len(stream)} tokens, too few for windows of {window_tokens}; "
                f"give more text, or data.window_tokens of at most {len(stream) // 2}"
            )
        self.stream, self.window_tokens = stream, window_tokens
        self.per_epoch = (len(stream) - (window_tokens - 1 if shuffle else 0)) // window_tokens
        self._order = Order(self.per_epoch, seed, source, shuffle=shuffle, span=window_tokens)

    def __getitem__(self, index: int) -> Ids:
        start = self._order(index) * self.window_tokens + self._order.offset
        return np.asarray(self.stream[start : start + self.window_tokens], dtype=np.int64)

    def tokens(self, index: int) -> int:
        return self.window_tokens


class Documents:
    """Windows that never cross from one document into the next.

    A document longer than a window is cut into the fewest pieces of nearly equal length. The last one of each holds
    the document's EOS, unless `keep_eos` is False.
    """

    def __init__(
        self,
        stream: TokenStream,
        window_tokens: int,
        *,
        seed: int = 0,
        source: int = 0,
        shuffle: bool = True,
        keep_eos: bool = True,
        eos_id: int = 1,
    ) -> None:
        self.stream, self.window_tokens, self.keep_eos, self.eos_id = stream, window_tokens, keep_eos, eos_id
        self.ends = stream.document_ends()
        lengths = np.diff(self.ends, prepend=0)
        pieces = np.where(lengths < _SHORTEST_DOCUMENT, 0, -(-lengths // window_tokens))
        self.last_pieces = np.cumsum(pieces)  # the number of pieces up to and with each document
        self.per_epoch = int(self.last_pieces[-1]) if len(pieces) else 0
        if not self.per_epoch:
            raise ValueError(f"the text has no document of {_SHORTEST_DOCUMENT - 1} tokens or more")
        self._order = Order(self.per_epoch, seed, source, shuffle=shuffle)

    def __getitem__(self, index: int) -> Ids:
        return np.asarray(self.stream[slice(*self._place(index))], dtype=np.int64)

    def tokens(self, index: int) -> int:
        start, stop = self._place(index)
        return stop - start

    def _place(self, index: int) -> tuple[int, int]:
        piece = self._order(index)
        document = int(np.searchsorted(self.last_pieces, piece, side="right"))
        before = int(self.last_pieces[document - 1]) if document else 0
        number, pieces = piece - before, int(self.last_pieces[document]) - before
        begin, end = int(self.ends[document - 1]) if document else 0, int(self.ends[document])
        if not self.keep_eos and int(self.stream[end - 1 : end][0]) == self.eos_id:
            end -= 1
        length = end - begin
        return begin + length * number // pieces, begin + length * (number + 1) // pieces
