"""Model FLOPs against torch's own counter, which sees every product that runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from encore.config import GemmaConfig, T5GemmaConfig
from encore.flops import pairs_seen, training_flops
from encore.model.gemma import Gemma
from encore.model.masks import Visibility, Window
from encore.model.t5gemma import T5Gemma
from encore.presets import preset

STACK = replace(preset("encore-small").stack, vocab_size=300, sliding_window=1000)  # pyright: ignore
SOURCE, TARGET = 50, 30


@pytest.mark.parametrize(
    "config",
    [
        GemmaConfig("gemma3_text", STACK),
        T5GemmaConfig("t5gemma2", STACK, STACK),
        T5GemmaConfig("t5gemma", replace(STACK, qk_norm=False), replace(STACK, qk_norm=False, num_key_value_heads=2)),
        T5GemmaConfig("t5gemma", STACK, replace(STACK, hidden_size=128)),
        T5GemmaConfig("t5gemma2", STACK, replace(STACK, hidden_size=128), tied_embeddings=False),
        T5GemmaConfig("t5gemma2", STACK, STACK, cross_attention_layers="full_attention"),
        T5GemmaConfig("t5gemma2", STACK, STACK, shared_stack=True, causal_encoder=True),
    ],
)
def test_the_count_is_what_runs_but_for_masked_pairs(config: GemmaConfig | T5GemmaConfig) -> None:
    """Windows are wider than the rows, so what is computed and masked is the upper half of causal layers."""
    with FlopCounterMode(display=False) as counter:
        source, target = torch.randint(3, 300, (1, SOURCE)), torch.randint(3, 300, (1, TARGET))
        if isinstance(config, GemmaConfig):
            Gemma(config)(torch.cat((source, target), 1)).sum().backward()
            causal = [(config.stack, SOURCE + TARGET)]
        else:
            T5Gemma(config)(source, target).sum().backward()
            causal = [(config.decoder, TARGET), *([(config.encoder, SOURCE)] if config.causal_encoder else [])]
    masked = sum(
        12 * stack.num_attention_heads * stack.head_dim * stack.num_hidden_layers * (n * n - n) // 2
        for stack, n in causal
    )
    assert counter.get_total_flops() == training_flops(config, SOURCE, TARGET) + masked


@pytest.mark.parametrize(
    "window", [Window(), Window(None, 0), Window(4, 0), Window(3, 4), Window(40, 40), Window(7, 7)]
)
def test_pairs_are_those_that_the_mask_shows(window: Window) -> None:
    visible = Visibility(window, num_keys=20)
    hidden = visible.hidden(slice(0, 20), slice(0, 20))
    assert pairs_seen(window, 20) == (400 if hidden is None else int((~hidden).sum()))
