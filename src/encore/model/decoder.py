"""The decoders: layers, not flags, because separate and merged cross-attention are different equations.

CrossAttentionLayer   T5Gemma:   x += post(self(pre x)); x += post(cross(pre x, memory)); x += post(mlp(pre x))
MergedLayer           T5Gemma 2: x += post(merged(pre x, memory));                        x += post(mlp(pre x))
SelfLayer             no memory: x += post(self(pre x));                                  x += post(mlp(pre x))

The last one stands where only global layers read the memory (T5Gemma 2 paper, ablations).
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from encore.config import LayerType, StackConfig, T5GemmaConfig
from encore.kernels.attention import Keys
from encore.model.attention import CrossAttention, KeysValues, MergedAttention, SelfView
from encore.model.cache import Cache, LayerCache
from encore.model.encoder import GemmaLayer, Memory, SelfLayer, check_tokens, packed
from encore.model.layers import RMSNorm, ScaledEmbedding, real_positions, rotations, segment_positions
from encore.model.masks import EVERYTHING, Segments, Visibility, decoder_window


class MergedLayer(GemmaLayer):
    """T5Gemma 2: the parts of a Gemma layer, its attention reading target and memory."""

    def __init__(self, config: StackConfig) -> None:
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
        stack, memory_size = config.decoder, config.encoder.hidden_size
        self.embed_tokens = embed_tokens
        self.memory_proj = nn.Linear(memory_size, stack.hidden_size, bias=False) if config.projects_memory else None
        self.layers = nn.ModuleList(
            _reading_layer(config) if reads else SelfLayer(stack) for reads in config.memory_layers
        )
        self.norm = RMSNorm(stack.hidden_size, stack.rms_norm_eps)

    def project(self, memory: Float[Tensor, "B S M"]) -> Float[Tensor, "B S D"]:
        """The memory as the layers read it: merged attention needs it in the decoder's width."""
        return memory if self.memory_proj is None else self.memory_proj(memory)

    def memory_keys_values(self, memory: Memory) -> list[KeysValues | None]:
        """What each layer reads of the memory; None where a layer reads none of it."""
        states = self.project(memory.states)
        return [
            layer.memory_keys_values(states) if reads else None  # pyright: ignore
            for layer, reads in zip(self.layers, self.config.memory_layers, strict=True)
        ]

    def forward(
        self,
        decoder_input_tokens: Int[Tensor, "B T"],
        memory: Memory,
        cache: Cache | None = None,
        *,
        decoder_mask: Bool[Tensor, "B T"] | None = None,
        positions: Int[Tensor, "#B T"] | None = None,
        segment_ids: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """`segment_ids` are of packed rows: segment n reads itself and segment n of the memory, no other."""
        check_tokens(decoder_input_tokens, decoder_mask, self.embed_tokens.weight.shape[0], "decoder")
        decoder_mask, segments = packed(decoder_input_tokens, decoder_mask, segment_ids, "decoder")
        x = self.embed_tokens(decoder_input_tokens)
        views = self_views(self.config.decoder, x, decoder_mask, cache, positions, segments=segments)
        memory_visible = _memory_visibility(memory, None if segments is None else segments.queries)
        states = self.project(memory.states) if cache is None else memory.states
        for i, (kind, reads) in enumerate(zip(self.config.decoder.layer_types, self.config.memory_layers, strict=True)):
            layer, layer_cache = self.layers[i], None if cache is None else cache.layers[i]
            if not reads:
                x = layer(x, views[kind], layer_cache)
                continue
            keys_values = layer.memory_keys_values(states) if layer_cache is None else layer_cache.memory  # pyright: ignore
            x = layer(x, views[kind], layer_cache, keys_values, memory_visible)
        if cache is not None:
            cache.length += decoder_input_tokens.shape[1]
        return self.norm(x)


def _reading_layer(config: T5GemmaConfig) -> GemmaLayer:
    if config.attention == "merged":
        return MergedLayer(config.decoder)
    return CrossAttentionLayer(config.decoder, config.encoder.hidden_size)


def _memory_visibility(memory: Memory, segment_ids: Int[Tensor, "B T"] | None) -> Visibility:
    """Every target token sees the whole memory, or that of its segment."""
    num_keys, device = memory.states.shape[1], memory.states.device
    if segment_ids is None and memory.segment_ids is None:
        return Visibility(EVERYTHING, num_keys=num_keys, key_mask=memory.mask, device=device)
    if segment_ids is None or memory.segment_ids is None:
        given, lacking = ("memory", "target") if segment_ids is None else ("target", "memory")
        raise ValueError(f"the {given} has segment ids, the {lacking} has none; give both, or neither")
    segments = Segments(segment_ids, memory.segment_ids)
    return Visibility(EVERYTHING, num_keys=num_keys, segments=segments, device=device)


def self_views(
    stack: StackConfig,
    x: Float[Tensor, "B T D"],
    mask: Bool[Tensor, "B T"] | None,
    cache: Cache | None,
    positions: Int[Tensor, "#B T"] | None,
    groups: Int[Tensor, "B T"] | None = None,
    segments: Segments | None = None,
) -> dict[LayerType, SelfView]:
    """How the new tokens of a causal stack see themselves and the cached past, for each kind of layer.

    Positions count real tokens and go on from the cache, unless given. `groups` says which new tokens belong to one
    picture and so see each other both ways; the past lies to the left, where groups change nothing. `segments` of
    packed rows are read each from position 0, and not together with a cache.
    """
    batch_size, num_tokens = x.shape[:2]
    start, length = 0, 0
    if cache is not None:
        if segments is not None:
            raise ValueError("segment ids were given together with a cache; decode packed rows without one")
        cache.check_room(num_tokens)
        cache.remember_mask(mask, batch_size, num_tokens)
        start, length = cache.next_position, cache.length
    if positions is None and segments is not None:
        positions = segment_positions(segments.queries)
    elif positions is None:
        positions = real_positions(mask, num_tokens, start, x.device)
    if cache is not None and num_tokens:
        cache.next_position = start + (num_tokens if mask is None else mask.sum(dim=1, keepdim=True))
    views: dict[LayerType, SelfView] = {}
    for kind, (rotation, query_rotation) in rotations(stack, positions).items():
        window = decoder_window(stack, kind)
        new = None
        if cache is None or num_tokens != 1:
            new = Visibility(
                window, num_keys=num_tokens, key_mask=mask, group=groups, segments=segments, device=x.device
            )
        past = None if cache is None else cache.past_visibility(window, num_tokens, x.device)
        views[kind] = SelfView(rotation, query_rotation, new, past, length)
    return views
