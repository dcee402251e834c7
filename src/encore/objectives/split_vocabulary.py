"""Cross-entropy where each process holds some rows of the vocabulary (Megatron-LM, arXiv 1909.08053, section 3).

Every process has the same states and makes the logits (n, V / processes) of its own rows. Of a chunk of tokens three
numbers per token cross the processes, never the logits:

    the greatest logit, the sum of exponentials, the target's logit (zero where the target's row is not held)

The gradient in the head weight is that of the rows held; that in the states is the sum over processes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from encore.objectives.sweep import Score


class SplitHead(Protocol):
    """A head weight (V, D) of which this process holds rows `first_row`, `first_row` + 1, …"""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    ndim: int

    @property
    def rows(self) -> Float[Tensor, "v D"]: ...

    @property
    def first_row(self) -> int: ...

    def states(self, states: Tensor) -> Tensor:
        """The same states; the gradient in them is summed over processes."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        ...

    def greatest(self, values: Tensor) -> Tensor:
        """The maximum over processes, in place."""
        ...


def against_split(targets: Int[Tensor, " N"], weights: Float[Tensor, " N"], head: SplitHead) -> Score:
    """Negative log-likelihoods of one-hot targets, from the logits of the rows held; the same on every process."""
    first_row, num_rows = head.first_row, head.rows.shape[0]

    def score(here: slice, logits: Tensor, with_gradient: bool) -> Tensor:
        column = targets[here, None] - first_row
        held = (column >= 0) & (column < num_rows)
        column = column.clamp(0, num_rows - 1)
        logits.sub_(head.greatest(logits.amax(dim=1, keepdim=True)))
        target_logits = head.total(torch.where(held, logits.gather(1, column), 0.0))
        normaliser = head.total(logits.exp_().sum(dim=1, keepdim=True))
        if with_gradient:
            factor = weights[here, None].to(logits.dtype)
            logits.mul_(factor / normaliser).scatter_add_(1, column, torch.where(held, -factor, 0.0))
        return (normaliser.log() - target_logits).squeeze(1)

    return score
