"""Packed weights in a checkpoint folder: what config.json says of them, under `encore_quantization`. No torch.

    {"weights": "int4", "bits": 4, "vocabulary_bits": 4, "block_size": 32, "method": "gptq", "bits_per_weight": 5.0,
     "error": 0.09, "source": {"name": "translator", "sha256": {…}}, …}

A packed matrix (N, K) lies there as `….weight`, uint8 (N, blocks, bytes), and `….scales`, float32 (N, blocks); the
layout is told in `quantize/blocks.py`. Everything else is stored as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from encore.checkpoint import CheckpointError
from encore.config import ModelConfig

KEY = "encore_quantization"
BLOCK_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Packing:
    """Bits of the layers' matrices and of the vocabulary's; `raw` is all that is said."""

    weights: str
    bits: int
    vocabulary_bits: int
    block_size: int
    raw: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)


def packing(config: ModelConfig) -> Packing | None:
    """How the weights of a folder are packed; None where they are not. Raises CheckpointError."""
    found = config.extra.get(KEY)
    if found is None:
        return None
    try:
        bits = [int(found[key]) for key in ("bits", "vocabulary_bits", "block_size")]
        made = Packing(str(found["weights"]), *bits, raw=found)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"config.json: {KEY} is {found!r:.120}; expected what `encore quantize` writes"
        ) from error
    if not {made.bits, made.vocabulary_bits} <= {4, 8} or made.block_size not in BLOCK_SIZES:
        raise CheckpointError(f"config.json: {KEY} is {found!r:.120}; expected 4 or 8 bits in blocks of 32, 64 or 128")
    return made


def scales_name(name: str) -> str:
    """The tensor that holds the scales of a packed matrix."""
    return name.removesuffix(".weight") + ".scales"


def is_packed_matrix(name: str) -> bool:
    """Whether a tensor (our name) is packed: the layers' projections, and the vocabulary's matrix."""
    if "vision_tower." in name or name.startswith("multi_modal_projector."):
        return False
    return name.endswith("embed_tokens.weight") or (".layers." in f".{name}" and name.endswith("_proj.weight"))
