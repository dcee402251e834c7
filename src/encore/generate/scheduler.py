"""Requests join a running batch, advance with it step by step, and leave it. No torch, no onnxruntime, no threads.

    add(Job) ─▶ waiting ─ sources read in batches, under a token budget ─▶ rows ─ turn() ─▶ (job, event), … (job, None)

A turn drops who has ended, lets in who fits, gives every row one step, and hands out what came of it. The answer of a
row does not depend on its neighbours. `decoding.py` and `onnx_backend.py` run one batch to its end with it; `engine.py`
keeps one running in a thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from encore.config import ModelConfig
from encore.generate.drafts import Drafting
from encore.generate.request import Event, Request
from encore.generate.rows import Rows, first_token

if TYPE_CHECKING:
    from encore.images import Pixels

ENCODE_TOKENS = 8192
"""Source tokens, padding included, that are read at a time (a longer source is read alone)."""


@dataclass(eq=False)
class Job:
    """A source and the targets that are to be written for it: one request for each sample."""

    source: Sequence[int]
    requests: list[Request]
    pixels: Pixels | None = None
    deadline: float = float("inf")  # time.monotonic()
    cancelled: bool = False
    running: int = field(init=False)

    def __post_init__(self) -> None:
        self.running = len(self.requests)


@dataclass(eq=False)
class _Row:
    job: Job
    request: Request
    following: int  # the token that the next step reads


Delivery = tuple[Job, Event | None]
"""What a turn gave; None says that all targets of the job have ended."""


class Scheduler:
    """Drives `rows`, of which `max_rows` may be in use. `drafting` proposes tokens to be verified (`drafts.py`)."""

    def __init__(
        self,
        config: ModelConfig,
        rows: Rows,
        max_rows: int,
        *,
        encode_tokens: int = ENCODE_TOKENS,
        drafting: Drafting | None = None,
    ) -> None:
        self.config, self.rows, self.max_rows = config, rows, max_rows
        self.encode_tokens, self.drafting = encode_tokens, drafting
        self.waiting: deque[Job] = deque()
        self._batch: list[_Row] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self._batch)

    @property
    def in_work(self) -> list[Job]:
        """Those that have rows."""
        return list(dict.fromkeys(row.job for row in self._batch))

    def add(self, job: Job) -> None:
        if len(job.requests) > self.max_rows:
            raise ValueError(
                f"{len(job.requests)} samples of one source were asked for; {self.max_rows} rows are there"
            )
        self.waiting.append(job)

    def turn(self) -> list[Delivery]:
        """One step of every row, and all that goes with it."""
        deliveries: list[Delivery] = []
        self._end_from_outside(deliveries)
        while self._free_rows and self.waiting and self._let_in():
            if self._batch[0].request.tokens:
                break  # those who are being written wait for one batch of sources at most
        if self._batch:
            self._step(deliveries)
        return deliveries

    @property
    def _free_rows(self) -> int:
        return self.max_rows - len(self._batch)

    def _end_from_outside(self, deliveries: list[Delivery]) -> None:
        now = time.monotonic()
        ended = {job for job in [*self.in_work, *self.waiting] if job.cancelled or job.deadline <= now}
        if not ended:
            return
        for job in ended:
            for request in job.requests:
                request.end("cancelled" if job.cancelled else "deadline")
            deliveries.append((job, None))
        self.waiting = deque(job for job in self.waiting if job not in ended)
        self._drop_ended()

    def _let_in(self) -> bool:
        """The next waiting jobs that fit into the free rows and, read together, into the token budget."""
        group: list[Job] = []
        room, longest = self._free_rows, 1
        while self.waiting and len(self.waiting[0].requests) <= room:
            longest = max(longest, len(self.waiting[0].source))
            if group and (len(group) + 1) * longest > self.encode_tokens:
                break
            group.append(self.waiting.popleft())
            room -= len(group[-1].requests)
        if not group:
            return False
        sources, copies = [job.source for job in group], [len(job.requests) for job in group]
        pictures = [job.pixels for job in group]
        for job in group:
            self._batch += [_Row(job, request, first_token(self.config, job.source)) for request in job.requests]
        self.rows.join(sources, copies, pictures if any(p is not None for p in pictures) else None)
        if self.drafting is not None:
            self.drafting.join(sources, copies)
        return True

    def _step(self, deliveries: list[Delivery]) -> None:
        batch = self._batch
        if self.drafting is None:
            logits = self.rows.step([[row.following] for row in batch], summed=self._summed)
            log_sums = self._log_sums(len(batch))
            for row, of_row, sums in zip(batch, logits, log_sums, strict=True):
                event = row.request.accept(of_row[0], None if sums is None else float(sums[0]))
                row.following = event.token
                deliveries.append((row.job, event))
        else:
            self._step_with_drafts(self.drafting, deliveries)
        if any(row.request.finished for row in batch):
            for row in batch:
                if row.request.finished:
                    row.job.running -= 1
                    if row.job.running == 0:
                        deliveries.append((row.job, None))
            self._drop_ended()

    @property
    def _summed(self) -> bool:
        return any(row.request.settings.log_probabilities for row in self._batch)

    def _log_sums(self, num_rows: int) -> Sequence[NDArray[np.float32] | None]:
        log_sums = self.rows.log_sums
        return [None] * num_rows if log_sums is None else list(log_sums)

    def _step_with_drafts(self, drafting: Drafting, deliveries: list[Delivery]) -> None:
        batch = self._batch
        drafts = drafting.propose([row.request for row in batch])
        tokens = [[row.following, *draft] for row, draft in zip(batch, drafts, strict=True)]
        logits = self.rows.step(tokens, summed=self._summed)
        drafting.measured()
        written: list[list[int]] = []
        for row, of_row, draft, sums in zip(batch, logits, drafts, self._log_sums(len(batch)), strict=True):
            events = row.request.accept_drafted(of_row, draft, sums)
            row.following = events[-1].token
            written.append([event.token for event in events])
            deliveries += [(row.job, event) for event in events]
        surplus = [len(draft) + 1 - len(new) for draft, new in zip(drafts, written, strict=True)]
        if any(surplus):
            self.rows.rollback(surplus)
        drafting.learn(written)

    def _drop_ended(self) -> None:
        """Rows behind take the places of those that have ended, so that few are copied."""
        batch = self._batch
        keep = [i for i, row in enumerate(batch) if not row.request.finished]
        if len(keep) == len(batch):
            return
        behind = [i for i in keep if i >= len(keep)]
        order = [i if not batch[i].request.finished else behind.pop() for i in range(len(keep))]
        self._batch = [batch[i] for i in order]
        self.rows.select(order)
        if self.drafting is not None:
            self.drafting.select(order)


def run_to_end(scheduler: Scheduler) -> Iterator[Event]:
    """Every token of every job as an event."""
    while scheduler.busy:
        for _, event in scheduler.turn():
            if event is not None:
                yield event
