"""`encore generate` with beams and with drafts, on the shipped translator."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import encore
from encore.cli import app
from encore.generate.batch import beam_search
from encore.generate.beam import BeamSettings
from encore.generate.sampling import SamplingSettings

TEXTS = ["Anna Meier lives in Berlin at 12 Hauptstrasse.", "Why?"]


def run(*arguments: str) -> list[dict[str, Any]]:
    command = ["generate", "--model", "translator", "--json", "--max-target-tokens", "24", *arguments, *TEXTS]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_beams() -> None:
    found = run("--beams", "3", "--length-penalty", "0.6", "--beam-returns", "2")
    model, tokenizer = encore.load("translator", dtype=torch.float32), encore.load_tokenizer("translator")
    sources = [tokenizer.encode_source(text) for text in TEXTS]
    settings, beams = SamplingSettings(max_target_tokens=24), BeamSettings(3, 0.6, num_return=2)
    for row, (best, second) in zip(
        found, beam_search(model, sources, settings, beams=beams, tokenizer=tokenizer), strict=True
    ):
        assert (row["tokens"], row["text"]) == (best.tokens, best.text)
        assert row["score"] == pytest.approx(best.score, abs=1e-4)
        (other,) = row["others"]
        assert other["tokens"] == second.tokens and other["score"] <= row["score"]


def test_drafts_change_nothing_but_what_is_told_of_them() -> None:
    plain = run()
    for options in (["--draft"], ["--draft-model", "translator"]):
        for row, before in zip(run(*options), plain, strict=True):
            assert row["tokens"] == before["tokens"] and "drafts" not in before
            if "drafts" in row:
                assert 0 <= row["drafts"]["accepted"] <= row["drafts"]["drafted"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length-penalty", "0.6"], "give --beams too"),
        (["--beams", "2", "--draft"], "beam search takes no drafts"),
        (["--beams", "2", "--temperature", "1"], "beam search takes no temperature"),
        (["--beams", "2", "--beam-returns", "3"], "num_return is 3"),
    ],
)
def test_what_does_not_go_together(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["generate", *options, "Why?"], catch_exceptions=False)
