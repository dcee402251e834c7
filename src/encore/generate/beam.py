"""Beam search with a length penalty (Wu et al., arXiv 1609.08144, section 7, with score / length^penalty). No torch.

Each source has `num_beams` running targets. A step takes the best continuations of all of them, (1 + stop ids) per beam
so that enough go on; of the first `num_beams` those that end join the ended ones, of which the best `num_beams` stay.
What is left open by the paper is as in `transformers` 5.23, whose output it equals:

    early_stopping False    ends when the best running target, at its present length, is worse than every ended one
    early_stopping True     ends when `num_beams` have ended
    early_stopping "never"  as False, but a running target may still gain by growing to its full length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from encore.config import ModelConfig
from encore.generate.rows import Rows, first_token

if TYPE_CHECKING:
    from encore.generate.padding import PicturesOfRows

BLOCK = 64
"""Logits are searched for the greatest in blocks of so many: one pass, and few blocks to look into."""


@dataclass(frozen=True)
class BeamSettings:
    """`length_penalty`: 0 compares sums of log-probabilities, 1 their means; more favours longer targets."""

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return: int = 1

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}; expected at least 1")
        if not 1 <= self.num_return <= self.num_beams:
            raise ValueError(f"num_return is {self.num_return}; expected 1 to num_beams, {self.num_beams}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f'early_stopping is {self.early_stopping!r}; expected True, False or "never"')


@dataclass(frozen=True)
class Beam:
    """A target; `total` is the sum of its log-probabilities, `score` that sum / length^penalty once it has ended."""

    tokens: list[int]
    log_probabilities: list[float]
    total: float
    score: float = 0.0


class _Search:
    """The beams of one source."""

    def __init__(self, settings: BeamSettings, max_tokens: int, stop_ids: frozenset[int]) -> None:
        self.settings, self.max_tokens, self.stop_ids = settings, max_tokens, stop_ids
        self.running = [Beam([], [], 0.0)]  # the first step has one beam to go on from
        self.ended: list[Beam] = []
        self.done = False

    def advance(self, logits: Sequence[NDArray[np.float32]]) -> list[int]:
        """Takes the logits (V,) of each running beam; gives the beam that each one now running goes on from."""
        settings = self.settings
        width = max(2, 1 + len(self.stop_ids)) * settings.num_beams
        found: list[tuple[float, int, int, float]] = []
        for i, (beam, of_beam) in enumerate(zip(self.running, logits, strict=True)):
            best = greatest(of_beam, width)
            shift = of_beam.max()
            log_sum = float(shift) + np.log(np.exp(of_beam - shift).sum(dtype=np.float64))
            found += [(beam.total + float(of_beam[t]) - log_sum, i, t, float(of_beam[t]) - log_sum) for t in best]
        found.sort(key=lambda item: (-item[0], item[1], item[2]))
        length = len(self.running[0].tokens) + 1
        running: list[Beam] = []
        origins: list[int] = []
        for place, (total, i, token, log_probability) in enumerate(found[:width]):
            before = self.running[i]
            beam = Beam(
                [*before.tokens, token],
                [*before.log_probabilities, log_probability],
                total,
                total / length**settings.length_penalty,
            )
            if token not in self.stop_ids and length < self.max_tokens:
                if len(running) < settings.num_beams:
                    running.append(beam)
                    origins.append(i)
            elif place < settings.num_beams:
                self.ended.append(beam)
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[: settings.num_beams]
        self.running = running
        self.done = length >= self.max_tokens or self._cannot_improve(length)
        return origins

    def _cannot_improve(self, length: int) -> bool:
        settings = self.settings
        if len(self.ended) < settings.num_beams:
            return False
        if settings.early_stopping is True:
            return True
        if settings.early_stopping == "never" and settings.length_penalty > 0:
            length = self.max_tokens
        return self.running[0].total / length**settings.length_penalty <= self.ended[-1].score


def search(
    config: ModelConfig,
    rows: Rows,
    sources: Sequence[Sequence[int]],
    settings: BeamSettings,
    max_tokens: int,
    stop_ids: frozenset[int],
    pictures: PicturesOfRows = None,
) -> list[list[Beam]]:
    """The best `num_return` targets of each source. Empty `rows` with room for `num_beams` rows for each source."""
    searches = [_Search(settings, max_tokens, stop_ids) for _ in sources]
    rows.join(sources, [1] * len(sources), pictures)
    following = [[first_token(config, source)] for source in sources]
    running = list(searches)
    while running:
        logits = rows.step(following)
        order: list[int] = []
        following, still = [], []
        start = 0
        for one in running:
            count = len(one.running)
            origins = one.advance([logits[row][-1] for row in range(start, start + count)])
            if not one.done:
                still.append(one)
                order += [start + origin for origin in origins]
                following += [[beam.tokens[-1]] for beam in one.running]
            start += count
        running = still
        if running and order != list(range(start)):
            rows.select(order)
    return [one.ended[: settings.num_return] for one in searches]


def greatest(values: NDArray[np.float32], count: int) -> list[int]:
    """Where the `count` greatest of the values (V,) stand, greatest first."""
    if count >= values.size:
        return np.argsort(-values, kind="stable").tolist()
    places = np.arange(values.size)
    whole = values.size // BLOCK * BLOCK
    if values.size > 4 * count * BLOCK:  # the greatest lie in the blocks with the greatest maxima
        blocks = values[:whole].reshape(-1, BLOCK)
        best = np.argpartition(-blocks.max(axis=1), count)[:count]
        places = np.concatenate([(best[:, None] * BLOCK + np.arange(BLOCK)).ravel(), places[whole:]])
        places.sort()
    inside = values[places]
    chosen = np.argpartition(-inside, count)[:count]
    chosen = chosen[np.argsort(-inside[chosen], kind="stable")]
    return places[chosen].tolist()
