"""How fast a model runs here: loading, encoding, the first token, the tokens after it, memory. Torch only if it must.

    speed = measure("translator-int8", source_tokens=512, target_tokens=64)
    speed.decode_tokens_per_second

Sources are random ids, which cost what real ones do; answers may not end early. Times are medians over rounds, through
the same functions that `encore generate` uses, so Python's part is in them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encore.config import T5GemmaConfig
from encore.generate.backends import backend_of
from encore.generate.batch import stream
from encore.generate.rows import source_limit, source_stack
from encore.generate.sampling import SamplingSettings
from encore.generate.text import TextGenerator


@dataclass(frozen=True)
class Speed:
    """Tokens per second count all rows of the batch. `peak_bytes` is this process's highest resident size (Linux)."""

    model: str
    batch: int
    source_tokens: int
    target_tokens: int
    load_seconds: float
    encode_tokens_per_second: float | None
    first_token_seconds: float
    decode_tokens_per_second: float
    peak_bytes: int | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    name_or_folder: str | Path,
    *,
    batch: int = 1,
    source_tokens: int = 512,
    target_tokens: int = 64,
    rounds: int = 3,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Speed:
    """Load a model and time it. ValueError if the lengths are more than the model has positions for.

    `first_token_seconds` runs from the source's ids to its first target token; encoding is timed by itself too, where
    there is an encoder. `progress` is told the rounds done and all rounds.
    """
    if min(batch, source_tokens, rounds) < 1 or target_tokens < 2:
        raise ValueError(
            f"batch {batch}, source_tokens {source_tokens}, rounds {rounds}, target_tokens {target_tokens}: expected "
            "at least 1, 1, 1 and 2 (speed is measured from the first token to the last)"
        )
    start = time.perf_counter()
    generator = TextGenerator.load(name_or_folder, threads=threads)
    load_seconds = time.perf_counter() - start
    model = generator.model
    if source_tokens > (limit := source_limit(model, target_tokens)):
        raise ValueError(
            f"{source_tokens} source tokens and {target_tokens} target tokens; the model reads {limit} at most"
        )
    stack = source_stack(model)
    sources = np.random.default_rng(seed).integers(3, stack.vocab_size, (batch, source_tokens)).tolist()
    run, settings = backend_of(model), SamplingSettings(max_target_tokens=target_tokens, stop_ids=())
    encodes = isinstance(model.config, T5GemmaConfig)
    encode_times: list[float] = []
    first_times: list[float] = []
    decode_speeds: list[float] = []
    for turn in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        if encodes:
            run.encoder_states(model, sources)
        encoded = time.perf_counter()
        events, first = 0, encoded
        for _ in stream(model, sources, settings):
            events += 1
            if events == batch:
                first = time.perf_counter()
        end = time.perf_counter()
        if turn:
            encode_times.append(encoded - start)
            first_times.append(first - encoded)
            decode_speeds.append((events - batch) / (end - first))
        if progress is not None:
            progress(turn + 1, rounds + 1)
    return Speed(
        model=str(name_or_folder),
        batch=batch,
        source_tokens=source_tokens,
        target_tokens=target_tokens,
        load_seconds=round(load_seconds, 3),
        encode_tokens_per_second=batch * source_tokens / statistics.median(encode_times) if encodes else None,
        first_token_seconds=statistics.median(first_times),
        decode_tokens_per_second=statistics.median(decode_speeds),
        peak_bytes=peak_bytes(),
    )


def peak_bytes() -> int | None:
    """The highest resident size of this process so far, from /proc; None where there is none."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = status.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
