"""The model that a recipe names: ablations by key, drawn at random, trained, saved, and warmed up where it must be."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from encore.adapt import adapt
from encore.checkpoint.pretrained import load, save
from encore.config import T5GemmaConfig
from encore.model.t5gemma import T5Gemma
from encore.train.models import open_model, open_tokenizer
from encore.train.optim import is_cross_attention
from encore.train.pretrain import pretrain

ARCHITECTURE = "model.architecture."
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "separate": (("attention=separate",), {"attention": "separate"}),
    "merged": (("model_type=t5gemma", "attention=merged", "embeddings=tied"), {"tied_embeddings": True}),
    "global": (("cross_attention_layers=full_attention",), {"cross_attention_layers": "full_attention"}),
    "causal": (("causal_encoder=true",), {"causal_encoder": True}),
    "shared": (("shared_stack=true",), {"shared_stack": True}),
    "wide": (
        ("embeddings=separate", "encoder_hidden_size=48", "encoder_num_hidden_layers=1"),
        {"tied_embeddings": False, "projects_memory": True},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_an_ablation_is_named_trained_and_saved(tiny, name: str) -> None:
    changes, expected = VARIANTS[name]
    recipe = tiny.recipe("t5gemma2", "train.steps=2", *(ARCHITECTURE + change for change in changes))
    result = pretrain(recipe, tiny.folder / "run")
    model = load(result.model_folder)
    assert isinstance(model.config, T5GemmaConfig)
    assert {key: getattr(model.config, key) for key in expected} == expected
    assert json.loads((result.model_folder / "config.json").read_text())["model_type"] == "encore_t5gemma"
    before = dict(open_model(recipe.model, open_tokenizer(recipe.model), recipe.train.seed).named_parameters())
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(not torch.equal(after[leaf], before[leaf]) for leaf in after if leaf.endswith("proj.weight"))


def test_a_projection_of_the_memory_learns_alone_at_first(tiny) -> None:
    changes = (ARCHITECTURE + change for change in VARIANTS["wide"][0])
    recipe = tiny.recipe("t5gemma2", "train.steps=2", "optim.cross_attention_warmup_steps=2", *changes)
    before = dict(open_model(recipe.model, open_tokenizer(recipe.model), recipe.train.seed).named_parameters())
    after = dict(load(pretrain(recipe, tiny.folder / "run").model_folder).named_parameters())
    assert [leaf for leaf in after if not torch.equal(after[leaf], before[leaf])] == ["decoder.memory_proj.weight"]
    assert is_cross_attention("decoder.memory_proj.weight")


def test_keys_change_a_named_configuration_whose_weights_are_random(tiny) -> None:
    first = open_model(tiny.recipe("t5gemma2").model, tiny.tokenizer, 0)
    save(first, tiny.folder / "plain", tokenizer=tiny.tokenizer)
    named = ("t5gemma2", f"model.init={tiny.folder / 'plain'}")
    recipe = tiny.recipe(*named, "model.weights=random", "model.architecture.causal_encoder=true")
    model = open_model(recipe.model, tiny.tokenizer, 0)
    assert isinstance(model, T5Gemma) and model.config.causal_encoder and not model.config.is_public
    with pytest.raises(ValueError, match=r"causal_encoder is set, but the model comes with weights"):
        open_model(tiny.recipe(*named, "model.architecture.causal_encoder=true").model, tiny.tokenizer, 0)
    with pytest.raises(ValueError, match=r"encoder_hidden_size is set, but the sizes"):
        wide = tiny.recipe(*named, "model.weights=random", "model.architecture.encoder_hidden_size=48")
        open_model(wide.model, tiny.tokenizer, 0)


def test_an_adapted_variant_goes_on_as_it_is(tiny) -> None:
    source = open_model(tiny.recipe("causal").model, tiny.tokenizer, 0)
    save(source, tiny.folder / "source", tokenizer=tiny.tokenizer)
    adapt(tiny.folder / "source", tiny.folder / "adapted", attention="separate", encoder_layers=4)
    recipe = tiny.recipe("t5gemma2", f"model.init={tiny.folder / 'adapted'}", "train.steps=1")
    trained = load(pretrain(recipe, tiny.folder / "run").model_folder).config
    assert isinstance(trained, T5GemmaConfig) and trained == load(tiny.folder / "adapted").config
    assert trained.attention == "separate" and trained.encoder.num_hidden_layers == 4


def test_a_decoder_only_model_has_no_ablations(tiny) -> None:
    with pytest.raises(ValueError, match="shared_stack is set, but a gemma3_text has no encoder"):
        open_model(tiny.recipe("causal", "model.architecture.shared_stack=true").model, tiny.tokenizer, 0)
