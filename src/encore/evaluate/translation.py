"""Translation on held-out sentences: greedy answers against all references, by BLEU and chrF of sacrebleu."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sacrebleu

from encore.generate.batch import generate
from encore.generate.decoding import Model
from encore.generate.padding import by_length
from encore.generate.sampling import SamplingSettings
from encore.tokenizer import Tokenizer


@dataclass(frozen=True)
class SentencePair:
    """A source sentence and its references, at least one."""

    source: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class TranslationResult:
    """Corpus scores (0..100, higher is better), the answers in order, and what they took."""

    bleu: float
    chrf: float
    answers: list[str]
    seconds: float
    target_tokens: int


def evaluate_translation(
    model: Model,
    tokenizer: Tokenizer,
    pairs: Sequence[SentencePair],
    *,
    batch_size: int = 32,
    max_target_tokens: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> TranslationResult:
    """Translates every source greedily and scores the answers.

    A decoder-only model reads the source in the same format and goes on from it, as it was tuned. `on_batch` is told
    how many sentences each batch finished.

    Raises:
        ValueError: there is no pair, or one without a reference.
    """
    if not pairs:
        raise ValueError("no sentence to evaluate on; give at least one pair")
    if any(not pair.references for pair in pairs):
        raise ValueError("a pair has no reference; BLEU and chrF need at least one each")
    start = time.perf_counter()
    sources = [tokenizer.encode_source(pair.source) for pair in pairs]
    settings = SamplingSettings(max_target_tokens=max_target_tokens)
    answers = [""] * len(pairs)
    target_tokens = 0
    for rows in by_length(sources, batch_size):
        generations = generate(model, [sources[row] for row in rows], settings, tokenizer=tokenizer)
        for row, generation in zip(rows, generations, strict=True):
            answers[row] = generation.text.strip()
            target_tokens += len(generation.tokens)
        if on_batch:
            on_batch(len(rows))
    seconds = time.perf_counter() - start
    bleu, chrf = corpus_scores(answers, [pair.references for pair in pairs])
    return TranslationResult(bleu, chrf, answers, seconds, target_tokens)


def corpus_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float]:
    """BLEU and chrF of answers, each against its own number of references (sacrebleu's defaults)."""
    most = max(len(of_one) for of_one in references)
    streams = [[of_one[i] if i < len(of_one) else None for of_one in references] for i in range(most)]
    bleu = sacrebleu.corpus_bleu(list(answers), streams)  # pyright: ignore[reportArgumentType] (None = no reference)
    chrf = sacrebleu.corpus_chrf(list(answers), streams)  # pyright: ignore[reportArgumentType]
    return bleu.score, chrf.score
