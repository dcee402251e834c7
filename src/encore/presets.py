"""Every released size by name, and the small size that the package ships.

    gemma-2-{2b,9b}                 Gemma 2
    gemma-2-{s,b,l,ml,xl}           stacks of T5's shapes, trained decoder-only with Gemma 2's recipe
    gemma-3-{270m,1b,4b}            Gemma 3 (4b reads pictures)
    t5gemma-{s-s,…,9b-2b,9b-9b}     T5Gemma: encoder and decoder are Gemma 2 stacks, with cross-attention between them
    t5gemma-2-{270m-270m,…,4b-4b}   T5Gemma 2: encoder and decoder are Gemma 3 stacks, with merged attention
    encore-small, encore-small-small    Gemma 3 and T5Gemma 2 of two million parameters a stack

Hub names map to their size: `google/t5gemma-2b-2b-prefixlm-it` is `t5gemma-2b-2b`.

Sources: arXiv 2504.06225 and 2512.14856 and the public configurations. Of T5Gemma 2 only the configuration of 270M-270M
is known to us; the two larger sizes have the window and positions of the Gemma 3 of their size, and the same factor 8.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from encore.config import GemmaConfig, LayerType, ModelConfig, Rope, StackConfig, T5GemmaConfig, VisionConfig

GEMMA2_VOCAB_SIZE = 256_000
GEMMA3_VOCAB_SIZE = 262_144
GEMMA3_4B_VOCAB_SIZE = 262_208  # 64 rows more than T5Gemma 2 keeps: the image token and padding of the table
SMALL_VOCAB_SIZE = 6_144

T5GEMMA_SIZES = ("s-s", "b-b", "l-l", "ml-ml", "xl-xl", "2b-2b", "9b-2b", "9b-9b")


def layer_types(num_layers: int, global_every: int) -> tuple[LayerType, ...]:
    """The last of every `global_every` layers is global, the others are local."""
    return tuple("sliding_attention" if (i + 1) % global_every else "full_attention" for i in range(num_layers))


def _gemma2(
    *, layers: int, width: int, feed_forward: int, heads: int, kv_heads: int | None = None, head_dim: int = 64
) -> StackConfig:
    """A stack of Gemma 2: soft-capped attention, local and global layers in turn, one RoPE for both."""
    rope = Rope(theta=10_000.0)
    return StackConfig(
        vocab_size=GEMMA2_VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        layer_types=layer_types(layers, global_every=2),
        sliding_window=4096,
        local_rope=rope,
        global_rope=rope,
        query_pre_attn_scalar=head_dim,
        qk_norm=False,
        attn_logit_softcapping=50.0,
        max_position_embeddings=8192,
    )


def _gemma3(
    *,
    layers: int,
    width: int,
    feed_forward: int,
    heads: int,
    kv_heads: int,
    window: int,
    max_positions: int,
    head_dim: int = 256,
    global_every: int = 6,
    vocab_size: int = GEMMA3_VOCAB_SIZE,
) -> StackConfig:
    """A stack of Gemma 3: QK-norm, few global layers, which have a RoPE of their own."""
    return StackConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        layer_types=layer_types(layers, global_every),
        sliding_window=window,
        local_rope=Rope(theta=10_000.0),
        global_rope=Rope(theta=1_000_000.0),
        query_pre_attn_scalar=head_dim,
        qk_norm=True,
        max_position_embeddings=max_positions,
    )


_GEMMA2_STACKS = {
    "s": _gemma2(layers=8, width=512, feed_forward=1024, heads=8),
    "b": _gemma2(layers=12, width=768, feed_forward=2048, heads=12),
    "l": _gemma2(layers=24, width=1024, feed_forward=2816, heads=16),
    "ml": _gemma2(layers=26, width=1152, feed_forward=6912, heads=4, head_dim=256),
    "xl": _gemma2(layers=24, width=2048, feed_forward=5120, heads=32),
    "2b": _gemma2(layers=26, width=2304, feed_forward=9216, heads=8, kv_heads=4, head_dim=256),
    "9b": _gemma2(layers=42, width=3584, feed_forward=14336, heads=16, kv_heads=8, head_dim=256),
}

_GEMMA3_STACKS = {
    "270m": _gemma3(layers=18, width=640, feed_forward=2048, heads=4, kv_heads=1, window=512, max_positions=32_768),
    "1b": _gemma3(layers=26, width=1152, feed_forward=6912, heads=4, kv_heads=1, window=512, max_positions=32_768),
    "4b": _gemma3(layers=34, width=2560, feed_forward=10_240, heads=8, kv_heads=4, window=1024, max_positions=131_072),
}

_SMALL_STACK = _gemma3(
    layers=4,
    width=256,
    feed_forward=512,
    heads=4,
    kv_heads=1,
    head_dim=64,
    window=64,
    max_positions=1024,
    global_every=4,
    vocab_size=SMALL_VOCAB_SIZE,
)


def _interpolated(stack: StackConfig) -> StackConfig:
    """Positions of the global layers divided by 8: what T5Gemma 2 and Gemma 3 from 4B upwards do."""
    return replace(stack, global_rope=replace(stack.global_rope, factor=8.0))


def _all_presets() -> dict[str, ModelConfig]:
    presets: dict[str, ModelConfig] = {}
    for size, stack in _GEMMA2_STACKS.items():
        presets[f"gemma-2-{size}"] = GemmaConfig("gemma2", stack, final_logit_softcapping=30.0)
    for size in ("270m", "1b"):
        presets[f"gemma-3-{size}"] = GemmaConfig("gemma3_text", _GEMMA3_STACKS[size])
    with_images = replace(_interpolated(_GEMMA3_STACKS["4b"]), vocab_size=GEMMA3_4B_VOCAB_SIZE)
    presets["gemma-3-4b"] = GemmaConfig("gemma3", with_images, vision=VisionConfig())
    for size in T5GEMMA_SIZES:
        encoder, decoder = (_GEMMA2_STACKS[half] for half in size.split("-"))
        presets[f"t5gemma-{size}"] = T5GemmaConfig("t5gemma", encoder, decoder, final_logit_softcapping=30.0)
    for size, stack in _GEMMA3_STACKS.items():
        both = _interpolated(stack)
        presets[f"t5gemma-2-{size}-{size}"] = T5GemmaConfig("t5gemma2", both, both, vision=VisionConfig())
    presets["encore-small"] = GemmaConfig("gemma3_text", _SMALL_STACK)
    presets["encore-small-small"] = T5GemmaConfig("t5gemma2", _SMALL_STACK, _SMALL_STACK)
    return presets


PRESETS: Mapping[str, ModelConfig] = MappingProxyType(_all_presets())

# What the hub adds to the name of a size, and names that stand for a size of another family.
_HUB_VARIANTS = (
    (re.compile(r"(t5gemma-(?!2-)[a-z0-9]+-[a-z0-9]+)-(?:prefixlm|ul2)(?:-it)?"), r"\1"),
    (re.compile(r"(gemma-2-[29]b)-it"), r"\1"),
    (re.compile(r"(gemma-3-[0-9]+[mb])-(?:it|pt)"), r"\1"),
    (re.compile(r"medgemma-(?:1\.5-)?4b(?:-it|-pt)?"), "gemma-3-4b"),
)


def canonical_name(name: str) -> str:
    """The size that a preset's or a hub's name means: `google/gemma-3-1b-it` -> `gemma-3-1b`.

    Raises:
        ValueError: no such size; the message lists the nearest names.
    """
    plain = name.removeprefix("google/").lower()
    for pattern, size in _HUB_VARIANTS:
        if pattern.fullmatch(plain):
            plain = pattern.sub(size, plain)
            break
    if plain not in PRESETS:
        near = difflib.get_close_matches(plain, PRESETS, n=4, cutoff=0.5) or list(PRESETS)
        raise ValueError(f"no preset is called {name!r}; the nearest are {', '.join(near)}")
    return plain


def preset(name: str) -> ModelConfig:
    """The configuration of a size by its name here or on the hub; raises ValueError as `canonical_name` does."""
    return PRESETS[canonical_name(name)]
