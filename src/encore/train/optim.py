"""The optimizer: AdamW (arXiv 1711.05101) with warm-up and cosine, and the norms of gradients by part of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from encore.train.recipe import OptimRecipe

PARTS = ("encoder", "decoder", "embedding")
RATE_PARTS = ("encoder", "decoder", "cross_attention", "embedding", "vision")
"""Parts with a learning rate of their own: `optim.{part}_rate`."""


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


def freeze(model: nn.Module, recipe: OptimRecipe) -> None:
    """Take the gradient from every part whose rate is 0.

    Raises ValueError for a rate of a part that the model has not, when nothing is left that learns, and when the
    cross-attention is to be warmed up but does not learn.
    """
    parts = {rate_part(name) for name, _ in model.named_parameters()}
    for part in RATE_PARTS:
        if part not in parts and rate_factor(part, recipe) != rate_factor(part, OptimRecipe()):
            raise ValueError(
                f"optim.{part}_rate is {rate_factor(part, recipe)}, but the model has no {part.replace('_', '-')} "
                f"with weights of its own; its parts are {', '.join(p for p in RATE_PARTS if p in parts)}"
            )
    for name, parameter in model.named_parameters():
        if rate_factor(rate_part(name), recipe) == 0:
            parameter.requires_grad_(False)
    learning = {rate_part(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not learning:
        raise ValueError("every part of the model is frozen; give one of optim.…_rate a value above 0")
    if recipe.cross_attention_warmup_steps and "encoder" in parts and "cross_attention" not in learning:
        raise ValueError(
            f"optim.cross_attention_warmup_steps is {recipe.cross_attention_warmup_steps}, but the model has no "
            "cross-attention that learns (T5Gemma 2 merges it into self-attention; rate 0 freezes it); set it to 0"
        )


def make_optimizer(model: nn.Module, recipe: OptimRecipe) -> torch.optim.AdamW:
    """AdamW over all parameters that ask for a gradient; matrices decay, norms and vectors do not.

    Embeddings decay only with `decay_embeddings`: a row that is not met in a step would shrink all the same. Each
    group carries the factor of its part on the learning rate. Parameters spread over different meshes of processes
    come in groups of their own, since one fused step works on one mesh.
    """
    groups: dict[tuple[float, float, Any], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.dim() >= 2 and (recipe.decay_embeddings or part_of(name) != "embedding")
        decay = recipe.weight_decay if matrix else 0.0
        key = rate_factor(rate_part(name), recipe), decay, getattr(parameter, "device_mesh", None)
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "rate_factor": factor}
            for (factor, decay, _), parameters in groups.items()
        ],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]


def part_of(name: str) -> str:
    """Which part of a model a parameter belongs to. Embeddings are a part of their own: they may be shared."""
    if ".embed_tokens." in f".{name}":
        return "embedding"
    return "encoder" if name.startswith("encoder.") else "decoder"


def is_cross_attention(name: str) -> bool:
    return any(part in name for part in (".cross_attn.", "_cross_attn_layernorm.", ".memory_proj."))


def rate_part(name: str) -> str:
    """Which learning rate a parameter follows: one of RATE_PARTS."""
    if ".vision_tower." in f".{name}":
        return "vision"
    return "cross_attention" if is_cross_attention(name) else part_of(name)


def rate_factor(part: str, recipe: OptimRecipe) -> float:
    return getattr(recipe, f"{part}_rate")


Gradients = Mapping[str, Sequence[Tensor]]
"""Part of the model -> its gradients."""


def squared_norms(gradients: Gradients) -> dict[str, float]:
    """The squared norm of each part's gradients, all held here."""
    return {
        part: float(torch.stack([g.norm() for g in some]).double().square().sum()) for part, some in gradients.items()
    }


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be spread over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


def clip_gradients(
    named: Iterable[tuple[str, nn.Parameter]],
    max_norm: float,
    squared_norms: Callable[[Gradients], dict[str, float]] = squared_norms,
) -> dict[str, float]:
    """Scale all gradients so that their joint norm is at most `max_norm`.

    Returns the norms before that: "gradient_norm", and "gradient_norm_{encoder,decoder,embedding}" of the parts that
    there are. If a gradient is not finite nothing is scaled, and the joint norm that comes back is not finite either.
    `squared_norms` is another function where gradients are spread over processes.
    """
    found: dict[str, list[Tensor]] = {}
    for name, parameter in named:
        if parameter.grad is not None:
            found.setdefault(part_of(name), []).append(parameter.grad)
    gradients = {part: found[part] for part in PARTS if part in found}
    squares = squared_norms(gradients)
    total = math.sqrt(sum(squares.values()))
    if math.isfinite(total) and total > max_norm:
        for gradient in (g for part in gradients.values() for g in part):
            local_part(gradient).mul_(max_norm / total)
    return {"gradient_norm": total} | {f"gradient_norm_{part}": math.sqrt(s) for part, s in squares.items()}
