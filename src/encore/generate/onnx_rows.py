"""`rows.Rows` over an exported model, without torch: one `OnnxCache` that rows are put into and taken from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from encore.export import ExportError
from encore.generate.onnx_cache import NAMES, OnnxCache
from encore.generate.rows import RowLogits, Size

if TYPE_CHECKING:
    from encore.generate.onnx_backend import OnnxModel
    from encore.generate.padding import PicturesOfRows


class OnnxRows:
    """At most `size.rows` targets at a time; see `rows.Rows`."""

    def __init__(self, model: OnnxModel, size: Size) -> None:
        self.model, self.size = model, size
        self.cache: OnnxCache | None = None
        self._sources: list[object] = []  # rows with the same one have the same memory

    @property
    def num_rows(self) -> int:
        return 0 if self.cache is None else len(self.cache.lengths)

    @property
    def num_bytes(self) -> int:
        return 0 if self.cache is None else self.cache.num_bytes

    @property
    def log_sums(self) -> NDArray[np.float32] | None:
        return None if self.cache is None else self.cache.log_sums

    def join(self, sources: Sequence[Sequence[int]], copies: Sequence[int], pictures: PicturesOfRows = None) -> None:
        refuse_pictures(pictures)
        memory = self.model.encode(sources)
        new = self.model.make_cache(memory, self.size.target_tokens, self.size.new_tokens)
        rows = [i for i, n in enumerate(copies) for _ in range(n)]
        marks = [object() for _ in sources]
        self._sources += [marks[i] for i in rows]
        if self.cache is None or not len(self.cache.lengths):
            if rows != list(range(len(sources))):
                new.index_select(rows)
            self.cache = new
            return
        self.cache.extend(new, rows)

    def step(self, tokens: Sequence[Sequence[int]], *, summed: bool = False) -> list[RowLogits]:
        assert self.cache is not None
        if all(len(new) == 1 for new in tokens):
            return list(self.cache.advance(tokens, summed=summed))
        counts = [len(new) for new in tokens]
        width = min(1 << (max(counts) - 1).bit_length(), self.size.new_tokens)  # few widths, each bound once
        ids = np.zeros((len(tokens), width), np.int64)
        for row, new in enumerate(tokens):
            ids[row, : len(new)] = new
        logits = self.cache.advance(ids, counts, summed=summed)
        return [logits[row, :count] for row, count in enumerate(counts)]

    def rollback(self, counts: Sequence[int]) -> None:
        assert self.cache is not None
        self.cache.rollback(self.cache.lengths - np.asarray(counts))

    def select(self, rows: Sequence[int]) -> None:
        assert self.cache is not None
        if not rows:
            self.cache, self._sources = None, []
            return
        sources = [self._sources[row] for row in rows]
        if len(rows) == self.num_rows and all(a is b for a, b in zip(sources, self._sources, strict=True)):
            self.cache.reorder(rows)
        else:
            self.cache.index_select(rows)
        self._sources = sources


def cache_bytes(model: OnnxModel, size: Size) -> int:
    """The most that the caches of `OnnxRows` take: all rows at their longest, and those being put in."""
    empty = model.empty_cache(np.zeros(1, np.int64), size.target_tokens, size.new_tokens)
    rings = {NAMES[kind]: ring for kind, ring in empty.rings.items()}
    in_front = size.source_tokens if empty.merged else 0
    total = 0
    for name, buffer in empty.buffers.items():
        place = empty.place(name)
        slots = max(1, size.source_tokens) if place == "memory" else in_front + rings[place]
        total += buffer.shape[1] * slots * buffer.shape[3] * buffer.itemsize
    return 2 * size.rows * total


def refuse_pictures(pictures: PicturesOfRows) -> None:
    if any(pixels is not None for pixels in pictures or ()):
        raise ExportError("exported models read text only; give pictures to the checkpoint it was made from")
