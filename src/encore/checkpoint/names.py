"""Our tensor names <-> the public ones: one table per architecture.

Written names are exactly those of transformers 5.23.0. Ours keep the public leaf names, so a table is short: the
prefix that stands before ours, and (Gemma) two norms that T5Gemma names better.

    ours                                       gemma2, gemma3_text          gemma3
    layers.0.pre_self_attn_layernorm.weight    model.layers.0.input_…       language_model.model.layers.0.input_…
    encoder.layers.0.mlp.up_proj.weight        model.encoder.layers.0.…     (t5gemma, t5gemma2, encore_t5gemma)

Read are also the older layouts: with or without `model.`; `model.language_model.`; `encoder.text_model.`;
`vision_tower.vision_model.`; tied copies (which must equal their original); rotary buffers (ignored, they are
computed).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from encore.config import VARIANT_TYPE

Role = Literal["weight", "tied", "ignored"]

_GEMMA_NORMS = {
    "pre_self_attn_layernorm": "input_layernorm",
    "post_self_attn_layernorm": "post_attention_layernorm",
}
_IGNORED = re.compile(
    r"(?:^|\.)(?:rotary_emb(?:_local)?\..*|.*inv_freq|position_ids|embed_scale)$"
    r"|(?:^|\.)vision_tower\.(?:vision_model\.)?head\."
)
"""Buffers that are computed, and the tower's pooling head, which no Gemma uses."""


@dataclass(frozen=True)
class NameTable:
    """How one architecture spells its tensors. `prefixes`: ours -> public, the first that fits."""

    prefixes: tuple[tuple[str, str], ...]
    dropped: re.Pattern[str]
    """What may stand before our name in a folder, in any layout."""
    tied: Mapping[str, str]
    """Copies that older folders hold (prefix dropped) -> the tensor they must equal."""
    norms: Mapping[str, str] = field(default_factory=dict[str, str])


_DECODER_ONLY = {
    "dropped": re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?"),
    "tied": {"lm_head.weight": "embed_tokens.weight"},
    "norms": _GEMMA_NORMS,
}
_DECODER_TABLE, _TABLE = "decoder.embed_tokens.weight", "encoder.embed_tokens.weight"
_END_OF_IMAGE = "embed_tokens.eoi_embedding"

TABLES: dict[str, NameTable] = {
    "gemma2": NameTable(prefixes=(("", "model."),), **_DECODER_ONLY),
    "gemma3_text": NameTable(prefixes=(("", "model."),), **_DECODER_ONLY),
    "gemma3": NameTable(
        prefixes=(
            ("vision_tower.", "vision_tower."),
            ("multi_modal_projector.", "multi_modal_projector."),
            ("", "language_model.model."),
        ),
        **_DECODER_ONLY,
    ),
    "t5gemma": NameTable(
        prefixes=(("", "model."),),
        dropped=re.compile(r"^(?:model\.)?"),
        tied={"lm_head.out_proj.weight": _DECODER_TABLE, "lm_head.weight": _DECODER_TABLE},
    ),
    "t5gemma2": NameTable(
        prefixes=(("", "model."),),
        dropped=re.compile(r"^(?:model\.)?"),
        tied={
            "lm_head.out_proj.weight": _TABLE,
            "lm_head.weight": _TABLE,
            _DECODER_TABLE: _TABLE,
            f"decoder.{_END_OF_IMAGE}": f"encoder.{_END_OF_IMAGE}",
        },
    ),
    VARIANT_TYPE: NameTable(prefixes=(("", "model."),), dropped=re.compile(r"^(?:model\.)?"), tied={}),
}


def public_name(model_type: str, name: str) -> str:
    """Our name -> the name that is written."""
    table = TABLES[model_type]
    for ours, public in table.norms.items():
        name = name.replace(f".{ours}.", f".{public}.")
    ours, public = next(pair for pair in table.prefixes if name.startswith(pair[0]))
    return public + name.removeprefix(ours)


def our_name(model_type: str, public: str) -> tuple[str, Role]:
    """A name found in a folder, of any layout -> ours and its role. For a tied copy: the tensor it must equal."""
    table = TABLES[model_type]
    if _IGNORED.search(public):
        return public, "ignored"
    name = table.dropped.sub("", public, count=1)
    name = name.replace("vision_tower.vision_model.", "vision_tower.", 1)
    if name.startswith("encoder.text_model."):
        name = "encoder." + name.removeprefix("encoder.text_model.")
    for ours, theirs in table.norms.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    if name in table.tied:
        return table.tied[name], "tied"
    return name, "weight"


def is_picture_part(name: str) -> bool:
    """Whether a tensor (our name) belongs to the vision tower or the projector."""
    return name.removeprefix("encoder.").startswith(("vision_tower.", "multi_modal_projector."))
