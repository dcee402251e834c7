"""Cached, batched, drawn and drafted generation with every variant, against the naive generator on each row alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from encore.config import Rope, StackConfig, T5GemmaConfig
from encore.generate.batch import generate
from encore.generate.decoding import naive_generate
from encore.generate.sampling import SamplingSettings
from encore.generate.score import score
from encore.model.t5gemma import T5Gemma

WINDOW = 6
VARIANTS: dict[str, dict[str, Any]] = {
    "t5gemma merged": dict(attention="merged"),
    "t5gemma tied": dict(tied_embeddings=True),
    "t5gemma global": dict(cross_attention_layers="full_attention"),
    "t5gemma2 causal": dict(causal_encoder=True),
    "t5gemma2 separate": dict(attention="separate"),
    "t5gemma2 global": dict(cross_attention_layers="full_attention"),
    "t5gemma2 shared": dict(shared_stack=True),
    "t5gemma2 wide": dict(tied_embeddings=False, width=40),
    "t5gemma2 wide global": dict(tied_embeddings=False, width=40, cross_attention_layers="full_attention"),
}
SETTINGS = {
    "greedy": SamplingSettings(
        repetition_penalty=3.0, max_target_tokens=2 * WINDOW + 3, stop_ids=(), log_probabilities=True
    ),
    "drawn": SamplingSettings(
        temperature=2.0, seed=3, max_target_tokens=WINDOW + 2, stop_ids=(), log_probabilities=True
    ),
}


def build(name: str) -> T5Gemma:
    family, options = name.split()[0], dict(VARIANTS[name])
    second = family == "t5gemma2"
    stack = StackConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
        sliding_window=WINDOW,
        local_rope=Rope(1e4),
        global_rope=Rope(1e6, 8.0) if second else Rope(1e4),
        query_pre_attn_scalar=8,
        qk_norm=second,
        attn_logit_softcapping=None if second else 20.0,
    )
    encoder = replace(stack, hidden_size=options.pop("width", 24))
    model = T5Gemma(T5GemmaConfig(family, encoder, stack, **options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf, parameter in model.named_parameters():
            std = 0.3 if parameter.dim() == 1 or "embed" in leaf else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_equals_each_row_alone_without_a_cache(name: str) -> None:
    model, numbers = build(name), np.random.default_rng(0)
    rows = [numbers.integers(3, 61, n).tolist() for n in (WINDOW - 1, 1, 2 * WINDOW + 3)]
    for settings in SETTINGS.values():
        found = generate(model, rows, settings)
        for row, ours in zip(rows, found, strict=True):
            expected = naive_generate(model, row, settings)
            assert ours.tokens == expected.tokens
            np.testing.assert_allclose(ours.log_probabilities, expected.log_probabilities, atol=1e-4)
        assert len({tuple(answer.tokens) for answer in found}) == len(rows), "each source has its own answer"
    alone = [score(model, [row], [answer.tokens])[0] for row, answer in zip(rows, found, strict=True)]
    together = score(model, rows, [answer.tokens for answer in found])
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a.log_probabilities, b.log_probabilities, atol=1e-4)
