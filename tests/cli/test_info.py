"""`encore info`: exact counts of every size, cache figures equal to real caches, clean output."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from encore.cli import app
from encore.config import GemmaConfig
from encore.info import BITS_OF, cache_bytes, describe, describe_config
from encore.model.encoder import Memory
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.presets import PRESETS, preset

# name: (encoder stack, decoder stack, cross-attention, all embeddings, total)
T5GEMMA = {
    "t5gemma-s-s": (20_988_416, 20_988_416, 8_388_608, 256_000 * 2 * 512, 312_517_632),
    "t5gemma-b-b": (84_972_288, 84_972_288, 28_311_552, 256_000 * 2 * 768, 591_490_560),
    "t5gemma-l-l": (308_380_672, 308_380_672, 100_663_296, 256_000 * 2 * 1024, 1_241_761_792),
    "t5gemma-ml-ml": (743_889_024, 743_889_024, 122_683_392, 256_000 * 2 * 1152, 2_200_345_344),
    "t5gemma-xl-xl": (1_157_826_560, 1_157_826_560, 402_653_184, 256_000 * 2 * 2048, 3_766_980_608),
    "t5gemma-2b-2b": (2_024_517_888, 2_024_517_888, 368_050_176, 256_000 * 2 * 2304, 5_596_853_760),
    "t5gemma-9b-2b": (8_324_201_984, 2_024_517_888, 436_207_616, 256_000 * (3584 + 2304), 12_292_375_296),
    "t5gemma-9b-9b": (8_324_201_984, 8_324_201_984, 1_849_688_064, 256_000 * 2 * 3584, 20_333_401_088),
}
# name: (one stack, embedding, projector, text total, total)
T5GEMMA2 = {
    "t5gemma-2-270m-270m": (100_326_016, 167_772_160, 738_432, 368_424_192, 786_029_296),
    "t5gemma-2-1b-1b": (697_896_064, 301_989_888, 1_328_256, 1_697_782_016, 2_115_977_456),
    "t5gemma-2-4b-4b": (3_209_010_688, 671_088_640, 2_950_272, 7_089_110_016, 7_508_928_880),
}
VISION = 416_866_032


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["info", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(name: str) -> dict[str, Any]:
    return json.loads(run(name, "--json"))


@pytest.mark.parametrize("name", T5GEMMA)
def test_t5gemma_counts_are_the_published_ones(name: str) -> None:
    encoder, decoder, cross_attention, embedding, total = T5GEMMA[name]
    parameters = describe(name).parameters
    assert parameters == {
        "embedding": embedding,
        "encoder": encoder,
        "decoder": decoder,
        "cross_attention": cross_attention,
        "vision": 0,
        "projector": 0,
        "text_total": total,
        "total": total,
    }


@pytest.mark.parametrize("name", T5GEMMA2)
def test_t5gemma_2_counts_are_the_published_ones(name: str) -> None:
    stack, embedding, projector, text_total, total = T5GEMMA2[name]
    info = describe(name)
    assert info.parameters == {
        "embedding": embedding,
        "encoder": stack,
        "decoder": stack,
        "cross_attention": 0,
        "vision": VISION,
        "projector": projector,
        "text_total": text_total,
        "total": total,
    }
    assert info.vectors == {
        "cross_attention_norms": 0,
        "end_of_image_vector": info.shapes["encoder.embed_tokens.weight"][1],
    }


def test_a_decoder_only_model_is_embedding_and_decoder() -> None:
    parameters = describe("google/gemma-3-270m-it").parameters
    assert (parameters["embedding"], parameters["encoder"], parameters["decoder"]) == (167_772_160, 0, 100_326_016)
    assert parameters["total"] == parameters["text_total"] == 268_098_176
    assert describe("gemma-2-2b").parameters["total"] == 2_614_341_888
    with_images = describe("gemma-3-4b").parameters
    assert (with_images["vision"], with_images["embedding"]) == (VISION, 262_208 * 2560)


@pytest.mark.parametrize("name", PRESETS)
def test_parts_and_vectors_add_up(name: str) -> None:
    info = describe(name)
    counts, vectors = info.parameters, info.vectors
    text = sum(counts[part] for part in ("embedding", "encoder", "decoder", "cross_attention"))
    assert counts["text_total"] == text + vectors["cross_attention_norms"]
    assert (
        counts["total"]
        == counts["text_total"] + vectors["end_of_image_vector"] + counts["vision"] + counts["projector"]
    )


def test_json_is_one_object_with_the_agreed_keys() -> None:
    info = run_json("google/t5gemma-2-270m-270m")
    assert info["name"] == "t5gemma-2-270m-270m" and info["model_type"] == "t5gemma2"
    assert info["layers"] == {"encoder": 18, "decoder": 18}
    assert info["stacks"]["encoder"]["num_global_layers"] == 3
    assert info["shapes"]["decoder.layers.*.self_attn.k_proj.weight"] == [256, 640]
    assert info["memory_bytes"] == {
        "float32": 4 * 786_029_296,
        "bfloat16": 2 * 786_029_296,
        "int8": 786_029_296,
        "int4": 786_029_296 // 2,
    }
    assert info["text_memory_bytes"]["bfloat16"] == 2 * (368_424_192 + 640)
    # one key and one value of 256 in bfloat16, in 18 layers of which 3 are global
    assert info["cache_bytes"] == {
        "dtype": "bfloat16",
        "per_source_token": 18 * 1024,
        "per_target_token": 18 * 1024,
        "per_target_token_beyond_window": 3 * 1024,
        "window": 512,
    }


def test_memory_of_an_odd_count_is_rounded_up() -> None:
    info = describe("encore-small")
    odd = replace(info, parameters={**info.parameters, "total": 7})
    assert odd.memory_bytes() == {"float32": 28, "bfloat16": 14, "int8": 7, "int4": 4}
    assert list(odd.memory_bytes()) == list(BITS_OF)


@pytest.mark.parametrize("style", ["t5gemma", "t5gemma2", "gemma"])
def test_cache_figures_are_those_of_real_caches(style: str) -> None:
    """Caches that differ by one token differ by the bytes that we say, before and beyond the window."""
    config = preset({"t5gemma": "t5gemma-9b-2b", "t5gemma2": "t5gemma-2-270m-270m", "gemma": "gemma-3-1b"}[style])
    figures = cache_bytes(config)

    def held(source_tokens: int, target_tokens: int) -> int:
        with torch.device("meta"):
            if isinstance(config, GemmaConfig):
                cache = Gemma(config).to(torch.bfloat16).make_cache(1, target_tokens)
            else:
                model = T5Gemma(config).to(torch.bfloat16)
                states = torch.zeros(1, source_tokens, config.encoder.hidden_size, dtype=torch.bfloat16)
                cache = model.make_cache(Memory(states, mask=None), target_tokens)
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values, *(layer.memory or ()))]
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors)
        return sum(tensor.nbytes for tensor in tensors)

    start = held(5, 8)
    assert held(6, 8) - start == figures.source_token
    assert held(5, 9) - start == figures.target_token
    beyond = figures.window + 3
    assert held(5, beyond + 1) - held(5, beyond) == figures.target_token_beyond_window


def test_nothing_is_allocated() -> None:
    """40 GB of parameters are described on any machine, since shapes alone are made."""
    info = describe_config("large", preset("t5gemma-9b-9b"))
    assert info.memory_bytes()["bfloat16"] == 40_666_802_176


def test_tables_show_the_figures_to_people() -> None:
    shown = run("t5gemma-s-s")
    for text in (
        "t5gemma-s-s (t5gemma)",
        "312,517,632",
        "8,388,608",
        "encoder.layers.*.self_attn.q_proj.weight",
        "512 x 512",
    ):
        assert text in shown
    assert "vision" not in shown


def test_a_checkpoint_folder_is_read(tmp_path: Path) -> None:
    config = preset("encore-small-small")
    from encore.checkpoint.pretrained import save

    assert not isinstance(config, GemmaConfig)
    save(T5Gemma(config), tmp_path / "model")
    info = run_json(str(tmp_path / "model"))
    assert info["name"] == str(tmp_path / "model")
    assert info["parameters"] == describe("encore-small-small").parameters
    assert info["parameters"]["embedding"] == 6144 * 256


def test_a_wrong_name_says_what_was_looked_for() -> None:
    with pytest.raises(ValueError, match=r"'gemma-3-2b' is not a folder, and no preset.*gemma-3-1b"):
        describe("gemma-3-2b")


def test_the_plan_is_what_the_planner_says() -> None:
    from encore.memory_plan import make_planner

    options = ["--plan", "--devices", "1,4", "--tokens", "40/24", "--device-memory", "2"]
    told = json.loads(run("encore-small-small", *options, "--json"))
    assert (told["source_tokens"], told["target_tokens"], told["device_memory_bytes"]) == (40, 24, 2_000_000_000)
    planner = make_planner(preset("encore-small-small"), 40, 24)
    (rows,) = told["models"].values()
    assert [row["devices"] for row in rows] == [1, 4]
    for row in rows:
        for name, checkpointing in (("plain", False), ("checkpointed", True)):
            fit = planner.rows_that_fit(row["devices"], 2_000_000_000, checkpointing=checkpointing)
            planned = planner.plan(row["devices"], checkpointing=checkpointing).as_json()
            assert row[name] == {**planned, "rows_that_fit": fit}
    shown = run("encore-small-small", *options)
    assert f"{rows[0]['plain']['peak'] / 1e9:.1f}" in shown and "rows of 40/24 tokens" in shown
    assert "| 4 | " in run("encore-small-small", *options, "--markdown")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--devices", "1,x", "numbers above 0 with commas"),
        ("--devices", "0", "numbers above 0"),
        ("--tokens", "4096/", "expected SOURCE/TARGET"),
        ("--device-memory", "0", "expected GB above 0"),
    ],
)
def test_a_plan_for_nothing_is_refused(option: str, value: str, message: str) -> None:
    result = CliRunner().invoke(app, ["info", "encore-small", "--plan", option, value])
    assert result.exit_code and isinstance(result.exception, ValueError) and message in str(result.exception)
