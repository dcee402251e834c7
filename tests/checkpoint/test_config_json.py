"""config.json: both vocabularies, what is kept, and errors that name the key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from encore.checkpoint import CheckpointError
from encore.checkpoint.config_json import config_from_json, config_to_json, read_config_file
from encore.config import GemmaConfig, Rope, T5GemmaConfig
from encore.presets import preset

GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
}
GEMMA2 = {**GEMMA3, "model_type": "gemma2"}
NAMES = (
    "gemma-2-2b",
    "gemma-3-270m",
    "gemma-3-4b",
    "t5gemma-9b-2b",
    "t5gemma-b-b",
    "t5gemma-2-270m-270m",
    "t5gemma-2-4b-4b",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_of_ours_survives_the_way_through_json_and_transformers(name: str, tmp_path: Path) -> None:
    config = preset(name)
    raw = config_to_json(config, "bfloat16")
    assert config_from_json(json.loads(json.dumps(raw))) == config
    (tmp_path / "config.json").write_text(json.dumps(raw))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    assert read_config_file(tmp_path / "theirs") == config
    assert config_to_json(read_config_file(tmp_path / "theirs"), "bfloat16") == json.loads(
        (tmp_path / "theirs/config.json").read_text()
    )


def test_a_text_only_t5gemma2_survives() -> None:
    config = preset("t5gemma-2-270m-270m")
    assert isinstance(config, T5GemmaConfig)
    bare = replace(config, vision=None)
    raw = config_to_json(bare, "float32")
    assert raw["text_only"] is True and raw["encoder"]["vision_config"]["num_hidden_layers"] == 1
    assert config_from_json(raw) == bare
    with_pictures = replace(config, extra=raw)
    assert config_from_json(config_to_json(with_pictures, "float32")) == with_pictures


def test_both_vocabularies_say_the_same() -> None:
    old = {
        **GEMMA3,
        "rope_theta": 500_000.0,
        "rope_local_base_freq": 9_000.0,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "sliding_window_pattern": 2,
    }
    new = {
        **GEMMA3,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 9_000.0},
        },
        "layer_types": ["sliding_attention", "full_attention"],
    }
    assert config_from_json(old) == config_from_json(new)
    config = config_from_json(old)
    assert isinstance(config, GemmaConfig)
    assert (config.stack.local_rope, config.stack.global_rope) == (Rope(9_000.0), Rope(500_000.0, 4.0))
    flat = {**GEMMA2, "rope_parameters": {"rope_theta": 5_000.0, "rope_type": "default"}}
    assert config_from_json(flat) == config_from_json({**GEMMA2, "rope_theta": 5_000.0})


def test_a_missing_softcap_is_the_default_and_null_is_none() -> None:
    assert config_from_json(GEMMA2).final_logit_softcapping == 30
    assert config_from_json({**GEMMA2, "final_logit_softcapping": None}).final_logit_softcapping is None
    assert config_from_json(GEMMA3).final_logit_softcapping is None


def test_a_vocabulary_with_its_own_picture_tokens_survives() -> None:
    config = config_from_json({**GEMMA3, "eoi_token_index": 60})
    assert isinstance(config, GemmaConfig) and config.eoi_token_index == 60
    assert config_from_json(config_to_json(replace(config, extra={}), "float32")) == config
    assert "eoi_token_index" not in config_to_json(config_from_json(GEMMA3), "float32")


def test_global_layers_alone_need_no_window() -> None:
    config = config_from_json({**GEMMA3, "sliding_window": None, "layer_types": ["full_attention"] * 2})
    assert isinstance(config, GemmaConfig) and config.stack.sliding_window == config.stack.max_position_embeddings


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type is 'llama'; expected one of gemma2"),
    ({"model_type": ["gemma2"]}, "model_type is"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
    ({"hidden_size": None}, "hidden_size is None; expected a whole number"),
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"head_dim": 7}, "head_dim is 7; rotary positions need an even number"),
    ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
    ({"layer_types": ["full_attention"]}, "layer_types names 1 layers but num_hidden_layers is 2"),
    ({"layer_types": ["full_attention", "chunked"]}, "unknown layer types ['chunked']"),
    ({"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
    ({"sliding_window": None}, "sliding_window is None"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    ({"attention_bias": True}, "attention_bias is True; only False"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_scaling.rope_type is 'yarn'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
    ({"rope_scaling": 8.0}, "rope_scaling is 8.0; expected a JSON object"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters is flat"),
    ({"rope_parameters": {"full_attention": {"rope_theta": "1e6"}}}, "rope_parameters.full_attention.rope_theta is"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ({"pad_token_id": -1}, "pad_token_id is -1"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_errors_name_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_from_json({**GEMMA3, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads"])
def test_a_missing_size_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{name} is missing"):
        config_from_json({key: value for key, value in GEMMA2.items() if key != name})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "gemma3"}, "text_config is missing; expected a JSON object"),
        ({"model_type": "t5gemma", "encoder": {}}, "decoder is missing"),
        ({"model_type": "t5gemma2", "encoder": {}, "decoder": {}}, "encoder.text_config is missing"),
        ({"model_type": "t5gemma", "encoder": {"hidden_size": "1"}, "decoder": {}}, "encoder.hidden_size is '1'"),
        (
            {"model_type": "t5gemma2", "encoder": {"text_config": {"hidden_size": 8}}, "decoder": {}},
            "one embedding for both needs equal stacks: hidden_size is 8 in the encoder, 2304 in the decoder",
        ),
    ],
)
def test_errors_name_the_path(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_from_json(raw)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "a config is a JSON object, not list"), ("[" * 100_000, "not valid JSON")],
)
def test_a_file_that_is_no_config(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config_file(tmp_path)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        read_config_file(tmp_path)


def test_what_the_format_cannot_say_is_refused() -> None:
    config = config_from_json(GEMMA2)
    assert isinstance(config, GemmaConfig)
    with pytest.raises(CheckpointError, match="one RoPE for all layers"):
        config_to_json(replace(config, stack=replace(config.stack, global_rope=Rope(5.0))), "float32")
    with pytest.raises(CheckpointError, match="gemma3_text"):
        config_to_json(replace(config, model_type="gemma3"), "float32")
