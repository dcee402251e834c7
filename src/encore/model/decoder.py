"""The decoders: two layers, not a flag, because separate and merged cross-attention are different equations.

CrossAttentionLayer   T5Gemma:   x += post(self(pre x)); x += post(cross(pre x, memory)); x += post(mlp(pre x))
MergedLayer           T5Gemma 2: x += post(merged(pre x, memory));                        x += post(mlp(pre x))
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from encore.config import LayerType, StackConfig, T5GemmaConfig
from encore.kernels.attention import Keys
from encore.model.attention import CrossAttention, KeysValues, MergedAttention, SelfView
from encore.model.cache import Cache, LayerCache
from encore.model.encoder import GemmaLayer, Memory, check_tokens
from encore.model.layers import RMSNorm, ScaledEmbedding, real_positions, rotations
from encore.model.masks import EVERYTHING, Visibility, decoder_window


class MergedLayer(GemmaLayer):
    """T5Gemma 2: the parts of a Gemma 3 layer, its attention reading target and memory."""

    def __init__(self, config: StackConfig, memory_size: int) -> None:
        if memory_size != config.hidden_size:
            raise ValueError(f"merged attention needs a memory of width {config.hidden_size}, not {memory_size}")
        super().__init__(config)
        self.self_attn = MergedAttention(config)

    def memory_keys_values(self, states: Float[Tensor, "B S D"]) -> KeysValues:
        return self.self_attn.memory_keys_values(states)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        view: SelfView,
        cache: LayerCache | None,
        memory: KeysValues,
        memory_visible: Visibility,
    ) -> Float[Tensor, "B T D"]:
        return self.feed_forward(self.attend(x, view, cache, (Keys(*memory, memory_visible),)))


class CrossAttentionLayer(GemmaLayer):
    """T5Gemma: cross-attention, with norms of its own, between self-attention and feed-forward."""

    def __init__(self, config: StackConfig, memory_size: int) -> None:
        super().__init__(config)
        self.cross_attn = CrossAttention(config, memory_size)
        self.pre_cross_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_cross_attn_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def memory_keys_values(self, states: Float[Tensor, "B S D"]) -> KeysValues:
        return self.cross_attn.memory_keys_values(states)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        view: SelfView,
        cache: LayerCache | None,
        memory: KeysValues,
        memory_visible: Visibility,
    ) -> Float[Tensor, "B T D"]:
        x = self.attend(x, view, cache)
        read = self.cross_attn(self.pre_cross_attn_layernorm(x), memory, memory_visible)
        return self.feed_forward(x + self.post_cross_attn_layernorm(read))


class Decoder(nn.Module):
    """Target tokens (B, T) and a Memory to states (B, T, D) after the final norm."""

    def __init__(self, config: T5GemmaConfig, embed_tokens: ScaledEmbedding) -> None:
        super().__init__()
        self.config = config
        stack = config.decoder
        layer = MergedLayer if config.model_type == "t5gemma2" else CrossAttentionLayer
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layer(stack, config.encoder.hidden_size) for _ in stack.layer_types)
        self.norm = RMSNorm(stack.hidden_size, stack.rms_norm_eps)

    def forward(
        self,
        decoder_input_tokens: Int[Tensor, "B T"],
        memory: Memory,
        cache: Cache | None = None,
        *,
        decoder_mask: Bool[Tensor, "B T"] | None = None,
        positions: Int[Tensor, "#B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        check_tokens(decoder_input_tokens, decoder_mask, self.embed_tokens.weight.shape[0], "decoder")
        x = self.embed_tokens(decoder_input_tokens)
        views = self_views(self.config.decoder, x, decoder_mask, cache, positions)
        memory_visible = Visibility(EVERYTHING, num_keys=memory.states.shape[1], key_mask=memory.mask, device=x.device)
        for i, kind in enumerate(self.config.decoder.layer_types):
            layer, layer_cache = self.layers[i], None if cache is None else cache.layers[i]
            if layer_cache is not None and layer_cache.memory is not None:
                keys_values = layer_cache.memory
            else:
                keys_values = layer.memory_keys_values(memory.states)  # pyright: ignore
            x = layer(x, views[kind], layer_cache, keys_values, memory_visible)
        if cache is not None:
            cache.length += decoder_input_tokens.shape[1]
        return self.norm(x)


def self_views(
    stack: StackConfig,
    x: Float[Tensor, "B T D"],
    mask: Bool[Tensor, "B T"] | None,
    cache: Cache | None,
    positions: Int[Tensor, "#B T"] | None,
    groups: Int[Tensor, "B T"] | None = None,
) -> dict[LayerType, SelfView]:
    """How the new tokens of a causal stack see themselves and the cached past, for each kind of layer.

    Positions count real tokens and go on from the cache, unless given. `groups` says which new tokens belong to one
    picture and so see each other both ways; the past lies to the left, where groups change nothing.
    """
    batch_size, num_tokens = x.shape[:2]
    start, length = 0, 0
    if cache is not None:
        cache.check_room(num_tokens)
        cache.remember_mask(mask, batch_size, num_tokens)
        start, length = cache.next_position, cache.length
    if positions is None:
        positions = real_positions(mask, num_tokens, start, x.device)
    if cache is not None and num_tokens:
        cache.next_position = start + (num_tokens if mask is None else mask.sum(dim=1, keepdim=True))
    views: dict[LayerType, SelfView] = {}
    for kind, (rotation, query_rotation) in rotations(stack, positions).items():
        window = decoder_window(stack, kind)
        new = None
        if cache is None or num_tokens != 1:
            new = Visibility(window, num_keys=num_tokens, key_mask=mask, group=groups, device=x.device)
        past = None if cache is None else cache.past_visibility(window, num_tokens, x.device)
        views[kind] = SelfView(rotation, query_rotation, new, past, length)
    return views
