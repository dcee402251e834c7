"""Requests that join and leave at any step get what they would get alone, in the memory that was planned."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encore.generate.backends import make_rows, memory_plan
from encore.generate.batch import generate
from encore.generate.drafts import DraftSettings
from encore.generate.engine import Engine, EngineClosed, EngineFull
from encore.generate.request import Request
from encore.generate.rows import Size
from encore.generate.sampling import SamplingSettings
from encore.generate.scheduler import Job, Scheduler

WINDOW = 6
each_kind = pytest.mark.parametrize("kind", ("gemma2", "gemma3", "t5gemma", "t5gemma2"))


def requests(count: int, seed: int = 0, longest: int = 20) -> list[tuple[list[int], SamplingSettings]]:
    """Sources and settings of every sort, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        source = rng.integers(3, 61, rng.integers(1, longest)).tolist()
        drawn: dict[str, Any] = {"temperature": 1.5, "top_k": 20, "seed": i} if rng.random() < 0.5 else {}
        settings = SamplingSettings(max_target_tokens=int(rng.integers(1, 3 * WINDOW)), stop_ids=(), **drawn)
        found.append((source, settings))
    return found


@each_kind
def test_rows_join_and_leave_at_any_step(tiny: Callable, kind: str) -> None:
    model = tiny(kind)
    asked = requests(10, seed=1)
    alone = [generate(model, [source], settings)[0].tokens for source, settings in asked]
    scheduler = Scheduler(model.config, make_rows(model, Size(5, 20, 4 * WINDOW)), 5, encode_tokens=30)
    rng, left, jobs, sizes = np.random.default_rng(0), list(asked), [], set()
    while left or scheduler.busy:
        for _ in range(rng.integers(0, 3) if left else 0):
            source, settings = left.pop(0) if left else asked[0]
            seen = [2] if kind.startswith("t5") else source
            jobs.append(Job(source, [Request(0, settings, stop_ids=(), seen=seen)]))
            scheduler.add(jobs[-1])
            if not left:
                break
        scheduler.turn()
        sizes.add(scheduler.rows.num_rows)
    assert [job.requests[0].tokens for job in jobs] == alone
    assert max(sizes) == 5 and len(sizes) > 3


@pytest.mark.parametrize("kind", ["gemma3", "t5gemma2"])
@pytest.mark.parametrize("drafts", [None, DraftSettings(max_tokens=3, ngram=1, adaptive=False)], ids=["", "drafts"])
def test_many_threads_submit(tiny: Callable, kind: str, drafts: DraftSettings | None) -> None:
    model = tiny(kind)
    asked = requests(10, seed=2)
    alone = [generate(model, [source], settings)[0].tokens for source, settings in asked]
    found: dict[int, list[int]] = {}
    with Engine(model, max_rows=4, max_source_tokens=20, max_target_tokens=4 * WINDOW, drafts=drafts) as engine:

        def ask(numbers: range) -> None:
            for number in numbers:
                found[number] = engine.submit(*asked[number]).result(60)[0].tokens

        threads = [threading.Thread(target=ask, args=(range(start, 10, 5),)) for start in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[i] for i in range(10)] == alone


def test_samples_of_one_source_read_it_once(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("t5gemma2")
    ((source, _),) = requests(1)
    settings = SamplingSettings(temperature=1.5, seed=5, max_target_tokens=12, stop_ids=())
    read, encoded = model.encoder.forward, []
    monkeypatch.setattr(model.encoder, "forward", lambda *a, **k: (encoded.append(a[0].shape), read(*a, **k))[1])
    with Engine(model, max_rows=4, max_source_tokens=20, max_target_tokens=12) as engine:
        samples = engine.submit(source, settings, n=3).result(60)
    assert encoded == [(1, len(source))]
    alone = [generate(model, [source], dataclasses.replace(settings, seed=5 + i))[0] for i in range(3)]
    assert [s.tokens for s in samples] == [a.tokens for a in alone]
    assert len({tuple(s.tokens) for s in samples}) == 3


def test_events_come_in_order_to_threads_and_coroutines(tiny: Callable) -> None:
    model = tiny("t5gemma2")
    asked = requests(6, seed=3)
    with Engine(model, max_rows=3, max_source_tokens=20, max_target_tokens=4 * WINDOW) as engine:

        async def read(source: list[int], settings: SamplingSettings) -> list[int]:
            return [event.token async for event in engine.submit(source, settings)]

        async def read_all() -> list[list[int]]:
            return await asyncio.gather(*(read(*one) for one in asked))

        found = asyncio.run(read_all())
        ticket = engine.submit(*asked[0])
        first = [event.token for event in ticket]
        again = [event.token for event in ticket]  # from the first on, for every reader
    assert found == [generate(model, [source], settings)[0].tokens for source, settings in asked]
    assert first == again == found[0] and ticket.done


def test_cancel_deadline_and_close(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("t5gemma2")
    endless = SamplingSettings(max_target_tokens=120, stop_ids=())
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda *a, **k: (time.sleep(0.01), decode(*a, **k))[1])
    engine = Engine(model, max_rows=1, max_source_tokens=20, max_target_tokens=120, max_waiting=2)
    whole = generate(model, [[5, 6]], endless)[0].tokens
    running = engine.submit([5, 6], endless)
    next(iter(running))
    waiting = engine.submit([7], endless, deadline_seconds=0.02)
    third = engine.submit([8], endless)
    with pytest.raises(EngineFull, match="2 requests wait already"):
        engine.submit([9], endless)
    (late,) = waiting.result(30)
    assert (late.finish_reason, late.tokens, late.stop) == ("deadline", [], None)
    running.cancel()
    (cut,) = running.result(30)
    assert cut.finish_reason == "cancelled" and cut.tokens == whole[: len(cut.tokens)]
    assert 0 < len(cut.tokens) < 120
    next(iter(third))
    with pytest.raises(TimeoutError, match="has not ended within"):
        third.result(0.01)
    engine.close()
    with pytest.raises(EngineClosed):
        third.result(30)
    with pytest.raises(EngineClosed):
        list(third)
    with pytest.raises(EngineClosed, match="make another"):
        engine.submit([5], endless)


def test_an_error_ends_those_in_work_and_not_the_engine(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("t5gemma2")
    settings = SamplingSettings(max_target_tokens=5, stop_ids=())
    with Engine(model, max_rows=2, max_source_tokens=20, max_target_tokens=5) as engine:
        decode = model.decode

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(model, "decode", broken)
        tickets = [engine.submit([5, 6], settings, n=2) for _ in range(3)]
        for ticket in tickets:
            with pytest.raises(RuntimeError, match="out of memory"):
                ticket.result(30)
        monkeypatch.setattr(model, "decode", decode)
        assert engine.submit([5, 6], settings).result(30)[0].tokens == generate(model, [[5, 6]], settings)[0].tokens


@each_kind
def test_caches_have_the_planned_size(tiny: Callable, kind: str) -> None:
    model = tiny(kind)
    for size in (Size(3, 17, 40), Size(2, 1, 4), Size(4, 30, 9, 5)):
        rows = make_rows(model, size)
        assert rows.num_bytes == memory_plan(model, size, 64).caches


def test_a_memory_limit_is_kept_by_taking_fewer_rows(tiny: Callable) -> None:
    model = tiny("t5gemma2")
    sizes: dict[str, Any] = {"max_source_tokens": 64, "max_target_tokens": 64, "encode_tokens": 64}
    free = Engine(model, max_rows=8, **sizes).memory_plan()
    one = Engine(model, max_rows=1, **sizes).memory_plan()
    limit = one.total + 3 * (free.caches // 8) + 1
    limited = Engine(model, max_rows=8, memory_limit=limit, **sizes)
    assert limited.memory_plan().total <= limit and 1 < limited.size.rows < 8
    with pytest.raises(ValueError, match="one row needs"):
        Engine(model, max_rows=8, memory_limit=one.total - 1, **sizes)


def test_what_an_engine_refuses(tiny: Callable) -> None:
    engine = Engine(tiny("t5gemma2"), max_rows=2, max_source_tokens=4, max_target_tokens=5)
    few = SamplingSettings(max_target_tokens=5)
    with pytest.raises(ValueError, match="the source has 5 tokens and 5 may follow; this engine takes 4 and 5"):
        engine.submit([5] * 5, few)
    with pytest.raises(ValueError, match="n is 3; this engine writes 1 to 2"):
        engine.submit([5], few, n=3)
    with pytest.raises(ValueError, match="holds the id 61"):
        engine.submit([61], few)
    with pytest.raises(ValueError, match="max_rows is 0"):
        Engine(tiny("t5gemma2"), max_rows=0)
    engine.close()


MEASURED = """
import dataclasses, sys
sys.path.insert(0, sys.argv[1])
from conftest import build
from encore.generate.engine import Engine
from encore.generate.sampling import SamplingSettings
from encore.model.t5gemma import T5Gemma

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

config = build("t5gemma2").config
sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "vocab_size": 2048, "sliding_window": 64}
stack = dataclasses.replace(config.decoder, max_position_embeddings=4096, **sizes)
model = T5Gemma(dataclasses.replace(config, encoder=stack, decoder=stack))
model.init_weights()
settings = SamplingSettings(max_target_tokens=6, stop_ids=())
with Engine(model, max_rows=1, max_source_tokens=8, max_target_tokens=6, encode_tokens=8) as engine:
    engine.submit([5] * 8, settings).result()
before = status("VmRSS")
with Engine(model, max_rows=12, max_source_tokens=1000, max_target_tokens=64, encode_tokens=2000) as engine:
    plan = engine.memory_plan()
    for ticket in [engine.submit([5 + i % 99 for i in range(1000)], settings) for _ in range(14)]:
        ticket.result()
print(status("VmHWM") - before, plan.total - plan.weights, plan.caches)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_process_grows_by_no_more_than_planned() -> None:
    """Fourteen long sources in twelve rows, in a process of its own; most of the buffers are really used."""
    command = [sys.executable, "-c", MEASURED, str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    grown, planned, caches = map(int, run.stdout.split())
    assert 0.8 * caches < grown <= planned
