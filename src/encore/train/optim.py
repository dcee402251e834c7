"""The optimizer: AdamW (arXiv 1711.05101) with warm-up and cosine, and the norms of gradients by part of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from encore.train.recipe import OptimRecipe

PARTS = ("encoder", "decoder", "embedding")


def learning_rate(step: int, total_steps: int, recipe: OptimRecipe) -> float:
    """The rate of step `step` (from 0): up in a line over `warmup_steps`, then a cosine to the final fraction.

    The first step already moves (rate peak / warmup_steps), the last one has the final rate.
    """
    peak, warmup = recipe.learning_rate, recipe.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup + 1) / max(1, total_steps - warmup)
    floor = peak * recipe.final_learning_rate_fraction
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(model: nn.Module, recipe: OptimRecipe) -> torch.optim.AdamW:
    """AdamW over all parameters that ask for a gradient; matrices decay, norms and vectors do not.

    Embeddings decay only with `decay_embeddings`: a row that is not met in a step would shrink all the same.
    """
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.dim() >= 2 and (recipe.decay_embeddings or part_of(name) != "embedding")
        (decayed if matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def part_of(name: str) -> str:
    """Which part of a model a parameter belongs to. Embeddings are a part of their own: they may be shared."""
    if ".embed_tokens." in f".{name}":
        return "embedding"
    return "encoder" if name.startswith("encoder.") else "decoder"


def is_cross_attention(name: str) -> bool:
    return ".cross_attn." in name or "_cross_attn_layernorm." in name


def clip_gradients(named: Iterable[tuple[str, nn.Parameter]], max_norm: float) -> dict[str, float]:
    """Scale all gradients so that their joint norm is at most `max_norm`.

    Returns the norms before that: "gradient_norm", and "gradient_norm_{encoder,decoder,embedding}" of the parts that
    there are. If a gradient is not finite nothing is scaled, and the joint norm that comes back is not finite either.
    """
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in named:
        if parameter.grad is not None:
            gradients.setdefault(part_of(name), []).append(parameter.grad)
    squares = {
        part: float(torch.stack([g.norm() for g in gradients[part]]).double().square().sum())
        for part in PARTS
        if part in gradients
    }
    total = math.sqrt(sum(squares.values()))
    if math.isfinite(total) and total > max_norm:
        for gradient in (g for part in gradients.values() for g in part):
            gradient.mul_(max_norm / total)
    return {"gradient_norm": total} | {f"gradient_norm_{part}": math.sqrt(s) for part, s in squares.items()}
