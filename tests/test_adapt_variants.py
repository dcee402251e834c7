"""Adapting into variants and into another depth: what is copied from where, and which functions stay as they were."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encore.adapt import adapt
from encore.adapt_plan import chosen_layers, plan
from encore.checkpoint.pretrained import load, save
from encore.checkpoint.recipes import Copy, Draw, Fill
from encore.config import GemmaConfig, Rope, StackConfig, T5GemmaConfig
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.train.optim import is_cross_attention

LOCAL, GLOBAL = "sliding_attention", "full_attention"
TYPES = (LOCAL, LOCAL, GLOBAL, LOCAL)


def gemma(second: bool, **changes: Any) -> GemmaConfig:
    """Gemma 3 (the source of a T5Gemma 2), or Gemma 2."""
    values: dict[str, Any] = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=TYPES,
        sliding_window=4,
        local_rope=Rope(1e4),
        global_rope=Rope(1e6) if second else Rope(1e4),
        query_pre_attn_scalar=16,
        qk_norm=second,
        attn_logit_softcapping=None if second else 50.0,
    )
    stack = StackConfig(**{**values, **changes})
    if second:
        return GemmaConfig("gemma3_text", stack, eoi_token_index=60)
    return GemmaConfig("gemma2", stack, final_logit_softcapping=30.0)


WIDE: dict[str, Any] = dict(hidden_size=48, intermediate_size=64, num_attention_heads=6)


def write(folder: Path, config: GemmaConfig) -> Path:
    model = Gemma(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3 if parameter.dim() == 1 else 0.08)
    save(model, folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """style -> a folder that it can be adapted from."""
    root = tmp_path_factory.mktemp("sources")
    return {style: write(root / style, gemma(style == "t5gemma2")) for style in ("t5gemma", "t5gemma2")}


PRESERVING: list[tuple[str, dict[str, Any]]] = [
    ("t5gemma", {}),
    ("t5gemma", dict(attention="merged")),
    ("t5gemma", dict(tied_embeddings=True, cross_attention_layers=GLOBAL)),
    ("t5gemma", dict(shared_stack=True)),
    ("t5gemma2", dict(attention="separate")),
    ("t5gemma2", dict(tied_embeddings=False, cross_attention_layers=GLOBAL)),
    ("t5gemma2", dict(attention="separate", cross_attention_layers=GLOBAL, shared_stack=True)),
    ("t5gemma2", dict(encoder_layers=[1, 2])),
]


@pytest.mark.parametrize(("style", "options"), PRESERVING)
def test_without_a_memory_every_variant_is_its_source(
    sources: dict[str, Path], style: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    adapt(sources[style], tmp_path / "out", style=style, **options)
    source, model = load(sources[style]), load(tmp_path / "out")
    assert isinstance(model, T5Gemma) and isinstance(source, Gemma)
    tokens = torch.randint(3, 60, (2, 12))
    with torch.no_grad():
        memory = model.encode(tokens)
        hidden = replace(memory, mask=torch.zeros_like(tokens, dtype=torch.bool))
        assert (model.decode(tokens, hidden) - source(tokens)).abs().max() < 1e-5
        assert (model.decode(tokens, memory) - source(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("style", ["t5gemma", "t5gemma2"])
def test_a_causal_encoder_gives_the_states_of_its_source(sources: dict[str, Path], style: Any, tmp_path: Path) -> None:
    summary = adapt(sources[style], tmp_path / "out", style=style, causal_encoder=True)
    assert summary.model_type == "encore_t5gemma"
    source, model = load(sources[style]), load(tmp_path / "out")
    assert isinstance(model, T5Gemma) and isinstance(source, Gemma)
    tokens = torch.randint(3, 60, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(model.encode(tokens).states, source.states(tokens), atol=1e-5, rtol=0)


def test_separate_attention_of_gemma3_copies_its_norms_too(sources: dict[str, Path], tmp_path: Path) -> None:
    summary = adapt(sources["t5gemma2"], tmp_path / "out", attention="separate", cross_attention_layers=GLOBAL)
    assert summary.warmup is None
    weights = dict(load(tmp_path / "out").named_parameters())
    cross = [name for name in weights if is_cross_attention(name)]
    assert len(cross) == 8, "four matrices and four norms of the one global layer"
    for name in cross:
        assert torch.equal(weights[name], weights[name.replace("cross_attn", "self_attn")]), name


def test_an_unbalanced_t5gemma2_has_a_projection_that_is_warmed_up(sources: dict[str, Path], tmp_path: Path) -> None:
    wide = write(tmp_path / "wide", gemma(True, **WIDE))
    with pytest.raises(ValueError, match="with separate embeddings they may differ"):
        adapt(wide, tmp_path / "out", decoder=sources["t5gemma2"])
    options: dict[str, Any] = dict(decoder=sources["t5gemma2"], tied_embeddings=False, seed=3)
    summary = adapt(wide, tmp_path / "out", **options)
    assert summary.model_type == "encore_t5gemma" and summary.warmup == {"steps": 1000, "train": "cross_attention"}
    model = load(tmp_path / "out")
    assert isinstance(model, T5Gemma)
    weights = dict(model.named_parameters())
    assert [name for name in weights if is_cross_attention(name)] == ["decoder.memory_proj.weight"]
    projection = weights["decoder.memory_proj.weight"].detach()
    assert projection.shape == (32, 48) and abs(float(projection.std()) - 48**-0.5) < 0.01
    for folder, side in ((wide, "encoder"), (sources["t5gemma2"], "decoder")):
        for name, value in load(folder).named_parameters():
            assert torch.equal(weights[f"{side}.{name}"], value), name
    adapt(wide, tmp_path / "separate", attention="separate", **options)
    separate = dict(load(tmp_path / "separate").named_parameters())
    assert separate["decoder.layers.0.cross_attn.k_proj.weight"].shape == (16, 48)
    assert not separate["decoder.layers.0.cross_attn.k_norm.weight"].any()


def test_another_depth_is_made_of_the_chosen_layers(sources: dict[str, Path], tmp_path: Path) -> None:
    summary = adapt(sources["t5gemma2"], tmp_path / "out", encoder_layers=6, decoder_layers=[3, 2])
    assert summary.model_type == "t5gemma2", "a public format holds stacks of different depth"
    source, model = load(sources["t5gemma2"]), load(tmp_path / "out")
    assert isinstance(model.config, T5GemmaConfig) and isinstance(source, Gemma)
    chosen = {"encoder": (0, 1, 1, 2, 2, 3), "decoder": (3, 2)}
    before, after = dict(source.named_parameters()), dict(model.named_parameters())
    for side, layers in chosen.items():
        assert getattr(model.config, side).layer_types == tuple(TYPES[layer] for layer in layers)
        for new, old in enumerate(layers):
            for name in (name for name in before if name.startswith(f"layers.{old}.")):
                of_target = name.replace(f"layers.{old}.", f"{side}.layers.{new}.")
                assert torch.equal(after[of_target], before[name]), of_target
    provenance = json.loads((tmp_path / "out/encore_adaptation.json").read_text())
    assert provenance["layers"] == {
        "encoder": {"rule": "evenly spaced", "source_layers": [0, 1, 1, 2, 2, 3]},
        "decoder": {"rule": "listed", "source_layers": [3, 2]},
    }


def test_cross_attention_of_another_depth_is_that_of_its_own_layer() -> None:
    planned = plan(gemma(False), "t5gemma", decoder_layers=[1, 2])
    name = "decoder.layers.1.cross_attn.q_proj.weight"
    assert planned.recipes[name] == Copy("decoder", "layers.2.self_attn.q_proj.weight") and planned.warmup is None


@given(have=st.integers(1, 40), wanted=st.integers(1, 80))
def test_even_spacing(have: int, wanted: int) -> None:
    """From the first layer to the last, rising; none is skipped where layers repeat, none repeated where they drop."""
    stack = gemma(True, num_hidden_layers=have, layer_types=(GLOBAL,) * have).stack
    chosen = chosen_layers(stack, wanted, "encoder_layers")
    steps = [b - a for a, b in itertools.pairwise(chosen)]
    assert len(chosen) == wanted and chosen[-1] == have - 1 and (wanted == 1 or chosen[0] == 0)
    assert max(steps, default=1) - min(steps, default=1) <= 1
    assert all(step >= 1 for step in steps) if wanted <= have else set(chosen) == set(range(have))


def test_even_spacing_by_example() -> None:
    twelve = gemma(True, num_hidden_layers=12, layer_types=(GLOBAL,) * 12).stack
    assert chosen_layers(twelve, 6, "") == (0, 2, 4, 7, 9, 11)
    assert chosen_layers(gemma(True).stack, 8, "") == (0, 0, 1, 1, 2, 2, 3, 3)
    assert chosen_layers(gemma(True).stack, None, "") == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(encoder_layers=0), "encoder_layers is 0; expected a number from 1"),
        (dict(decoder_layers=[0, 4]), r"decoder_layers is \[0, 4\]; expected layers of the source, 0 to 3"),
        (dict(decoder_layers=[]), r"decoder_layers is \[\]"),
        (dict(encoder_layers=2), r"keeps the layers \[0, 3\], none of which is global; .* one of \[2\]"),
        (dict(shared_stack=True, encoder_layers=3, decoder_layers=4), "one stack for encoder and decoder"),
        (dict(shared_stack=True, decoder=gemma(True)), "one stack for encoder and decoder"),
        (dict(attention="both"), "attention is 'both'"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(gemma(True), "t5gemma2", **options)


@pytest.mark.parametrize("options", [dict(attention="separate"), dict(shared_stack=True), dict(tied_embeddings=False)])
def test_random_weights_of_every_tensor(options: dict[str, Any]) -> None:
    planned = plan(gemma(True), "t5gemma2", random=True, **options)
    assert planned.warmup is None
    assert {type(recipe) for recipe in planned.recipes.values()} == {Draw, Fill}
