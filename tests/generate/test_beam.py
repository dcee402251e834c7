"""Beam search against transformers: the same targets with the same scores, for every sort of end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import encore
from encore.generate.batch import beam_search, generate
from encore.generate.beam import BeamSettings, greatest
from encore.generate.request import Generation
from encore.generate.sampling import SamplingSettings

STOPS = (1, 9, 17, 25, 33, 41)
SETTINGS = SamplingSettings(max_target_tokens=10, stop_ids=STOPS, log_probabilities=True)


def source(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 61, length).tolist()


@pytest.fixture(scope="module")
def reference(tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def load(kind: str) -> Any:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            encore.save(tiny(kind), folder)
            auto = AutoModelForCausalLM if kind.startswith("gemma") else AutoModelForSeq2SeqLM
            made[kind] = auto.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        return made[kind]

    return load


def expected(model: Any, ids: list[int], beams: BeamSettings) -> list[tuple[list[int], float]]:
    decoder_only = not model.config.is_encoder_decoder
    given = torch.tensor([ids])
    found = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        num_beams=beams.num_beams,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        num_return_sequences=beams.num_return,
        max_new_tokens=SETTINGS.max_target_tokens,
        eos_token_id=list(STOPS),
        pad_token_id=0,
        do_sample=False,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
        **({} if decoder_only else {"decoder_start_token_id": 2}),
    )
    written = found.sequences[:, len(ids) if decoder_only else 1 :].tolist()
    return list(zip(written, found.sequences_scores.tolist(), strict=True))


def same(ours: Sequence[Generation], theirs: Sequence[tuple[list[int], float]]) -> None:
    assert len(ours) == len(theirs)
    for found, (tokens, score) in zip(ours, theirs, strict=True):
        length = len(found.tokens)
        assert tokens[:length] == found.tokens and set(tokens[length:]) <= {0, 1}
        assert found.score == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("kind", ["gemma3", "t5gemma", "t5gemma2"])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_targets_and_scores_are_those_of_transformers(
    tiny: Callable, reference: Callable, kind: str, early_stopping: Any
) -> None:
    ended_early = 0
    for seed, penalty in enumerate((0.6, 2.0, -0.5)):
        beams = BeamSettings(3, penalty, early_stopping, num_return=3)
        ids = source(3 + 2 * seed, seed)
        (ours,) = beam_search(tiny(kind), [ids], SETTINGS, beams=beams)
        same(ours, expected(reference(kind), ids, beams))
        ended_early += any(found.finish_reason == "stop" for found in ours)
    assert ended_early


@pytest.mark.parametrize("kind", ["gemma3", "t5gemma", "t5gemma2"])
def test_sources_of_a_batch_are_searched_apart(tiny: Callable, kind: str) -> None:
    rows, beams = [source(n, n) for n in (4, 11, 1, 7)], BeamSettings(3, 0.6, num_return=2)
    together = beam_search(tiny(kind), rows, SETTINGS, beams=beams)
    for ids, found in zip(rows, together, strict=True):
        (alone,) = beam_search(tiny(kind), [ids], SETTINGS, beams=beams)
        assert [f.tokens for f in found] == [a.tokens for a in alone]
        np.testing.assert_allclose([f.score or 0 for f in found], [a.score or 0 for a in alone], atol=1e-4)


def test_one_beam_is_greedy(tiny: Callable) -> None:
    rows = [source(n, n) for n in (4, 11)]
    found = beam_search(tiny("t5gemma2"), rows, SETTINGS, beams=BeamSettings(1))
    for (ours,), greedy in zip(found, generate(tiny("t5gemma2"), rows, SETTINGS), strict=True):
        assert (ours.tokens, ours.finish_reason, ours.stop) == (greedy.tokens, greedy.finish_reason, greedy.stop)
        np.testing.assert_allclose(ours.log_probabilities, greedy.log_probabilities, atol=1e-4)


def test_the_greatest_of_many() -> None:
    rng = np.random.default_rng(0)
    for size in (5, 64, 700, 5000, 5001):
        values = rng.normal(size=size).astype(np.float32)
        for count in (1, 2, 9):
            assert greatest(values, count) == np.argsort(-values, kind="stable")[:count].tolist()


def test_what_is_refused(tiny: Callable) -> None:
    model, drawn = tiny("t5gemma2"), SamplingSettings(temperature=1.0)
    with pytest.raises(ValueError, match="beam search takes no temperature"):
        beam_search(model, [[5]], drawn, beams=BeamSettings(2))
    with pytest.raises(ValueError, match="num_return is 3; expected 1 to num_beams, 2"):
        BeamSettings(2, num_return=3)
    with pytest.raises(ValueError, match="num_beams is 0"):
        BeamSettings(0)
    assert beam_search(model, [], beams=BeamSettings(2)) == []
