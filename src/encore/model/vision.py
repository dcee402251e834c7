"""The SigLIP tower and the projector into the encoder's width (Gemma 3 report, section 2.1).

pixels (N, 3, 896, 896) in [-1, 1] -> 4,096 patches -> 27 pre-LN layers -> average pool 4 x 4 -> 256 vectors
-> RMSNorm -> matrix -> (N, 256, D)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from encore.config import VisionConfig
from encore.model.layers import RMSNorm


class VisionEmbeddings(nn.Module):
    """Patches through a convolution, plus learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2, config.hidden_size)

    def forward(self, pixels: Float[Tensor, "N C size size"]) -> Float[Tensor, "N P W"]:
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding.weight


class VisionAttention(nn.Module):
    """Every patch sees every patch; projections with biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        size = config.hidden_size
        self.q_proj, self.k_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.v_proj, self.out_proj = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Float[Tensor, "N P W"]) -> Float[Tensor, "N P W"]:
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """fc2(gelu(fc1(x))), tanh GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "N P W"]) -> Float[Tensor, "N P W"]:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Float[Tensor, "N P W"]) -> Float[Tensor, "N P W"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionLayers(nn.Module):
    """The layers under the public name `encoder.layers`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionTower(nn.Module):
    """Pixels to patch states after the last norm; no pooling head."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionLayers(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Float[Tensor, "N C size size"]) -> Float[Tensor, "N P W"]:
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class MultiModalProjector(nn.Module):
    """Average pool, RMSNorm, and a matrix multiplied from the right."""

    def __init__(self, config: VisionConfig, size: int) -> None:
        super().__init__()
        self.mm_input_projection_weight = nn.Parameter(torch.zeros(config.hidden_size, size))
        self.mm_soft_emb_norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.patches_per_side = config.image_size // config.patch_size
        self.pool = self.patches_per_side // int(config.mm_tokens_per_image**0.5)

    def forward(self, patches: Float[Tensor, "N P W"]) -> Float[Tensor, "N pictures D"]:
        grid = patches.transpose(1, 2).unflatten(2, (self.patches_per_side, self.patches_per_side))
        pooled = F.avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2)
        return self.mm_soft_emb_norm(pooled) @ self.mm_input_projection_weight
