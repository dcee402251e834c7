"""Denoising as an algebra: a noise mask x what becomes of the inputs x what becomes of the targets. Numpy only.

The operators and their names are T5's (arXiv 1910.10683, section 3.1.4; UL2, arXiv 2205.05131, section 3.1). A text of
eight tokens with its mask (1 = noise), sentinels X and Y, and the pair that span corruption makes of it:

    tokens                              a  b  c  d  e  f  g  h
    noise_mask                          0  0  1  1  0  0  0  1
    noise_span_to_unique_sentinel       a  b  X     e  f  g  Y           -> inputs
    nonnoise_span_to_unique_sentinel    X     c  d  Y        h           -> targets (+ EOS)

A mask starts with a kept token and ends with a hidden one. With one span the noise is therefore the end of the text,
and that task is prefix LM: it needs no sentinel, since nothing follows the gap (`Task.is_prefix_lm`).

Sentinels are a plain list of ids, used from the first on. Inputs are bare: the tokenizer's source format (BOS, EOS) is
put around them by whoever builds the batch, which is why lengths take `source_extra_tokens`. Targets end in EOS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Tokens = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Example:
    """What the encoder reads (no BOS or EOS added) and what the decoder writes (EOS at the end)."""

    inputs: Tokens
    targets: Tokens


class SentinelShortage(ValueError):
    """A text has more noise spans than the tokenizer has sentinels."""


@dataclass(frozen=True)
class Task:
    """One row of a mixture: hide a share `rate` of the tokens in spans of mean length `mean_span`.

    Give `mean_span` (the number of spans follows from the length) or `num_spans` (fixed), the other None. One fixed
    span is prefix LM; a rate of 1 hides everything, which is causal LM. `weight` is the row's share of examples in its
    mixture. `mode` names the token put before the inputs when the caller asks for mode tokens (UL2; none by default).
    """

    name: str
    mean_span: float | None
    rate: float
    num_spans: int | None = None
    weight: float = 1.0
    mode: str | None = None

    def __post_init__(self) -> None:
        _check_noise(self.rate, self.mean_span, self.num_spans)
        if self.rate == 1.0 and self.num_spans != 1:
            raise ValueError(f"task {self.name!r} hides every token (rate 1), which is one span; give num_spans=1")
        if not self.weight > 0:
            raise ValueError(f"task {self.name!r} has weight {self.weight}; expected a positive number")

    @property
    def is_prefix_lm(self) -> bool:
        """One span, at the end of the text: inputs and targets are its two parts, without sentinels."""
        return self.num_spans == 1

    def num_sentinels(self, length: int) -> int:
        """How many sentinels a text of `length` tokens takes."""
        return 0 if self.is_prefix_lm else noise_and_spans(length, self.rate, self.mean_span, self.num_spans)[1]

    def lengths(self, length: int, *, source_extra_tokens: int = 0) -> tuple[int, int]:
        """Exact (inputs, targets) lengths for a text of `length` tokens.

        Targets include EOS; inputs include `source_extra_tokens`: the BOS and EOS of the source format, a mode token.
        """
        noise, _ = noise_and_spans(length, self.rate, self.mean_span, self.num_spans)
        sentinels = self.num_sentinels(length)
        return length - noise + sentinels + source_extra_tokens, noise + sentinels + 1


def _check_noise(noise_density: float, mean_span: float | None, num_spans: int | None) -> None:
    if not 0.0 < noise_density <= 1.0:
        raise ValueError(f"the noise density is {noise_density}; expected a share above 0 and at most 1")
    if (mean_span is None) == (num_spans is None):
        raise ValueError(f"mean_span is {mean_span} and num_spans is {num_spans}; give exactly one of them")
    if mean_span is not None and not mean_span >= 1:
        raise ValueError(f"mean_span is {mean_span}; a span has at least 1 token")
    if num_spans is not None and num_spans < 1:
        raise ValueError(f"num_spans is {num_spans}; expected at least 1")


def noise_and_spans(
    length: int, noise_density: float, mean_span: float | None = None, num_spans: int | None = None
) -> tuple[int, int]:
    """How many tokens T5's rule hides, and in how many spans: whole numbers, no chance in them.

    noise = clamp(round(length x density), 1, length - 1), spans = max(1, round(noise / mean_span)), and no more spans
    than hidden or kept tokens. A text of one token keeps it (0, 0), as in T5; a density of 1 hides all in one span.
    Both numbers, and the number of kept tokens, never fall as the text grows, so that a longest length can be searched.
    """
    _check_noise(noise_density, mean_span, num_spans)
    if length < 1:
        raise ValueError(f"cannot make an example of {length} tokens; give at least 1")
    if noise_density == 1.0:
        return length, 1
    if length == 1:
        return 0, 0
    noise = min(max(round(length * noise_density), 1), length - 1)
    spans = num_spans if num_spans is not None else max(1, round(noise / (mean_span or 1)))
    return noise, min(spans, noise, length - noise)


def _random_composition(total: int, parts: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`total` as an ordered sum of `parts` positive numbers, uniform among all such sums."""
    cuts = np.sort(rng.choice(total - 1, size=parts - 1, replace=False, shuffle=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))


def random_spans_noise_mask(
    length: int,
    noise_density: float,
    rng: np.random.Generator,
    *,
    mean_span: float | None = None,
    num_spans: int | None = None,
) -> Mask:
    """A random mask (length,), True = noise, with exactly the counts of `noise_and_spans`.

    Kept and hidden tokens are each cut into that many parts, uniformly among all ways, and interleaved, a kept part
    first.
    """
    noise, spans = noise_and_spans(length, noise_density, mean_span, num_spans)
    if noise in (0, length):
        return np.full(length, noise > 0)
    parts = np.empty(2 * spans, dtype=np.int64)
    parts[0::2] = _random_composition(length - noise, spans, rng)
    parts[1::2] = _random_composition(noise, spans, rng)
    return np.repeat(np.arange(2 * spans) % 2 == 1, parts)


def _token_array(tokens: ArrayLike) -> Tokens:
    array = np.asarray(tokens)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"tokens have shape {array.shape} and type {array.dtype}; expected one non-empty row of integer ids"
        )
    return array.astype(np.int64)


def _pair(tokens: ArrayLike, noise_mask: ArrayLike) -> tuple[Tokens, Mask]:
    row, mask = _token_array(tokens), np.asarray(noise_mask)
    if mask.dtype != np.bool_ or mask.shape != row.shape:
        raise ValueError(
            f"noise_mask has shape {mask.shape} and type {mask.dtype}; expected {row.shape} booleans, one per token"
        )
    return row, mask


def drop_noise_tokens(tokens: ArrayLike, noise_mask: ArrayLike) -> Tokens:
    """The kept tokens, in order."""
    row, mask = _pair(tokens, noise_mask)
    return row[~mask]


def drop_nonnoise_tokens(tokens: ArrayLike, noise_mask: ArrayLike) -> Tokens:
    """The hidden tokens, in order."""
    row, mask = _pair(tokens, noise_mask)
    return row[mask]


def noise_span_to_unique_sentinel(tokens: ArrayLike, noise_mask: ArrayLike, sentinel_ids: Sequence[int]) -> Tokens:
    """Each run of noise becomes one sentinel: the first run the first id, and so on.

    Raises SentinelShortage when there are more runs than ids.
    """
    row, mask = _pair(tokens, noise_mask)
    starts = mask.copy()
    starts[1:] &= ~mask[:-1]
    spans = int(starts.sum())
    if spans > len(sentinel_ids):
        raise SentinelShortage(
            f"the text has {spans} spans to mark but the tokenizer has {len(sentinel_ids)} sentinels; "
            "give a shorter text or a tokenizer with more sentinels"
        )
    row[starts] = np.asarray(sentinel_ids[:spans], dtype=np.int64)
    return row[starts | ~mask]


def nonnoise_span_to_unique_sentinel(tokens: ArrayLike, noise_mask: ArrayLike, sentinel_ids: Sequence[int]) -> Tokens:
    """The mirror image: each run of kept tokens becomes one sentinel."""
    return noise_span_to_unique_sentinel(tokens, ~_pair(tokens, noise_mask)[1], sentinel_ids)


def span_corruption(tokens: ArrayLike, noise_mask: ArrayLike, sentinel_ids: Sequence[int], eos_id: int) -> Example:
    """T5's pair. The mask starts with a kept token and ends with a hidden one, so that both sides count spans alike."""
    row, mask = _pair(tokens, noise_mask)
    if mask[0] or not mask[-1]:
        raise ValueError(
            "the noise mask must start with a kept token and end with a hidden one, else the sentinels of inputs and "
            "targets do not match; make it with random_spans_noise_mask"
        )
    targets = nonnoise_span_to_unique_sentinel(row, mask, sentinel_ids)
    return Example(noise_span_to_unique_sentinel(row, mask, sentinel_ids), np.append(targets, eos_id))


def prefix_lm(tokens: ArrayLike, split: int, eos_id: int) -> Example:
    """The first `split` tokens are read, the rest is written."""
    row = _token_array(tokens)
    if not 0 <= split <= len(row):
        raise ValueError(f"cannot split {len(row)} tokens after {split}; expected 0 to {len(row)}")
    return Example(row[:split], np.append(row[split:], eos_id))


def causal_lm(tokens: ArrayLike, eos_id: int) -> Example:
    """Nothing is read, all is written: what a decoder-only model learns."""
    return prefix_lm(tokens, 0, eos_id)


def _longest(fits: Callable[[int], bool]) -> int:
    """The greatest length that fits, where every shorter one does too; 0 if not even one token fits."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@lru_cache(maxsize=4096)
def longest_raw_length(
    task: Task, max_inputs: int, max_targets: int, *, source_extra_tokens: int = 0, num_sentinels: int | None = None
) -> int:
    """The longest text whose example fits: inputs (with the source's own extra tokens), targets (with EOS), sentinels.

    One token more would not fit. Raises ValueError when nothing fits.
    """

    def fits(length: int) -> bool:
        inputs, targets = task.lengths(length, source_extra_tokens=source_extra_tokens)
        enough = num_sentinels is None or task.num_sentinels(length) <= num_sentinels
        return inputs <= max_inputs and targets <= max_targets and enough

    length = _longest(fits)
    if length == 0:
        inputs, targets = task.lengths(1, source_extra_tokens=source_extra_tokens)
        raise ValueError(
            f"no text fits task {task.name!r} into {max_inputs} input and {max_targets} target tokens; even one token "
            f"takes {inputs} and {targets} (with the source format's {source_extra_tokens} and the target's EOS)"
        )
    return length


@lru_cache(maxsize=4096)
def longest_for_sentinels(task: Task, num_sentinels: int) -> int | None:
    """The longest text that `num_sentinels` sentinels suffice for; None = any (prefix LM, or a fixed few spans)."""
    if num_sentinels < 0:
        raise ValueError(f"num_sentinels is {num_sentinels}; expected 0 or more")
    if task.is_prefix_lm or (task.num_spans is not None and task.num_spans <= num_sentinels):
        return None
    return _longest(lambda length: task.num_sentinels(length) <= num_sentinels)
