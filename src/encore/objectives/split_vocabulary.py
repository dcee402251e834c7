"""Losses where each process holds some rows of the vocabulary (Megatron-LM, arXiv 1909.08053, section 3).

Every process has the same states and makes the logits (n, V / processes) of its own rows. Of a chunk of tokens a few
numbers per token cross the processes, never the logits:

    the greatest logit, the sum of exponentials, the target's logit (zero where the target's row is not held)
    distillation: the same of the teacher's logits, and its share of the divergence

The gradient in the head weight is that of the rows held; that in the states is the sum over processes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from encore.objectives.sweep import Score


class Vocabulary(Protocol):
    """Which columns of (n, V) logits this process holds, from `first_row` on, and what it hears of the others'."""

    @property
    def first_row(self) -> int: ...

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        ...

    def greatest(self, values: Tensor) -> Tensor:
        """The maximum over processes, in place."""
        ...


class WholeVocabulary:
    """All of it, held by one process."""

    first_row = 0

    def total(self, values: Tensor) -> Tensor:
        return values

    def greatest(self, values: Tensor) -> Tensor:
        return values


class SplitHead(Vocabulary, Protocol):
    """A head weight (V, D) of which this process holds rows `first_row`, `first_row` + 1, …"""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    ndim: int

    @property
    def rows(self) -> Float[Tensor, "v D"]: ...

    def states(self, states: Tensor) -> Tensor:
        """The same states; the gradient in them is summed over processes."""
        ...


def normalise_(logits: Float[Tensor, "n v"], vocabulary: Vocabulary) -> Float[Tensor, "n v"]:
    """Logits of the columns held -> their log-probabilities over the whole vocabulary, in place."""
    own = logits.logsumexp(dim=1, keepdim=True)
    greatest = vocabulary.greatest(own.clone())
    return logits.sub_(vocabulary.total((own - greatest).exp_()).log_().add_(greatest))


def held_columns(
    ids: Int[Tensor, "n k"], vocabulary: Vocabulary, num_columns: int
) -> tuple[Int[Tensor, "n k"], Bool[Tensor, "n k"]]:
    """Where ids stand among the columns held, and which of them do; the others' places are any."""
    columns = ids - vocabulary.first_row
    held = (columns >= 0) & (columns < num_columns)
    return columns.clamp_(0, num_columns - 1), held


def against_split(targets: Int[Tensor, " N"], weights: Float[Tensor, " N"], head: SplitHead) -> Score:
    """Negative log-likelihoods of one-hot targets, from the logits of the rows held; the same on every process."""

    def score(here: slice, logits: Tensor, with_gradient: bool) -> Tensor:
        column, held = held_columns(targets[here, None], head, logits.shape[1])
        logits.sub_(head.greatest(logits.amax(dim=1, keepdim=True)))
        target_logits = head.total(torch.where(held, logits.gather(1, column), 0.0))
        normaliser = head.total(logits.exp_().sum(dim=1, keepdim=True))
        if with_gradient:
            factor = weights[here, None].to(logits.dtype)
            logits.mul_(factor / normaliser).scatter_add_(1, column, torch.where(held, -factor, 0.0))
        return (normaliser.log() - target_logits).squeeze(1)

    return score
