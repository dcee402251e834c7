"""How probable a target is, given a source: log p(target | source), token by token.

Torch needs one forward pass, an exported model a step per target token. No torch here (`backends.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from encore.config import T5GemmaConfig
from encore.generate.backends import backend_of
from encore.generate.padding import by_length
from encore.generate.rows import HasConfig, check_ids, source_stack, target_stack
from encore.generate.source import SourceReader
from encore.tokenizer import Tokenizer


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
    model: HasConfig,
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
    encoder_decoder = isinstance(model.config, T5GemmaConfig)
    bos = model.config.bos_token_id
    if not encoder_decoder:
        sources = [source[1:] if source[:1] == [bos] else source for source in map(list, sources)]
    check_ids(sources, source_stack(model).vocab_size, "source")
    check_ids(targets, target_stack(model).vocab_size, "target")
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        _check_lengths(model, len(source), len(target), i)
    scores: dict[int, Score] = {}
    lengths = [[*source, *target] for source, target in zip(sources, targets, strict=True)]
    for rows in by_length(lengths, batch_size):
        chosen = [list(sources[row]) for row in rows], [list(targets[row]) for row in rows]
        for row, values in zip(rows, backend_of(model).log_probabilities(model, *chosen), strict=True):
            scores[row] = Score(list(targets[row]), values)
    return [scores[row] for row in range(len(targets))]


def score_texts(
    model: HasConfig,
    tokenizer: Tokenizer,
    reader: SourceReader,
    pairs: Iterable[tuple[str, str]],
    *,
    batch_size: int = 8,
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


def _check_lengths(model: HasConfig, source: int, target: int, number: int) -> None:
    limit = target_stack(model).max_position_embeddings
    if not target:
        raise ValueError(f"target {number} has no tokens; there is nothing to score")
    if isinstance(model.config, T5GemmaConfig):
        found = {"source": (source, model.config.encoder.max_position_embeddings), "target": (target, limit)}
    else:
        found = {"source with target": (source + target, limit)}
    for what, (length, allowed) in found.items():
        if length > allowed:
            raise ValueError(f"{what} {number} has {length} tokens; the model has {allowed} positions: shorten it")
