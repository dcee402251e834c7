"""Random small reference models of transformers, and the same weights in ours."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from encore.config import GemmaConfig, Rope, StackConfig, T5GemmaConfig, VisionConfig
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma

WINDOW = 7
V = 97
SIZES = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=24,
    sliding_window=WINDOW,
    max_position_embeddings=256,
)
GEMMA2_TYPES = ["sliding_attention", "full_attention"] * 2
GEMMA3_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
ROPE3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
}
VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=14
)


def stack(kind: str, **changes: int) -> StackConfig:
    gemma3 = kind in ("gemma3", "t5gemma2")
    sizes = {**SIZES, **changes}
    return StackConfig(
        **sizes,  # pyright: ignore
        layer_types=tuple(GEMMA3_TYPES if gemma3 else GEMMA2_TYPES),  # pyright: ignore
        local_rope=Rope(10_000.0),
        global_rope=Rope(1_000_000.0, 8.0) if gemma3 else Rope(10_000.0),
        qk_norm=gemma3,
        attn_logit_softcapping=None if gemma3 else 5.0,
    )


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every part matters: matrices 1.2 / sqrt(fan in), norm scales and vectors 0.3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            std = 0.3 if parameter.dim() == 1 else 1.2 * fan_in**-0.5
            if "embed" in name and parameter.dim() == 2:
                std = 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def reference(kind: str) -> torch.nn.Module:
    """One of gemma2, gemma3, t5gemma, t5gemma-unbalanced, t5gemma2."""
    caps = dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
    if kind == "gemma2":
        config = tf.Gemma2Config(**SIZES, layer_types=GEMMA2_TYPES, **caps)
        model = tf.Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    elif kind == "gemma3":
        config = tf.Gemma3TextConfig(**SIZES, layer_types=GEMMA3_TYPES, rope_parameters=ROPE3)
        model = tf.Gemma3ForCausalLM._from_config(config, attn_implementation="eager")
    elif kind.startswith("t5gemma2"):
        text = dict(**SIZES, layer_types=GEMMA3_TYPES, rope_parameters=ROPE3)
        config = tf.T5Gemma2Config(
            encoder=dict(text_config=text, vision_config=dict(VISION), mm_tokens_per_image=4, eoi_token_index=90),
            decoder=dict(text),
            image_token_index=91,
        )
        model = tf.T5Gemma2ForConditionalGeneration._from_config(config, attn_implementation="eager")
    else:
        module = tf.T5GemmaModuleConfig
        encoder = dict(SIZES, hidden_size=40, num_key_value_heads=4) if kind == "t5gemma-unbalanced" else dict(SIZES)
        config = tf.T5GemmaConfig(
            encoder=module(**encoder, layer_types=GEMMA2_TYPES, **caps),
            decoder=module(**SIZES, layer_types=GEMMA2_TYPES, **caps),
            vocab_size=V,
        )
        model = tf.T5GemmaForConditionalGeneration._from_config(config, attn_implementation="eager")
    randomise(model, seed=sum(map(ord, kind)))
    model.tie_weights()
    return model.eval()


def ours(kind: str, theirs: torch.nn.Module) -> Gemma | T5Gemma:
    """Our model with the weights of the reference, copied by name."""
    cap = 3.0 if kind in ("gemma2", "t5gemma", "t5gemma-unbalanced") else None
    if kind in ("gemma2", "gemma3"):
        model_type = "gemma2" if kind == "gemma2" else "gemma3_text"
        model = Gemma(GemmaConfig(model_type, stack(kind), final_logit_softcapping=cap))
    elif kind == "t5gemma2":
        vision = VisionConfig(**VISION, mm_tokens_per_image=4)
        config = T5GemmaConfig(kind, stack(kind), stack(kind), vision=vision, eoi_token_index=90, image_token_index=91)
        model = T5Gemma(config, vision=True)
    else:
        wide = dict(hidden_size=40, num_key_value_heads=4) if kind == "t5gemma-unbalanced" else {}
        model = T5Gemma(T5GemmaConfig("t5gemma", stack(kind, **wide), stack(kind), final_logit_softcapping=cap))
    tensors = theirs.state_dict()
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("model.").replace("encoder.text_model.", "encoder.")
        if kind in ("gemma2", "gemma3"):
            name = name.replace("input_layernorm", "pre_self_attn_layernorm")
            name = name.replace("post_attention_layernorm", "post_self_attn_layernorm")
        renamed[name.replace("vision_tower.vision_model.", "vision_tower.")] = tensor
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(renamed[name])
    return model.eval()


@pytest.fixture(scope="session")
def pair():
    """pair(kind) -> (reference, ours), made once."""
    made: dict[str, tuple[torch.nn.Module, Gemma | T5Gemma]] = {}

    def make(kind: str) -> tuple[torch.nn.Module, Gemma | T5Gemma]:
        if kind not in made:
            theirs = reference(kind)
            made[kind] = (theirs, ours(kind, theirs))
        return made[kind]

    return make
