"""One stack of Gemma layers <-> its section of a config.json, in the vocabularies of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from encore.checkpoint import CheckpointError
from encore.checkpoint.config_keys import Keys
from encore.config import Rope, StackConfig

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
GEMMA2_DEFAULTS: dict[str, Any] = {
    **dict(zip(_SIZES, (256_000, 2304, 9216, 26, 8, 4), strict=True)),
    "max_position_embeddings": 8192,
    "softcap": 50.0,
    "final_softcap": 30.0,
    "pattern": 2,
    "theta": 10_000.0,
}
GEMMA3_DEFAULTS: dict[str, Any] = {
    **dict(zip(_SIZES, (262_208, 2304, 9216, 26, 8, 4), strict=True)),
    "max_position_embeddings": 131_072,
    "softcap": None,
    "final_softcap": None,
    "pattern": 6,
    "theta": 1_000_000.0,
}
_FIXED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
}
_SUPERSEDED = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern", "hidden_act")


def read_stack(keys: Keys, defaults: Mapping[str, Any], *, qk_norm: bool, required: bool) -> StackConfig:
    """A stack of Gemma 3 if `qk_norm`, else of Gemma 2. `required`: the file must name the sizes."""
    sizes = {name: keys.integer(name, None if required else defaults[name]) for name in _SIZES}
    if keys.raw.get("use_bidirectional_attention"):
        raise CheckpointError(
            f"{keys.where('use_bidirectional_attention')} is {keys.raw['use_bidirectional_attention']!r}: "
            "an embedding model without causal masks is not a decoder-only Gemma; only false is read"
        )
    keys.expect("hidden_activation", "gelu_pytorch_tanh", None)
    keys.expect("attention_bias", False, None)
    keys.expect("tie_word_embeddings", True, None)
    layer_types = _read_layer_types(keys, sizes["num_hidden_layers"], defaults["pattern"])
    max_positions = keys.integer("max_position_embeddings", defaults["max_position_embeddings"])
    window_free = keys.raw.get("sliding_window", 0) is None and "sliding_attention" not in layer_types
    local_rope, global_rope = _read_ropes(keys, defaults["theta"], by_layer_type=qk_norm)
    return StackConfig(
        **sizes,
        head_dim=keys.integer("head_dim", 256),
        layer_types=layer_types,  # type: ignore[arg-type]
        sliding_window=max_positions if window_free else keys.integer("sliding_window", 4096),
        local_rope=local_rope,
        global_rope=global_rope,
        query_pre_attn_scalar=keys.number("query_pre_attn_scalar", 256),
        qk_norm=qk_norm,
        attn_logit_softcapping=keys.number_or_none("attn_logit_softcapping", defaults["softcap"]),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        max_position_embeddings=max_positions,
    )


def _read_layer_types(keys: Keys, num_layers: int, default_pattern: int) -> tuple[str, ...]:
    """One type per layer: listed, or every `sliding_window_pattern`-th layer is global."""
    listed = keys.raw.get("layer_types")
    if listed is not None:
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise CheckpointError(f"{keys.where('layer_types')} is {listed!r}; expected a list of names")
        return tuple(listed)
    name = "sliding_window_pattern" if "sliding_window_pattern" in keys.raw else "_sliding_window_pattern"
    pattern = keys.integer(name, default_pattern)
    return tuple("sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers))


def _read_ropes(keys: Keys, theta: float, *, by_layer_type: bool) -> tuple[Rope, Rope]:
    """(local, global). Gemma 2 and T5Gemma have one for both; Gemma 3 and T5Gemma 2 scale the global one only."""
    theta = keys.number("rope_theta", theta)
    local_theta = keys.number("rope_local_base_freq", 10_000.0) if by_layer_type else theta
    name = "rope_parameters" if keys.raw.get("rope_parameters") is not None else "rope_scaling"
    given = keys.child(name, default={})
    if "full_attention" in given.raw or "sliding_attention" in given.raw:
        return (
            _read_rope(given.child("sliding_attention", default={}), local_theta),
            _read_rope(given.child("full_attention", default={}), theta),
        )
    if by_layer_type and name == "rope_parameters":
        raise CheckpointError(
            f"{keys.where(name)} is flat; expected one object under full_attention and one under sliding_attention"
        )
    rope = _read_rope(given, theta)
    return (Rope(local_theta) if by_layer_type else rope), rope


def _read_rope(keys: Keys, theta: float) -> Rope:
    kind_key = "rope_type" if "rope_type" in keys.raw else "type"
    keys.expect(kind_key, "default", "linear", None)
    keys.expect("partial_rotary_factor", 1, 1.0, None)
    linear = keys.raw.get(kind_key) == "linear"
    return Rope(keys.number("rope_theta", theta), keys.number("factor", None) if linear else 1.0)


def write_stack(stack: StackConfig, raw: dict[str, Any], model_type: str, dtype: str, *, top: bool = False) -> None:
    """Into the section `raw`, whose other keys stay; `top` if that is the whole file."""
    for name in _SUPERSEDED:
        raw.pop(name, None)
    write_nested_dtype(raw, dtype, top=top)
    for name in (*_SIZES, "head_dim", "sliding_window", "attn_logit_softcapping", "rms_norm_eps"):
        raw[name] = getattr(stack, name)
    scalar = stack.query_pre_attn_scalar
    raw["query_pre_attn_scalar"] = int(scalar) if float(scalar).is_integer() else scalar
    raw["max_position_embeddings"] = stack.max_position_embeddings
    raw["layer_types"] = list(stack.layer_types)
    raw["model_type"] = model_type
    if stack.qk_norm:
        ropes = {"full_attention": stack.global_rope, "sliding_attention": stack.local_rope}
        raw["rope_parameters"] = {kind: _rope_json(rope) for kind, rope in ropes.items()}
    elif stack.local_rope != stack.global_rope:
        raise CheckpointError(f"{model_type} has one RoPE for all layers, not {stack.local_rope}, {stack.global_rope}")
    else:
        raw["rope_parameters"] = _rope_json(stack.global_rope)
    raw["hidden_activation"] = "gelu_pytorch_tanh"
    for name, value in _FIXED.items():
        raw.setdefault(name, value)


def _rope_json(rope: Rope) -> dict[str, Any]:
    if rope.factor == 1.0:
        return {"rope_theta": rope.theta, "rope_type": "default"}
    return {"factor": rope.factor, "rope_theta": rope.theta, "rope_type": "linear"}


def write_nested_dtype(raw: dict[str, Any], dtype: str, *, top: bool) -> None:
    """A nested object that names a dtype names that of the file; the top level is written by the caller."""
    old = raw.pop("torch_dtype", None)
    if not top and (old is not None or raw.get("dtype") is not None):
        raw["dtype"] = dtype
