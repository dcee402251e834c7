"""Decoder-only Gemma 2 and 3: where adaptation starts, the teacher, the baseline (Gemma 2 and Gemma 3 reports)."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from encore.config import GemmaConfig
from encore.model.cache import Cache
from encore.model.decoder import self_views
from encore.model.encoder import SelfLayer, check_tokens, packed
from encore.model.layers import RMSNorm, ScaledEmbedding, init_weights, vocabulary_logits
from encore.model.masks import picture_groups
from encore.model.vision import MultiModalProjector, VisionTower, insert_pictures


class Gemma(nn.Module):
    """Tokens (B, T) to logits (B, T, V). The head is the embedding matrix."""

    origin: Path | None = None
    """The folder it was loaded from, if any."""

    def __init__(self, config: GemmaConfig, *, vision: bool = False) -> None:
        super().__init__()
        self.config = config
        stack = config.stack
        self.embed_tokens = ScaledEmbedding(stack.vocab_size, stack.hidden_size)
        self.layers = nn.ModuleList(SelfLayer(stack) for _ in stack.layer_types)
        self.norm = RMSNorm(stack.hidden_size, stack.rms_norm_eps)
        self.vision_tower: VisionTower | None = None
        self.multi_modal_projector: MultiModalProjector | None = None
        if vision:
            if config.vision is None:
                raise ValueError(
                    "vision=True, but the config describes no vision tower; load a checkpoint that has one"
                )
            self.vision_tower = VisionTower(config.vision)
            self.multi_modal_projector = MultiModalProjector(config.vision, stack.hidden_size)

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        return self.embed_tokens.weight

    def make_cache(self, batch_size: int, max_tokens: int) -> Cache:
        """Buffers for `max_tokens` tokens (B, K, tokens, E); local layers keep a window only."""
        weight = self.head_weight
        return Cache(
            self.config.stack, batch_size=batch_size, max_tokens=max_tokens, dtype=weight.dtype, device=weight.device
        )

    def states(
        self,
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        positions: Int[Tensor, "#B T"] | None = None,
        pictures: Float[Tensor, "N C size size"] | None = None,
        segment_ids: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """States after the final norm, before the head: for losses that never hold all logits.

        `pictures`, pixels in [-1, 1], stand in the order of their placeholders over the batch. With a cache, all
        placeholders of a picture come in one call. `segment_ids` are of packed rows (0 = padding, 1, 2, … rising from
        the left): each segment is read as if it were alone.
        """
        check_tokens(tokens, mask, self.head_weight.shape[0], "input")
        mask, segments = packed(tokens, mask, segment_ids, "input")
        x = self.embed_tokens(tokens)
        groups = None
        if pictures is not None:
            x = insert_pictures(x, tokens, pictures, self.config, self.vision_tower, self.multi_modal_projector)
            groups = picture_groups(tokens, self.config.image_token_index)
        views = self_views(self.config.stack, x, mask, cache, positions, groups, segments)
        for i, kind in enumerate(self.config.stack.layer_types):
            x = self.layers[i](x, views[kind], None if cache is None else cache.layers[i])
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def logits(self, states: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        return vocabulary_logits(states, self.head_weight, self.config.final_logit_softcapping)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        positions: Int[Tensor, "#B T"] | None = None,
        pictures: Float[Tensor, "N C size size"] | None = None,
        segment_ids: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits after soft-capping. With a cache from `make_cache`, takes the next tokens and updates it in place."""
        states = self.states(tokens, mask, cache, positions=positions, pictures=pictures, segment_ids=segment_ids)
        return self.logits(states)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights: normal(0, 0.02), norms zero."""
        init_weights(self, generator)
