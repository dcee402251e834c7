"""One pass over tokens in chunks: states and head weight to losses and both gradients, never all logits at once.

    for each chunk of tokens:   z = states @ head.T;  y = softcap(z)             the chunk's logits, (n, V)
                                score(chunk, y) -> losses; y becomes dloss/dy    what is learned, given by the caller
                                dloss/dz -> gradients of states (N, D) and head weight (V, D)

As the loss is one number, both gradients are known, up to one factor, when the forward ends; the backward only
multiplies. That is three matrix products in all, as many as a loss over all logits needs. Products run in the dtype of
the states (or autocast's), everything over the vocabulary in float32 or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Score = Callable[[slice, Tensor, bool], Tensor]
"""(which tokens, their capped logits y (n, V), whether gradients are wanted) -> their losses (n,).

May overwrite y. If gradients are wanted it leaves in y the gradient in y of sum(weight x loss), the caller's weights.
"""

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}  # logits held at once; on a CPU more than this is no faster
SMALLEST_CHUNK_TOKENS = 128  # below, reading the head weight and its gradient costs more than the products


def default_chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """How many tokens go by at once when the caller does not say."""
    return max(SMALLEST_CHUNK_TOKENS, CHUNK_ELEMENTS.get(device.type, 1 << 24) // vocab_size)


def swept_loss(
    states: Float[Tensor, "N D"],
    head_weight: Float[Tensor, "V D"],
    weights: Float[Tensor, " N"],
    softcap: float | None,
    score: Score,
    chunk: int,
) -> Float[Tensor, ""]:
    """sum(weights x losses), differentiable (once) in states and head weight; loss and gradients in one sweep."""
    states, head_weight = matmul_operands(states, head_weight)
    enabled = torch.is_grad_enabled()
    wanted = enabled and states.requires_grad, enabled and head_weight.requires_grad
    loss: Any = _SweptLoss.apply(states, head_weight, weights, softcap, score, chunk, wanted)
    return loss


class _SweptLoss(torch.autograd.Function):
    """Loss and both gradients in one pass; the backward multiplies by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head_weight: Tensor,
        weights: Tensor,
        softcap: float | None,
        score: Score,
        chunk: int,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        losses, *gradients = sweep(states, head_weight, softcap, score, chunk, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = states.dtype, head_weight.dtype
        return (losses * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """From above comes 1 where the weights are already those of a mean: then the gradients go on as they are."""
        (factor,) = grad_outputs
        as_they_are = bool(factor == 1)
        scaled = [
            None if gradient is None else (gradient if as_they_are else gradient * factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None


def sweep(
    states: Float[Tensor, "N D"],
    head_weight: Float[Tensor, "V D"],
    softcap: float | None,
    score: Score,
    chunk: int,
    wanted: tuple[bool, bool],
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N D"] | None, Float[Tensor, "V D"] | None]:
    """Losses, and where wanted the gradients that `score` asks for, in states and in the head weight.

    The head weight's gradient sums over chunks, so it is kept in float32 even where the products are in bfloat16.
    """
    precision = torch.promote_types(states.dtype, torch.float32)
    number = len(states)
    losses = states.new_empty(number, dtype=precision)
    grad_states = torch.empty_like(states) if wanted[0] else None
    grad_weight = None
    if wanted[1]:
        grad_weight = (torch.empty_like if number else torch.zeros_like)(head_weight, dtype=precision)
    chunk = max(1, math.ceil(number / math.ceil(max(1, number) / chunk)))  # no fewer chunks, but all of one size
    reused = states.dtype == precision and number > 0  # touching new memory takes as long as writing it twice
    room = states.new_empty(chunk, len(head_weight)) if reused else None
    room_for_slope = torch.empty_like(room) if room is not None and softcap is not None and any(wanted) else None
    with torch.autocast(states.device.type, enabled=False):
        for start in range(0, number, chunk):
            here = slice(start, min(start + chunk, number))
            out, slope_out = (None if r is None else r[: here.stop - start] for r in (room, room_for_slope))
            logits = capped_logits(states[here], head_weight, softcap, out=out)
            slope = None
            if softcap is not None and any(wanted):
                slope = torch.div(logits, softcap, out=slope_out).square_().neg_().add_(1)
            losses[here] = score(here, logits, any(wanted))
            if not any(wanted):
                continue
            if slope is not None:
                logits.mul_(slope)
            grad_logits = logits.to(states.dtype)
            if grad_states is not None:
                torch.mm(grad_logits, head_weight, out=grad_states[here])
            if grad_weight is None:
                continue
            if states.dtype == precision:
                grad_weight.addmm_(grad_logits.t(), states[here], beta=min(start, 1))
            elif start:
                grad_weight.add_(grad_logits.t() @ states[here])
            else:
                grad_weight.copy_(grad_logits.t() @ states[here])
    return losses, grad_states, grad_weight


def capped_logits(
    states: Float[Tensor, "n D"],
    head_weight: Float[Tensor, "V D"],
    softcap: float | None,
    out: Float[Tensor, "n V"] | None = None,
) -> Float[Tensor, "n V"]:
    """One chunk's logits after the soft-cap (y = c tanh(z / c)), in float32 or more; in `out`, else in a new buffer."""
    if out is None:
        logits = (states @ head_weight.t()).to(torch.promote_types(states.dtype, torch.float32))
    else:
        logits = torch.mm(states, head_weight.t(), out=out)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def matmul_operands(states: Tensor, head_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype: autocast's where it is on, else the states'. The casts are part of the graph."""
    device = states.device.type
    autocast = torch.is_autocast_enabled(device) and states.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else states.dtype
    return states.to(dtype), head_weight.to(dtype)


def check_operands(
    states: Tensor, head_weight: Tensor, targets: Tensor, softcap: float | None, chunk_tokens: int | None
) -> None:
    """Raises ValueError for misshapen arguments."""
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


def check_weights(weights: Tensor, targets: Tensor) -> None:
    """Raises ValueError unless there is one constant weight per target."""
    if weights.shape != targets.shape:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; expected one per target, {tuple(targets.shape)}")
    if weights.requires_grad:
        raise ValueError("weights require a gradient but are taken as constants; detach them first")


def check_range(targets: Tensor, vocab_size: int) -> None:
    """Raises ValueError for ids outside the vocabulary."""
    if len(targets) == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"targets lie in {low}..{high} but the vocabulary is 0..{vocab_size - 1}; "
            "give positions without a target the weight 0"
        )
