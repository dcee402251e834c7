"""Ids in, ids out, with torch: batches of unequal length, caches, and the slow oracle beside them.

    T5Gemma   sources ─ encode once ─▶ Memory ─▶ decode(<bos>) ─▶ decode(id) ─▶ decode(id) …
    Gemma     prompts, padded on the left ─ one pass fills the cache ─▶ states(id) ─▶ states(id) …

The head (the largest matrix) runs over the last position only. What becomes of the logits, row by row, is in `rows.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encore.data.batch import Batch, decoder_batch, encoder_decoder_batch
from encore.generate.padding import PicturesOfRows, join_pictures, pad_rows
from encore.generate.request import Event, Generation, Request
from encore.generate.rows import Steps, make_requests, run_rows
from encore.generate.sampling import Logits, SamplingSettings
from encore.model.encoder import Encoder
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma

if TYPE_CHECKING:
    from encore.tokenizer import Tokenizer

Model = Gemma | T5Gemma

MAX_LOGITS = 1 << 25
"""Logits held at a time: 128 positions at a vocabulary of 262,144, 128 MiB in float32."""


def generate(
    model: Model,
    sources: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    pictures: PicturesOfRows = None,
) -> list[Generation]:
    """The targets of one batch of sources (prompts, for Gemma), in their order.

    `settings` is one for all or one for each row; rows with the same seed draw the same numbers. The tokenizer is
    needed for text and stop strings, and gives the default stop ids; without it only `<eos>` stops. `pictures` has an
    entry for each source: the pixels (N, 3, size, size) of its N pictures, or None.
    """
    requests = make_requests(model, sources, settings, tokenizer)
    for _ in _run(model, sources, requests, pictures):
        pass
    return [request.result() for request in requests]


def stream(
    model: Model,
    sources: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    pictures: PicturesOfRows = None,
) -> Iterator[Event]:
    """As `generate`, but gives every token as an event as soon as it is there; closing the iterator stops the work."""
    return _run(model, sources, make_requests(model, sources, settings, tokenizer), pictures)


def naive_generate(
    model: Model,
    source: Sequence[int],
    settings: SamplingSettings | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    pictures: PicturesOfRows = None,
) -> Generation:
    """One source, no cache, no batch: the whole target is read again for every token. The oracle of `generate`."""
    (request,) = make_requests(model, [source], settings, tokenizer)
    device = model.head_weight.device
    pixels = join_pictures(pictures, 1)
    with torch.inference_mode():
        while not request.finished:
            if isinstance(model, T5Gemma):
                target = torch.tensor([[model.config.bos_token_id, *request.tokens]], device=device)
                logits = model(torch.tensor([list(source)], device=device), target, pictures=pixels)
            else:
                logits = model(torch.tensor([[*source, *request.tokens]], device=device), pictures=pixels)
            request.accept(_as_numpy(logits)[0])
    return request.result()


@torch.inference_mode()
def log_probabilities(
    model: Model, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> list[list[float]]:
    """log p of each target's ids after its source's: one forward pass.

    The head runs over the target's positions only, some at a time, so that no (B, T, V) tensor is held.
    """
    ids = {"bos_id": model.config.bos_token_id, "pad_id": model.config.pad_token_id}
    device = model.head_weight.device
    if isinstance(model, T5Gemma):
        batch = encoder_decoder_batch(sources, targets, **ids).to(device)
        assert batch.encoder_input_tokens is not None
        states = model.states(
            batch.encoder_input_tokens, batch.decoder_input_tokens, batch.encoder_mask, batch.decoder_mask
        )
    else:
        rows = [[*source, *target] for source, target in zip(sources, targets, strict=True)]
        batch = decoder_batch(rows, [len(source) for source in sources], **ids).to(device)
        states = model.states(batch.decoder_input_tokens, batch.decoder_mask)
    values = _target_log_probabilities(model, states, batch)
    return [part.tolist() for part in values.split([len(target) for target in targets])]


def _target_log_probabilities(model: Model, states: Tensor, batch: Batch) -> Tensor:
    """Those of the positions with weight, one row of the batch after the other, on the CPU."""
    scored = batch.decoder_loss_weights > 0
    positions, tokens = states[scored], batch.decoder_target_tokens[scored]
    step = max(1, MAX_LOGITS // model.head_weight.shape[0])
    parts: list[Tensor] = []
    for start in range(0, len(tokens), step):
        logits = model.logits(positions[start : start + step]).float()
        chosen = logits.gather(1, tokens[start : start + step, None])[:, 0]
        parts.append((chosen - logits.logsumexp(dim=1)).cpu())
    return torch.cat(parts)


@torch.inference_mode()
def encoder_states(
    model: Encoder | T5Gemma, sources: Sequence[Sequence[int]], pictures: PicturesOfRows = None
) -> list[NDArray[np.float32]]:
    """The states (S, D) of each source, without padding."""
    encoder = model.encoder if isinstance(model, T5Gemma) else model
    device = encoder.embed_tokens.weight.device
    tokens, mask = pad_rows(sources, encoder.config.pad_token_id, side="right", device=device)
    states = encoder(tokens, mask, pictures=join_pictures(pictures, len(sources))).states.float().cpu().numpy()
    return [states[row, : len(source)] for row, source in enumerate(sources)]


class EncoderDecoderSteps:
    """T5Gemma: sources are encoded once, and their keys and values computed once, into the cache."""

    @torch.inference_mode()
    def __init__(
        self, model: T5Gemma, sources: Sequence[Sequence[int]], pictures: Tensor | None, max_target_tokens: int
    ) -> None:
        self.model = model
        tokens, mask = pad_rows(sources, model.config.pad_token_id, side="right", device=model.head_weight.device)
        self.memory = model.encode(tokens, mask, pictures=pictures)
        self.cache = model.make_cache(self.memory, max_target_tokens)

    def first(self) -> list[Logits]:
        return self.next([self.model.config.bos_token_id] * self.memory.states.shape[0])

    @torch.inference_mode()
    def next(self, tokens: Sequence[int]) -> list[Logits]:
        return _as_numpy(self.model.decode(_column(self.model, tokens), self.memory, self.cache))

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        chosen = torch.tensor(rows, device=self.model.head_weight.device)
        self.memory = self.memory.index_select(chosen)
        self.cache.index_select(chosen)


class DecoderOnlySteps:
    """Gemma: prompts end at the same column, so that every row's next token is the next column."""

    @torch.inference_mode()
    def __init__(
        self, model: Gemma, sources: Sequence[Sequence[int]], pictures: Tensor | None, max_target_tokens: int
    ) -> None:
        self.model = model
        self.pictures = pictures
        self.prompts, self.mask = pad_rows(
            sources, model.config.pad_token_id, side="left", device=model.head_weight.device
        )
        # The last token that is written is never read again.
        self.cache = model.make_cache(len(sources), self.prompts.shape[1] + max_target_tokens - 1)

    @torch.inference_mode()
    def first(self) -> list[Logits]:
        states = self.model.states(self.prompts, self.mask, self.cache, pictures=self.pictures)
        return _as_numpy(self.model.logits(states[:, -1:]))

    @torch.inference_mode()
    def next(self, tokens: Sequence[int]) -> list[Logits]:
        return _as_numpy(self.model.logits(self.model.states(_column(self.model, tokens), None, self.cache)))

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        self.cache.index_select(torch.tensor(rows, device=self.model.head_weight.device))


def _run(
    model: Model, sources: Sequence[Sequence[int]], requests: Sequence[Request], pictures: PicturesOfRows
) -> Iterator[Event]:
    pixels = join_pictures(pictures, len(sources))

    def start(max_target_tokens: int) -> Steps:
        if isinstance(model, T5Gemma):
            return EncoderDecoderSteps(model, sources, pixels, max_target_tokens)
        return DecoderOnlySteps(model, sources, pixels, max_target_tokens)

    return run_rows(start, requests, model.config.pad_token_id)


def _column(model: Model, tokens: Sequence[int]) -> Tensor:
    return torch.tensor(tokens, device=model.head_weight.device)[:, None]


def _as_numpy(logits: Tensor) -> list[Logits]:
    """The last position's logits of each row, (V,) in float32."""
    return list(logits[:, -1].float().cpu().numpy())
