"""Our tensor names and the public ones."""

from __future__ import annotations

import pytest

from encore.checkpoint.names import TABLES, is_picture_part, our_name, public_name
from encore.checkpoint.pretrained import expected_shapes
from encore.config import T5GemmaConfig
from encore.presets import preset

CONFIGS = {
    "gemma2": preset("gemma-2-s"),
    "gemma3_text": preset("gemma-3-270m"),
    "gemma3": preset("gemma-3-4b"),
    "t5gemma": preset("t5gemma-s-s"),
    "t5gemma2": preset("t5gemma-2-270m-270m"),
    "encore_t5gemma": T5GemmaConfig(
        "t5gemma2",
        preset("gemma-3-1b").stack,
        preset("gemma-3-270m").stack,
        tied_embeddings=False,  # type: ignore
    ),
}


@pytest.mark.parametrize("model_type", TABLES)
def test_every_name_comes_back(model_type: str) -> None:
    names = list(expected_shapes(CONFIGS[model_type]))
    written = [public_name(model_type, name) for name in names]
    assert len(set(written)) == len(names)
    assert [our_name(model_type, public) for public in written] == [(name, "weight") for name in names]


@pytest.mark.parametrize(
    ("model_type", "public", "ours"),
    [
        ("gemma2", "model.layers.3.input_layernorm.weight", "layers.3.pre_self_attn_layernorm.weight"),
        ("gemma3", "model.language_model.layers.3.input_layernorm.weight", "layers.3.pre_self_attn_layernorm.weight"),
        ("gemma3", "model.layers.3.post_attention_layernorm.weight", "layers.3.post_self_attn_layernorm.weight"),
        ("gemma3", "vision_tower.vision_model.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
        ("t5gemma2", "model.encoder.text_model.norm.weight", "encoder.norm.weight"),
        ("t5gemma2", "encoder.vision_tower.vision_model.embeddings.x", "encoder.vision_tower.embeddings.x"),
    ],
)
def test_older_spellings(model_type: str, public: str, ours: str) -> None:
    assert our_name(model_type, public) == (ours, "weight")


@pytest.mark.parametrize(
    "public",
    [
        "model.rotary_emb.inv_freq",
        "model.rotary_emb_local.inv_freq",
        "model.encoder.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.vision_model.embeddings.position_ids",
        "vision_tower.vision_model.head.probe",
        "model.encoder.embed_tokens.embed_scale",
    ],
)
def test_what_is_computed_or_unused_is_ignored(public: str) -> None:
    assert our_name("t5gemma2", public)[1] == "ignored"


def test_an_unknown_name_stays_visible() -> None:
    assert our_name("gemma2", "model.layers.0.self_attn.q_proj.weight_scale")[1] == "weight"
    assert our_name("gemma2", "score.weight") == ("score.weight", "weight")


def test_picture_parts() -> None:
    assert is_picture_part("vision_tower.post_layernorm.bias")
    assert is_picture_part("encoder.multi_modal_projector.mm_input_projection_weight")
    assert not is_picture_part("encoder.layers.0.mlp.up_proj.weight")
