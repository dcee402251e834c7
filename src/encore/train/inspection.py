"""What a recipe's data comes to, measured without a model: mixture, lengths, fill of rows, speed, and examples to read.

    report = inspect(reading, reading.steps, tokenizer, examples=2)
    report["padding"]      # the share of places that hold no token

The speed is that of the steps as the run would get them, in the recipe's number of workers. No torch here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from encore.data.layout import Arrays, Row
from encore.data.steps import Steps
from encore.data.workers import MakesArrays, Prefetched
from encore.tokenizer import Tokenizer
from encore.train.reading import Reading

_SAMPLE = 4096
_MOST_STEPS = 1000


def inspect(
    reading: Reading,
    source: MakesArrays,
    tokenizer: Tokenizer,
    *,
    examples: int = 1,
    seconds: float = 3.0,
    workers: int = 0,
    num_steps: int = 0,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Everything as plain numbers and texts, ready for JSON.

    Args:
        source: what makes the run's steps; `reading.steps`, or pairs under a token budget.
        examples: how many of each source and task are decoded.
        seconds: how long steps are made to measure the speed, one whole pool of packed rows at least.
        num_steps: how many steps the run has; none behind them are made. 0: no end.
        progress: is told the seconds measured, and those in all.
    """
    steps = reading.steps
    drawn = steps.mixture.between(0, _SAMPLE)
    lengths = np.array([steps.mixture.sources[s].lengths(i) for s, i in drawn], dtype=np.int64)
    of_source = np.array([s for s, _ in drawn])
    total = int(lengths.sum())
    sources: list[dict[str, Any]] = []
    for number, opened in enumerate(reading.sources):
        own = lengths[of_source == number]
        sources.append(
            {
                "name": opened.name,
                "objective": opened.objective,
                "share_of_examples": opened.share,
                "share_of_tokens": float(own.sum() / total) if total else 0.0,
                "records": opened.tally.records,
                "skipped": opened.tally.skipped,
                "places": opened.tally.places,
                "tokens": opened.tokens,
                "examples_per_epoch": opened.examples.per_epoch,
                "inputs": _spread(own[:, 0]),
                "targets": _spread(own[:, 1]),
            }
        )
    return {
        "sources": sources,
        "inputs": _spread(lengths[:, 0]),
        "targets": _spread(lengths[:, 1]),
        **_measure(steps, source, seconds, workers, num_steps, progress),
        "examples": _decoded(steps, reading, tokenizer, examples),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {"mean": 0.0, "p50": 0, "p95": 0, "max": 0}
    middle, high = (int(np.percentile(values, share, method="nearest")) for share in (50, 95))
    return {"mean": round(float(values.mean()), 1), "p50": middle, "p95": high, "max": int(values.max())}


def _measure(
    steps: Steps,
    source: MakesArrays,
    seconds: float,
    workers: int,
    num_steps: int,
    progress: Callable[[float, float], None],
) -> dict[str, Any]:
    most = min(num_steps or _MOST_STEPS, _MOST_STEPS)
    least = min(steps.pool_steps if source is steps else 1, most)
    made = Prefetched(source, workers, most)
    used, places = np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64)
    rows = done = 0
    try:
        made.arrays(0)  # whatever is found once: the shape of rows, the start of workers
        begin = time.perf_counter()
        while done < most and (done < least or time.perf_counter() - begin < seconds):
            for arrays in made.arrays(done):
                for side, mask in enumerate((arrays["encoder_mask"], arrays["decoder_mask"])):
                    if mask is not None:
                        used[side] += int(mask.sum())
                        places[side] += mask.size
                rows += _num_rows(arrays)
            done += 1
            progress(min(time.perf_counter() - begin, seconds), seconds)
        elapsed = time.perf_counter() - begin
    finally:
        made.close()
    fills = [float(u / p) if p else None for u, p in zip(used, places, strict=True)]
    packed = steps.packing is not None and source is steps
    return {
        "packed": packed,
        "row_tokens": [steps.shape.encoder, steps.shape.decoder] if packed else None,
        "fill": {"encoder": fills[0], "decoder": fills[1]},
        "padding": float(1 - used.sum() / places.sum()),
        "rows_per_step": rows / done,
        "tokens_per_step": float(used.sum() / done),
        "tokens_per_second": float(used.sum() / elapsed),
        "measured_steps": done,
        "workers": workers,
    }


def _num_rows(arrays: Arrays) -> int:
    mask = arrays["decoder_mask"]
    assert mask is not None
    return len(mask)


def _decoded(steps: Steps, reading: Reading, tokenizer: Tokenizer, number: int) -> list[dict[str, Any]]:
    """The first `number` examples of each source and task, in words."""
    shown: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for source, index in steps.mixture.between(0, 512) if number else ():
        examples = steps.mixture.sources[source]
        found = shown.setdefault((source, examples.kind(index)), [])
        if len(found) < number:
            row = examples.row(index)
            names = {"source": reading.sources[source].name, "task": examples.kind(index)}
            found.append(names | _in_words(row, tokenizer))
    return [example for found in shown.values() for example in found]


def _in_words(row: Row, tokenizer: Tokenizer) -> dict[str, Any]:
    prompt = row.target[: row.prompt_tokens]
    given = prompt if row.source is None else row.source
    return {
        "input": _text(given, tokenizer),
        "target": _text(row.target[row.prompt_tokens :], tokenizer),
        "input_tokens": len(given),
        "target_tokens": len(row.target) - row.prompt_tokens,
    }


def _text(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([int(i) for i in ids], skip_special=False)
