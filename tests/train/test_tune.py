"""tune() learns a toy task to the end, with both kinds of model, and both then stop by themselves."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

import encore
from encore.data.examples import TokenPair, pair_row
from encore.generate.text import TextGenerator
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.tokenizer import SourceFormat, Tokenizer
from encore.train.metrics import Silent
from encore.train.pretrain import pretrain
from encore.train.sft import tune

LETTERS = "abcdef"


def answer(model: Gemma | T5Gemma, tokenizer: Tokenizer, source: str, max_tokens: int = 12) -> list[int]:
    """Greedy, without a cache, until EOS (which is given back) or `max_tokens`."""
    made: list[int] = []
    prompt = tokenizer.encode(source, bos=True, eos=True)
    with torch.no_grad():
        while len(made) < max_tokens and tokenizer.eos_id not in made:
            if isinstance(model, Gemma):
                logits = model(torch.tensor([[*prompt, *made]]))
            else:
                read = torch.tensor([tokenizer.encode_source(source)])
                logits = model(read, torch.tensor([[tokenizer.bos_id, *made]]))
            made.append(int(logits[0, -1].argmax()))
    return made


@pytest.mark.parametrize("model_type", ["gemma3_text", "t5gemma2"])
def test_a_toy_task_is_learned_and_answers_end(tiny: Any, model_type: str) -> None:
    """A cipher of six letters, in rows of one to three: where each letter stands has to be found in the source."""
    numbers = random.Random(0)
    table = dict(zip(LETTERS, "ghcbad", strict=True))
    sources = [" ".join(numbers.choices(LETTERS, k=numbers.randint(1, 3))) for _ in range(300)]
    rows = [{"src": source, "tgt": " ".join(table[letter] for letter in source.split())} for source in sources]
    name = tiny.write("cipher.jsonl", rows)
    recipe = tiny.recipe(
        "pairs",
        f"model.architecture.model_type={model_type}",
        *(f"data.train={json.dumps([name])}", f"data.validation={json.dumps([name])}", "data.batch_tokens=600"),
        *("model.architecture.hidden_size=64", "model.architecture.intermediate_size=128", "data.validation_pairs=60"),
        *("train.steps=140", "train.evaluate_every_steps=0", "train.checkpoint_every_steps=0"),
        *("optim.learning_rate=0.005", "optim.warmup_steps=10", "optim.weight_decay=0.0"),
    )
    result = tune(recipe, tiny.folder / "run", progress=Silent())
    assert result.validation_losses[0][1] > 4
    assert result.validation_losses[-1][1] < 0.1
    model, tokenizer = encore.load(result.model_folder), encore.load_tokenizer(result.model_folder)
    assert isinstance(model, Gemma | T5Gemma)
    right = [answer(model, tokenizer, row["src"]) == tokenizer.encode_target(row["tgt"]) for row in rows[:20]]
    assert sum(right) >= 19

    # The format is stored with the checkpoint, and generation reads sources as tuning wrote them.
    pair = TokenPair(*(np.asarray(tokenizer.encode(text), np.int32) for text in ("a b", "g h")))
    row = pair_row(pair, tokenizer, encoder=isinstance(model, T5Gemma))
    tuned_on = row.source.tolist() if row.source is not None else [tokenizer.bos_id, *row.target[: row.prompt_tokens]]
    generator = TextGenerator(model, tokenizer)
    assert generator.reader(12).read("a b").tokens == tuned_on
    told = [answer.text for answer in generator.generate([row["src"] for row in rows[:20]])]
    assert sum(text == row["tgt"] for text, row in zip(told, rows, strict=False)) >= 19


def test_a_causal_model_is_stored_without_eos_behind_its_prompt(tiny: Any) -> None:
    result = pretrain(tiny.recipe("causal", "train.steps=1"), tiny.folder / "run", progress=Silent())
    assert encore.load_tokenizer(result.model_folder).source_format == SourceFormat(bos=True, eos=False)
