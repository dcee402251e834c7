"""How probable a target is, given a source: log p(target | source), token by token.

One forward pass; the head runs over the target's positions only, some at a time, so that no (B, T, V) tensor is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encore.data.batch import Batch, decoder_batch, encoder_decoder_batch
from encore.generate.decoding import Model, target_stack
from encore.generate.padding import by_length, check_ids
from encore.generate.source import SourceReader
from encore.model.t5gemma import T5Gemma
from encore.tokenizer import Tokenizer

MAX_LOGITS = 1 << 25
"""Logits held at a time: 128 positions at a vocabulary of 262,144, 128 MiB in float32."""


@dataclass(frozen=True)
class Score:
    """Natural logarithms. `tokens` are the target's ids, `log_probabilities` one number for each."""

    tokens: list[int]
    log_probabilities: list[float]

    @property
    def total(self) -> float:
        return math.fsum(self.log_probabilities)

    @property
    def mean(self) -> float:
        return self.total / len(self.log_probabilities)


def score(
    model: Model,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
) -> list[Score]:
    """Log-probabilities of each target's ids after its source's ids, in their order.

    T5Gemma reads the source in the encoder and starts the target from `<bos>`. Gemma reads source and target as one
    text from `<bos>` (a `<bos>` at the source's head is not doubled), and the source may be empty.
    """
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sources and {len(targets)} targets; each source needs its target")
    encoder_decoder = isinstance(model, T5Gemma)
    bos = model.config.bos_token_id
    if not encoder_decoder:
        sources = [source[1:] if source[:1] == [bos] else source for source in map(list, sources)]
    check_ids(sources, model.config.encoder.vocab_size if encoder_decoder else target_stack(model).vocab_size, "source")
    check_ids(targets, target_stack(model).vocab_size, "target")
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        _check_lengths(model, len(source), len(target), i)
    scores: dict[int, Score] = {}
    lengths = [[*source, *target] for source, target in zip(sources, targets, strict=True)]
    for rows in by_length(lengths, batch_size):
        chosen = [(list(sources[row]), list(targets[row])) for row in rows]
        for row, values in zip(rows, _score_batch(model, chosen), strict=True):
            scores[row] = Score(list(targets[row]), values)
    return [scores[row] for row in range(len(targets))]


def score_texts(
    model: Model, tokenizer: Tokenizer, reader: SourceReader, pairs: Iterable[tuple[str, str]], *, batch_size: int = 8
) -> Iterator[Score]:
    """One score per (source, target) of texts, in order. The target's `<eos>` is scored as its last token.

    Source and target are tokenized apart, so for a decoder-only model the target's text begins with its own space.
    """
    ahead: list[tuple[list[int], list[int]]] = []

    def flush() -> list[Score]:
        scores = score(model, [s for s, _ in ahead], [t for _, t in ahead], batch_size=batch_size)
        ahead.clear()
        return scores

    for number, (source, target) in enumerate(pairs, start=1):
        ids = reader.read(source, number).tokens, tokenizer.encode_target(target)
        _check_lengths(model, len(ids[0]), len(ids[1]), number)
        ahead.append(ids)
        if len(ahead) >= batch_size * (4 if batch_size > 1 else 1):
            yield from flush()
    yield from flush()


def _check_lengths(model: Model, source: int, target: int, number: int) -> None:
    limit = target_stack(model).max_position_embeddings
    if not target:
        raise ValueError(f"target {number} has no tokens; there is nothing to score")
    if isinstance(model, T5Gemma):
        found = {"source": (source, model.config.encoder.max_position_embeddings), "target": (target, limit)}
    else:
        found = {"source with target": (source + target, limit)}
    for what, (length, allowed) in found.items():
        if length > allowed:
            raise ValueError(f"{what} {number} has {length} tokens; the model has {allowed} positions: shorten it")


@torch.inference_mode()
def _score_batch(model: Model, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    ids = {"bos_id": model.config.bos_token_id, "pad_id": model.config.pad_token_id}
    device = model.head_weight.device
    if isinstance(model, T5Gemma):
        batch = encoder_decoder_batch(sources, targets, **ids).to(device)
        assert batch.encoder_input_tokens is not None
        states = model.states(
            batch.encoder_input_tokens, batch.decoder_input_tokens, batch.encoder_mask, batch.decoder_mask
        )
    else:
        rows = [[*source, *target] for source, target in pairs]
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
