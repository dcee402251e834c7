"""What a model is made of and what it costs: parameters by part, weights in memory, cache per token.

Everything is counted on the model itself, built on the meta device (shapes without storage), so that the figures are
those of the code that runs. The parts add up like this:

    text_total = embedding + encoder + decoder + cross_attention + (cross_attention_norms)
    total      = text_total + (end_of_image_vector) + vision + projector

`encoder` and `decoder` are stacks without embedding and without anything of cross-attention: a decoder-only model is
all `decoder`, and in a balanced T5Gemma both are equal. `cross_attention` is the four projections of T5Gemma's separate
cross-attention; T5Gemma 2 merges it into self-attention and has none, or, with two widths, a projection of the memory.
A stack that encoder and decoder share counts as `encoder`. The two entries in brackets are vectors that
belong to no part; they are listed under `vectors`. A matrix that several modules share counts once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from encore.checkpoint.packing import packing
from encore.checkpoint.pretrained import read_config
from encore.config import VARIANT_FIELDS, GemmaConfig, ModelConfig, StackConfig
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.presets import canonical_name, preset

PARTS = ("embedding", "encoder", "decoder", "cross_attention", "vision", "projector")
VECTORS = ("cross_attention_norms", "end_of_image_vector")
BITS_OF = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
CACHE_DTYPE = "bfloat16"


@dataclass(frozen=True)
class CacheBytes:
    """What decoding keeps, in bytes of bfloat16 keys and values, over all decoder layers.

    `source_token` is what each token of the memory costs, `target_token` each token of the target. Local layers keep
    `window` - 1 target tokens in a ring, so from there on a further token costs `target_token_beyond_window` only.
    A decoder-only model has no memory: its prompt is target.
    """

    source_token: int
    target_token: int
    target_token_beyond_window: int
    window: int


@dataclass(frozen=True)
class ModelInfo:
    """The figures of one model. `shapes` names each kind of tensor once: layer numbers read `*`."""

    name: str
    config: ModelConfig
    parameters: dict[str, int]
    vectors: dict[str, int]
    shapes: dict[str, list[int]]
    cache: CacheBytes

    @property
    def stacks(self) -> dict[str, StackConfig]:
        """The stacks by the part that they are."""
        if isinstance(self.config, GemmaConfig):
            return {"decoder": self.config.stack}
        return {"encoder": self.config.encoder, "decoder": self.config.decoder}

    @property
    def variant(self) -> dict[str, Any] | None:
        """What makes it no plain T5Gemma or T5Gemma 2; None if it is one."""
        if isinstance(self.config, GemmaConfig) or self.config.is_public:
            return None
        return {"family": self.config.model_type} | {name: getattr(self.config, name) for name in VARIANT_FIELDS}

    def memory_bytes(self, *, vision: bool = True) -> dict[str, int]:
        """Bytes of the weights by dtype; int8 and int4 without the scales that packing adds."""
        count = self.parameters["total"]
        if not vision:
            count -= self.parameters["vision"] + self.parameters["projector"]
        return {dtype: -(-count * bits // 8) for dtype, bits in BITS_OF.items()}

    @property
    def packed(self) -> Mapping[str, Any] | None:
        """What `encore quantize` said of packed weights (`checkpoint/packing.py`); None where they are not packed."""
        how = packing(self.config)
        return None if how is None else how.raw

    def as_json(self) -> dict[str, Any]:
        """The object that `encore info --json` prints."""
        return {
            "name": self.name,
            "model_type": self.config.file_type,
            "variant": self.variant,
            "parameters": self.parameters,
            "vectors": self.vectors,
            "layers": {part: stack.num_hidden_layers for part, stack in self.stacks.items()},
            "stacks": {part: describe_stack(stack) for part, stack in self.stacks.items()},
            "shapes": self.shapes,
            "memory_bytes": self.memory_bytes(),
            "text_memory_bytes": self.memory_bytes(vision=False),
            **({} if self.packed is None else {"packed_weights": dict(self.packed)}),
            "cache_bytes": {
                "dtype": CACHE_DTYPE,
                "per_source_token": self.cache.source_token,
                "per_target_token": self.cache.target_token,
                "per_target_token_beyond_window": self.cache.target_token_beyond_window,
                "window": self.cache.window,
            },
        }


def describe_stack(stack: StackConfig) -> dict[str, Any]:
    """The dimensions of a stack under their public names, and how many of its layers are local and global."""
    return {
        "hidden_size": stack.hidden_size,
        "intermediate_size": stack.intermediate_size,
        "num_hidden_layers": stack.num_hidden_layers,
        "num_local_layers": stack.layer_types.count("sliding_attention"),
        "num_global_layers": stack.layer_types.count("full_attention"),
        "num_attention_heads": stack.num_attention_heads,
        "num_key_value_heads": stack.num_key_value_heads,
        "head_dim": stack.head_dim,
        "sliding_window": stack.sliding_window,
        "max_position_embeddings": stack.max_position_embeddings,
        "rope_theta_local": stack.local_rope.theta,
        "rope_theta_global": stack.global_rope.theta,
        "rope_factor_global": stack.global_rope.factor,
        "vocab_size": stack.vocab_size,
    }


def find_config(name_or_folder: str) -> tuple[str, ModelConfig]:
    """A checkpoint folder, a preset or a hub name -> what to call it and its configuration.

    Raises:
        ValueError: it is none of them, or the folder's config.json is at fault.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        return name_or_folder, read_config(folder)
    try:
        name = canonical_name(name_or_folder)
    except ValueError as error:
        raise ValueError(f"{name_or_folder!r} is not a folder, and {error}") from None
    return name, preset(name)


def describe(name_or_folder: str) -> ModelInfo:
    """All figures of a checkpoint folder, a preset or a hub name; raises ValueError as `find_config` does."""
    name, config = find_config(name_or_folder)
    return describe_config(name, config)


def describe_config(name: str, config: ModelConfig) -> ModelInfo:
    """All figures of a configuration. Nothing is allocated."""
    vision = config.vision is not None
    with torch.device("meta"):
        model = Gemma(config, vision=vision) if isinstance(config, GemmaConfig) else T5Gemma(config, vision=vision)
    counts: Counter[str] = Counter()
    shapes: dict[str, list[int]] = {}
    for parameter_name, parameter in model.named_parameters():
        counts[part_of(parameter_name)] += parameter.numel()
        shapes[re.sub(r"\.\d+\.", ".*.", parameter_name)] = list(parameter.shape)
    total = counts.total()
    parameters = {part: counts[part] for part in PARTS}
    parameters["text_total"] = total - counts["vision"] - counts["projector"] - counts["end_of_image_vector"]
    parameters["total"] = total
    return ModelInfo(
        name=name,
        config=config,
        parameters=parameters,
        vectors={vector: counts[vector] for vector in VECTORS},
        shapes=shapes,
        cache=cache_bytes(config),
    )


def part_of(parameter_name: str) -> str:
    """Which of PARTS or VECTORS a parameter is: `decoder.layers.3.cross_attn.q_proj.weight` -> cross_attention."""
    words = parameter_name.split(".")
    if "vision_tower" in words:
        return "vision"
    if "multi_modal_projector" in words:
        return "projector"
    if "eoi_embedding" in words:
        return "end_of_image_vector"
    if "embed_tokens" in words:
        return "embedding"
    if "cross_attn" in words or "memory_proj" in words:
        return "cross_attention"
    if "pre_cross_attn_layernorm" in words or "post_cross_attn_layernorm" in words:
        return "cross_attention_norms"
    return "encoder" if words[0] == "encoder" else "decoder"


def cache_bytes(config: ModelConfig) -> CacheBytes:
    """Keys and values per token: 2 x heads x width x 2 bytes in each decoder layer that keeps the token."""
    decoder = config.stack if isinstance(config, GemmaConfig) else config.decoder
    reading = 0 if isinstance(config, GemmaConfig) else sum(config.memory_layers)
    one_layer = 2 * decoder.num_key_value_heads * decoder.head_dim * torch.bfloat16.itemsize
    return CacheBytes(
        source_token=one_layer * reading,
        target_token=one_layer * decoder.num_hidden_layers,
        target_token_beyond_window=one_layer * decoder.layer_types.count("full_attention"),
        window=decoder.sliding_window,
    )
