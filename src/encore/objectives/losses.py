"""Cross-entropy over the vocabulary that never holds all the logits.

Plain cross-entropy makes (N, V) logits, their log-softmax and their gradient: at 4,096 tokens and 262,144 words, 4 GiB
each. Here the tokens go by in chunks (`sweep`). One chunk's logits are made, turned in place into the gradient of the
loss with respect to them, multiplied into the gradients of states (N, D) and head weight (V, D), and forgotten.

With logits z = states @ head_weight.T, soft-cap c (Gemma 2: y = c tanh(z / c); none: y = z), token weight w:

    loss = sum w (logsumexp(y) - y[target])        dloss/dz = w (softmax(y) - onehot(target)) (1 - (y / c)^2)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from encore.objectives.split_vocabulary import SplitHead, against_split
from encore.objectives.sweep import (
    Score,
    check_operands,
    check_range,
    check_weights,
    default_chunk_tokens,
    matmul_operands,
    sweep,
    swept_loss,
)


def cross_entropy(
    states: Float[Tensor, "N D"],
    head_weight: Float[Tensor, "V D"] | SplitHead,
    targets: Int[Tensor, " N"],
    weights: Float[Tensor, " N"] | None = None,
    softcap: float | None = None,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum over tokens of weight x negative log-likelihood (nats), and the sum of weights; divide for the mean.

    Differentiable (once) in states and head weight. Tokens of weight 0 cost nothing, whatever their state and target,
    so padding may hold any id. `weights` None = all 1. A head weight that is split over processes is a SplitHead; all
    of them call with the same arguments and get the same loss. Raises ValueError for misshapen arguments and for
    targets outside the vocabulary.
    """
    weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights
    held = head_weight if isinstance(head_weight, Tensor) else head_weight.rows
    check_operands(states, held, targets, softcap, chunk_tokens)
    check_weights(weights, targets)
    weights = weights.to(torch.promote_types(states.dtype, torch.float32))
    total_weight = weights.sum()
    rows = weights.nonzero().squeeze(1)
    if len(rows) < len(weights):
        states, targets, weights = states[rows], targets[rows], weights[rows]
    check_range(targets, head_weight.shape[0])
    chunk = chunk_tokens or default_chunk_tokens(held.shape[0], states.device)
    if isinstance(head_weight, Tensor):
        return swept_loss(states, held, weights, softcap, _against(targets, weights), chunk), total_weight
    score = against_split(targets, weights, head_weight)
    return swept_loss(head_weight.states(states), held, weights, softcap, score, chunk), total_weight


def log_probabilities(
    states: Float[Tensor, "N D"],
    head_weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    softcap: float | None = None,
    *,
    chunk_tokens: int | None = None,
) -> Float[Tensor, " N"]:
    """The log-probability (nats, float32 or more) of each target, for scoring.

    Differentiable (once) too: the backward makes the logits again, chunk by chunk.
    """
    check_operands(states, head_weight, targets, softcap, chunk_tokens)
    check_range(targets, head_weight.shape[0])
    states, head_weight = matmul_operands(states, head_weight)
    chunk = chunk_tokens or default_chunk_tokens(head_weight.shape[0], states.device)
    scores: Any = _LogProbabilities.apply(states, head_weight, targets, softcap, chunk)
    return scores


def _against(targets: Tensor, weights: Tensor) -> Score:
    """Negative log-likelihoods of one-hot targets; their gradient is softmax - onehot."""

    def score(here: slice, logits: Tensor, with_gradient: bool) -> Tensor:
        column = targets[here, None]
        greatest = logits.amax(dim=1, keepdim=True)
        target_logits = logits.sub_(greatest).gather(1, column)
        normaliser = logits.exp_().sum(dim=1, keepdim=True)
        if with_gradient:
            factor = weights[here, None].to(logits.dtype)
            logits.mul_(factor / normaliser).scatter_add_(1, column, -factor)
        return (normaliser.log() - target_logits).squeeze(1)

    return score


class _LogProbabilities(torch.autograd.Function):
    """Per-token scores; what comes from above is not known in the forward, so the backward sweeps again."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head_weight: Tensor, targets: Tensor, softcap: float | None, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(states, head_weight, targets)
        ctx.softcap, ctx.chunk = softcap, chunk
        score = _against(targets, torch.ones_like(targets, dtype=torch.float32))
        return -sweep(states, head_weight, softcap, score, chunk, (False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        states, head_weight, targets = ctx.saved_tensors
        score = _against(targets, -grad_outputs[0])
        _, *gradients = sweep(states, head_weight, ctx.softcap, score, ctx.chunk, ctx.needs_input_grad[:2])
        cast = [
            None if gradient is None else gradient.to(like.dtype)
            for gradient, like in zip(gradients, (states, head_weight), strict=True)
        ]
        return *cast, None, None, None
