"""The small parts of a Gemma layer (Gemma 2 report, section 2; Gemma 3 report, section 2).

RMSNorm with scale (1 + w), the gated GELU feed-forward, the scaled embedding and the head that shares its matrix, and
rotary positions. Norms and rotations run in float32 whatever the weights are in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from encore.config import LayerType, Rope, StackConfig


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + w), in float32, back in the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        scale = 1.0 + self.weight.float()
        return F.rms_norm(x.float(), (x.shape[-1],), scale, self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), tanh GELU, no biases."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class ScaledEmbedding(nn.Module):
    """Rows of a (V, D) matrix times sqrt(D), the factor rounded to the dtype of the matrix.

    T5Gemma 2 adds one learned vector, not scaled, in place of the row of the end-of-image token; the head still uses
    the row (T5Gemma 2 paper; absent elsewhere: `eoi_token_index=None`).
    """

    def __init__(self, vocab_size: int, size: int, eoi_token_index: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size, size))
        self.eoi_token_index = eoi_token_index
        self.eoi_embedding = None if eoi_token_index is None else nn.Parameter(torch.zeros(size))

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        scale = torch.tensor(self.weight.shape[1] ** 0.5, dtype=self.weight.dtype).item()
        x = F.embedding(tokens, self.weight) * scale
        if self.eoi_embedding is not None and self.eoi_token_index < self.weight.shape[0]:  # pyright: ignore
            x = torch.where((tokens == self.eoi_token_index)[..., None], self.eoi_embedding, x)
        return x


Rotation = tuple[Float[Tensor, "#B T half"], Float[Tensor, "#B T half"]]
"""Cosines and sines of the angles of each position, float32."""


def rotation(rope: Rope, head_dim: int, positions: Int[Tensor, "#B T"]) -> Rotation:
    """Angles position / factor * theta^(-2i / head_dim) for i in 0..head_dim/2 - 1."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequency = 1.0 / (rope.theta**exponent) / rope.factor
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rotations(config: StackConfig, positions: Int[Tensor, "#B T"]) -> dict[LayerType, Rotation]:
    """One rotation per kind of layer."""
    kinds = dict.fromkeys(config.layer_types)
    return {kind: rotation(config.rope(kind), config.head_dim, positions) for kind in kinds}


def rotate(x: Float[Tensor, "B T H E"], by: Rotation) -> Float[Tensor, "B T H E"]:
    """Rotary positions: halves (a, b) become (a cos - b sin, b cos + a sin), in float32."""
    cos, sin = by[0][:, :, None], by[1][:, :, None]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def real_positions(
    mask: Bool[Tensor, "B T"] | None, num_tokens: int, start: int | Int[Tensor, "B 1"], device: torch.device
) -> Int[Tensor, "#B T"]:
    """Positions that count real tokens from `start`; padding gets some finite position that nobody reads."""
    if mask is None:
        return torch.arange(num_tokens, device=device)[None] + start
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0) + start


def vocabulary_logits(
    states: Float[Tensor, "*B D"], head_weight: Float[Tensor, "V D"], softcap: float | None
) -> Float[Tensor, "*B V"]:
    """states @ head', soft-capped in float32."""
    logits = F.linear(states, head_weight)
    if softcap is not None:
        logits = (torch.tanh(logits.float() / softcap) * softcap).to(states.dtype)
    return logits


@torch.no_grad()
def init_weights(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Matrices normal(0, 0.02), norm scales, biases and the end-of-image vector zero."""
    zeros = {id(p) for m in model.modules() if isinstance(m, RMSNorm | nn.LayerNorm) for p in m.parameters()}
    for parameter in model.parameters():
        if id(parameter) in zeros or parameter.dim() == 1:
            parameter.zero_()
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
