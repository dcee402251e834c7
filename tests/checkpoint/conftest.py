"""Small random models made and saved by transformers, one folder for each kind, and the way to run both sides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

VOCAB, EOI = 64, 60
STACK: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": 128,
}
SMALLER: dict[str, Any] = {
    **STACK,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}
KINDS = ("gemma2", "gemma3_text", "gemma3", "t5gemma", "t5gemma_unbalanced", "t5gemma2")
TOLERANCE = 3e-5


def gemma3_stack() -> dict[str, Any]:
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    return {**STACK, "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": ropes}


def make(kind: str) -> torch.nn.Module:
    """The reference model of a kind with every parameter random, norms and the end-of-image vector too."""
    torch.manual_seed(len(kind))
    pictures = {"vision_config": {**VISION, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4}
    if kind == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**STACK))
    elif kind == "gemma3_text":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**gemma3_stack()))
    elif kind == "gemma3":
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=gemma3_stack(), image_token_index=VOCAB, **pictures)
        )
    elif kind == "t5gemma2":
        encoder = {"text_config": gemma3_stack(), "eoi_token_index": EOI, **pictures}
        model = T5Gemma2ForConditionalGeneration(
            T5Gemma2Config(encoder=encoder, decoder=gemma3_stack(), image_token_index=EOI + 1)
        )
    else:
        decoder = STACK if kind == "t5gemma" else SMALLER
        model = T5GemmaForConditionalGeneration(
            T5GemmaConfig(encoder=dict(STACK), decoder=dict(decoder), vocab_size=VOCAB)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3 if parameter.dim() == 1 else 0.08)
    return model.eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """kind -> a folder that transformers wrote."""
    root = tmp_path_factory.mktemp("public")
    for kind in KINDS:
        make(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], torch.nn.Module]:
    """A folder -> the reference model of it; a missing or unexpected tensor fails the test."""

    def load(folder: Path) -> torch.nn.Module:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
        family = {
            "t5gemma": AutoModelForSeq2SeqLM,
            "t5gemma2": AutoModelForSeq2SeqLM,
            "gemma3": Gemma3ForConditionalGeneration,
        }.get(model_type, AutoModelForCausalLM)
        model, info = family.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True, local_files_only=True
        )
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            assert not info.get(key), (key, info[key])
        return model.eval()

    return load


@pytest.fixture(scope="session")
def difference() -> Callable[[torch.nn.Module, torch.nn.Module], float]:
    """The largest difference between the logits of ours and the reference, on tokens past every window."""

    def compare(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
        generator = torch.Generator().manual_seed(1)
        source = torch.randint(3, VOCAB - 3, (2, 11), generator=generator)
        source[0, 4] = EOI
        target = torch.randint(3, VOCAB - 3, (2, 9), generator=generator)
        with torch.no_grad():
            if hasattr(ours, "encode"):
                found, expected = ours(source, target), theirs(input_ids=source, decoder_input_ids=target).logits
            else:
                found, expected = ours(source), theirs(input_ids=source).logits
        return float((found - expected).abs().max())

    return compare


@pytest.fixture(scope="session")
def stored() -> Callable[[Path], dict[str, torch.Tensor]]:
    """All tensors of a folder, read by the safetensors library."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}

    return read
