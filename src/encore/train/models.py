"""The model and the tokenizer that a recipe names: a folder, a preset, or a `[model.architecture]` of its own."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch

from encore.checkpoint import hub
from encore.checkpoint.pretrained import load, read_config
from encore.config import GemmaConfig, ModelConfig, Rope, StackConfig, T5GemmaConfig, Variant, VisionConfig
from encore.data.sources import resolve
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.presets import PRESETS, layer_types, preset
from encore.tokenizer import Tokenizer
from encore.train.loss import Model
from encore.train.recipe import ArchitectureRecipe, ModelRecipe, VisionRecipe


def open_tokenizer(recipe: ModelRecipe) -> Tokenizer:
    """The recipe's tokenizer, else the one in the folder of `init`."""
    name = recipe.tokenizer or recipe.init
    if not name:
        raise ValueError("the recipe names no tokenizer; set model.tokenizer, for example to asset:tokenizer")
    return hub.load_tokenizer(resolve(name))


def open_model(recipe: ModelRecipe, tokenizer: Tokenizer, seed: int, *, vision: bool = False) -> Model:
    """The model to train, in float32: loaded, or with weights drawn at random from the seed.

    `vision`: with its picture tower.
    """
    init = str(resolve(recipe.init)) if recipe.init.startswith("asset:") else recipe.init
    if init and recipe.weights == "load":
        if asked := _asked_of_encoder_decoders(recipe.architecture):
            raise ValueError(
                f"model.architecture.{asked[0]} is set, but the model comes with weights from {recipe.init}; make such "
                'a model with `encore adapt` and name its folder, or set model.weights to "random"'
            )
        model = load(init, torch.float32, vision=vision)
        if not isinstance(model, Gemma | T5Gemma):
            raise ValueError(f"{recipe.init} is an encoder alone, which has nothing to train here; give a whole model")
    else:
        config = _config(init, recipe.architecture, tokenizer)
        model = Gemma(config, vision=vision) if isinstance(config, GemmaConfig) else T5Gemma(config, vision=vision)
        model.init_weights(torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    vocab_size = model.head_weight.shape[0]
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model {vocab_size} rows; they do not belong together"
        )
    return model.requires_grad_(True)


def _config(init: str, architecture: ArchitectureRecipe, tokenizer: Tokenizer) -> ModelConfig:
    if not init:
        return model_config(architecture, tokenizer)
    config = preset(init) if init in PRESETS and not Path(init).exists() else read_config(init)
    asked = _asked_of_encoder_decoders(architecture)
    if asked and (isinstance(config, GemmaConfig) or asked[0] in _ENCODER_SIZES):
        raise ValueError(
            f"model.architecture.{asked[0]} is set, but the sizes and the kind of model come from model.init {init}; "
            "leave that empty to describe a whole model in model.architecture"
        )
    return replace(config, **_variant(architecture)) if isinstance(config, T5GemmaConfig) else config


def model_config(recipe: ArchitectureRecipe, tokenizer: Tokenizer) -> ModelConfig:
    """The `[model.architecture]` of a recipe as a configuration; both stacks of an encoder-decoder are alike, but for
    the sizes that are given for the encoder. `layer_types` are the decoder's, and the encoder's if it is as deep.
    """
    gemma3 = recipe.model_type in ("gemma3_text", "t5gemma2")
    global_every = 6 if gemma3 else 2
    local = Rope(recipe.local_rope_theta)
    stack = StackConfig(
        vocab_size=recipe.vocab_size or tokenizer.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        head_dim=recipe.head_dim,
        layer_types=recipe.layer_types or layer_types(recipe.num_hidden_layers, global_every),
        sliding_window=recipe.sliding_window,
        local_rope=local,
        global_rope=Rope(recipe.global_rope_theta, recipe.global_rope_factor) if gemma3 else local,
        query_pre_attn_scalar=recipe.query_pre_attn_scalar or recipe.head_dim,
        qk_norm=gemma3,
        attn_logit_softcapping=None if gemma3 else 50.0,
        max_position_embeddings=recipe.max_position_embeddings,
    )
    softcap = None if gemma3 else 30.0
    pad, eos, bos = tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id
    if recipe.model_type == "gemma2" or recipe.model_type == "gemma3_text":
        if asked := _asked_of_encoder_decoders(recipe):
            raise ValueError(
                f"model.architecture.{asked[0]} is set, but a {recipe.model_type} has no encoder; set model_type to "
                "t5gemma or t5gemma2"
            )
        return GemmaConfig(recipe.model_type, stack, softcap, None, pad, eos, bos)
    depth = recipe.encoder_num_hidden_layers or recipe.num_hidden_layers
    encoder = replace(
        stack,
        hidden_size=recipe.encoder_hidden_size or recipe.hidden_size,
        intermediate_size=recipe.encoder_intermediate_size or recipe.intermediate_size,
        num_hidden_layers=depth,
        layer_types=stack.layer_types if depth == recipe.num_hidden_layers else layer_types(depth, global_every),
    )
    config = T5GemmaConfig(recipe.model_type, encoder, stack, softcap, None, pad, eos, bos, **_variant(recipe))
    return _with_vision(config, recipe.vision, tokenizer) if recipe.vision.image_size else config


def _with_vision(config: T5GemmaConfig, recipe: VisionRecipe, tokenizer: Tokenizer) -> T5GemmaConfig:
    """With a picture tower. A vocabulary too small for the released picture ids gives its last sentinels for them."""
    vision = VisionConfig(**{field.name: getattr(recipe, field.name) for field in fields(recipe)})
    config = replace(config, vision=vision)
    if max(config.boi_token_index, config.eoi_token_index, config.image_token_index) < config.encoder.vocab_size:
        return config
    if len(tokenizer.sentinel_ids) < 3:
        raise ValueError(
            f"the vocabulary of {config.encoder.vocab_size} has no ids for pictures, and the tokenizer no sentinels to "
            "spare; add three tokens to it"
        )
    boi, eoi, image = tokenizer.sentinel_ids[-3:]
    return replace(config, boi_token_index=boi, eoi_token_index=eoi, image_token_index=image)


_ENCODER_SIZES = ("encoder_hidden_size", "encoder_intermediate_size", "encoder_num_hidden_layers")
_VARIANT = ("attention", "embeddings", "cross_attention_layers", "causal_encoder", "shared_stack")


def _asked_of_encoder_decoders(recipe: ArchitectureRecipe) -> list[str]:
    """The keys, of those that only encoder-decoders have, that are not at their defaults."""
    default = ArchitectureRecipe()
    return [name for name in (*_ENCODER_SIZES, *_VARIANT) if getattr(recipe, name) != getattr(default, name)]


def _variant(recipe: ArchitectureRecipe) -> Variant:
    """What differs from the family; nothing for a plain model, so that a variant that `init` names stays as it is."""
    variant = Variant()
    if recipe.attention:
        variant["attention"] = recipe.attention
    if recipe.embeddings:
        variant["tied_embeddings"] = recipe.embeddings == "tied"
    if recipe.cross_attention_layers != "all":
        variant["cross_attention_layers"] = recipe.cross_attention_layers
    if recipe.causal_encoder:
        variant["causal_encoder"] = True
    if recipe.shared_stack:
        variant["shared_stack"] = True
    return variant
