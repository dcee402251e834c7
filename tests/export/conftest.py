"""Tiny random models in checkpoint folders, with windows soon left behind, and their exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import encore
from encore import assets
from encore.config import Rope, StackConfig, T5GemmaConfig
from encore.export.folder import export
from encore.generate.onnx_backend import OnnxModel
from encore.model.t5gemma import T5Gemma

WINDOW = 7
END_OF_IMAGE = 9
KINDS = ("t5gemma", "t5gemma-unbalanced", "t5gemma2")


def build(kind: str, **changes: Any) -> T5Gemma:
    """Weights large enough that every part matters; `changes` are of both stacks."""
    second = kind == "t5gemma2"
    stack = StackConfig(
        **{
            "vocab_size": 61,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "layer_types": ("sliding_attention", "sliding_attention", "full_attention", "sliding_attention"),
            "sliding_window": WINDOW,
            "local_rope": Rope(10_000.0),
            "global_rope": Rope(1_000_000.0, 8.0) if second else Rope(10_000.0),
            "query_pre_attn_scalar": 24,
            "qk_norm": second,
            "attn_logit_softcapping": None if second else 5.0,
            "max_position_embeddings": 256,
            **changes,
        }
    )
    encoder = stack
    if kind == "t5gemma-unbalanced":
        layers = ("full_attention", "sliding_attention")
        encoder = replace(stack, hidden_size=64, num_key_value_heads=4, num_hidden_layers=2, layer_types=layers)
    model_type = "t5gemma2" if second else "t5gemma"
    cap = None if second else 9.0
    model = T5Gemma(
        T5GemmaConfig(model_type, encoder, stack, final_logit_softcapping=cap, eoi_token_index=END_OF_IMAGE)
    )
    generator = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if parameter.dim() == 1 or "embed" in name else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[T5Gemma, Path]]:
    """make(kind, **changes) -> a model, and the checkpoint folder that holds it (with the shipped tokenizer)."""
    made: dict[str, tuple[T5Gemma, Path]] = {}

    def find(kind: str, **changes: Any) -> tuple[T5Gemma, Path]:
        key = repr((kind, sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / "model"
            model = build(kind, **changes)
            encore.save(model, folder, tokenizer=encore.load_tokenizer(assets.path("tokenizer")))
            made[key] = model, folder
        return made[key]

    return find


@pytest.fixture(scope="session")
def exported(
    make: Callable[..., tuple[T5Gemma, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[T5Gemma, OnnxModel]]:
    """exported(kind, weights, changes, **options) -> a model in torch, and the same one exported."""
    made: dict[str, tuple[T5Gemma, OnnxModel]] = {}

    def find(
        kind: str, weights: str = "float32", changes: dict[str, Any] | None = None, **options: Any
    ) -> tuple[T5Gemma, OnnxModel]:
        key = repr((kind, weights, changes, sorted(options.items())))
        if key not in made:
            model, folder = make(kind, **(changes or {}))
            out = tmp_path_factory.mktemp("exported") / "model"
            export(folder, out, weights, **options)  # pyright: ignore
            made[key] = model, OnnxModel.load(out, threads=1)
        return made[key]

    return find
