"""Sources that are read in chunks apart: longer than what a model was trained on, or than memory allows. No torch.

    ids of a text ─ cut ─▶ [bos, instruction, piece 1, eos], [bos, instruction, piece 2, eos], …

Each chunk is encoded alone, with positions from 0, and the decoder reads all their states side by side. No chunk sees
another, and the decoder is not told their order: docs/long_context.md says what that costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

LAST_PART = 4
"""A chunk ends at the best place in its last 1/4: after a line, else a sentence, else before a word."""


TOKENS_AT_ONCE = 8192
"""Of chunks in one pass, with padding; a longer chunk goes alone."""


class Chunks(list[int]):
    """The ids of a source, all in a row as a memory holds them, and the chunks that they are encoded in."""

    def __init__(self, chunks: Iterable[Sequence[int]]) -> None:
        self.chunks: tuple[tuple[int, ...], ...] = tuple(tuple(chunk) for chunk in chunks)
        super().__init__(token for chunk in self.chunks for token in chunk)


def chunks_of(source: Sequence[int]) -> Sequence[Sequence[int]]:
    """The rows that a source is encoded in: one, unless it was cut."""
    return source.chunks if isinstance(source, Chunks) else (source,)


def groups_of(source: Sequence[int]) -> Iterator[list[Sequence[int]]]:
    """Neighbouring chunks of a source that go through the encoder together."""
    group: list[Sequence[int]] = []
    longest = 0
    for chunk in chunks_of(source):
        longest = max(longest, len(chunk))
        if group and longest * (len(group) + 1) > TOKENS_AT_ONCE:
            yield group
            group, longest = [], len(chunk)
        group.append(chunk)
    yield group


def longest_chunk(source: Sequence[int]) -> int:
    """How many positions the encoder needs for a source."""
    return max((len(chunk) for chunk in chunks_of(source)), default=0)


def cut(atoms: Sequence[Sequence[int]], room: int, text_of: Callable[[int], bytes]) -> list[list[int]]:
    """Pieces of at most `room` ids that follow each other without loss. An atom (one id, or a picture) stays whole.

    Args:
        text_of: the UTF-8 bytes of an id, by which a good place for a cut is known.

    Raises:
        ValueError: an atom is longer than `room`.
    """
    pieces: list[list[int]] = []
    start = 0
    while start < len(atoms):
        end, size = start, 0
        while end < len(atoms) and size + len(atoms[end]) <= room:
            size += len(atoms[end])
            end += 1
        if end == start:
            raise ValueError(
                f"a chunk has room for {room} tokens, and a picture takes {len(atoms[start])}; allow longer chunks"
            )
        if end < len(atoms):
            end = _best_end(atoms, start + max(1, (end - start) * (LAST_PART - 1) // LAST_PART), end, text_of)
        pieces.append([token for atom in atoms[start:end] for token in atom])
        start = end
    return pieces


def _best_end(atoms: Sequence[Sequence[int]], first: int, last: int, text_of: Callable[[int], bytes]) -> int:
    """The best place to cut in first..last; the latest of equally good ones."""

    def goodness(place: int) -> int:
        before, after = atoms[place - 1], atoms[place]
        if len(before) > 1 or len(after) > 1:
            return 2  # beside a picture
        ends, begins = text_of(before[0]), text_of(after[0])
        if ends.endswith(b"\n"):
            return 3
        if not begins.startswith((b" ", b"\n")):
            return 0
        return 2 if ends.rstrip().endswith((b".", b"!", b"?")) else 1

    return max(range(first, last + 1), key=lambda place: (goodness(place), place))
