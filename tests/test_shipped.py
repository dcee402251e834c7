"""The shipped models are what their cards say, and small enough."""

from __future__ import annotations

import pytest
import torch

import encore
from encore import assets
from encore.data.examples import causal
from encore.data.pipeline import WindowBatches as Batches
from encore.data.sources import token_stream
from encore.data.windows import Windows
from encore.evaluate.translation import SentencePair, evaluate_translation
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.train.loss import mean_loss


def test_everything_shipped_fits() -> None:
    sizes = {
        path.relative_to(assets.path()): path.stat().st_size for path in assets.path().rglob("*") if path.is_file()
    }
    assert sum(sizes.values()) < 45e6
    for model in ("source", "translator"):
        assert sum(size for path, size in sizes.items() if path.parts[0] == model) < 16e6
        assert (assets.path(model) / "README.md").is_file()


def test_the_source_has_learned_english_and_german() -> None:
    model, tokenizer = encore.load("source", "float32"), encore.load_tokenizer("source")
    assert isinstance(model, Gemma)
    stream = token_stream(["asset:text/validation"], tokenizer, max_tokens=5_000)
    windows = Windows(stream, 256, shuffle=False)
    batches = Batches(windows, causal, tokenizer, batch_size=8, accumulation_steps=1, seed=0).batches(range(8))
    with torch.no_grad():
        assert mean_loss(model, batches) < 4.6
    assert not tokenizer.source_format.eos, "a prompt that is to be continued has no end"


@pytest.mark.parametrize("batch_size", [1, 20])
def test_the_translator_translates(batch_size: int) -> None:
    model, tokenizer = encore.load("translator", "float32"), encore.load_tokenizer("translator")
    assert isinstance(model, T5Gemma)
    rows = list(assets.read_jsonl("pairs/test.jsonl"))[:40]
    pairs = [SentencePair(row["src"], tuple(row["refs"])) for row in rows]
    result = evaluate_translation(model, tokenizer, pairs, batch_size=batch_size)
    assert result.chrf > 30
