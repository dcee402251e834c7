"""`encore info` on a model that no public format holds: it says so, and counts what is there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from encore.adapt import adapt
from encore.cli import app
from encore.config import T5GemmaConfig
from encore.info import cache_bytes, describe_config
from encore.model.encoder import Memory
from encore.model.t5gemma import T5Gemma
from encore.presets import preset

PLAIN = preset("encore-small-small")
assert isinstance(PLAIN, T5GemmaConfig)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["info", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_variant_is_named_as_one(tmp_path: Path) -> None:
    adapt("source", tmp_path / "out", attention="separate", causal_encoder=True)
    said = run(tmp_path / "out")
    assert "(encore_t5gemma)" in said.replace("\n", "") and "No public format holds this model" in said
    assert "family: t5gemma2, attention: separate" in said and "causal_encoder: True" in said
    info = json.loads(run(tmp_path / "out", "--json"))
    assert info["model_type"] == "encore_t5gemma" and info["variant"]["attention"] == "separate"
    assert info["parameters"]["cross_attention"] > 0
    assert "No public format" not in run("encore-small-small")
    assert json.loads(run("encore-small-small", "--json"))["variant"] is None


def test_the_cache_costs_a_source_only_where_it_is_read() -> None:
    config = replace(PLAIN, cross_attention_layers="full_attention")
    with torch.device("meta"):
        cache = T5Gemma(config).make_cache(Memory(torch.zeros(1, 10, config.encoder.hidden_size)), 1)
    held = sum(tensor.numel() for layer in cache.layers if layer.memory for tensor in layer.memory)
    assert cache_bytes(config).source_token == held * 2 // 10
    assert cache_bytes(config).source_token * 4 == cache_bytes(PLAIN).source_token


@pytest.mark.parametrize("shared", [False, True])
def test_parts_add_up(shared: bool) -> None:
    encoder = PLAIN.encoder if shared else replace(PLAIN.encoder, hidden_size=128)
    described = describe_config("x", replace(PLAIN, encoder=encoder, tied_embeddings=False, shared_stack=shared))
    parts = described.parameters
    with torch.device("meta"):
        model = T5Gemma(described.config)  # type: ignore[arg-type]
    assert parts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert parts["cross_attention"] == (0 if shared else 128 * 256)
    assert (parts["decoder"] == 0) == shared
