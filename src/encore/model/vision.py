"""The SigLIP tower and the projector into the encoder's width (Gemma 3 report, section 2.1).

pixels (N, 3, 896, 896) in [-1, 1] -> 4,096 patches -> 27 pre-LN layers -> average pool 4 x 4 -> 256 vectors
-> RMSNorm -> matrix -> (N, 256, D), which take the places of 256 placeholders each
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from encore.config import GemmaConfig, T5GemmaConfig, VisionConfig
from encore.model.layers import RMSNorm

PATCHES_AT_A_TIME = 1 << 14
"""How many go through the tower together: four pictures of 896 x 896, whose states take 70 MB each in float32."""


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
        self.image_size, self.tokens_per_image = config.image_size, config.mm_tokens_per_image
        self.patches_per_side = config.image_size // config.patch_size
        self.pool = self.patches_per_side // int(config.mm_tokens_per_image**0.5)

    def forward(self, patches: Float[Tensor, "N P W"]) -> Float[Tensor, "N pictures D"]:
        return self.project(self.pooled(patches))

    def pooled(self, patches: Float[Tensor, "N P W"]) -> Float[Tensor, "N pictures W"]:
        """The mean of each square of patches: all that the model keeps of what the tower saw."""
        grid = patches.transpose(1, 2).unflatten(2, (self.patches_per_side, self.patches_per_side))
        return F.avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2)

    def project(self, pooled: Float[Tensor, "N pictures W"]) -> Float[Tensor, "N pictures D"]:
        return self.mm_soft_emb_norm(pooled) @ self.mm_input_projection_weight


def picture_features(
    tower: VisionTower, projector: MultiModalProjector, pictures: Float[Tensor, "N C size size"]
) -> Float[Tensor, "N tokens W"]:
    """What the tower makes of each picture, pooled; a few pictures at a time, so that memory stays bounded.

    As long as the tower is frozen this depends on the picture alone: it can be kept, and given instead of the pixels.
    """
    at_a_time = max(1, PATCHES_AT_A_TIME // projector.patches_per_side**2)
    return torch.cat([projector.pooled(tower(some)) for some in pictures.split(at_a_time)])


def insert_pictures(
    x: Float[Tensor, "B S D"],
    tokens: Int[Tensor, "B S"],
    pictures: Float[Tensor, "N C size size"] | Float[Tensor, "N tokens W"],
    config: GemmaConfig | T5GemmaConfig,
    tower: VisionTower | None,
    projector: MultiModalProjector | None,
) -> Float[Tensor, "B S D"]:
    """The features of the pictures, not scaled, in place of the embeddings of their placeholders.

    Placeholders are the ids `config.image_token_index`. They are filled over the batch row by row, so the pictures
    stand in the order of the rows, and within a row in the order of the text. Pixels go through tower and projector,
    `picture_features` through the projector only.

    Raises ValueError where the model has no tower, the pictures have another shape, or their number does not match.
    """
    if config.vision is None:
        raise ValueError(f"pictures were given, but this {config.model_type} reads text only: its config has no tower")
    if tower is None or projector is None:
        raise ValueError(
            "pictures were given, but the model was loaded without its vision tower; load(..., vision=True)"
        )
    channels, size = config.vision.num_channels, config.vision.image_size
    per_picture, width = config.vision.mm_tokens_per_image, config.vision.hidden_size
    if tuple(pictures.shape[1:]) not in ((channels, size, size), (per_picture, width)):
        raise ValueError(
            f"pictures have shape {tuple(pictures.shape)}; expected pixels (number, {channels}, {size}, {size}), or "
            f"pooled features of the tower (number, {per_picture}, {width})"
        )
    if not pictures.is_floating_point():
        raise ValueError(f"pictures have dtype {pictures.dtype}; expected floats in [-1, 1] (encore.images makes them)")
    places = tokens == config.image_token_index
    found, wanted = int(places.sum()), pictures.shape[0] * per_picture
    if found != wanted:
        raise ValueError(
            f"the tokens hold {found} picture placeholders (id {config.image_token_index}), but {pictures.shape[0]} "
            f"pictures fill {wanted}: give {per_picture} placeholders for each picture"
        )
    if not wanted:
        return x
    weight = tower.embeddings.patch_embedding.weight
    pictures = pictures.to(weight.device, weight.dtype)
    pooled = pictures if pictures.dim() == 3 else picture_features(tower, projector, pictures)
    return x.masked_scatter(places[..., None], projector.project(pooled).to(x.dtype))
