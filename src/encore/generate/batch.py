"""Ids in, ids out: one batch of sources to its end, with any model, in torch or exported. No torch of its own.

    generate(model, sources, SamplingSettings(temperature=0.7))
    generate(model, sources, drafts=DraftSettings())            # the same targets, sooner where the source is copied
    beam_search(model, sources, beams=BeamSettings(4))

`engine.py` is for requests that come and go.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from encore.generate.backends import make_drafting, make_rows
from encore.generate.beam import Beam, BeamSettings, search
from encore.generate.drafts import DraftSettings
from encore.generate.padding import PicturesOfRows, check_pictures
from encore.generate.request import Event, Generation, Request
from encore.generate.rows import HasConfig, Size, make_requests
from encore.generate.sampling import SamplingSettings
from encore.generate.scheduler import Job, Scheduler, run_to_end

if TYPE_CHECKING:
    from encore.tokenizer import Tokenizer


def generate(
    model: HasConfig,
    sources: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    pictures: PicturesOfRows = None,
    drafts: DraftSettings | None = None,
) -> list[Generation]:
    """The targets of one batch of sources (prompts, for Gemma), in their order.

    `settings` is one for all or one for each row; rows with the same seed draw the same numbers. The tokenizer is
    needed for text and stop strings, and gives the default stop ids; without it only `<eos>` stops. `pictures` has an
    entry for each source: the pixels (N, 3, size, size) of its N pictures, or None. `drafts` has tokens drafted and
    verified several at a time (`drafts.py`).
    """
    requests = make_requests(model, sources, settings, tokenizer)
    for _ in _run(model, sources, requests, pictures, drafts):
        pass
    return [request.result() for request in requests]


def stream(
    model: HasConfig,
    sources: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    pictures: PicturesOfRows = None,
    drafts: DraftSettings | None = None,
) -> Iterator[Event]:
    """As `generate`, but gives every token as an event as soon as it is there; closing the iterator stops the work."""
    return _run(model, sources, make_requests(model, sources, settings, tokenizer), pictures, drafts)


def _run(
    model: HasConfig,
    sources: Sequence[Sequence[int]],
    requests: Sequence[Request],
    pictures: PicturesOfRows,
    drafts: DraftSettings | None,
) -> Iterator[Event]:
    check_pictures(pictures, len(sources))
    if not requests:
        return
    size = _size(sources, len(requests), max(request.settings.max_target_tokens for request in requests), drafts)
    drafting = None if drafts is None else make_drafting(drafts, model, size)
    scheduler = Scheduler(model.config, make_rows(model, size), size.rows, drafting=drafting)
    for row, (source, request) in enumerate(zip(sources, requests, strict=True)):
        scheduler.add(Job(source, [request], None if pictures is None else pictures[row]))
    yield from run_to_end(scheduler)


def beam_search(
    model: HasConfig,
    sources: Sequence[Sequence[int]],
    settings: SamplingSettings | None = None,
    *,
    beams: BeamSettings,
    tokenizer: Tokenizer | None = None,
    pictures: PicturesOfRows = None,
) -> list[list[Generation]]:
    """For each source the `beams.num_return` best targets, best first, with their scores.

    Of the settings, `max_target_tokens` and `stop_ids` count; a beam has no draws and no stop strings.
    """
    settings = settings or SamplingSettings()
    if (settings.temperature, settings.repetition_penalty, settings.stop_strings) != (0, 1, ()):
        raise ValueError("beam search takes no temperature, repetition penalty or stop strings; leave them, or --beams")
    check_pictures(pictures, len(sources))
    if not sources:
        return []
    started = time.perf_counter()
    stop_ids = make_requests(model, sources, settings, tokenizer)[0].stop_ids
    size = _size(sources, len(sources) * beams.num_beams, settings.max_target_tokens, None)
    rows = make_rows(model, size)
    found = search(model.config, rows, sources, beams, settings.max_target_tokens, stop_ids, pictures)
    seconds = time.perf_counter() - started
    return [[_as_generation(beam, stop_ids, tokenizer, seconds) for beam in of_source] for of_source in found]


def _size(sources: Sequence[Sequence[int]], rows: int, target_tokens: int, drafts: DraftSettings | None) -> Size:
    return Size(rows, max(map(len, sources)), target_tokens, 1 if drafts is None else 1 + drafts.max_tokens)


def _as_generation(beam: Beam, stop_ids: frozenset[int], tokenizer: Tokenizer | None, seconds: float) -> Generation:
    stopped = beam.tokens[-1] in stop_ids
    return Generation(
        tokens=beam.tokens,
        log_probabilities=beam.log_probabilities,
        text="" if tokenizer is None else tokenizer.decode(beam.tokens[: len(beam.tokens) - stopped]),
        finish_reason="stop" if stopped else "length",
        stop=beam.tokens[-1] if stopped else None,
        first_token_seconds=seconds,
        seconds=seconds,
        score=beam.score,
    )
