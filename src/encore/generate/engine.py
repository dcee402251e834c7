"""The engine: requests from any thread join a running batch and leave it, in memory that is known before the start.

    with Engine(model, tokenizer, max_rows=8, max_source_tokens=2048, max_target_tokens=256) as engine:
        print(engine.memory_plan())                        # bytes, never exceeded
        ticket = engine.submit(ids, SamplingSettings(temperature=0.8), n=2, deadline_seconds=30)
        for event in ticket: ...                           # or: async for event in ticket
        generations = ticket.result()

One thread runs the model (`scheduler.py`); it starts with the first request. Requests that find no free row wait in the
order in which they came. A model in torch (CPU or CUDA) and an exported one are driven alike.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from encore.generate.backends import make_drafting, make_rows, memory_plan
from encore.generate.drafts import DraftSettings
from encore.generate.memory import MemoryPlan
from encore.generate.request import Event, Generation
from encore.generate.rows import HasConfig, Size, make_requests
from encore.generate.sampling import SamplingSettings
from encore.generate.scheduler import ENCODE_TOKENS, Job, Scheduler

if TYPE_CHECKING:
    from encore.images import Pixels
    from encore.tokenizer import Tokenizer


class EngineClosed(RuntimeError):
    """The engine was closed before the request ended, or asked for one afterwards."""


class EngineFull(RuntimeError):
    """As many requests wait as may; ask again later."""


class Ticket:
    """A request that was submitted: its events, its results, and the way to stop it. Safe to use from any thread."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._listeners: list[Callable[[Event | None], object]] = []
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[Event]:
        """Every event from the first on, as they come; `event.row` is the number of the sample."""
        arrived: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._listen(arrived.put)
        while (event := arrived.get()) is not None:
            yield event
        self._raise()

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Event | None]()
        self._listen(lambda event: loop.call_soon_threadsafe(arrived.put_nowait, event))
        while (event := await arrived.get()) is not None:
            yield event
        self._raise()

    def result(self, timeout: float | None = None) -> list[Generation]:
        """One target for each sample, once all have ended. Raises TimeoutError, and what stopped the engine."""
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the request has not ended within {timeout} seconds; wait longer, or cancel() it")
        self._raise()
        return [request.result() for request in self._job.requests]

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def cancel(self) -> None:
        """Ends it before its next token; what was written stays, with the finish reason "cancelled"."""
        self._job.cancelled = True

    def _listen(self, listener: Callable[[Event | None], object]) -> None:
        with self._lock:
            for event in self._events:
                listener(event)
            if self._ended.is_set():
                listener(None)
            else:
                self._listeners.append(listener)

    def _deliver(self, event: Event | None, error: BaseException | None = None) -> None:
        """An event, or None for the end."""
        with self._lock:
            if event is None:
                self._error = error
                self._ended.set()
            else:
                self._events.append(event)
            for listener in self._listeners:
                try:
                    listener(event)
                except RuntimeError:  # an event loop that was closed: nobody listens there any more
                    self._listeners = [other for other in self._listeners if other is not listener]

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class Engine:
    """Generates for requests that come and go. Sizes are the most there may be; requests beyond them are refused.

    `memory_limit` (bytes) takes as many rows, up to `max_rows`, as stay within it. `encode_tokens` is the most source
    tokens read at a time, `max_waiting` the most requests that wait for a row. `drafts` has tokens drafted for all.
    """

    def __init__(
        self,
        model: HasConfig,
        tokenizer: Tokenizer | None = None,
        *,
        max_rows: int = 8,
        max_source_tokens: int = 2048,
        max_target_tokens: int = 256,
        encode_tokens: int = ENCODE_TOKENS,
        memory_limit: int | None = None,
        max_waiting: int | None = None,
        drafts: DraftSettings | None = None,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_target_tokens", max_target_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        self.model, self.tokenizer, self.drafts = model, tokenizer, drafts
        self.encode_tokens, self.max_waiting = encode_tokens, max_waiting
        size = Size(max_rows, max_source_tokens, max_target_tokens, 1 if drafts is None else 1 + drafts.max_tokens)
        plan = self._plan(size)
        while memory_limit is not None and plan.total > memory_limit:
            if size.rows == 1:
                raise ValueError(
                    f"one row needs {plan.total} bytes and the limit is {memory_limit}: allow more, or fewer source "
                    "and target tokens"
                )
            size = replace(size, rows=size.rows - 1)
            plan = self._plan(size)
        self.size, self._memory_plan = size, plan
        self._wake = threading.Condition()
        self._arrived: list[Ticket] = []
        self._tickets: dict[Job, Ticket] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    def _plan(self, size: Size) -> MemoryPlan:
        plan = memory_plan(self.model, size, self.encode_tokens)
        if self.drafts is not None and self.drafts.model is not None:
            own = memory_plan(self.drafts.model, replace(size, target_tokens=size.target_tokens + size.new_tokens), 0)
            plan = replace(plan, weights=plan.weights + own.weights, caches=plan.caches + own.caches)
        return plan

    def memory_plan(self) -> MemoryPlan:
        """What the engine takes at most, the model included."""
        return self._memory_plan

    def submit(
        self,
        source: Sequence[int],
        settings: SamplingSettings | None = None,
        *,
        n: int = 1,
        pictures: Pixels | None = None,
        deadline_seconds: float | None = None,
    ) -> Ticket:
        """Ask for `n` targets of a source; they share what reading it gives. Returns at once.

        With a seed, sample i draws as with seed + i. A target that is not ready at the deadline, counted from now,
        ends as it is, with the finish reason "deadline". Raises ValueError, EngineFull, EngineClosed.
        """
        settings = settings or SamplingSettings(max_target_tokens=self.size.target_tokens)
        if len(source) > self.size.source_tokens or settings.max_target_tokens > self.size.target_tokens:
            raise ValueError(
                f"the source has {len(source)} tokens and {settings.max_target_tokens} may follow; this engine takes "
                f"{self.size.source_tokens} and {self.size.target_tokens}: shorten it, or make a larger engine"
            )
        if not 1 <= n <= self.size.rows:
            raise ValueError(f"n is {n}; this engine writes 1 to {self.size.rows} targets at a time")
        each = [settings if settings.seed is None else replace(settings, seed=settings.seed + i) for i in range(n)]
        requests = make_requests(self.model, [source] * n, each, self.tokenizer)
        deadline = float("inf") if deadline_seconds is None else time.monotonic() + deadline_seconds
        ticket = Ticket(Job(source, requests, pictures, deadline))
        with self._wake:
            if self._closed:
                raise EngineClosed("the engine was closed; make another")
            if self.max_waiting is not None and len(self._arrived) + self._num_waiting >= self.max_waiting:
                raise EngineFull(f"{self.max_waiting} requests wait already; ask again later")
            self._arrived.append(ticket)
            if self._thread is None:
                self._scheduler = self._make_scheduler()
                self._thread = threading.Thread(target=self._run, name="encore-engine", daemon=True)
                self._thread.start()
            self._wake.notify()
        return ticket

    def close(self) -> None:
        """Stops; requests that have not ended raise EngineClosed. Waits for the step that is running."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _num_waiting(self) -> int:
        return 0 if self._thread is None else len(self._scheduler.waiting)

    def _make_scheduler(self) -> Scheduler:
        drafting = None if self.drafts is None else make_drafting(self.drafts, self.model, self.size)
        rows = make_rows(self.model, self.size)
        return Scheduler(self.model.config, rows, self.size.rows, encode_tokens=self.encode_tokens, drafting=drafting)

    def _run(self) -> None:
        try:
            while self._take_arrived():
                try:
                    deliveries = self._scheduler.turn()
                except Exception as error:
                    self._start_anew(error)
                    continue
                for job, event in deliveries:
                    ticket = self._tickets[job] if event is not None else self._tickets.pop(job)
                    ticket._deliver(event)
            self._fail(self._tickets, EngineClosed("the engine was closed before the request ended"))
        except BaseException as error:  # nothing can run any more, and nobody may wait for it
            with self._wake:
                self._closed = True
                self._tickets |= {ticket._job: ticket for ticket in self._arrived}
            self._fail(self._tickets, error)
            raise

    def _start_anew(self, error: Exception) -> None:
        """What was in work may have left half a step, or NaN, in the caches: it is told, and all others go on."""
        with self._wake:
            in_work, waiting = self._scheduler.in_work, self._scheduler.waiting
            del self._scheduler  # before its successor takes as much memory
            self._scheduler = self._make_scheduler()
            self._scheduler.waiting.extend(waiting)
        self._fail(in_work, error)

    def _take_arrived(self) -> bool:
        """Waits for something to do; False once closed."""
        with self._wake:
            while not (self._arrived or self._scheduler.busy or self._closed):
                self._wake.wait()
            for ticket in self._arrived:
                self._tickets[ticket._job] = ticket
                self._scheduler.add(ticket._job)
            self._arrived.clear()
            return not self._closed

    def _fail(self, jobs: Iterable[Job], error: BaseException) -> None:
        for job in list(jobs):
            self._tickets.pop(job)._deliver(None, error)
