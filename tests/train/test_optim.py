"""The schedule, who decays, and the norms of gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from encore.train.optim import (
    clip_gradients,
    freeze,
    is_cross_attention,
    learning_rate,
    make_optimizer,
    part_of,
    rate_part,
    set_learning_rate,
)
from encore.train.recipe import OptimRecipe

RECIPE = OptimRecipe(learning_rate=1.0, final_learning_rate_fraction=0.1, warmup_steps=10)


def test_warmup_then_cosine() -> None:
    rates = [learning_rate(step, 110, RECIPE) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[59] == pytest.approx(0.55)  # half of the cosine
    assert rates[-1] == pytest.approx(0.1)


def test_no_warmup_and_runs_shorter_than_it() -> None:
    assert learning_rate(0, 1, OptimRecipe(learning_rate=1.0, warmup_steps=0)) == pytest.approx(0.1)
    assert learning_rate(4, 5, RECIPE) == pytest.approx(0.5)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.embed_tokens = nn.Embedding(5, 3)
        self.encoder.q_proj = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Module()
        self.decoder.norm = nn.LayerNorm(3, bias=False)
        self.decoder.cross_attn = nn.Linear(3, 3, bias=False)


def test_matrices_decay_and_norms_do_not() -> None:
    model = Toy()
    names = {id(p): name for name, p in model.named_parameters()}
    for embeddings in (False, True):
        optimizer = make_optimizer(model, OptimRecipe(weight_decay=0.3, decay_embeddings=embeddings))
        decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decay == {
            "encoder.embed_tokens.weight": 0.3 if embeddings else 0.0,
            "encoder.q_proj.weight": 0.3,
            "decoder.norm.weight": 0.0,
            "decoder.cross_attn.weight": 0.3,
        }


def test_each_part_has_its_rate_and_a_part_of_rate_0_is_frozen() -> None:
    model = Toy()
    recipe = OptimRecipe(encoder_rate=0.0, decoder_rate=0.5, cross_attention_rate=2.0)
    freeze(model, recipe)
    optimizer = make_optimizer(model, recipe)
    set_learning_rate(optimizer, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == pytest.approx(
        {"encoder.embed_tokens.weight": 0.1, "decoder.norm.weight": 0.05, "decoder.cross_attn.weight": 0.2}
    )
    assert not model.encoder.q_proj.weight.requires_grad


def test_rates_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optim\.encoder_rate is 0\.5, but the model has no encoder .* are decoder$"):
        freeze(nn.Linear(2, 2), OptimRecipe(encoder_rate=0.5))
    with pytest.raises(ValueError, match="every part of the model is frozen"):
        freeze(nn.Linear(2, 2), OptimRecipe(decoder_rate=0.0))
    with pytest.raises(ValueError, match="no cross-attention that learns"):
        freeze(Toy(), OptimRecipe(cross_attention_rate=0.0, cross_attention_warmup_steps=3))


def test_parts() -> None:
    assert part_of("layers.0.mlp.up_proj.weight") == "decoder"  # a decoder-only model
    assert part_of("encoder.layers.0.mlp.up_proj.weight") == "encoder"
    assert part_of("embed_tokens.weight") == part_of("encoder.embed_tokens.eoi_embedding") == "embedding"
    assert is_cross_attention("decoder.layers.1.cross_attn.q_proj.weight")
    assert is_cross_attention("decoder.layers.1.pre_cross_attn_layernorm.weight")
    assert not is_cross_attention("decoder.layers.1.self_attn.q_proj.weight")
    assert rate_part("decoder.layers.1.post_cross_attn_layernorm.weight") == "cross_attention"
    assert rate_part("decoder.embed_tokens.weight") == "embedding"


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_torchs_and_norms_are_by_part(max_norm: float) -> None:
    ours, theirs = Toy(), Toy()
    for model in (ours, theirs):
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    norms = clip_gradients(ours.named_parameters(), max_norm)
    total = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    assert norms["gradient_norm"] == pytest.approx(float(total), rel=1e-6)
    parts = [norms[f"gradient_norm_{part}"] for part in ("encoder", "decoder", "embedding")]
    assert math.hypot(*parts) == pytest.approx(norms["gradient_norm"])
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_gradients_that_are_no_numbers_are_reported() -> None:
    model = Toy()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert math.isnan(clip_gradients(model.named_parameters(), 1.0)["gradient_norm"])
