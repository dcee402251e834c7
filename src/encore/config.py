"""What a model is, as frozen dataclasses. No torch here: an exported model runs on these alone.

Field names are those of the public `config.json` files, so that reading one is a short table
(`checkpoint/config_json.py`). A model is one or two *stacks* of Gemma layers:

    GemmaConfig    one stack, decoder-only                 (Gemma 2, Gemma 3)
    T5GemmaConfig  an encoder stack and a decoder stack    (T5Gemma, T5Gemma 2)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

LayerType = Literal["sliding_attention", "full_attention"]
GemmaType = Literal["gemma2", "gemma3_text", "gemma3"]
T5GemmaType = Literal["t5gemma", "t5gemma2"]
FULL: LayerType = "full_attention"
AttentionKind = Literal["separate", "merged"]
MemoryLayers = Literal["all", "full_attention"]

VARIANT_TYPE = "encore_t5gemma"
"""The model_type of files whose encoder-decoder no public format can hold: nobody else may load it as another one."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions: base `theta`, positions divided by `factor` (linear interpolation)."""

    theta: float
    factor: float = 1.0


@dataclass(frozen=True)
class StackConfig:
    """One stack of Gemma layers with its embedding.

    `sliding_window` and `local_rope` serve the layers of type "sliding_attention", `global_rope` those of type
    "full_attention". `qk_norm` is Gemma 3's RMSNorm on queries and keys; the soft-cap is Gemma 2's.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[LayerType, ...]
    sliding_window: int
    local_rope: Rope
    global_rope: Rope
    query_pre_attn_scalar: float
    qk_norm: bool
    attn_logit_softcapping: float | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers but num_hidden_layers is {self.num_hidden_layers}; "
                "give one type per layer"
            )
        unknown = set(self.layer_types) - {"sliding_attention", "full_attention"}
        if unknown:
            raise ValueError(f"unknown layer types {sorted(unknown)}; expected sliding_attention or full_attention")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value heads; "
                "the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")

    def rope(self, layer_type: LayerType) -> Rope:
        return self.local_rope if layer_type == "sliding_attention" else self.global_rope


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower and how many vectors it gives per picture."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 896
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    mm_tokens_per_image: int = 256


@dataclass(frozen=True)
class GemmaConfig:
    """A decoder-only Gemma. `extra` keeps the keys of config.json that mean nothing to us, for saving."""

    model_type: GemmaType
    stack: StackConfig
    final_logit_softcapping: float | None = None
    vision: VisionConfig | None = None
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2
    boi_token_index: int = 255_999
    eoi_token_index: int = 256_000
    image_token_index: int = 262_144
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False, repr=False)

    @property
    def file_type(self) -> str:
        """The model_type that its config.json names."""
        return self.model_type


class Variant(TypedDict, total=False):
    """How an encoder-decoder may differ from its family: the fields of T5GemmaConfig of the same names."""

    attention: AttentionKind | None
    tied_embeddings: bool | None
    cross_attention_layers: MemoryLayers
    causal_encoder: bool
    shared_stack: bool


VARIANT_FIELDS = tuple(Variant.__annotations__)


@dataclass(frozen=True)
class T5GemmaConfig:
    """An encoder-decoder.

    `model_type` is its family: "t5gemma" has the layers of Gemma 2, separate cross-attention and two embeddings,
    "t5gemma2" the layers of Gemma 3, merged attention and one embedding. The papers' ablations, and what is new here,
    are fields; those that are None become what the family has:

        attention               "separate": each decoder layer has cross-attention after its self-attention;
                                "merged": its self-attention reads the target and the memory under one softmax
        tied_embeddings         whether encoder input, decoder input and head share one matrix, or the last two only
        cross_attention_layers  which decoder layers read the memory: "all", or the global ones only ("full_attention")
        causal_encoder          the encoder sees to the left only, as the decoder does
        shared_stack            encoder and decoder have the same layers and final norm (cross-attention is the
                                decoder's own)

    Merged attention with an encoder of another width than the decoder has one learned projection of the memory.
    """

    model_type: T5GemmaType
    encoder: StackConfig
    decoder: StackConfig
    final_logit_softcapping: float | None = None
    vision: VisionConfig | None = None
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2
    boi_token_index: int = 255_999
    eoi_token_index: int = 256_000
    image_token_index: int = 256_001
    attention: AttentionKind | None = None
    tied_embeddings: bool | None = None
    cross_attention_layers: MemoryLayers = "all"
    causal_encoder: bool = False
    shared_stack: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.attention is None:
            object.__setattr__(self, "attention", "merged" if self.model_type == "t5gemma2" else "separate")
        if self.tied_embeddings is None:
            object.__setattr__(self, "tied_embeddings", self.model_type == "t5gemma2")
        for name, allowed in (("attention", ("separate", "merged")), ("cross_attention_layers", ("all", FULL))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(map(repr, allowed))}")
        if self.tied_embeddings:
            for name in ("hidden_size", "vocab_size"):
                encoder, decoder = getattr(self.encoder, name), getattr(self.decoder, name)
                if encoder != decoder:
                    raise ValueError(
                        f"one embedding for both needs equal stacks: {name} is {encoder} in the encoder, {decoder} in "
                        "the decoder; make them equal, or the embeddings separate (tied_embeddings=False)"
                    )
        if self.shared_stack and self.encoder != self.decoder:
            raise ValueError("shared_stack needs an encoder and a decoder of the same description; make them equal")
        if self.cross_attention_layers == FULL and FULL not in self.decoder.layer_types:
            raise ValueError("only global layers are to read the memory, but the decoder has none of them")

    @property
    def is_public(self) -> bool:
        """Whether it is a plain T5Gemma or T5Gemma 2, which the public format of its family holds."""
        plain = T5GemmaConfig(self.model_type, self.encoder, self.encoder)
        return all(getattr(self, name) == getattr(plain, name) for name in VARIANT_FIELDS)

    @property
    def file_type(self) -> str:
        """The model_type that its config.json names."""
        return self.model_type if self.is_public else VARIANT_TYPE

    @property
    def projects_memory(self) -> bool:
        """Whether the memory has to be brought to the decoder's width before its layers read it."""
        return self.attention == "merged" and self.encoder.hidden_size != self.decoder.hidden_size

    @property
    def memory_layers(self) -> tuple[bool, ...]:
        """For each decoder layer whether it reads the memory."""
        return tuple(self.cross_attention_layers in ("all", kind) for kind in self.decoder.layer_types)


ModelConfig = GemmaConfig | T5GemmaConfig
