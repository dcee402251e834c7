"""plan(): every tensor of a T5Gemma, and where in a decoder-only Gemma it comes from (arXiv 2504.06225 section 2.2;
arXiv 2512.14856 section 2). A pure function of configurations: `adapt` carries out what it says.

                     T5Gemma (from Gemma 2)                       T5Gemma 2 (from Gemma 3)
    encoder          the source                                   the source
    decoder          the source, or another one (--decoder)       the same; its attention reads target and memory
    embedding        one per stack                                one for all, from the source, at most 262,144 rows
    cross-attention  same size: the layer's self-attention        none: merged into self-attention
                     and its norms; else random, warmed up
    eoi_embedding    none                                         sqrt(d) x the row of the end-of-image token, so that
                                                                  the function stays as it was
    vision           none                                         tower and projector of a gemma3 folder

The ablations are the fields of `Variant`, free of the style: `attention="separate"` gives Gemma 3's layers the
cross-attention of the left column (its norms of queries and keys copied too), "merged" Gemma 2's that of the right. Two
widths under merged attention need separate embeddings, and have a projection of the memory: random, warmed up.

Another depth drops or repeats layers. A layer keeps its own kind, local or global, with its weights: they were trained
for that window and those positions, so the pattern of the target is what the chosen layers make of it. A target that
repeats layers does not compute what its source does, and needs training as one that drops them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

from encore.checkpoint.pretrained import expected_shapes
from encore.checkpoint.recipes import Copy, Draw, Fill, Recipe, ScaledRow, Side, random_recipe
from encore.config import FULL, GemmaConfig, StackConfig, T5GemmaConfig, Variant

Style = Literal["t5gemma", "t5gemma2"]
Layers = int | Sequence[int]
"""A number of layers, spaced evenly over the source's; or the source's layers in the order they shall stand."""

WARMUP_STEPS = 1000
MAX_VOCAB_SIZE = 262_144
IMAGE_TOKEN = 256_001

_MAX_LAYERS = 4096


@dataclass(frozen=True)
class Plan:
    """What an adaptation makes: the target's config and, by our names, where each of its tensors comes from.

    `layers`: for each side the source's layer that each of the target's layers is.
    """

    config: T5GemmaConfig
    recipes: Mapping[str, Recipe]
    warmup: Mapping[str, Any] | None
    layers: Mapping[Side, tuple[int, ...]]


def plan(
    source: GemmaConfig,
    style: Style,
    decoder: GemmaConfig | None = None,
    *,
    rope_factor: float | None = None,
    random: bool = False,
    encoder_layers: Layers | None = None,
    decoder_layers: Layers | None = None,
    **variant: Unpack[Variant],
) -> Plan:
    """Which tensor of the target comes from where. ValueError, with the reason, if the two do not fit."""
    other = decoder or source
    for role, config in (("source", source), ("decoder", other)):
        if not isinstance(config, GemmaConfig):
            raise ValueError(f"the {role} is a {config.model_type}; expected a decoder-only Gemma 2 or Gemma 3")
        _check_style(role, config, style)
    if variant.get("shared_stack") and decoder_layers is None:
        decoder_layers = encoder_layers
    layers: dict[Side, tuple[int, ...]] = {
        "encoder": chosen_layers(source.stack, encoder_layers, "encoder_layers"),
        "decoder": chosen_layers(other.stack, decoder_layers, "decoder_layers"),
    }
    if variant.get("shared_stack") and (layers["encoder"] != layers["decoder"] or decoder is not None):
        raise ValueError("one stack for encoder and decoder has one source, and the same layers of it on both sides")
    target = _target_config(source, other, style, rope_factor, layers, variant)
    names = expected_shapes(target)
    if random:
        return Plan(target, {name: random_recipe(name) for name in names}, None, layers)
    sources: dict[Side, GemmaConfig] = {"encoder": source, "decoder": other}
    recipes = {name: _recipe(name, sources, target, layers) for name in names}
    drawn = any(isinstance(recipe, Draw) for recipe in recipes.values())
    return Plan(target, recipes, {"steps": WARMUP_STEPS, "train": "cross_attention"} if drawn else None, layers)


def chosen_layers(stack: StackConfig, layers: Layers | None, option: str) -> tuple[int, ...]:
    """The source's layer that each layer of the target is. Raises ValueError, naming the `option`.

    A number is spaced evenly from the first layer to the last (Shleifer & Rush, arXiv 2010.13002): 6 of 12 are
    0, 2, 4, 7, 9, 11, and 8 of 4 are 0, 0, 1, 1, 2, 2, 3, 3.
    """
    have = stack.num_hidden_layers
    if layers is None:
        return tuple(range(have))
    if isinstance(layers, int):
        if not 1 <= layers <= _MAX_LAYERS:
            raise ValueError(f"{option} is {layers}; expected a number from 1 to {_MAX_LAYERS}, or a list of layers")
        step = (have - 1) / max(1, layers - 1)
        chosen = tuple(math.floor(i * step + 0.5) for i in range(layers)) if layers > 1 else (have - 1,)
    else:
        chosen = tuple(layers)
        if not chosen or not all(isinstance(layer, int) and 0 <= layer < have for layer in chosen):
            raise ValueError(f"{option} is {list(chosen)}; expected layers of the source, 0 to {have - 1}")
    if FULL in stack.layer_types and not any(stack.layer_types[layer] == FULL for layer in chosen):
        every = [i for i, kind in enumerate(stack.layer_types) if kind == FULL]
        raise ValueError(
            f"{option} keeps the layers {list(chosen)}, none of which is global; list the layers yourself, with one "
            f"of {every} among them"
        )
    return chosen


def same_size(encoder: StackConfig, decoder: StackConfig) -> bool:
    """Whether a decoder is balanced with its encoder: then cross-attention can copy self-attention."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("num_key_value_heads", "head_dim")
    return all(getattr(encoder, name) == getattr(decoder, name) for name in sizes)


def _check_style(role: str, config: GemmaConfig, style: Style) -> None:
    if style == "t5gemma" and config.stack.qk_norm:
        raise ValueError(
            f"the {role} is a {config.model_type}, whose queries and keys are normalised; T5Gemma has no such norms, "
            "so they would be lost. Use style t5gemma2 (which may have separate attention too)"
        )
    if style == "t5gemma2" and not config.stack.qk_norm:
        raise ValueError(
            f"the {role} is a {config.model_type}, which has no norms on queries and keys and caps its logits; "
            "the layers of T5Gemma 2 are Gemma 3's. Use style t5gemma (which may have merged attention too)"
        )


def _target_config(
    source: GemmaConfig,
    other: GemmaConfig,
    style: Style,
    rope_factor: float | None,
    layers: Mapping[Side, tuple[int, ...]],
    variant: Variant,
) -> T5GemmaConfig:
    if rope_factor is not None and style == "t5gemma":
        raise ValueError("rope_factor is for style t5gemma2: T5Gemma interpolates no positions")
    if rope_factor is not None and not 0 < rope_factor < math.inf:
        raise ValueError(f"rope_factor is {rope_factor}; expected a number above 0 (8 in the released models)")
    encoder = _stack(source.stack, layers["encoder"], style, rope_factor)
    decoder = _stack(other.stack, layers["decoder"], style, rope_factor)
    tied = variant.get("tied_embeddings")
    if (style == "t5gemma2" if tied is None else tied) and encoder.hidden_size != decoder.hidden_size:
        raise ValueError(
            f"one embedding for encoder and decoder means that both stacks need one width: {encoder.hidden_size} in "
            f"the source, {decoder.hidden_size} in the decoder; with separate embeddings they may differ"
        )
    if encoder.vocab_size != decoder.vocab_size:
        raise ValueError(
            f"the source has {encoder.vocab_size} tokens and the decoder {decoder.vocab_size}; "
            "both must share one tokenizer"
        )
    eos = source.extra.get("eos_token_id")
    placeholder = source.image_token_index  # Gemma 3's, 262144, is the first id beyond the embedding as it is cut here
    return T5GemmaConfig(
        model_type=style,
        encoder=encoder,
        decoder=decoder,
        final_logit_softcapping=other.final_logit_softcapping,
        vision=source.vision if style == "t5gemma2" else None,
        pad_token_id=source.pad_token_id,
        eos_token_id=source.eos_token_id,
        bos_token_id=source.bos_token_id,
        boi_token_index=source.boi_token_index,
        eoi_token_index=source.eoi_token_index,
        image_token_index=placeholder if placeholder < encoder.vocab_size else IMAGE_TOKEN,
        **variant,
        extra={"eos_token_id": eos} if isinstance(eos, list) else {},
    )


def _stack(stack: StackConfig, layers: tuple[int, ...], style: Style, rope_factor: float | None) -> StackConfig:
    """The source's stack as one of the target: its layers chosen, its global positions interpolated if asked for."""
    types = tuple(stack.layer_types[layer] for layer in layers)
    stack = replace(stack, num_hidden_layers=len(layers), layer_types=types)
    if style == "t5gemma":
        return stack
    rope = stack.global_rope if rope_factor is None else replace(stack.global_rope, factor=float(rope_factor))
    return replace(stack, vocab_size=min(stack.vocab_size, MAX_VOCAB_SIZE), global_rope=rope)


def _recipe(
    name: str,
    sources: Mapping[Side, GemmaConfig],
    target: T5GemmaConfig,
    layers: Mapping[Side, tuple[int, ...]],
) -> Recipe:
    """Where a tensor of the target (our name) comes from."""
    side, _, inner = name.partition(".")
    assert side in ("encoder", "decoder"), name
    if inner == "embed_tokens.eoi_embedding":
        inside = target.eoi_token_index < target.encoder.vocab_size
        return ScaledRow(target.eoi_token_index) if inside else Fill(0.0)
    if inner == "embed_tokens.weight":
        rows = target.encoder.vocab_size
        return Copy(side, inner, rows if rows < sources[side].stack.vocab_size else None)
    if inner == "memory_proj.weight":  # keeps the size of the memory's numbers
        return Draw(target.encoder.hidden_size**-0.5)
    if inner.startswith("layers."):
        _, layer, rest = inner.split(".", 2)
        inner = f"layers.{layers[side][int(layer)]}.{rest}"
    if "cross_attn" in inner:
        if not same_size(sources["encoder"].stack, sources["decoder"].stack):
            return random_recipe(name)
        inner = inner.replace("cross_attn", "self_attn")
    return Copy(side, inner)
