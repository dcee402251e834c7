"""The rows of a batch, driven step by step through whatever runs the model. No torch, no onnxruntime.

    Steps.first() ─▶ logits of each row ─ Request.accept ─▶ ids ─▶ Steps.next(ids) ─▶ logits …

Each row samples, streams and stops by itself (`request.py`). Ended rows stay as padding until enough of the batch has
ended to be worth copying the caches; the answer of a row does not depend on its neighbours. `decoding.py` (torch) and
`onnx_backend.py` (exported graphs) make the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from encore.config import ModelConfig, StackConfig, T5GemmaConfig
from encore.generate.request import Event, Request
from encore.generate.sampling import Logits, SamplingSettings

if TYPE_CHECKING:
    from encore.tokenizer import Tokenizer

WORTH_DROPPING = 0.25
"""The share of ended rows at which the caches are copied without them: all copies together stay below 4 x one."""


class HasConfig(Protocol):
    """A model, whatever runs it."""

    @property
    def config(self) -> ModelConfig: ...


class Steps(Protocol):
    """A batch of targets being decoded; all methods speak of its current rows."""

    def first(self) -> list[Logits]:
        """Logits (V,) of each row's first new token."""
        ...

    def next(self, tokens: Sequence[int]) -> list[Logits]:
        """Logits (V,) of each row after its next token."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows."""
        ...


def source_stack(model: HasConfig) -> StackConfig:
    """The stack that reads the source: the encoder, or the only one."""
    return model.config.encoder if isinstance(model.config, T5GemmaConfig) else model.config.stack


def target_stack(model: HasConfig) -> StackConfig:
    """The stack that writes: the decoder, or the only one."""
    return model.config.decoder if isinstance(model.config, T5GemmaConfig) else model.config.stack


def source_limit(model: HasConfig, max_target_tokens: int) -> int:
    """The most source tokens the model has positions for, when up to `max_target_tokens` follow."""
    limit = target_stack(model).max_position_embeddings
    if max_target_tokens > limit:
        raise ValueError(
            f"max_target_tokens is {max_target_tokens}; the model has {limit} target positions: ask for fewer tokens"
        )
    if isinstance(model.config, T5GemmaConfig):
        return model.config.encoder.max_position_embeddings
    return limit - max_target_tokens


def check_ids(rows: Sequence[Sequence[int]], vocab_size: int, what: str) -> None:
    """Refuses ids that the embedding does not have, before they become an index error deep inside."""
    for i, row in enumerate(rows):
        for token in row:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{what} {i} holds the id {token}; the model has ids 0 to {vocab_size - 1}: "
                    "use the tokenizer that belongs to the model"
                )


def make_requests(
    model: HasConfig,
    sources: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings] | None,
    tokenizer: Tokenizer | None,
) -> list[Request]:
    """One request for each source, with all that the user may have got wrong checked before anything is computed."""
    if settings is None or isinstance(settings, SamplingSettings):
        settings = [settings or SamplingSettings()] * len(sources)
    if len(settings) != len(sources):
        raise ValueError(f"{len(settings)} settings for {len(sources)} sources; give one for all, or one for each")
    check_ids(sources, source_stack(model).vocab_size, "source")
    encoder_decoder = isinstance(model.config, T5GemmaConfig)
    requests: list[Request] = []
    for row, (source, chosen) in enumerate(zip(sources, settings, strict=True)):
        limit = source_limit(model, chosen.max_target_tokens)
        if len(source) > limit:
            raise ValueError(
                f"source {row} has {len(source)} tokens; the model takes {limit}"
                + ("" if encoder_decoder else f" when up to {chosen.max_target_tokens} are to follow")
                + ": shorten it"
            )
        if not encoder_decoder and not source:
            raise ValueError(f"source {row} is empty; a decoder-only model needs a token to start from, such as <bos>")
        requests.append(
            Request(
                row,
                chosen,
                stop_ids=tokenizer.stop_ids if tokenizer else (model.config.eos_token_id,),
                seen=(model.config.bos_token_id,) if encoder_decoder else source,
                decoder=tokenizer.streamer() if tokenizer else None,
            )
        )
    return requests


def run_rows(start: Callable[[int], Steps], requests: Sequence[Request], pad_id: int) -> Iterator[Event]:
    """Every token of every request as an event. `start(max_target_tokens)` reads the sources and makes the steps."""
    if not requests:
        return
    steps = start(max(request.settings.max_target_tokens for request in requests))
    logits = steps.first()
    batch = list(requests)
    while True:
        for request, row_logits in zip(batch, logits, strict=True):
            if not request.finished:
                yield request.accept(row_logits)
        running = [row for row, request in enumerate(batch) if not request.finished]
        if not running:
            return
        if len(running) <= (1 - WORTH_DROPPING) * len(batch):
            batch = [batch[row] for row in running]
            steps.keep(running)
        logits = steps.next([pad_id if request.finished else request.tokens[-1] for request in batch])
