"""One target being written: its tokens, its text, its own random draws, and whether it has ended. No torch.

A `Request` takes one position's logits at a time and says what came of them. `scheduler.py` keeps a list of them, so
rows of a batch never touch each other's state:

    logits (V,) ─ sample ─▶ id ─ StreamDecoder ─▶ text ─ StopScanner ─▶ Event(token, text, finish_reason)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from encore.generate.sampling import Logits, SamplingSettings, apply_repetition_penalty, sample

if TYPE_CHECKING:
    from encore.tokenizer import StreamDecoder

FinishReason = Literal["stop", "length", "cancelled", "deadline"]

NEAR_TIE = 1e-4
"""Two best logits closer than this may change places with the number of tokens that a step computes at once."""


@dataclass(frozen=True)
class Event:
    """What one step gave one row. `text` is what can be shown now; it may be empty, or lag behind the token."""

    row: int
    token: int
    log_probability: float | None
    text: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Generation:
    """A finished target.

    `tokens` holds every id that was written, the stop id included, and `log_probabilities` one number for each if the
    settings ask for them (the model's own, before temperature and filters). `text` is without special tokens, stop id
    and stop string. `stop` is the id or the text that ended it, None if something else did. Seconds count from when it
    was asked for.
    Of `drafted` tokens, `accepted` were what the model chose; at `near_ties` of the positions so computed the two best
    logits were closer than NEAR_TIE. `score` is that of a beam (`beam.py`).
    """

    tokens: list[int]
    log_probabilities: list[float]
    text: str
    finish_reason: FinishReason
    stop: int | str | None
    first_token_seconds: float
    seconds: float
    drafted: int = 0
    accepted: int = 0
    near_ties: int = 0
    score: float | None = None


class StopScanner:
    """Cuts text at the first stop string, however the text arrives in pieces.

    >>> scanner = StopScanner(("END",))
    >>> scanner.push("one E"), scanner.push("N"), scanner.push("D two"), scanner.found
    ('one ', '', '', 'END')
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self.stop_strings = tuple(stop_strings)
        self.found: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is now sure not to belong to a stop string; nothing more once one was found."""
        if self.found is not None:
            return ""
        self._held += text
        places = [(place, -len(s), s) for s in self.stop_strings if (place := self._held.find(s)) >= 0]
        if places:
            place, _, self.found = min(places)
            released, self._held = self._held[:place], ""
            return released
        keep = max((_overlap(self._held, s) for s in self.stop_strings), default=0)
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def finish(self) -> str:
        """What was held back as a possible beginning of a stop string, at the end of the target."""
        released, self._held = self._held, ""
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Request:
    """The state of one target. `seen` are the ids that the decoder reads before the first new one."""

    def __init__(
        self,
        row: int,
        settings: SamplingSettings,
        *,
        stop_ids: Sequence[int],
        seen: Sequence[int] = (),
        decoder: StreamDecoder | None = None,
    ) -> None:
        if settings.stop_strings and decoder is None:
            raise ValueError(f"stop strings {settings.stop_strings} need a tokenizer to be found; give tokenizer=")
        self.row = row
        self.settings = settings
        self.stop_ids = frozenset(stop_ids if settings.stop_ids is None else settings.stop_ids)
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._seen = list(seen)
        self._decoder = decoder
        self._scanner = StopScanner(settings.stop_strings)
        self._rng = settings.generator()
        self._log_probabilities: list[float] = []
        self._text: list[str] = []
        self._stop: int | str | None = None
        self._started = time.perf_counter()
        self._first_token_seconds = self._seconds = 0.0
        self._drafted = self._accepted = self._near_ties = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def accept(self, logits: Logits, log_sum: float | None = None) -> Event:
        """Chooses the next token from the logits (V,) and takes note of all that follows from it.

        `log_sum` is that of `sampling.sample`.
        """
        if self.finished:
            raise ValueError(f"request {self.row} has ended ({self.finish_reason}); it takes no more logits")
        token, log_probability = sample(logits, self.settings, self._rng, self._seen, log_sum)
        self.tokens.append(token)
        self._seen.append(token)
        if log_probability is not None:
            self._log_probabilities.append(log_probability)
        text = self._advance(token)
        self._text.append(text)
        self._seconds = time.perf_counter() - self._started
        if len(self.tokens) == 1:
            self._first_token_seconds = self._seconds
        return Event(self.row, token, log_probability, text, self.finish_reason)

    def accept_drafted(
        self, logits: NDArray[np.float32], draft: Sequence[int], log_sums: NDArray[np.float32] | None = None
    ) -> list[Event]:
        """As `accept`, after a step over the last token and a draft: logits (1 + len(draft), V).

        Each position's token is chosen as ever, and the next position counts if it was drafted right: rejection
        sampling (Leviathan et al., arXiv 2211.17192) against a draft that is certain of itself. So the target does not
        depend on the draft, drawn ones included.
        """
        events: list[Event] = []
        for place, drafted in enumerate([*draft, None]):
            if self.settings.greedy and draft:
                penalty = self.settings.repetition_penalty
                self._near_ties += _is_near_tie(apply_repetition_penalty(logits[place], self._seen, penalty))
            events.append(self.accept(logits[place], None if log_sums is None else float(log_sums[place])))
            if self.finished or events[-1].token != drafted:
                break
        self._drafted += len(draft)
        self._accepted += sum(event.token == token for event, token in zip(events, draft, strict=False))
        return events

    def end(self, reason: Literal["cancelled", "deadline"]) -> None:
        """Ends it from outside."""
        if not self.finished:
            self.finish_reason = reason
            self._text.append(self._flush())
            self._seconds = time.perf_counter() - self._started

    def _flush(self) -> str:
        """The text that was held back."""
        text = "" if self._decoder is None else self._scanner.push(self._decoder.finish())
        return text + self._scanner.finish()

    def _advance(self, token: int) -> str:
        text = ""
        if token in self.stop_ids:
            self.finish_reason, self._stop = "stop", token
        else:
            if self._decoder is not None:
                text = self._scanner.push(self._decoder.push(token))
            if len(self.tokens) >= self.settings.max_target_tokens:
                self.finish_reason = "length"
        if self.finished:
            text += self._flush()
        if self._scanner.found is not None:
            self.finish_reason, self._stop = "stop", self._scanner.found
        return text

    def result(self) -> Generation:
        if self.finish_reason is None:
            raise ValueError(f"request {self.row} has not ended; run it until an event has a finish_reason")
        return Generation(
            tokens=self.tokens,
            log_probabilities=self._log_probabilities,
            text="".join(self._text),
            finish_reason=self.finish_reason,
            stop=self._stop,
            first_token_seconds=self._first_token_seconds,
            seconds=self._seconds,
            drafted=self._drafted,
            accepted=self._accepted,
            near_ties=self._near_ties,
        )


def _is_near_tie(logits: Logits) -> bool:
    best = int(logits.argmax())
    around = (logits[:best], logits[best + 1 :])
    return bool(logits[best] - max(part.max() for part in around if part.size) < NEAR_TIE)
