"""The mixtures of denoising tasks, as tables of rows over `denoise`. Numpy only; all chance comes from the given rng.

    t5gemma2   T5Gemma 2 (arXiv 2512.14856, section 3): (3, .15, n) (12, .5, n) (32, .15, n) (32, .5, n) (3/4 L, .75, 1)
               mixed 1:1:1:1:4 by examples. Half of it is prefix LM with a quarter as prefix; 0.5375 of all is hidden.
    ul2        UL2 (arXiv 2205.05131, table 1): two R, one S, four X denoisers. The paper's mixing rates are not known;
               here each of the three kinds gets a third. With `mode_ids`, inputs open with the kind's token.
    prefixlm   T5Gemma (arXiv 2504.06225): the first half is read, the second written.
    causal     decoder-only: all is written.

Which tokens the released models use as sentinels or modes is not published. Here spans take the tokenizer's sentinels
in order, the single-span tasks take none, and mode tokens are used only when asked for.

    task = sample_task("t5gemma2", rng)
    length = longest_raw_length(task, 1024, 1024, source_extra_tokens=2, num_sentinels=len(sentinel_ids))
    example = apply(task, tokens[:length], sentinel_ids, eos_id, rng)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from encore.objectives.denoise import (
    Example,
    SentinelShortage,
    Task,
    longest_for_sentinels,
    noise_and_spans,
    prefix_lm,
    random_spans_noise_mask,
    span_corruption,
)

Mixture = str | Sequence[Task]

MIXTURES: dict[str, tuple[Task, ...]] = {
    "t5gemma2": (
        Task("short_spans_light", 3, 0.15, None, 1),
        Task("medium_spans_heavy", 12, 0.5, None, 1),
        Task("long_spans_light", 32, 0.15, None, 1),
        Task("long_spans_heavy", 32, 0.5, None, 1),
        Task("prefix_lm", None, 0.75, 1, 4),
    ),
    "ul2": (
        Task("r_3", 3, 0.15, None, 2, "[NLU]"),
        Task("r_8", 8, 0.15, None, 2, "[NLU]"),
        Task("s", None, 0.25, 1, 4, "[S2S]"),
        Task("x_3_heavy", 3, 0.5, None, 1, "[NLG]"),
        Task("x_8_heavy", 8, 0.5, None, 1, "[NLG]"),
        Task("x_64_light", 64, 0.15, None, 1, "[NLG]"),
        Task("x_64_heavy", 64, 0.5, None, 1, "[NLG]"),
    ),
    "prefixlm": (Task("prefix_lm", None, 0.5, 1, 1),),
    "causal": (Task("causal_lm", None, 1.0, 1, 1),),
}


def mixture_rows(mixture: Mixture) -> tuple[Task, ...]:
    """The rows of a mixture given by name or as rows."""
    if isinstance(mixture, str):
        if mixture not in MIXTURES:
            raise ValueError(f"there is no mixture {mixture!r}; expected one of {', '.join(MIXTURES)}, or rows of Task")
        return MIXTURES[mixture]
    if not mixture:
        raise ValueError("the mixture has no rows; give at least one Task")
    return tuple(mixture)


def expected_corruption(mixture: Mixture) -> float:
    """The share of tokens hidden, averaged over examples (before each example's counts are rounded)."""
    rows = mixture_rows(mixture)
    return sum(row.weight * row.rate for row in rows) / sum(row.weight for row in rows)


def sample_task(mixture: Mixture, rng: np.random.Generator) -> Task:
    """One row, with probability in proportion to its weight. Draws exactly one number from `rng`."""
    rows = mixture_rows(mixture)
    edges = np.cumsum([row.weight for row in rows])
    return rows[min(int(np.searchsorted(edges, rng.random() * edges[-1], side="right")), len(rows) - 1)]


def apply(
    task: Task,
    tokens: ArrayLike,
    sentinel_ids: Sequence[int],
    eos_id: int,
    rng: np.random.Generator,
    *,
    on_shortage: Literal["refuse", "shorten"] = "refuse",
    mode_ids: Mapping[str, int] | None = None,
) -> Example:
    """Make one example of all the tokens (no BOS or EOS in them), of exactly `task.lengths(len(tokens))`.

    A text that needs more sentinels than there are is refused (SentinelShortage, which names the longest length that
    would do) or, with on_shortage="shorten", cut to that length from the end. Callers that must lose nothing take texts
    of `longest_raw_length(..., num_sentinels=len(sentinel_ids))`. `mode_ids` maps mode names to ids and puts the task's
    own before the inputs (one token more than `lengths` says).
    """
    if on_shortage not in ("refuse", "shorten"):
        raise ValueError(f"on_shortage is {on_shortage!r}; expected 'refuse' or 'shorten'")
    row = np.asarray(tokens)
    needed = task.num_sentinels(len(row)) if row.ndim == 1 else 0
    if needed > len(sentinel_ids):
        longest = longest_for_sentinels(task, len(sentinel_ids)) or len(row)
        if on_shortage == "refuse":
            raise SentinelShortage(
                f"task {task.name!r} needs {needed} sentinels for {len(row)} tokens but the tokenizer has "
                f"{len(sentinel_ids)}; give at most {longest} tokens, or on_shortage='shorten'"
            )
        row = row[:longest]
    example = _denoise(task, row, sentinel_ids, eos_id, rng)
    if mode_ids is None or task.mode is None:
        return example
    if task.mode not in mode_ids:
        raise ValueError(f"task {task.name!r} has mode {task.mode} but mode_ids names {', '.join(mode_ids) or 'none'}")
    return Example(np.insert(example.inputs, 0, mode_ids[task.mode]), example.targets)


def _denoise(
    task: Task, tokens: np.ndarray, sentinel_ids: Sequence[int], eos_id: int, rng: np.random.Generator
) -> Example:
    noise, spans = noise_and_spans(len(tokens), task.rate, task.mean_span, task.num_spans)
    if task.is_prefix_lm or spans == 0:
        return prefix_lm(tokens, len(tokens) - noise, eos_id)
    mask = random_spans_noise_mask(len(tokens), task.rate, rng, mean_span=task.mean_span, num_spans=task.num_spans)
    return span_corruption(tokens, mask, sentinel_ids, eos_id)
