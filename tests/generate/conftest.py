"""Tiny random models of each kind, with windows short enough to be left behind at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from encore import assets
from encore.config import GemmaConfig, Rope, StackConfig, T5GemmaConfig
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.tokenizer import Tokenizer, load_tokenizer

WINDOW = 6
KINDS = ("gemma2", "gemma3", "t5gemma", "t5gemma2")


def stack(kind: str, vocab_size: int, max_position_embeddings: int) -> StackConfig:
    gemma3 = kind in ("gemma3", "t5gemma2")
    return StackConfig(
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=("sliding_attention", "sliding_attention", "full_attention", "sliding_attention"),
        sliding_window=WINDOW,
        local_rope=Rope(10_000.0),
        global_rope=Rope(1_000_000.0, 8.0) if gemma3 else Rope(10_000.0),
        query_pre_attn_scalar=8,
        qk_norm=gemma3,
        attn_logit_softcapping=None if gemma3 else 20.0,
        max_position_embeddings=max_position_embeddings,
    )


def build(kind: str, vocab_size: int = 61, max_position_embeddings: int = 128, seed: int = 0) -> Gemma | T5Gemma:
    """Weights large enough that targets vary and every token read matters."""
    layers = stack(kind, vocab_size, max_position_embeddings)
    cap = 20.0 if kind in ("gemma2", "t5gemma") else None
    model: Gemma | T5Gemma
    if kind == "gemma2":
        model = Gemma(GemmaConfig("gemma2", layers, final_logit_softcapping=cap))
    elif kind == "gemma3":
        model = Gemma(GemmaConfig("gemma3_text", layers))
    elif kind == "t5gemma":
        model = T5Gemma(T5GemmaConfig("t5gemma", layers, layers, final_logit_softcapping=cap))
    else:
        model = T5Gemma(T5GemmaConfig("t5gemma2", layers, layers))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if parameter.dim() == 1 or "embed" in name else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Gemma | T5Gemma]:
    """tiny(kind) -> a model; the same one for the same arguments."""
    made: dict[tuple[str, int, int], Gemma | T5Gemma] = {}

    def make(kind: str, vocab_size: int = 61, max_position_embeddings: int = 128) -> Gemma | T5Gemma:
        key = (kind, vocab_size, max_position_embeddings)
        if key not in made:
            made[key] = build(*key)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The shipped one."""
    return load_tokenizer(assets.path("tokenizer"))


@pytest.fixture(scope="session")
def speaker(tiny: Callable[..., Gemma | T5Gemma], tokenizer: Tokenizer) -> Callable[[str], Gemma | T5Gemma]:
    """speaker(kind) -> a tiny model with the shipped tokenizer's vocabulary."""
    return lambda kind: tiny(kind, vocab_size=tokenizer.vocab_size, max_position_embeddings=320)
