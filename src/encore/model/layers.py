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
    """x / rms(x) * (1 + w), in float32, back in the dtype of x.

    By way of the vector norm: on a CPU its backward makes the whole 1.8 times as fast as torch's composite rms_norm.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        precise = x.float()
        norm = torch.linalg.vector_norm(precise, dim=-1, keepdim=True)
        unit = precise * torch.rsqrt(norm * norm * (1.0 / x.shape[-1]) + self.eps)
        return torch.addcmul(unit, unit, self.weight.float()).to(x.dtype)


ROWS_AT_ONCE = 8192
"""Longer inputs go through the feed-forward in pieces of so many tokens (where no gradient is kept)."""


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), tanh GELU, no biases."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        if x.shape[1] > ROWS_AT_ONCE and not torch.is_grad_enabled():
            return torch.cat([self.forward(piece) for piece in x.split(ROWS_AT_ONCE, dim=1)], dim=1)
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class ScaledEmbedding(nn.Module):
    """Rows of a (V, D) matrix times sqrt(D), the factor rounded to the dtype of the matrix.

    T5Gemma 2 adds one learned vector, not scaled, in place of the row of the end-of-image token; the head still uses
    the row (T5Gemma 2 paper; absent elsewhere: `eoi_token_index=None`).

    With `sparse_gradient` the lookup's gradient holds only the rows that were read: for a matrix that is the head too,
    whose dense gradient takes them up (`train/loss.py`).
    """

    def __init__(self, vocab_size: int, size: int, eoi_token_index: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size, size))
        self.sparse_gradient = False
        self.eoi_token_index = eoi_token_index
        self.eoi_embedding = None if eoi_token_index is None else nn.Parameter(torch.zeros(size))

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        scale = torch.tensor(self.weight.shape[1] ** 0.5, dtype=self.weight.dtype).item()
        x = F.embedding(tokens, self.weight, sparse=self.sparse_gradient) * scale
        if self.eoi_embedding is not None and self.eoi_token_index < self.weight.shape[0]:  # pyright: ignore
            x = torch.where((tokens == self.eoi_token_index)[..., None], self.eoi_embedding, x)
        return x


Rotation = tuple[Float[Tensor, "#B T 1 E"], Float[Tensor, "#B T 1 E"]]
"""For each position the cosines (twice) and the sines (once negative, once positive) of its angles, float32."""


def rotation(rope: Rope, head_dim: int, positions: Int[Tensor, "#B T"]) -> Rotation:
    """Angles position / factor * theta^(-2i / head_dim) for i in 0..head_dim/2 - 1."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequency = 1.0 / (rope.theta**exponent) / rope.factor
    angle = (positions[..., None].float() * frequency)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotations(config: StackConfig, positions: Int[Tensor, "#B T"]) -> dict[LayerType, tuple[Rotation, Rotation]]:
    """For each kind of layer the rotation of keys, and that of queries, which scales them too."""
    found: dict[LayerType, tuple[Rotation, Rotation]] = {}
    scale = config.query_pre_attn_scalar**-0.5
    for kind in dict.fromkeys(config.layer_types):
        cos, sin = rotation(config.rope(kind), config.head_dim, positions)
        found[kind] = (cos, sin), (cos * scale, sin * scale)
    return found


def rotate(x: Float[Tensor, "B T H E"], by: Rotation) -> Float[Tensor, "B T H E"]:
    """Rotary positions: halves (a, b) become (a cos - b sin, b cos + a sin), in float32."""
    cos, sin = by
    precise = x.float()
    return torch.addcmul(precise * cos, precise.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def real_positions(
    mask: Bool[Tensor, "B T"] | None, num_tokens: int, start: int | Int[Tensor, "B 1"], device: torch.device
) -> Int[Tensor, "#B T"]:
    """Positions that count real tokens from `start`; padding gets some finite position that nobody reads."""
    if mask is None:
        return torch.arange(num_tokens, device=device)[None] + start
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0) + start


def segment_positions(segment_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Positions that start again at 0 in each segment of a packed row.

    >>> segment_positions(torch.tensor([[1, 1, 1, 2, 2, 0]]))
    tensor([[0, 1, 2, 0, 1, 0]])
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def vocabulary_logits(
    states: Float[Tensor, "*B D"], head_weight: Float[Tensor, "V D"], softcap: float | None
) -> Float[Tensor, "*B V"]:
    """states @ head', soft-capped in float32.

    A handful of rows, as in a step of batched decoding, go through the transposed product: it reads the large matrix
    in order, and takes 0.5 to 0.9 of the time on a CPU (5 to 32 rows, 262,144 x 640).
    """
    if 4 < states.shape[:-1].numel() <= 32 and states.device.type == "cpu":
        logits = (head_weight @ states.flatten(0, -2).t()).t().view(*states.shape[:-1], -1)
    else:
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
