"""Adaptation: where each tensor of the target comes from, and that transformers agrees with the result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from encore.adapt import adapt
from encore.adapt_plan import plan, same_size
from encore.checkpoint.pretrained import expected_shapes, load, save
from encore.checkpoint.recipes import Copy, Fill, ScaledRow
from encore.config import GemmaConfig, Rope, StackConfig, VisionConfig
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.presets import preset

TOLERANCE = 3e-5
VOCAB, EOI = 64, 60


def stack(**changes: Any) -> StackConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ("sliding_attention", "full_attention"),
        "sliding_window": 4,
        "local_rope": Rope(1e4),
        "global_rope": Rope(1e6),
        "query_pre_attn_scalar": 16,
        "qk_norm": True,
        "max_position_embeddings": 128,
    }
    return StackConfig(**{**values, **changes})


def gemma3(**changes: Any) -> GemmaConfig:
    return GemmaConfig(model_type="gemma3_text", stack=stack(**changes), eoi_token_index=EOI)


def gemma2(**changes: Any) -> GemmaConfig:
    own = {"qk_norm": False, "global_rope": Rope(1e4), "attn_logit_softcapping": 50.0}
    return GemmaConfig(model_type="gemma2", stack=stack(**{**own, **changes}), final_logit_softcapping=30.0)


SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


def write(folder: Path, config: GemmaConfig, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A source with every parameter random."""
    model = Gemma(config, vision=config.vision is not None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3 if parameter.dim() == 1 else 0.08)
    save(model.to(dtype), folder, **options)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def largest_difference_to_transformers(folder: Path) -> float:
    theirs, info = AutoModelForSeq2SeqLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    source, target = torch.randint(3, VOCAB - 3, (2, 11)), torch.randint(3, VOCAB - 3, (2, 9))
    source[0, 3] = EOI
    with torch.no_grad():
        ours = load(folder, dtype="float32")(source, target)
        return float((ours - theirs.eval()(input_ids=source, decoder_input_ids=target).logits).abs().max())


def test_the_plan_of_the_released_sizes() -> None:
    """The config that adaptation gives is that of the release; every tensor has one recipe, and shapes fit."""
    unbalanced = plan(preset("gemma-2-9b"), "t5gemma", preset("gemma-2-2b"))  # type: ignore[arg-type]
    assert unbalanced.config == preset("t5gemma-9b-2b")
    assert unbalanced.warmup == {"steps": 1000, "train": "cross_attention"}
    balanced = plan(preset("gemma-2-2b"), "t5gemma")  # type: ignore[arg-type]
    assert balanced.config == preset("t5gemma-2b-2b") and balanced.warmup is None
    pictures = plan(preset("gemma-3-4b"), "t5gemma2", rope_factor=8)  # type: ignore[arg-type]
    assert pictures.config == preset("t5gemma-2-4b-4b")
    text = plan(preset("gemma-3-270m"), "t5gemma2", rope_factor=8)  # type: ignore[arg-type]
    assert replace(text.config, vision=VisionConfig()) == preset("t5gemma-2-270m-270m")
    cases = (
        (unbalanced, preset("gemma-2-9b"), preset("gemma-2-2b")),
        (balanced, preset("gemma-2-2b"), preset("gemma-2-2b")),
        (pictures, preset("gemma-3-4b"), preset("gemma-3-4b")),
    )
    for planned, encoder, decoder in cases:
        shapes = expected_shapes(planned.config)
        stored = {"encoder": expected_shapes(encoder), "decoder": expected_shapes(decoder)}
        assert planned.recipes.keys() == shapes.keys()
        for name, recipe in planned.recipes.items():
            if isinstance(recipe, Copy):
                shape = stored[recipe.side][recipe.name]
                assert shapes[name] == ((recipe.rows, *shape[1:]) if recipe.rows else shape), name


def test_balanced_means_equal_in_every_size() -> None:
    assert same_size(stack(), stack(sliding_window=8))
    for change in ({"intermediate_size": 64}, {"num_key_value_heads": 4}, SMALL):
        assert not same_size(stack(), stack(**change))


def test_the_end_of_image_token_outside_the_vocabulary() -> None:
    outside = replace(gemma3(), eoi_token_index=256_000)
    assert plan(outside, "t5gemma2").recipes["encoder.embed_tokens.eoi_embedding"] == Fill(0.0)
    assert plan(gemma3(), "t5gemma2").recipes["encoder.embed_tokens.eoi_embedding"] == ScaledRow(EOI)


REFUSED: list[tuple[GemmaConfig, str, GemmaConfig | None, dict[str, Any], str]] = [
    (gemma3(), "t5gemma", None, {}, "the source is a gemma3_text, whose queries and keys are normalised"),
    (gemma2(), "t5gemma2", None, {}, "the source is a gemma2, which has no norms on queries and keys"),
    (gemma2(), "t5gemma", gemma3(), {}, "the decoder is a gemma3_text"),
    (gemma3(), "t5gemma2", gemma2(), {}, "the decoder is a gemma2"),
    (gemma3(), "t5gemma2", gemma3(**SMALL), {}, "both stacks need one width: 32 in the source, 16 in the decoder"),
    (gemma2(), "t5gemma", gemma2(vocab_size=32), {}, "the source has 64 tokens and the decoder 32"),
    (gemma2(), "t5gemma", None, {"rope_factor": 8.0}, "T5Gemma interpolates no positions"),
    (gemma3(), "t5gemma2", None, {"rope_factor": 0.0}, "rope_factor is 0.0; expected a number above 0"),
    (preset("t5gemma-s-s"), "t5gemma", None, {}, "the source is a t5gemma; expected a decoder-only"),  # type: ignore
]


@pytest.mark.parametrize(("source", "style", "decoder", "options", "message"), REFUSED, ids=[row[4] for row in REFUSED])
def test_what_does_not_fit_is_refused_with_its_reason(
    source: GemmaConfig, style: Any, decoder: GemmaConfig | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(source, style, decoder, **options)


def test_balanced_t5gemma(tmp_path: Path) -> None:
    source = write(tmp_path / "source", gemma2())
    summary = adapt(source, tmp_path / "out", style="t5gemma")
    assert summary.warmup is None
    old, new = tensors(source), tensors(tmp_path / "out")
    spelling = {"pre_self_attn_layernorm": "input_layernorm", "post_self_attn_layernorm": "post_attention_layernorm"}
    for name, value in new.items():
        origin = name.replace("encoder.", "").replace("decoder.", "").replace("cross_attn", "self_attn")
        for ours, public in spelling.items():
            origin = origin.replace(ours, public)
        assert torch.equal(value, old[origin]), name
    assert sum("cross_attn" in name for name in new) == 2 * 6
    assert largest_difference_to_transformers(tmp_path / "out") < TOLERANCE


def test_balanced_t5gemma_with_another_decoder(tmp_path: Path) -> None:
    source, other = write(tmp_path / "source", gemma2()), write(tmp_path / "other", gemma2())
    (source / "LICENSE").write_text("one")
    (other / "LICENSE").write_text("two")
    adapt(source, tmp_path / "out", style="t5gemma", decoder=other)
    a, b, new = tensors(source), tensors(other), tensors(tmp_path / "out")
    assert torch.equal(new["model.encoder.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(new["model.decoder.embed_tokens.weight"], b["model.embed_tokens.weight"])
    query = "layers.1.self_attn.q_proj.weight"
    assert torch.equal(new[f"model.encoder.{query}"], a[f"model.{query}"])
    assert torch.equal(new["model.decoder.layers.1.cross_attn.q_proj.weight"], b[f"model.{query}"])
    assert [(tmp_path / "out" / name).read_text() for name in ("LICENSE", "decoder_LICENSE")] == ["one", "two"]


def test_unbalanced_t5gemma(tmp_path: Path) -> None:
    source = write(tmp_path / "source", gemma2(hidden_size=256))
    other = write(tmp_path / "other", gemma2(hidden_size=128, num_key_value_heads=1))
    summary = adapt(source, tmp_path / "out", style="t5gemma", decoder=other, seed=3)
    assert summary.warmup == {"steps": 1000, "train": "cross_attention"}
    provenance = json.loads((tmp_path / "out/encore_adaptation.json").read_text())
    assert provenance["warmup"] == {"steps": 1000, "train": "cross_attention"}
    new = tensors(tmp_path / "out")
    cross = {name: value for name, value in new.items() if "cross_attn." in name}
    assert len(cross) == 2 * 4 and cross["model.decoder.layers.0.cross_attn.k_proj.weight"].shape == (8, 256)
    drawn = torch.cat([value.flatten() for value in cross.values()])
    assert abs(float(drawn.std()) - 0.02) < 0.001 and abs(float(drawn.mean())) < 0.001
    assert len({float(value.flatten()[0]) for value in cross.values()}) == len(cross)
    norms = [value for name, value in new.items() if "cross_attn_layernorm" in name]
    assert len(norms) == 4 and all(not value.any() for value in norms)
    for name, value in tensors(other).items():
        if "mlp" in name:
            assert torch.equal(new[name.replace("model.", "model.decoder.")], value)
    adapt(source, tmp_path / "same", style="t5gemma", decoder=other, seed=3)
    adapt(source, tmp_path / "other seed", style="t5gemma", decoder=other, seed=4)
    same, different = tensors(tmp_path / "same"), tensors(tmp_path / "other seed")
    assert all(torch.equal(value, same[name]) for name, value in new.items())
    assert not any(torch.equal(value, different[name]) for name, value in cross.items())
    assert largest_difference_to_transformers(tmp_path / "out") < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5gemma2(dtype: torch.dtype, tmp_path: Path) -> None:
    source = write(tmp_path / "source", gemma3(), dtype)
    adapt(source, tmp_path / "out")
    old, new = tensors(source), tensors(tmp_path / "out")
    for name, value in old.items():
        name = name.replace("input_layernorm", "pre_self_attn_layernorm")
        name = name.replace("post_attention_layernorm", "post_self_attn_layernorm")
        for side in ("encoder", "decoder")[: 1 if "embed_tokens" in name else 2]:
            assert torch.equal(new.pop(name.replace("model.", f"model.{side}.")), value)
    # what enters the model at the end-of-image token is, bit for bit, what entered the source
    with torch.no_grad():
        entering = load(source).embed_tokens(torch.tensor([[EOI]]))[0, 0]
    assert torch.equal(new.pop("model.encoder.embed_tokens.eoi_embedding"), entering)
    assert all("vision_tower" in name or "multi_modal" in name for name in new)
    assert not any(value.any() for value in new.values())
    assert largest_difference_to_transformers(tmp_path / "out") < TOLERANCE


def test_t5gemma2_without_memory_is_the_source(tmp_path: Path) -> None:
    """Merged attention with every memory column hidden: the decoder-only model, end-of-image token included."""
    source = write(tmp_path / "source", gemma3(global_rope=Rope(1e6, 4.0)))
    adapt(source, tmp_path / "out")
    gemma, model = load(source), load(tmp_path / "out")
    assert isinstance(model, T5Gemma) and isinstance(gemma, Gemma)
    tokens = torch.randint(3, VOCAB - 3, (2, 12))
    tokens[:, 5] = EOI
    with torch.no_grad():
        memory = model.encode(tokens, torch.ones_like(tokens, dtype=torch.bool))
        hidden = replace(memory, mask=torch.zeros_like(tokens, dtype=torch.bool))
        assert (model.decode(tokens, hidden) - gemma(tokens)).abs().max() < 1e-5
        assert (model.decode(tokens, memory) - gemma(tokens)).abs().max() > 1e-3


def test_rope_and_window_are_the_sources_unless_asked(tmp_path: Path) -> None:
    source = write(tmp_path / "source", gemma3(global_rope=Rope(5e5), local_rope=Rope(9e3), sliding_window=6))
    adapt(source, tmp_path / "plain")
    adapt(source, tmp_path / "scaled", rope_factor=8)
    plain, scaled = load(tmp_path / "plain").config, load(tmp_path / "scaled").config
    for side in ("encoder", "decoder"):
        assert getattr(plain, side) == load(source).config.stack
        assert getattr(scaled, side) == replace(getattr(plain, side), global_rope=Rope(5e5, 8.0))
    assert largest_difference_to_transformers(tmp_path / "scaled") < TOLERANCE


def test_gemma3_with_pictures_keeps_its_tower_and_loses_the_rows_past_262144(tmp_path: Path) -> None:
    vision = VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        mm_tokens_per_image=4,
    )
    tiny = stack(vocab_size=262_208, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1)
    source = write(tmp_path / "source", GemmaConfig(model_type="gemma3", stack=tiny, vision=vision))
    adapt(source, tmp_path / "out")
    old, new = tensors(source), tensors(tmp_path / "out")
    table = old["language_model.model.embed_tokens.weight"]
    assert torch.equal(new["model.encoder.embed_tokens.weight"], table[:262_144])
    assert torch.equal(new["model.encoder.embed_tokens.eoi_embedding"], table[256_000] * 8**0.5)
    for name, value in old.items():
        if "language_model" not in name:
            assert torch.equal(new[f"model.encoder.{name}"], value)
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["image_token_index"] == raw["encoder"]["image_token_index"] == 256_001
    assert raw["encoder"]["eoi_token_index"] == 256_000 and raw["decoder"]["vocab_size"] == 262_144
    assert "text_only" not in raw and load(tmp_path / "out", vision=True).config.vision == vision
    assert largest_difference_to_transformers(tmp_path / "out") < TOLERANCE


def test_random_weights_in_the_same_architecture(tmp_path: Path) -> None:
    source = write(tmp_path / "source", gemma3(hidden_size=128), torch.bfloat16)
    adapt(source, tmp_path / "copied")
    summary = adapt(source, tmp_path / "random", random=True, seed=1)
    assert summary.init == "random" and summary.dtype == "bfloat16"
    copied, drawn = tensors(tmp_path / "copied"), tensors(tmp_path / "random")
    assert {name: (value.shape, value.dtype) for name, value in copied.items()} == {
        name: (value.shape, value.dtype) for name, value in drawn.items()
    }
    for name, value in drawn.items():
        if "vision_tower" in name or "multi_modal" in name or name.endswith(("norm.weight", "eoi_embedding")):
            assert not value.any(), name
        else:
            assert abs(float(value.float().std()) - 0.02) < 0.003, name
    assert load(tmp_path / "copied").config == load(tmp_path / "random").config
    assert json.loads((tmp_path / "random/encore_adaptation.json").read_text())["init"] == "random"


def test_shards_in_and_out_give_the_same_tensors(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", gemma3())
    save(load(whole), tmp_path / "sharded", max_shard_bytes=10_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    adapt(whole, tmp_path / "a")
    summary = adapt(tmp_path / "sharded", tmp_path / "b", max_shard_bytes=20_000)
    assert len(summary.files) > 3 and summary.files[-1] == "model.safetensors.index.json"
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
