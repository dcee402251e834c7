"""Folders of variants: under a model_type of ours, with the public names, and refused by transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from encore.checkpoint import CheckpointError
from encore.checkpoint.averaging import average
from encore.checkpoint.config_json import config_from_json, config_to_json
from encore.checkpoint.pretrained import load, read_config, save
from encore.config import Rope, StackConfig, T5GemmaConfig, VisionConfig
from encore.model.encoder import Encoder
from encore.model.t5gemma import T5Gemma

VARIANTS: dict[str, dict[str, Any]] = {
    "t5gemma merged, tied": dict(attention="merged", tied_embeddings=True),
    "t5gemma causal, global": dict(causal_encoder=True, cross_attention_layers="full_attention"),
    "t5gemma2 separate": dict(attention="separate"),
    "t5gemma2 shared": dict(shared_stack=True),
    "t5gemma2 shared, separate": dict(shared_stack=True, attention="separate", tied_embeddings=False),
    "t5gemma2 wide": dict(tied_embeddings=False, width=24),
}


def stack(second: bool, width: int = 16, layers: int = 2) -> StackConfig:
    return StackConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=("sliding_attention", "full_attention", "sliding_attention")[:layers],  # type: ignore[arg-type]
        sliding_window=4,
        local_rope=Rope(1e4),
        global_rope=Rope(1e6, 8.0) if second else Rope(1e4),
        query_pre_attn_scalar=8,
        qk_norm=second,
        attn_logit_softcapping=None if second else 50.0,
    )


def build(name: str, **more: Any) -> T5Gemma:
    family, options = name.split()[0], {**VARIANTS[name], **more}
    encoder = stack(family == "t5gemma2", options.pop("width", 16))
    if family == "t5gemma":
        options["final_logit_softcapping"] = 30.0
    else:
        options["eoi_token_index"] = 60
    model = T5Gemma(T5GemmaConfig(family, encoder, stack(family == "t5gemma2"), **options))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 14)[None], torch.arange(20, 29)[None])


@pytest.mark.parametrize("name", VARIANTS)
def test_it_comes_back_and_transformers_refuses_it(name: str, tmp_path: Path) -> None:
    model = build(name)
    save(model, tmp_path / "model")
    raw = json.loads((tmp_path / "model/config.json").read_text())
    assert (raw["model_type"], raw["family"], raw["architectures"]) == (
        "encore_t5gemma",
        name.split()[0],
        ["EncoreT5Gemma"],
    )
    again = load(tmp_path / "model")
    assert isinstance(again, T5Gemma) and again.config == model.config
    assert torch.equal(logits(again), logits(model))
    with safe_open(tmp_path / "model/model.safetensors", "pt") as file:
        assert set(file.keys()) == {f"model.{leaf}" for leaf, _ in model.named_parameters()}
    for reader in (AutoConfig, AutoModelForSeq2SeqLM):
        with pytest.raises(ValueError, match="encore_t5gemma"):
            reader.from_pretrained(tmp_path / "model", local_files_only=True)
    encoder = load(tmp_path / "model", part="encoder")
    assert isinstance(encoder, Encoder)
    with torch.no_grad():
        source = torch.arange(3, 14)[None]
        assert torch.equal(encoder(source).states, model.encode(source).states)


def test_checkpoints_of_a_variant_can_be_averaged(tmp_path: Path) -> None:
    models = [build("t5gemma2 shared, separate") for _ in range(2)]
    for i, model in enumerate(models):
        save(model, tmp_path / str(i))
    average([tmp_path / "0", tmp_path / "1"], tmp_path / "mean")
    both = [dict(model.named_parameters()) for model in models]
    for name, parameter in load(tmp_path / "mean").named_parameters():
        torch.testing.assert_close(parameter, (both[0][name] + both[1][name]) / 2)


def test_pictures_stay_with_a_variant(tmp_path: Path) -> None:
    vision = VisionConfig(16, 24, 1, 2, image_size=28, mm_tokens_per_image=4)
    config = replace(build("t5gemma2 separate").config, vision=vision)
    model = T5Gemma(config, vision=True)
    model.init_weights()
    save(model, tmp_path / "model")
    assert load(tmp_path / "model", vision=True).config == config


def test_another_depth_alone_is_still_public(tmp_path: Path) -> None:
    """transformers has stacks of different depth, and agrees."""
    encoder = stack(True, layers=3)
    model = T5Gemma(T5GemmaConfig("t5gemma2", encoder, stack(True), eoi_token_index=60)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    save(model, tmp_path / "model")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(input_ids=torch.arange(3, 14)[None], decoder_input_ids=torch.arange(20, 29)[None]).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits(model), expected, atol=3e-5, rtol=0)


def test_a_variant_made_public_again_says_nothing_of_it() -> None:
    variant = build("t5gemma2 separate").config
    raw = config_to_json(variant, "float32")
    read = config_from_json(raw)
    assert isinstance(read, T5GemmaConfig) and read == variant
    public = config_to_json(replace(read, attention="merged"), "float32")
    assert public["model_type"] == "t5gemma2" and not {"family", "attention", "shared_stack"} & public.keys()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("family", "t5", "family is 't5'; expected 't5gemma' or 't5gemma2'"),
        ("family", None, "family is missing"),
        ("attention", "both", "attention is 'both'"),
        ("tied_embeddings", 1, "tied_embeddings is 1; expected True or False"),
        ("shared_stack", "yes", "shared_stack is 'yes'"),
        ("cross_attention_layers", [], r"cross_attention_layers is \[\]"),
    ],
)
def test_wrong_keys_are_named(key: str, value: Any, message: str, tmp_path: Path) -> None:
    raw = config_to_json(build("t5gemma2 separate").config, "float32")
    raw.pop(key) if value is None else raw.update({key: value})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)
