"""Cross-entropy over the vocabulary that never holds all the logits.

Plain cross-entropy makes (N, V) logits, their log-softmax and their gradient: at 4,096 tokens and 262,144 words, 4 GiB
each. Here the tokens go by in chunks. One chunk's logits are made, turned in place into the gradient of the loss with
respect to them, multiplied into the gradients of states (N, D) and head weight (V, D), and forgotten. As the loss is
one number, both gradients are known, up to one factor, when the forward ends; the backward only multiplies. That is
three matrix products in all, as many as the plain loss needs.

With logits z = states @ head_weight.T, soft-cap c (Gemma 2: y = c tanh(z / c); none: y = z), token weight w:

    loss = sum w (logsumexp(y) - y[target])        dloss/dz = w (softmax(y) - onehot(target)) (1 - (y / c)^2)

Products run in the dtype of the states (or autocast's), everything over the vocabulary in float32 or more.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}  # logits held at once; on a CPU more than this is no faster
SMALLEST_CHUNK_TOKENS = 64  # below, reading the head weight costs more than the products


def default_chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """How many tokens go by at once when the caller does not say."""
    return max(SMALLEST_CHUNK_TOKENS, CHUNK_ELEMENTS.get(device.type, 1 << 24) // vocab_size)


def cross_entropy(
    states: Float[Tensor, "N D"],
    head_weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    weights: Float[Tensor, " N"] | None = None,
    softcap: float | None = None,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Sum over tokens of weight x negative log-likelihood (nats), and the sum of weights; divide for the mean.

    Differentiable (once) in states and head weight. Tokens of weight 0 cost nothing, whatever their state and target,
    so padding may hold any id. `weights` None = all 1. Raises ValueError for misshapen arguments and for targets
    outside the vocabulary.
    """
    weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights
    _check(states, head_weight, targets, softcap, chunk_tokens)
    if weights.shape != targets.shape:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; expected one per target, {tuple(targets.shape)}")
    if weights.requires_grad:
        raise ValueError("weights require a gradient but are taken as constants; detach them first")
    weights = weights.to(torch.promote_types(states.dtype, torch.float32))
    total_weight = weights.sum()
    rows = weights.nonzero().squeeze(1)
    if len(rows) < len(weights):
        states, targets, weights = states[rows], targets[rows], weights[rows]
    _check_range(targets, head_weight.shape[0])
    states, head_weight = _matmul_operands(states, head_weight)
    chunk = chunk_tokens or default_chunk_tokens(head_weight.shape[0], states.device)
    wanted = torch.is_grad_enabled() and states.requires_grad, torch.is_grad_enabled() and head_weight.requires_grad
    loss: Any = _CrossEntropy.apply(states, head_weight, targets, weights, softcap, chunk, wanted)
    return loss, total_weight


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
    _check(states, head_weight, targets, softcap, chunk_tokens)
    _check_range(targets, head_weight.shape[0])
    states, head_weight = _matmul_operands(states, head_weight)
    chunk = chunk_tokens or default_chunk_tokens(head_weight.shape[0], states.device)
    scores: Any = _LogProbabilities.apply(states, head_weight, targets, softcap, chunk)
    return scores


class _CrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass; the backward multiplies by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        softcap: float | None,
        chunk: int,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        losses, *gradients = _sweep(states, head_weight, targets, weights, softcap, chunk, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = states.dtype, head_weight.dtype
        return (losses * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled = [
            None if gradient is None else (gradient * grad_outputs[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None


class _LogProbabilities(torch.autograd.Function):
    """Per-token scores; what comes from above is not known in the forward, so the backward sweeps again."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head_weight: Tensor, targets: Tensor, softcap: float | None, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(states, head_weight, targets)
        ctx.softcap, ctx.chunk = softcap, chunk
        return -_sweep(states, head_weight, targets, None, softcap, chunk, (False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        states, head_weight, targets = ctx.saved_tensors
        _, *gradients = _sweep(
            states, head_weight, targets, -grad_outputs[0], ctx.softcap, ctx.chunk, ctx.needs_input_grad[:2]
        )
        cast = [
            None if gradient is None else gradient.to(like.dtype)
            for gradient, like in zip(gradients, (states, head_weight), strict=True)
        ]
        return *cast, None, None, None


def _sweep(
    states: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    softcap: float | None,
    chunk: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Negative log-likelihoods (N,) and, where wanted, the gradients of sum(upstream x them) in states and head weight.

    The head weight's gradient sums over chunks, so it is kept in float32 even where the products are in bfloat16.
    """
    precision = torch.promote_types(states.dtype, torch.float32)
    losses = states.new_empty(len(states), dtype=precision)
    grad_states = torch.empty_like(states) if wanted[0] else None
    grad_weight = torch.zeros_like(head_weight, dtype=precision) if wanted[1] else None
    with torch.autocast(states.device.type, enabled=False):
        for start in range(0, len(states), chunk):
            here = slice(start, start + chunk)
            logits = (states[here] @ head_weight.t()).to(precision)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            column = targets[here, None]
            slope = None
            if softcap is not None and any(wanted):
                slope = (logits / softcap).square_().neg_().add_(1)
            greatest = logits.amax(dim=1, keepdim=True)
            target_logits = logits.sub_(greatest).gather(1, column)
            normaliser = logits.exp_().sum(dim=1, keepdim=True)
            losses[here] = (normaliser.log() - target_logits).squeeze(1)
            if upstream is None or not any(wanted):
                continue
            factor = upstream[here, None].to(precision)
            logits.mul_(factor / normaliser).scatter_add_(1, column, -factor)
            if slope is not None:
                logits.mul_(slope)
            grad_logits = logits.to(states.dtype)
            if grad_states is not None:
                torch.mm(grad_logits, head_weight, out=grad_states[here])
            if grad_weight is None:
                continue
            if states.dtype == precision:
                grad_weight.addmm_(grad_logits.t(), states[here])
            else:
                grad_weight.add_(grad_logits.t() @ states[here])
    return losses, grad_states, grad_weight


def _matmul_operands(states: Tensor, head_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype: autocast's where it is on, else the states'. The casts are part of the graph."""
    device = states.device.type
    autocast = torch.is_autocast_enabled(device) and states.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else states.dtype
    return states.to(dtype), head_weight.to(dtype)


def _check(
    states: Tensor, head_weight: Tensor, targets: Tensor, softcap: float | None, chunk_tokens: int | None
) -> None:
    if states.ndim != 2 or head_weight.ndim != 2 or states.shape[1] != head_weight.shape[1]:
        raise ValueError(
            f"states have shape {tuple(states.shape)} and head_weight {tuple(head_weight.shape)}; "
            "expected (N, D) and (V, D): flatten batch and time first"
        )
    if targets.shape != states.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and type {targets.dtype}; expected ({len(states)},) of int64"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; expected a positive number or None")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected at least 1")


def _check_range(targets: Tensor, vocab_size: int) -> None:
    if len(targets) == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"targets lie in {low}..{high} but the vocabulary is 0..{vocab_size - 1}; "
            "give positions without a target the weight 0"
        )
