"""The table of sizes: every name of the releases is there, and says what the papers say."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from encore.config import GemmaConfig, T5GemmaConfig
from encore.presets import PRESETS, canonical_name, layer_types, preset

T5GEMMA_SIZES = ("s-s", "b-b", "l-l", "ml-ml", "xl-xl", "2b-2b", "9b-2b", "9b-9b")
RELEASED = (
    *(f"gemma-2-{size}" for size in ("2b", "9b", "s", "b", "l", "ml", "xl")),
    *(f"gemma-3-{size}" for size in ("270m", "1b", "4b")),
    *(f"t5gemma-{size}" for size in T5GEMMA_SIZES),
    *(f"t5gemma-2-{size}" for size in ("270m-270m", "1b-1b", "4b-4b")),
)


def encoder_decoder(name: str) -> T5GemmaConfig:
    config = preset(name)
    assert isinstance(config, T5GemmaConfig)
    return config


def decoder_only(name: str) -> GemmaConfig:
    config = preset(name)
    assert isinstance(config, GemmaConfig)
    return config


def test_every_released_size_has_a_name() -> None:
    assert set(RELEASED) <= set(PRESETS)
    assert all(canonical_name(name) == name == canonical_name(f"google/{name}") for name in RELEASED)


def test_all_thirty_two_t5gemma_checkpoints_map_to_their_size() -> None:
    for size in T5GEMMA_SIZES:
        for objective in ("prefixlm", "ul2"):
            for tuned in ("", "-it"):
                assert canonical_name(f"google/t5gemma-{size}-{objective}{tuned}") == f"t5gemma-{size}"


@pytest.mark.parametrize(
    ("hub_name", "size"),
    [
        ("google/gemma-2-2b-it", "gemma-2-2b"),
        ("google/gemma-2-9b", "gemma-2-9b"),
        ("google/gemma-3-270m-it", "gemma-3-270m"),
        ("google/gemma-3-4b-pt", "gemma-3-4b"),
        ("google/medgemma-4b-it", "gemma-3-4b"),
        ("google/medgemma-1.5-4b-it", "gemma-3-4b"),
        ("google/t5gemma-2-1b-1b", "t5gemma-2-1b-1b"),
        ("T5Gemma-2B-2B-UL2", "t5gemma-2b-2b"),
    ],
)
def test_hub_names_map_to_their_size(hub_name: str, size: str) -> None:
    assert canonical_name(hub_name) == size
    assert preset(hub_name) is PRESETS[size]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("t5gemma-2-270-270m", "t5gemma-2-270m-270m"),
        ("google/gemma-3-270", "gemma-3-270m"),
        ("gemma-2-2b-prefixlm", "gemma-2-2b"),  # not a variant that exists
        ("t5gemma-2-1b-1b-it", "t5gemma-2-1b-1b"),  # never released
        ("someone/gemma-2-2b", "gemma-2-2b"),  # not Google's: perhaps another size
    ],
)
def test_unknown_names_list_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong!r}.*{nearest}"):
        preset(wrong)


def test_a_name_like_nothing_lists_them_all() -> None:
    with pytest.raises(ValueError, match=r"gemma-2-2b.*t5gemma-2-4b-4b"):
        preset("llama")


def test_gemma_2_alternates_local_and_global_layers_and_caps_logits() -> None:
    config = decoder_only("gemma-2-9b")
    stack = config.stack
    assert stack.layer_types[:4] == ("sliding_attention", "full_attention") * 2
    assert (stack.num_hidden_layers, stack.hidden_size, stack.intermediate_size) == (42, 3584, 14336)
    assert (stack.num_attention_heads, stack.num_key_value_heads, stack.head_dim) == (16, 8, 256)
    assert (stack.sliding_window, stack.max_position_embeddings, stack.vocab_size) == (4096, 8192, 256_000)
    assert (stack.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert stack.local_rope == stack.global_rope and stack.global_rope.theta == 10_000.0 and not stack.qk_norm


def test_unbalanced_t5gemma_takes_each_half_from_its_own_size() -> None:
    config = encoder_decoder("t5gemma-9b-2b")
    assert config.encoder == decoder_only("gemma-2-9b").stack
    assert config.decoder == decoder_only("gemma-2-2b").stack
    assert config.final_logit_softcapping == 30.0 and not config.tied_embeddings


@pytest.mark.parametrize(
    ("size", "window", "positions"), [("270m", 512, 32_768), ("1b", 512, 32_768), ("4b", 1024, 131_072)]
)
def test_t5gemma_2_is_two_gemma_3_stacks_with_interpolated_global_rope(size: str, window: int, positions: int) -> None:
    config = encoder_decoder(f"t5gemma-2-{size}-{size}")
    stack = config.encoder
    assert config.decoder == stack and config.tied_embeddings and config.final_logit_softcapping is None
    assert [i for i, kind in enumerate(stack.layer_types) if kind == "full_attention"] == list(
        range(5, len(stack.layer_types), 6)
    )
    assert (stack.global_rope.theta, stack.global_rope.factor) == (1_000_000.0, 8.0)
    assert (stack.local_rope.theta, stack.local_rope.factor) == (10_000.0, 1.0)
    assert (stack.sliding_window, stack.max_position_embeddings, stack.vocab_size) == (window, positions, 262_144)
    assert stack.qk_norm and stack.attn_logit_softcapping is None and stack.query_pre_attn_scalar == 256
    assert config.image_token_index == 256_001 and config.vision is not None
    source = decoder_only(f"gemma-3-{size}")
    assert replace(source.stack, global_rope=stack.global_rope, vocab_size=262_144) == stack


def test_only_gemma_3_4b_interpolates_and_reads_pictures() -> None:
    for size in ("270m", "1b"):
        small = decoder_only(f"gemma-3-{size}")
        assert (small.model_type, small.vision, small.stack.global_rope.factor) == ("gemma3_text", None, 1.0)
    large = decoder_only("gemma-3-4b")
    assert large.model_type == "gemma3" and large.vision is not None and large.stack.global_rope.factor == 8.0
    assert (large.stack.vocab_size, large.image_token_index) == (262_208, 262_144)


def test_layer_types_put_the_global_layer_last_of_each_group() -> None:
    assert layer_types(4, 2) == ("sliding_attention", "full_attention") * 2
    assert layer_types(7, 3)[-1] == "sliding_attention" and layer_types(7, 3).count("full_attention") == 2


def test_presets_import_no_torch() -> None:
    code = "import sys, encore.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
