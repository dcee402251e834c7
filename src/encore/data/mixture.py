"""A mixture of sources: which source example n comes from, for any n, without having counted up to it.

Shares are of examples (so the paper's 1:1:1:1:4 of tasks is read too). Sources take turns by Webster's method: the j-th
example of a source of share w comes at the time (j + 1/2) / w, and the earliest is next. After any number of examples
each source has had its share to within one example or so, and nothing depends on chance.

    shares 1/2, 1/4, 1/4     ->     A B C A  A B C A  …
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from encore.data.examples import Examples


class Mixture:
    """Sources by name, each with its share. `mixture.between(first, last)` says what examples first … last - 1 are."""

    def __init__(self, sources: Sequence[Examples], weights: Sequence[float] = (), names: Sequence[str] = ()) -> None:
        self.sources = tuple(sources)
        given = np.asarray(weights or [1.0] * len(self.sources), dtype=np.float64)
        if len(given) != len(self.sources) or not (given > 0).all():
            raise ValueError(f"{len(self.sources)} sources have the weights {given.tolist()}; give each one above 0")
        self.shares = given / given.sum()
        self.names = tuple(names) or tuple(str(i) for i in range(len(self.sources)))

    def counts(self, number: int) -> np.ndarray:
        """How many of the first `number` examples come from each source."""
        counts = np.floor(self.shares * number + 0.5).astype(np.int64)
        while (total := int(counts.sum())) != number:
            if total < number:  # the next to come; of equals the first
                counts[int(np.argmin((counts + 0.5) / self.shares))] += 1
            else:  # the last that came; of equals the last
                last = np.where(counts > 0, (counts - 0.5) / self.shares, -1.0)
                counts[len(last) - 1 - int(np.argmax(last[::-1]))] -= 1
        return counts

    def between(self, first: int, last: int) -> list[tuple[int, int]]:
        """(source, index within it) of examples first to last - 1, source by source."""
        begin, end = self.counts(first), self.counts(last)
        return [(s, i) for s in range(len(self.sources)) for i in range(int(begin[s]), int(end[s]))]
