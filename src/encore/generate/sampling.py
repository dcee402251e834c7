"""From the logits of one position to the next token: pure numpy functions on (V,) arrays, no torch.

The steps and their order are those that `transformers` applies, so that settings carry over:

    logits ─ repetition penalty ─▶ greedy: argmax                                          (temperature 0)
                                └▶ / temperature ─ top-k ─ top-p ─ min-p ─▶ softmax ─▶ one draw

A filter sets what it drops to minus infinity and always keeps at least one token. Sources: CTRL, arXiv 1909.05858
(repetition penalty, greedy division of logits); Holtzman et al., arXiv 1904.09751 (top-p); Nguyen et al., arXiv
2407.01082 (min-p).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
"""One position's logits over the vocabulary, shape (V,)."""

MIN_TEMPERATURE = 1e-4
"""Below it the draw is greedy in all but name, and float32 overflows."""

PIECE = 1 << 14
"""How many exponentials are summed at a time."""


@dataclass(frozen=True)
class SamplingSettings:
    """How the next tokens of one target are chosen, and when they end.

    temperature         0 takes the most probable token; otherwise logits are divided by it before the draw
    top_k               keep the k most probable tokens (0: all)
    top_p               keep the fewest tokens whose probabilities reach top_p (1: all)
    min_p               keep tokens at least min_p times as probable as the best one (0: all)
    repetition_penalty  positive logits of tokens already there are divided by it, negative ones multiplied (1: off)
    seed                of this request's own draws; None draws afresh. The same seed gives the same target for the
                        same source, whatever else is in the batch.
    max_target_tokens   the most tokens to write, the stop token included
    stop_ids            tokens that end the target; None means the tokenizer's own (`<eos>`, `<end_of_turn>`)
    stop_strings        texts that end the target; they and what follows are cut from the text
    log_probabilities   tell that of each token too: one more pass over the vocabulary, 2 % of a small model's step
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_target_tokens: int = 256
    stop_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    log_probabilities: bool = False

    def __post_init__(self) -> None:
        def need(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")

        warm = math.isfinite(self.temperature) and self.temperature >= MIN_TEMPERATURE
        need(warm or self.temperature == 0, "temperature", f"0 (greedy) or a number from {MIN_TEMPERATURE} up")
        need(self.top_k >= 0, "top_k", "0 (off) or a positive count of tokens")
        need(0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1 (off)")
        need(0 <= self.min_p <= 1, "min_p", "a number from 0 (off) to 1")
        need(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "a positive number (1 is off)",
        )
        need(self.seed is None or self.seed >= 0, "seed", "None or a whole number, 0 or more")
        need(self.max_target_tokens >= 1, "max_target_tokens", "at least 1")
        need(not isinstance(self.stop_strings, str), "stop_strings", "a tuple of texts, not one text")
        need(all(self.stop_strings), "stop_strings", "texts that are not empty")
        need(self.stop_ids is None or all(i >= 0 for i in self.stop_ids), "stop_ids", "token ids, 0 or more")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def generator(self) -> np.random.Generator:
        """The source of this request's draws, one uniform number per token."""
        return np.random.Generator(np.random.PCG64(self.seed))


def apply_repetition_penalty(logits: Logits, seen: Sequence[int] | NDArray[np.int64], penalty: float) -> Logits:
    """Logits (V,) with the `seen` tokens made less likely (penalty > 1) or more likely (penalty < 1)."""
    if penalty == 1 or len(seen) == 0:
        return logits
    ids = np.unique(np.asarray(seen, dtype=np.int64))
    result = logits.copy()
    scores = logits[ids]
    result[ids] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
    return result


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Logits (V,) with all but the `k` greatest at minus infinity; what ties with the k-th is kept. 0 keeps all."""
    if k == 0 or k >= logits.size:
        return logits
    threshold = np.partition(logits, logits.size - k)[logits.size - k]
    return np.where(logits < threshold, -np.inf, logits).astype(np.float32, copy=False)


def keep_top_p(logits: Logits, p: float) -> Logits:
    """Logits (V,) with only the fewest most probable tokens whose probabilities together reach `p`. 1 keeps all.

    Counted from the small end: the least probable tokens whose sum stays within 1 - p go. Tokens that are each
    below (1 - p) / V are within it for certain, so they are summed without being sorted: with a vocabulary of
    262,144 few are left to sort.
    """
    if p >= 1:
        return logits
    probabilities = _softmax(logits)
    surely_dropped = probabilities < (1 - p) / logits.size
    left = np.flatnonzero(~surely_dropped)
    ascending = left[np.argsort(probabilities[left])]
    mass = probabilities[surely_dropped].sum(dtype=np.float64) + np.cumsum(probabilities[ascending], dtype=np.float64)
    dropped = mass <= 1 - p
    dropped[-1] = False
    result = np.full_like(logits, -np.inf)
    kept = ascending[~dropped]
    result[kept] = logits[kept]
    return result


def keep_min_p(logits: Logits, p: float) -> Logits:
    """Logits (V,) with only the tokens at least `p` times as probable as the most probable one. 0 keeps all."""
    if p == 0:
        return logits
    return np.where(logits < logits.max() + np.float32(math.log(p)), -np.inf, logits).astype(np.float32, copy=False)


def candidates(
    logits: Logits, settings: SamplingSettings, seen: Sequence[int] = ()
) -> tuple[NDArray[np.int64], Logits]:
    """What a draw is made from: the ids that penalty, temperature, top-k, top-p and min-p leave, and their logits.

    After each filter only what it kept goes on, so that after top-k nothing runs over the vocabulary.
    """
    logits = apply_repetition_penalty(logits, seen, settings.repetition_penalty)
    logits = (logits - logits.max()) / np.float32(settings.temperature)
    ids: NDArray[np.int64] | None = None
    filters: list[Callable[[Logits], Logits]] = []
    if settings.top_k:
        filters.append(lambda x: keep_top_k(x, settings.top_k))
    if settings.top_p < 1:
        filters.append(lambda x: keep_top_p(x, settings.top_p))
    if settings.min_p:
        filters.append(lambda x: keep_min_p(x, settings.min_p))
    for keep in filters:
        filtered = keep(logits)
        kept = np.flatnonzero(filtered > -np.inf)
        ids, logits = kept if ids is None else ids[kept], filtered[kept]
    return np.arange(logits.size) if ids is None else ids, logits


def log_sum(logits: Logits) -> float:
    """The logarithm of the summed exponentials of the logits (V,); in pieces, which stay in a processor's cache."""
    top = logits.max()
    pieces = (logits[start : start + PIECE] for start in range(0, logits.size, PIECE))
    return float(top) + math.log(sum(float(np.exp(piece - top).sum()) for piece in pieces))


def sample(
    logits: Logits,
    settings: SamplingSettings,
    rng: np.random.Generator,
    seen: Sequence[int] = (),
    log_sum_of_logits: float | None = None,
) -> tuple[int, float | None]:
    """Choose the next token from the last position's logits (V,): (id, log-probability if the settings ask for it).

    `seen` holds the ids that the decoder has read so far, for the repetition penalty. The log-probability is the
    model's own, before penalty, temperature and filters: what scoring the same target gives again. It needs `log_sum`,
    which runs over the vocabulary, unless who computed the logits gives it with them.
    """
    if logits.ndim != 1:
        raise ValueError(f"logits have shape {logits.shape}; expected (V,), those of one position")
    best = int(logits.argmax())
    if not math.isfinite(logits[best]):  # a NaN anywhere is the maximum
        raise ValueError("the logits hold NaN or are infinite; the model or its weights are broken in this dtype")
    if not settings.greedy:
        token = _draw(*candidates(logits, settings, seen), rng)
    elif settings.repetition_penalty == 1:
        token = best
    else:
        token = int(apply_repetition_penalty(logits, seen, settings.repetition_penalty).argmax())
    if not settings.log_probabilities:
        return token, None
    total = log_sum(logits) if log_sum_of_logits is None else log_sum_of_logits
    return token, float(logits[token]) - total


def _draw(ids: NDArray[np.int64], logits: Logits, rng: np.random.Generator) -> int:
    """One id by its softmax probability: where a uniform number falls on the cumulated probabilities."""
    cumulated = np.cumsum(_softmax(logits), dtype=np.float64)
    place = int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))
    return int(ids[min(place, ids.size - 1)])


def _softmax(logits: Logits) -> Logits:
    weights = np.exp(logits - logits.max())
    return weights / np.float32(weights.sum(dtype=np.float64))
