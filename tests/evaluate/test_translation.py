"""Corpus scores against sacrebleu's own faces, and the evaluation of a model against a loop written out."""

from __future__ import annotations

import pytest
import sacrebleu
import torch

from encore import assets
from encore.config import GemmaConfig
from encore.evaluate.report import page, table
from encore.evaluate.translation import SentencePair, corpus_scores, evaluate_translation
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.presets import preset
from encore.tokenizer import load_tokenizer


def test_scores_are_sacrebleus_for_one_and_for_several_references():
    answers = ["Tom ist müde .", "Das ist ein Haus ."]
    one = [["Tom ist sehr müde ."], ["Das ist mein Haus ."]]
    assert corpus_scores(answers, one)[0] == sacrebleu.corpus_bleu(answers, [[r[0] for r in one]]).score
    several = [["Tom ist sehr müde .", "Tom ist müde ."], ["Das ist mein Haus ."]]
    bleu, chrf = corpus_scores(answers, several)
    assert bleu > corpus_scores(answers, one)[0]
    assert chrf > corpus_scores(answers, one)[1]
    assert corpus_scores(["a b c d e"], [["a b c d e"]]) == (pytest.approx(100), pytest.approx(100))


@pytest.mark.parametrize("name", ["encore-small", "encore-small-small"])
def test_answers_are_the_models_greedy_ones(name):
    config = preset(name)
    model = (Gemma(config) if isinstance(config, GemmaConfig) else T5Gemma(config)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    tokenizer = load_tokenizer(assets.path("tokenizer"))
    pairs = [
        SentencePair("I am here.", ("Ich bin hier.",)),
        SentencePair("No, not now, Tom.", ("Nein.", "Nicht jetzt.")),
    ]
    counted = []
    result = evaluate_translation(model, tokenizer, pairs, max_target_tokens=6, on_batch=counted.append)
    assert sum(counted) == 2
    for pair, answer in zip(pairs, result.answers, strict=True):
        source = tokenizer.encode_source(pair.source)
        written: list[int] = [] if isinstance(model, T5Gemma) else source
        new: list[int] = []
        with torch.no_grad():
            for _ in range(6):
                if isinstance(model, T5Gemma):
                    logits = model(torch.tensor([source]), torch.tensor([[tokenizer.bos_id, *new]]))
                else:
                    logits = model(torch.tensor([written + new]))
                new.append(int(logits[0, -1].argmax()))
                if new[-1] in tokenizer.stop_ids:
                    break
        assert answer == tokenizer.decode(new).strip()
    assert result.target_tokens >= 2


def test_nothing_to_evaluate_is_an_error():
    tokenizer = load_tokenizer(assets.path("tokenizer"))
    with pytest.raises(ValueError, match="at least one pair"):
        evaluate_translation(None, tokenizer, [])  # pyright: ignore
    with pytest.raises(ValueError, match="no reference"):
        evaluate_translation(None, tokenizer, [SentencePair("a", ())])  # pyright: ignore


def test_a_page_escapes_what_models_write():
    text = page("a < b", [table(["x"], [["<script>alert(1)</script>"]])])
    assert "<script>" not in text
    assert "a &lt; b" in text
