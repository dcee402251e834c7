"""config.json <-> our frozen configs, reading the vocabularies of transformers 4 and 5, writing that of 5.

    transformers 4                                          transformers 5
    rope_theta, rope_local_base_freq, rope_scaling          rope_parameters (flat in Gemma 2 and T5Gemma,
                                                            by layer type in Gemma 3 and T5Gemma 2)
    sliding_window_pattern                                  layer_types
    torch_dtype                                             dtype

The released folders are of the older kind, and nested configs there are sparse: a key that equals the class
default of its time is left out (Gemma 3 4B names six keys of its text_config). So nested objects take the
defaults below, while a file's own top level must name its sizes. The whole file is kept in `config.extra`; on
writing, our keys overwrite what it says and every other key stays.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encore.checkpoint import CheckpointError
from encore.checkpoint.config_keys import Keys, put_token, token
from encore.checkpoint.config_stack import GEMMA2_DEFAULTS, GEMMA3_DEFAULTS, read_stack, write_nested_dtype, write_stack
from encore.checkpoint.variants import ARCHITECTURE, read_variant, write_variant
from encore.config import (
    VARIANT_TYPE,
    GemmaConfig,
    ModelConfig,
    T5GemmaConfig,
    Variant,
    VisionConfig,
)

ARCHITECTURES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "t5gemma": "T5GemmaForConditionalGeneration",
    "t5gemma2": "T5Gemma2ForConditionalGeneration",
    VARIANT_TYPE: ARCHITECTURE,
}
"""What `architectures` says, by model_type: the kinds of folder that we read and write."""

TEXT_ONLY_VISION = VisionConfig(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    image_size=28,
    patch_size=14,
    mm_tokens_per_image=4,
)
"""The stand-in tower of a T5Gemma 2 without pictures: transformers always builds one, ours is skipped."""

_MAX_CONFIG_BYTES = 16 * 2**20
_SIGLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
}
_PICTURE_TOKENS = {"boi_token_index": 255_999, "eoi_token_index": 256_000, "image_token_index": 262_144}


def read_config_file(folder: Path) -> ModelConfig:
    """The config of a checkpoint folder. Raises CheckpointError, naming the file and the key."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json, so it is no checkpoint folder")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; a config has less than {_MAX_CONFIG_BYTES}")
    try:
        return config_from_json(json.loads(path.read_text(encoding="utf-8")))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def config_from_json(raw: Mapping[str, Any]) -> ModelConfig:
    """One parsed config.json -> our config. Raises CheckpointError that names the key."""
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"a config is a JSON object, not {type(raw).__name__}")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise CheckpointError(f"model_type is {model_type!r}; expected one of {', '.join(ARCHITECTURES)}")
    if raw.get("quantization_config"):
        raise CheckpointError("quantization_config is set; only float checkpoints are read here")
    keys = Keys(raw)
    try:
        family, variant = read_variant(keys) if model_type == VARIANT_TYPE else (model_type, Variant())
        if family == "t5gemma":
            return _read_t5gemma(keys, variant)
        if family == "t5gemma2":
            return _read_t5gemma2(keys, variant)
        return _read_gemma(keys, model_type)
    except CheckpointError:
        raise
    except ValueError as error:  # the dataclasses' own checks
        raise CheckpointError(str(error)) from error


def config_to_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Our config -> what transformers 5 writes, plus the unknown keys of the file it was read from."""
    raw: dict[str, Any] = copy.deepcopy(dict(config.extra))
    raw.pop("torch_dtype", None)
    raw.update(model_type=config.file_type, architectures=[ARCHITECTURES[config.file_type]], dtype=dtype)
    if isinstance(config, GemmaConfig):
        _write_gemma(config, raw, dtype)
        return raw
    write_variant(config, raw)
    if config.model_type == "t5gemma":
        _write_t5gemma(config, raw, dtype)
    else:
        _write_t5gemma2(config, raw, dtype)
    return raw


def _read_gemma(keys: Keys, model_type: str) -> GemmaConfig:
    defaults = GEMMA2_DEFAULTS if model_type == "gemma2" else GEMMA3_DEFAULTS
    pictures = model_type == "gemma3"
    text = keys.child("text_config") if pictures else keys
    sources = (keys, text)
    return GemmaConfig(
        model_type=model_type,  # type: ignore[arg-type]
        stack=read_stack(text, defaults, qk_norm=model_type != "gemma2", required=not pictures),
        final_logit_softcapping=text.number_or_none("final_logit_softcapping", defaults["final_softcap"]),
        vision=_read_vision(keys, keys) if pictures else None,
        **_read_tokens(sources),
        **_read_picture_tokens(sources, image_token_index=262_144),
        extra=keys.raw,
    )


def _read_t5gemma(keys: Keys, variant: Variant) -> T5GemmaConfig:
    decoder = keys.child("decoder")
    return T5GemmaConfig(
        model_type="t5gemma",
        encoder=read_stack(keys.child("encoder"), GEMMA2_DEFAULTS, qk_norm=False, required=False),
        decoder=read_stack(decoder, GEMMA2_DEFAULTS, qk_norm=False, required=False),
        final_logit_softcapping=decoder.number_or_none("final_logit_softcapping", 30.0),
        **_read_tokens((keys, decoder)),
        **variant,
        extra=keys.raw,
    )


def _read_t5gemma2(keys: Keys, variant: Variant) -> T5GemmaConfig:
    encoder, decoder = keys.child("encoder"), keys.child("decoder")
    return T5GemmaConfig(
        model_type="t5gemma2",
        encoder=read_stack(encoder.child("text_config"), GEMMA3_DEFAULTS, qk_norm=True, required=False),
        decoder=read_stack(decoder, GEMMA3_DEFAULTS, qk_norm=True, required=False),
        final_logit_softcapping=decoder.number_or_none("final_logit_softcapping", None),
        vision=None if keys.raw.get("text_only") is True else _read_vision(encoder, encoder),
        **_read_tokens((keys, decoder)),
        **_read_picture_tokens((keys, encoder), image_token_index=256_001),
        **variant,
        extra=keys.raw,
    )


def _read_tokens(sources: tuple[Keys, ...]) -> dict[str, Any]:
    defaults = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return {name: token(sources, (name,), default) for name, default in defaults.items()}


def _read_picture_tokens(sources: tuple[Keys, ...], image_token_index: int) -> dict[str, Any]:
    defaults = {**_PICTURE_TOKENS, "image_token_index": image_token_index}
    return {name: token(sources, (name, name.replace("_index", "_id")), value) for name, value in defaults.items()}


def _read_vision(keys: Keys, tokens: Keys) -> VisionConfig | None:
    if keys.raw.get("vision_config") is None:
        return None
    tower = keys.child("vision_config")
    tower.expect("hidden_act", "gelu_pytorch_tanh", None)
    return VisionConfig(
        **{name: tower.integer(name, default) for name, default in _SIGLIP_DEFAULTS.items()},
        layer_norm_eps=tower.number("layer_norm_eps", 1e-6),
        mm_tokens_per_image=tokens.integer("mm_tokens_per_image", 256),
    )


def _write_gemma(config: GemmaConfig, raw: dict[str, Any], dtype: str) -> None:
    if config.model_type != "gemma3":
        write_stack(config.stack, raw, config.model_type, dtype, top=True)
        raw["final_logit_softcapping"] = config.final_logit_softcapping
        _write_tokens(config, raw)
        for name, default in _PICTURE_TOKENS.items():  # no public keys here, but a vocabulary of its own has others
            if name in raw or getattr(config, name) != default:
                raw[name] = getattr(config, name)
        return
    if config.vision is None:
        raise CheckpointError("a gemma3 config needs its vision part; without pictures the model_type is gemma3_text")
    text = raw.setdefault("text_config", {})
    write_stack(config.stack, text, "gemma3_text", dtype)
    text["final_logit_softcapping"] = config.final_logit_softcapping
    _write_tokens(config, text if "eos_token_id" not in raw else raw)
    _write_picture_tokens(config, raw)
    _write_vision(config.vision, raw.setdefault("vision_config", {}), dtype)
    raw["mm_tokens_per_image"] = config.vision.mm_tokens_per_image
    raw.setdefault("tie_word_embeddings", True)
    raw.setdefault("initializer_range", 0.02)


def _write_t5gemma(config: T5GemmaConfig, raw: dict[str, Any], dtype: str) -> None:
    encoder, decoder = raw.setdefault("encoder", {}), raw.setdefault("decoder", {})
    for stack, section, is_decoder in ((config.encoder, encoder, False), (config.decoder, decoder, True)):
        write_stack(stack, section, "t5_gemma_module", dtype)
        _write_tokens(config, section)
        section["is_decoder"] = is_decoder
        section.setdefault("dropout_rate", 0.0)
    encoder.setdefault("final_logit_softcapping", config.final_logit_softcapping)
    decoder["final_logit_softcapping"] = config.final_logit_softcapping
    decoder["cross_attention_hidden_size"] = config.encoder.hidden_size
    raw.setdefault("vocab_size", config.decoder.vocab_size)
    _write_encoder_decoder(config, raw)


def _write_t5gemma2(config: T5GemmaConfig, raw: dict[str, Any], dtype: str) -> None:
    encoder, decoder = raw.setdefault("encoder", {}), raw.setdefault("decoder", {})
    text = encoder.setdefault("text_config", {})
    sections = ((config.encoder, text, "t5gemma2_text"), (config.decoder, decoder, "t5gemma2_decoder"))
    for stack, section, kind in sections:
        write_stack(stack, section, kind, dtype)
        _write_tokens(config, section)
        section.setdefault("dropout_rate", 0.0)
    text.setdefault("final_logit_softcapping", config.final_logit_softcapping)
    decoder["final_logit_softcapping"] = config.final_logit_softcapping
    if config.vision is None:
        raw["text_only"] = True
        encoder["vision_config"] = {}
    else:
        raw.pop("text_only", None)
    vision = config.vision or TEXT_ONLY_VISION
    _write_vision(vision, encoder.setdefault("vision_config", {}), dtype)
    encoder["mm_tokens_per_image"] = vision.mm_tokens_per_image
    encoder["model_type"] = "t5gemma2_encoder"
    encoder.setdefault("tie_word_embeddings", True)
    encoder.setdefault("initializer_range", 0.02)
    _write_picture_tokens(config, encoder)
    raw.update(eoi_token_index=config.eoi_token_index, image_token_index=config.image_token_index)
    raw["vocab_size"] = config.decoder.vocab_size
    _write_encoder_decoder(config, raw)


def _write_encoder_decoder(config: T5GemmaConfig, raw: dict[str, Any]) -> None:
    _write_tokens(config, raw)
    raw["is_encoder_decoder"] = True
    dropouts = dict.fromkeys(("attention_dropout", "classifier_dropout_rate", "dropout_rate"), 0.0)
    for name, value in {**dropouts, "initializer_range": 0.02, "tie_word_embeddings": True}.items():
        raw.setdefault(name, value)


def _write_vision(vision: VisionConfig, raw: dict[str, Any], dtype: str) -> None:
    write_nested_dtype(raw, dtype, top=False)
    for name in (*_SIGLIP_DEFAULTS, "layer_norm_eps"):
        raw[name] = getattr(vision, name)
    raw.update(model_type="siglip_vision_model", hidden_act="gelu_pytorch_tanh", vision_use_head=False)
    raw.setdefault("attention_dropout", 0.0)


def _write_tokens(config: ModelConfig, raw: dict[str, Any]) -> None:
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        put_token(raw, name, getattr(config, name))


def _write_picture_tokens(config: ModelConfig, raw: dict[str, Any]) -> None:
    for name in _PICTURE_TOKENS:
        raw.pop(name.replace("_index", "_id"), None)
        raw[name] = getattr(config, name)
