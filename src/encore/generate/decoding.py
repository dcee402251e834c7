"""Ids in, ids out, with torch: batches of unequal length, caches, and the slow oracle beside them.

    T5Gemma   sources ─ encode once ─▶ Memory ─▶ decode(<bos>) ─▶ decode(id) ─▶ decode(id) …
    Gemma     prompts, padded on the left ─ one pass fills the cache ─▶ states(id) ─▶ states(id) …

The head (the largest matrix) runs over the last position only. Each row samples, streams and stops by itself
(`request.py`). Ended rows stay as padding until enough of the batch has ended to be worth copying the caches; the
answer of a row does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from encore.config import StackConfig
from encore.generate.padding import check_ids, pad_rows
from encore.generate.request import Event, Generation, Request
from encore.generate.sampling import Logits, SamplingSettings
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma

if TYPE_CHECKING:
    from encore.tokenizer import Tokenizer

Model = Gemma | T5Gemma

WORTH_DROPPING = 0.25
"""The share of ended rows at which the caches are copied without them: all copies together stay below 4 x one."""


def target_stack(model: Model) -> StackConfig:
    """The stack that writes: the decoder, or the only one."""
    return model.config.decoder if isinstance(model, T5Gemma) else model.config.stack


def source_limit(model: Model, max_target_tokens: int) -> int:
    """The most source tokens the model has positions for, when up to `max_target_tokens` follow."""
    limit = target_stack(model).max_position_embeddings
    if max_target_tokens > limit:
        raise ValueError(
            f"max_target_tokens is {max_target_tokens}; the model has {limit} target positions: ask for fewer tokens"
        )
    if isinstance(model, T5Gemma):
        return model.config.encoder.max_position_embeddings
    return limit - max_target_tokens


def generate(
    model: Model,
    sources: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> list[Generation]:
    """The targets of one batch of sources (prompts, for Gemma), in their order.

    `settings` is one for all or one for each row; rows with the same seed draw the same numbers. The tokenizer is
    needed for text and stop strings, and gives the default stop ids; without it only `<eos>` stops.
    """
    requests = _requests(model, sources, settings, tokenizer)
    for _ in _run(model, sources, requests):
        pass
    return [request.result() for request in requests]


def stream(
    model: Model,
    sources: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Event]:
    """As `generate`, but gives every token as an event as soon as it is there; closing the iterator stops the work."""
    return _run(model, sources, _requests(model, sources, settings, tokenizer))


def naive_generate(
    model: Model,
    source: Sequence[int],
    settings: SamplingSettings | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> Generation:
    """One source, no cache, no batch: the whole target is read again for every token. The oracle of `generate`."""
    (request,) = _requests(model, [source], settings, tokenizer)
    device = model.head_weight.device
    with torch.inference_mode():
        while not request.finished:
            if isinstance(model, T5Gemma):
                target = torch.tensor([[model.config.bos_token_id, *request.tokens]], device=device)
                logits = model(torch.tensor([list(source)], device=device), target)
            else:
                logits = model(torch.tensor([[*source, *request.tokens]], device=device))
            request.accept(_as_numpy(logits)[0])
    return request.result()


def _requests(
    model: Model,
    sources: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings] | None,
    tokenizer: Tokenizer | None,
) -> list[Request]:
    if settings is None or isinstance(settings, SamplingSettings):
        settings = [settings or SamplingSettings()] * len(sources)
    if len(settings) != len(sources):
        raise ValueError(f"{len(settings)} settings for {len(sources)} sources; give one for all, or one for each")
    check_ids(sources, _source_vocabulary(model), "source")
    encoder_decoder = isinstance(model, T5Gemma)
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


def _source_vocabulary(model: Model) -> int:
    return (model.config.encoder if isinstance(model, T5Gemma) else model.config.stack).vocab_size


class Steps(Protocol):
    """A batch of targets being decoded; all methods speak of its current rows."""

    def first(self) -> Tensor:
        """Logits (B, 1, V) of the first new token."""
        ...

    def next(self, tokens: Tensor) -> Tensor:
        """Logits (B, 1, V) after these tokens (B, 1)."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        ...


class EncoderDecoderSteps:
    """T5Gemma: sources are encoded once, and their keys and values computed once, into the cache."""

    def __init__(self, model: T5Gemma, sources: Sequence[Sequence[int]], max_target_tokens: int) -> None:
        self.model = model
        tokens, mask = pad_rows(sources, model.config.pad_token_id, side="right", device=model.head_weight.device)
        self.memory = model.encode(tokens, mask)
        self.cache = model.make_cache(self.memory, max_target_tokens)

    def first(self) -> Tensor:
        states = self.memory.states
        return self.next(states.new_full((states.shape[0], 1), self.model.config.bos_token_id, dtype=torch.long))

    def next(self, tokens: Tensor) -> Tensor:
        return self.model.decode(tokens, self.memory, self.cache)

    def keep(self, rows: Tensor) -> None:
        self.memory = self.memory.index_select(rows)
        self.cache.index_select(rows)


class DecoderOnlySteps:
    """Gemma: prompts end at the same column, so that every row's next token is the next column."""

    def __init__(self, model: Gemma, sources: Sequence[Sequence[int]], max_target_tokens: int) -> None:
        self.model = model
        self.prompts, self.mask = pad_rows(
            sources, model.config.pad_token_id, side="left", device=model.head_weight.device
        )
        # The last token that is written is never read again.
        self.cache = model.make_cache(len(sources), self.prompts.shape[1] + max_target_tokens - 1)

    def first(self) -> Tensor:
        return self.model.logits(self.model.states(self.prompts, self.mask, self.cache)[:, -1:])

    def next(self, tokens: Tensor) -> Tensor:
        return self.model.logits(self.model.states(tokens, None, self.cache))

    def keep(self, rows: Tensor) -> None:
        self.cache.index_select(rows)


def _run(model: Model, sources: Sequence[Sequence[int]], requests: Sequence[Request]) -> Iterator[Event]:
    if not requests:
        return
    steps, logits = _start(model, sources, max(r.settings.max_target_tokens for r in requests))
    batch = list(requests)
    while True:
        for request, row_logits in zip(batch, logits, strict=True):
            if not request.finished:
                yield request.accept(row_logits)
        running = [row for row, request in enumerate(batch) if not request.finished]
        if not running:
            return
        dropped = len(running) <= (1 - WORTH_DROPPING) * len(batch)
        if dropped:
            batch = [batch[row] for row in running]
        pad = model.config.pad_token_id
        following = [pad if request.finished else request.tokens[-1] for request in batch]
        logits = _advance(steps, following, running if dropped else None, model.head_weight.device)


@torch.inference_mode()
def _start(model: Model, sources: Sequence[Sequence[int]], max_target_tokens: int) -> tuple[Steps, list[Logits]]:
    steps: Steps
    if isinstance(model, T5Gemma):
        steps = EncoderDecoderSteps(model, sources, max_target_tokens)
    else:
        steps = DecoderOnlySteps(model, sources, max_target_tokens)
    return steps, _as_numpy(steps.first())


@torch.inference_mode()
def _advance(steps: Steps, following: list[int], keep: list[int] | None, device: torch.device) -> list[Logits]:
    if keep is not None:
        steps.keep(torch.tensor(keep, device=device))
    return _as_numpy(steps.next(torch.tensor(following, device=device)[:, None]))


def _as_numpy(logits: Tensor) -> list[Logits]:
    """The last position's logits of each row, (V,) in float32."""
    return list(logits[:, -1].float().cpu().numpy())
