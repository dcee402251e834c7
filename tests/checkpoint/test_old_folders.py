"""Folders of the older kind, written by hand as transformers 4 wrote them: the released checkpoints are of that kind.

The oracle is transformers 5 reading the same folder, so that a key of the old vocabulary means the same to both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from encore.checkpoint import CheckpointError
from encore.checkpoint.pretrained import load, read_config, save
from encore.config import GemmaConfig, Rope, T5GemmaConfig

TOLERANCE = 3e-5
EOI = 60

SIZES: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 16,
    "rms_norm_eps": 1e-06,
    "sliding_window": 4,
    "use_cache": True,
    "vocab_size": 64,
}
OLD = {"torch_dtype": "float32", "transformers_version": "4.50.0"}
GEMMA2 = {
    **SIZES,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_theta": 9_000.0,
    "hidden_act": "gelu_pytorch_tanh",
    "cache_implementation": "hybrid",
}
GEMMA3 = {
    **SIZES,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 900_000.0,
    "rope_local_base_freq": 9_000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window_pattern": 2,
}
VISION = {
    "hidden_size": 16,
    "image_size": 28,
    "intermediate_size": 24,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 14,
    "vision_use_head": False,
}
T5_MODULE = {**GEMMA2, "model_type": "t5_gemma_module"}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": {**GEMMA2, **OLD, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
    "gemma3_text": {**GEMMA3, **OLD, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]},
    "gemma3": {
        **OLD,
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 64,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 4,
        "model_type": "gemma3",
        "text_config": {**GEMMA3, "model_type": "gemma3_text"},
        "vision_config": VISION,
    },
    "t5gemma": {
        **OLD,
        "architectures": ["T5GemmaForConditionalGeneration"],
        "decoder": {**T5_MODULE, "is_decoder": True, "cross_attention_hidden_size": 32, "dropout_rate": 0.0},
        "encoder": {**T5_MODULE, "is_decoder": False, "dropout_rate": 0.0},
        "is_encoder_decoder": True,
        "model_type": "t5gemma",
        "vocab_size": 64,
    },
    "t5gemma2": {
        **OLD,
        "architectures": ["T5Gemma2ForConditionalGeneration"],
        "decoder": {**GEMMA3, "model_type": "t5gemma2_decoder"},
        "encoder": {
            "boi_token_index": 255999,
            "eoi_token_index": EOI,
            "mm_tokens_per_image": 4,
            "model_type": "t5gemma2_encoder",
            "text_config": {**GEMMA3, "model_type": "t5gemma2_text"},
            "vision_config": VISION,
        },
        "image_token_index": 61,
        "is_encoder_decoder": True,
        "model_type": "t5gemma2",
    },
}


def old_names(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a new folder under their older names, with tied copies."""
    result: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        if kind == "t5gemma2" and name.startswith("model.encoder.") and "vision" not in name and "multi" not in name:
            name = name.replace("model.encoder.", "model.encoder.text_model.")
        result[name] = value
    if kind == "t5gemma2":
        table = tensors["model.encoder.embed_tokens.weight"]
        result["lm_head.out_proj.weight"] = table.clone()
        result["model.decoder.embed_tokens.weight"] = table.clone()
        result["model.decoder.embed_tokens.eoi_embedding"] = tensors["model.encoder.embed_tokens.eoi_embedding"].clone()
    elif kind == "t5gemma":
        result["lm_head.out_proj.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()
    elif kind == "gemma3":
        result["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    else:
        result["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return result


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_old_folder_gives_the_logits_that_the_reference_gives(
    kind: str,
    folders: dict[str, Path],
    stored: Callable[[Path], dict[str, torch.Tensor]],
    reference: Callable[[Path], torch.nn.Module],
    difference: Callable[..., float],
    tmp_path: Path,
) -> None:
    tensors = stored(folders[kind])
    old = write(tmp_path / "old", CONFIGS[kind], old_names(kind, tensors))
    ours = load(old)
    assert difference(ours, reference(old)) < TOLERANCE
    # the RoPE of the old keys is really used: the folder of the same weights with other bases differs
    assert difference(ours, reference(folders[kind])) > 10 * TOLERANCE
    save(ours, tmp_path / "new")
    written = stored(tmp_path / "new")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert difference(ours, reference(tmp_path / "new")) < TOLERANCE
    text = (tmp_path / "new/config.json").read_text()
    for superseded in ("rope_local_base_freq", "rope_scaling", "sliding_window_pattern", "torch_dtype"):
        assert superseded not in text
    raw = json.loads(text)
    assert raw["dtype"] == "float32" and raw["transformers_version"] == "4.50.0"
    if kind == "gemma2":
        assert raw["cache_implementation"] == "hybrid" and "rope_theta" not in raw
    if kind == "gemma3":
        assert raw["eos_token_id"] == [1, 106]


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "language_model.", "model.", ""])
def test_every_spelling_of_gemma3(
    prefix: str, folders: dict[str, Path], stored: Callable[[Path], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    tower = "model.vision_tower." if prefix.startswith("model.") else "vision_tower."
    tensors = {
        name.replace("language_model.model.", prefix).replace("vision_tower.", tower): value
        for name, value in stored(folders["gemma3"]).items()
    }
    tensors["language_model.model.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(4)[None]
    ours = load(write(tmp_path / "old", CONFIGS["gemma3"], tensors), vision=True)
    new = load(folders["gemma3"], vision=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), new.parameters(), strict=True))


@pytest.mark.parametrize("copy", ["model.decoder.embed_tokens.weight", "lm_head.out_proj.weight"])
def test_a_folder_that_kept_only_a_tied_copy(
    copy: str, folders: dict[str, Path], stored: Callable[[Path], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    tensors = stored(folders["t5gemma2"])
    table = tensors.pop("model.encoder.embed_tokens.weight")
    tensors[copy] = table
    ours = load(write(tmp_path / "old", CONFIGS["t5gemma2"], tensors))
    assert torch.equal(ours.encoder.embed_tokens.weight, table)


def test_tied_copies_that_differ_are_refused(
    folders: dict[str, Path], stored: Callable[[Path], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    tensors = old_names("t5gemma", stored(folders["t5gemma"]))
    tensors["lm_head.out_proj.weight"][63, 31] += 1e-3
    folder = write(tmp_path / "old", CONFIGS["t5gemma"], tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.out_proj\.weight should be tied to model\.decoder\.embed"):
        load(folder)


def test_the_sparse_config_of_the_released_gemma_3_4b(tmp_path: Path) -> None:
    """Google's own file: what equals the class defaults of its time is not there."""
    raw = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_config(tmp_path)
    assert isinstance(config, GemmaConfig)
    stack = config.stack
    assert (stack.vocab_size, stack.head_dim) == (262_208, 256)
    assert (stack.num_attention_heads, stack.num_key_value_heads) == (8, 4)
    assert (stack.global_rope, stack.local_rope) == (Rope(1e6, 8.0), Rope(1e4))
    assert [i for i, kind in enumerate(stack.layer_types) if kind == "full_attention"] == [5, 11, 17, 23, 29]
    assert stack.max_position_embeddings == 131_072 and stack.query_pre_attn_scalar == 256
    assert config.vision is not None and config.vision.num_channels == 3
    assert config.eos_token_id == 1 and config.image_token_index == 262_144

    from encore.presets import preset

    assert config == preset("gemma-3-4b")


def test_a_sparse_t5gemma_is_the_2b_size(tmp_path: Path) -> None:
    raw = {"model_type": "t5gemma", "encoder": {"model_type": "t5_gemma_module"}, "decoder": {"is_decoder": True}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_config(tmp_path)
    assert isinstance(config, T5GemmaConfig)
    for stack in (config.encoder, config.decoder):
        assert (stack.vocab_size, stack.hidden_size, stack.num_hidden_layers) == (256_000, 2304, 26)
        assert stack.attn_logit_softcapping == 50 and stack.layer_types[:2] == ("sliding_attention", "full_attention")
    assert config.final_logit_softcapping == 30
