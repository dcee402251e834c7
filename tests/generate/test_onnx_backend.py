"""Exported models generate, score and embed as their checkpoints do, and import no torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import encore
from encore.config import Rope, StackConfig, T5GemmaConfig
from encore.export.folder import export
from encore.generate import batch
from encore.generate.embed import embed
from encore.generate.onnx_backend import OnnxModel
from encore.generate.sampling import SamplingSettings
from encore.generate.score import score
from encore.generate.text import TextGenerator
from encore.model.t5gemma import T5Gemma
from encore.tokenizer import Tokenizer

SETTINGS = SamplingSettings(max_target_tokens=20, stop_ids=(), log_probabilities=True)
TEXTS = ["Good morning.", "Why?", "", "The cat is asleep on the warm stove, and we let it sleep there."]


@pytest.fixture(scope="module")
def pair(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint folder and its float32 export."""
    stack = StackConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=("sliding_attention", "full_attention"),
        sliding_window=6,
        local_rope=Rope(10_000.0),
        global_rope=Rope(1_000_000.0),
        query_pre_attn_scalar=16,
        qk_norm=True,
        max_position_embeddings=320,
    )
    model = T5Gemma(T5GemmaConfig("t5gemma2", stack, stack))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if parameter.dim() == 1 or "embed" in name else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    folder = tmp_path_factory.mktemp("models")
    encore.save(model, folder / "checkpoint", tokenizer=tokenizer)
    export(folder / "checkpoint", folder / "exported", "float32")
    return folder / "checkpoint", folder / "exported"


@pytest.fixture(scope="module")
def models(pair: tuple[Path, Path]) -> tuple[T5Gemma, OnnxModel]:
    model = encore.load(pair[0])
    assert isinstance(model, T5Gemma)
    return model, OnnxModel.load(pair[1], threads=1)


def test_texts_are_answered_as_by_the_checkpoint(pair: tuple[Path, Path]) -> None:
    expected, found = (list(TextGenerator.load(folder).generate(TEXTS, SETTINGS, batch_size=3)) for folder in pair)
    assert [a.generation.tokens for a in found] == [a.generation.tokens for a in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.text == theirs.text
        np.testing.assert_allclose(
            ours.generation.log_probabilities, theirs.generation.log_probabilities, atol=1e-4, rtol=0
        )


def test_rows_of_their_own_settings_end_apart(models: tuple[T5Gemma, OnnxModel], tokenizer: Tokenizer) -> None:
    model, graphs = models
    sources = [tokenizer.encode_source(text) for text in TEXTS]
    settings = [dataclasses.replace(SETTINGS, max_target_tokens=n, temperature=1.2, seed=n) for n in (3, 20, 9, 14)]
    found = batch.generate(graphs, sources, settings, tokenizer=tokenizer)
    expected = batch.generate(model, sources, settings, tokenizer=tokenizer)
    assert [g.tokens for g in found] == [g.tokens for g in expected]
    reticent = [dataclasses.replace(settings[0], log_probabilities=False), *settings[1:]]
    (nothing, *others) = batch.generate(graphs, sources, reticent, tokenizer=tokenizer)
    assert nothing == dataclasses.replace(
        found[0], log_probabilities=[], first_token_seconds=nothing.first_token_seconds, seconds=nothing.seconds
    )
    assert [g.log_probabilities for g in others] == [g.log_probabilities for g in found[1:]]
    events = list(batch.stream(graphs, sources[:1], settings[:1], tokenizer=tokenizer))
    assert [event.token for event in events] == found[0].tokens


def test_scores_and_embeddings(models: tuple[T5Gemma, OnnxModel], tokenizer: Tokenizer) -> None:
    model, graphs = models
    sources = [tokenizer.encode_source(text) for text in TEXTS]
    targets = [tokenizer.encode_target(text) for text in TEXTS[::-1]]
    for ours, theirs in zip(score(graphs, sources, targets), score(model, sources, targets), strict=True):
        np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-4, rtol=0)
    for pooling in ("mean", "none"):
        for ours, theirs in zip(
            embed(graphs, sources, pooling=pooling), embed(model, sources, pooling=pooling), strict=True
        ):
            np.testing.assert_allclose(ours.vectors, theirs.vectors, atol=1e-4)


def test_what_a_cache_refuses(models: tuple[T5Gemma, OnnxModel]) -> None:
    _, graphs = models
    with pytest.raises(ValueError, match="no sources to encode"):
        graphs.encode([])
    memory = graphs.encode([[5, 6], [7]])
    assert memory.index_select([1, 1]).lengths.tolist() == [1, 1]
    with pytest.raises(ValueError, match="max_target_tokens is 0"):
        graphs.make_cache(memory, 0)
    cache = graphs.make_cache(memory, 1)
    with pytest.raises(ValueError, match="1 tokens for 2 rows"):
        graphs.step([2], cache)
    with pytest.raises(ValueError, match="the vocabulary has ids 0 to"):
        graphs.step([2, 1_000_000], cache)
    graphs.step([2, 2], cache)
    with pytest.raises(ValueError, match="holds 1 target tokens and is full"):
        graphs.step([2, 2], cache)


def test_settings_of_torch_are_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="is exported: it runs on the CPU"):
        TextGenerator.load(pair[1], dtype=torch.bfloat16)


PROGRAM = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from encore.cli import app
from typer.testing import CliRunner
folder, out = sys.argv[1], []
for arguments in (
    ["generate", "Why?", "--json", "--max-target-tokens", "9", "--model", folder, "--threads", "1"],
    ["score", "--source", "Why?", "--target", "Because.", "--model", folder, "--threads", "1"],
    ["embed", "Why?", "--model", folder, "--threads", "1"],
):
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    out.append(json.loads(result.stdout))
assert not [name for name in sys.modules if name.partition(".")[0] in ("torch", "transformers", "onnx")]
print(json.dumps(out))
"""


def test_the_command_needs_no_torch(pair: tuple[Path, Path]) -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(pair[1])], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    generated, scored, embedded = json.loads(run.stdout)
    (answer,) = TextGenerator.load(pair[0]).generate(["Why?"], dataclasses.replace(SETTINGS, max_target_tokens=9))
    assert generated["tokens"] == answer.generation.tokens
    model = encore.load(pair[0])
    tokenizer = encore.load_tokenizer(pair[0])
    ids = tokenizer.encode_source("Why?"), tokenizer.encode_target("Because.")
    assert scored["logprob"] == pytest.approx(score(model, [ids[0]], [ids[1]])[0].total, abs=1e-4)  # pyright: ignore
    np.testing.assert_allclose(embedded["embedding"], embed(model, [ids[0]])[0].vectors, atol=1e-4)  # pyright: ignore
