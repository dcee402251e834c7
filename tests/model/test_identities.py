"""What must hold by construction: an encoder-decoder adapted from a Gemma contains that Gemma."""

from __future__ import annotations

from typing import Unpack

import pytest
import torch

from encore.config import T5GemmaConfig, Variant
from encore.model.encoder import Memory
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma

WINDOW = 7


def adapted(gemma: Gemma, **variant: Unpack[Variant]) -> T5Gemma:
    """The same weights as a T5Gemma 2 or, from Gemma 2, a balanced T5Gemma."""
    kind = "t5gemma" if gemma.config.model_type == "gemma2" else "t5gemma2"
    stack, cap = gemma.config.stack, gemma.config.final_logit_softcapping
    model = T5Gemma(T5GemmaConfig(kind, stack, stack, final_logit_softcapping=cap, **variant)).eval()
    weights = dict(gemma.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name.removeprefix("encoder.").removeprefix("decoder.").replace("cross_attn", "self_attn")
            parameter.copy_(weights[name]) if name in weights else parameter.zero_()
    return model


@pytest.mark.parametrize("nothing", ["no source tokens", "all masked"])
def test_merged_attention_that_sees_no_source_is_the_gemma_decoder(pair, nothing):
    _, gemma = pair("gemma3")
    model = adapted(gemma)
    tokens = torch.randint(3, 97, (2, 3 * WINDOW), generator=torch.Generator().manual_seed(0))
    if nothing == "all masked":
        memory = model.encode(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    else:
        memory = Memory(torch.zeros(2, 0, model.config.encoder.hidden_size))
    with torch.no_grad():
        torch.testing.assert_close(model.decode(tokens, memory), gemma(tokens), atol=3e-5, rtol=0)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_a_causal_encoder_is_the_source(pair, kind):
    _, gemma = pair(kind)
    model = adapted(gemma, causal_encoder=True)
    tokens = torch.randint(3, 97, (2, 3 * WINDOW), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.encode(tokens).states, gemma.states(tokens), atol=3e-5, rtol=0)
