"""The config.json of an encoder-decoder that no public format can hold: an ablation, or two widths under one softmax.

    {"model_type": "encore_t5gemma", "family": "t5gemma2", "attention": "separate", "tied_embeddings": true,
     "cross_attention_layers": "all", "causal_encoder": false, "shared_stack": false, "encoder": …, "decoder": …}

The rest is what the family's own config.json says, and tensors keep their names; but the model_type is ours alone, so
that no other library loads such a folder as what it is not.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from encore.checkpoint import CheckpointError
from encore.checkpoint.config_keys import Keys
from encore.config import VARIANT_FIELDS, VARIANT_TYPE, T5GemmaConfig, T5GemmaType, Variant

ARCHITECTURE = "EncoreT5Gemma"

_FAMILY = "family"
_ALLOWED: dict[str, tuple[Any, ...]] = {
    _FAMILY: ("t5gemma", "t5gemma2"),
    "attention": ("separate", "merged"),
    "tied_embeddings": (True, False),
    "cross_attention_layers": ("all", "full_attention"),
    "causal_encoder": (True, False),
    "shared_stack": (True, False),
}
"""Every key, all of which must be there, and its values."""


def read_variant(keys: Keys) -> tuple[T5GemmaType, Variant]:
    """The family, and how the model differs from it. Raises CheckpointError that names the key."""
    found: dict[str, Any] = {}
    for name, allowed in _ALLOWED.items():
        value = keys.raw.get(name)
        if not any(value is one or (isinstance(value, str) and value == one) for one in allowed):
            given = repr(value) if name in keys.raw else "missing"
            raise CheckpointError(f"{keys.where(name)} is {given}; expected {' or '.join(map(repr, allowed))}")
        found[name] = value
    family: Literal["t5gemma", "t5gemma2"] = found.pop(_FAMILY)
    return family, cast("Variant", found)


def write_variant(config: T5GemmaConfig, raw: dict[str, Any]) -> None:
    """The keys of a variant; a public model has none of them."""
    for name in _ALLOWED:
        raw.pop(name, None)
    if config.file_type == VARIANT_TYPE:
        raw[_FAMILY] = config.model_type
        raw.update({name: getattr(config, name) for name in VARIANT_FIELDS})
