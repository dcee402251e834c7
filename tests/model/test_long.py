"""Long inputs take other ways through the encoder; what comes out is the same."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import encore
from encore.config import LayerType, Rope, StackConfig, T5GemmaConfig, T5GemmaType
from encore.kernels import attention
from encore.kernels.attention import Keys, attend
from encore.model import layers
from encore.model.masks import Visibility, encoder_window


def test_long_sources_give_the_same_memory(pair, monkeypatch):
    _, model = pair("t5gemma2")
    tokens = torch.randint(3, 97, (2, 90), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[1, 50:] = False
    with torch.no_grad():
        expected = model.encode(tokens, mask).states
        monkeypatch.setattr(layers, "ROWS_AT_ONCE", 16)
        monkeypatch.setattr(attention, "LONG", 32)
        monkeypatch.setattr(attention, "MAX_SCORES", 4096)
        found = model.encode(tokens, mask).states
    assert not torch.equal(found, expected), "the other ways were not taken"
    torch.testing.assert_close(found[mask], expected[mask], atol=3e-5, rtol=0)


def test_with_gradients_nothing_is_cut(pair, monkeypatch):
    _, model = pair("gemma3")
    monkeypatch.setattr(layers, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(torch.Tensor, "split", lambda *_, **__: 1 / 0)
    model(torch.randint(3, 97, (1, 40))).sum().backward()
    model.zero_grad()


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 700),
    window=st.integers(1, 180),
    model_type=st.sampled_from(["t5gemma", "t5gemma2"]),
    kind=st.sampled_from(["sliding_attention", "full_attention"]),
    real=st.lists(st.floats(0, 1), min_size=2, max_size=2),
    side=st.sampled_from(["left", "right", "none"]),
    long=st.sampled_from([64, 1024]),
    seed=st.integers(0, 99),
)
def test_banded_equals_dense(
    length: int,
    window: int,
    model_type: T5GemmaType,
    kind: LayerType,
    real: list[float],
    side: str,
    long: int,
    seed: int,
) -> None:
    """The encoder's attention at lengths of several bands, by one S x S mask written from the paper's definition."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, length, 4, generator=generator) for heads in (2, 1, 1))
    mask = torch.ones(2, length, dtype=torch.bool)
    for row, share in enumerate(real):
        number = max(1, round(share * length))
        mask[row, slice(0, length - number) if side == "left" else slice(number, None)] = side == "none"
    stack = StackConfig(1, 8, 8, 1, 2, 1, 4, (kind,), window, Rope(1e4), Rope(1e4), 4, True)
    visible = Visibility(encoder_window(T5GemmaConfig(model_type, stack, stack), kind), num_keys=length, key_mask=mask)
    before, attention.LONG = attention.LONG, long
    try:
        found = attend(q, [Keys(k, v, visible)])
    finally:
        attention.LONG = before
    distance = torch.arange(length)[:, None] - torch.arange(length)
    if kind == "full_attention":
        near = torch.ones(length, length, dtype=torch.bool)
    elif model_type == "t5gemma2":
        near = (distance < (window + 1) // 2) & (-distance <= window // 2)  # W keys in all
    else:
        near = distance.abs() <= window
    seen = (near & mask[:, None, :])[:, None]
    scores = (q.double() @ k.double().transpose(-1, -2)).masked_fill(~seen, -torch.inf)
    expected = (torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v.double()).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found[mask].double(), expected[mask], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind, num_tokens", [("t5gemma", 4096), ("t5gemma2", 8192)])
def test_parity_with_thousands_of_source_tokens(kind: str, num_tokens: int, tmp_path) -> None:
    """Long enough for every fast path: bands, fused global layers, rows in pieces; whole and with padding."""
    sizes = dict(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=512,
        max_position_embeddings=8192,
        layer_types=["sliding_attention", "full_attention"],
    )
    if kind == "t5gemma2":
        rope = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        }
        vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28)
        config = tf.T5Gemma2Config(
            encoder=dict(text_config=dict(sizes, rope_parameters=rope), vision_config=vision, eoi_token_index=90),
            decoder=dict(sizes, rope_parameters=rope),
            image_token_index=91,
        )
        theirs = tf.T5Gemma2ForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    else:
        half = tf.T5GemmaModuleConfig(**{**sizes, "num_attention_heads": 1}, attn_logit_softcapping=5.0)
        config = tf.T5GemmaConfig(encoder=half, decoder=half, vocab_size=97)
        theirs = tf.T5GemmaForConditionalGeneration._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            std = 0.3 if parameter.dim() == 1 or "embed" in name else 1.2 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    theirs.tie_weights()
    theirs.eval().save_pretrained(tmp_path)
    model = encore.load(tmp_path)
    source = torch.randint(3, 90, (1, num_tokens), generator=generator)
    target = torch.randint(3, 90, (1, 5), generator=generator)
    for num_padding in (0, 700):
        mask = torch.ones(1, num_tokens, dtype=torch.bool)
        mask[:, num_tokens - num_padding :] = False
        with torch.inference_mode():
            expected = theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=target, use_cache=False)
            memory = model.encode(source, mask if num_padding else None)
            logits = model.decode(target, memory)
        states = expected.encoder_last_hidden_state
        torch.testing.assert_close(memory.states[mask], states[mask], atol=3e-5, rtol=0)
        torch.testing.assert_close(logits, expected.logits, atol=3e-5, rtol=0)
