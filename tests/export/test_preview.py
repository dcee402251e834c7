"""A head of which the best words are found in a narrow view: against numpy, word by word, and on real sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from typer.testing import CliRunner

from encore import assets
from encore.cli import app
from encore.export import ExportError
from encore.export.folder import export
from encore.export.preview import CANDIDATES
from encore.generate.onnx_backend import OnnxModel
from encore.generate.sampling import SamplingSettings
from encore.generate.score import score
from encore.generate.text import TextGenerator

from .test_products import both_passes, watched_step

WIDTH = 32


@pytest.mark.parametrize("vocab_size", [300, 64 * 160])  # all words compared; groups of words by their best
@pytest.mark.parametrize(["kind", "weights"], [("t5gemma", "int8"), ("t5gemma2", "int8"), ("t5gemma2", "int4")])
def test_the_best_words_have_the_logits_of_the_whole_head(
    exported: Callable, kind: str, weights: str, vocab_size: int
) -> None:
    """So have those asked for; all others those of the view."""
    _, graphs = exported(kind, weights, {"vocab_size": vocab_size}, activations="float32", head_preview=WIDTH)
    wanted = np.array([[280, 281, 282], [290, 291, 292]])
    watched, values, logits, log_sums = watched_step(graphs, wanted)
    head, project = watched.nodes[-1], watched.float_nodes[-1]
    h = values[project.input[0]].astype(np.float64)
    view = watched.matrix(head, 4, WIDTH).astype(np.float64)
    directions = watched.array(project.input[1], np.float32)
    label = project.input[1].removesuffix(".directions")
    rows = helper.make_node("", ["", f"{label}.codes_of_rows", f"{label}.scales_of_rows"], [])
    table = watched.matrix(rows, int(weights[-1]), h.shape[2]).astype(np.float64)

    np.testing.assert_allclose(directions @ directions.T, np.eye(WIDTH), atol=1e-5)
    seen = table @ directions.T
    assert np.linalg.norm(view - seen) < 0.1 * np.linalg.norm(seen)
    told = graphs.manifest.provenance["head_preview"]
    energy = np.square(seen).sum() / np.square(table).sum()
    assert told == {"width": WIDTH, "energy": pytest.approx(energy, abs=1e-4)}
    assert energy > np.sort(np.square(table).sum(axis=0))[-WIDTH:].sum() / np.square(table).sum(), "the best directions"

    first, full = h @ directions.T @ view.T, h @ table.T
    expected, full = both_passes(graphs, first, full, wanted, CANDIDATES)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    assert (np.abs(expected - full) > 1e-2 * np.abs(expected).max()).any(), "the view is narrow"
    np.testing.assert_allclose(log_sums, np.log(np.exp(expected).sum(axis=-1)), rtol=1e-5)


def test_real_sentences_lose_no_answers(tmp_path: Path) -> None:
    """Half of the shipped translator's head, at int8: as many answers are those of float32 as with the whole head."""
    written = export("translator", tmp_path / "seen", "int8", head_preview=128)
    assert written.preview_energy is not None and 0.9 < written.preview_energy < 1
    texts = [row["src"] for row in assets.read_jsonl("pairs/test.jsonl")][:24]
    settings = SamplingSettings(max_target_tokens=48)
    exact, whole, seen = (
        [answer.text for answer in TextGenerator.load(folder).generate(texts, settings)]
        for folder in ("translator", "translator-int8", tmp_path / "seen")
    )
    same = [sum(map(str.__eq__, exact, answers)) for answers in (whole, seen)]
    assert same[1] >= max(20, same[0] - 1)
    model = OnnxModel.load(tmp_path / "seen")
    with pytest.raises(ExportError, match="probabilities are estimates; export the model again without --head-preview"):
        score(model, [[5, 6]], [[7]])


def test_a_view_that_cannot_be_made_is_refused(make: Callable, tmp_path: Path) -> None:
    _, folder = make("t5gemma2", vocab_size=300)
    for width in (0, 33, 64, -32):
        with pytest.raises(
            ExportError, match=f"head_preview is {width}; expected a multiple of 32 below the head's 48"
        ):
            export(folder, tmp_path / "out", "int8", head_preview=width)
    with pytest.raises(ExportError, match="give other weights than float32"):
        export(folder, tmp_path / "out", "float32", head_preview=WIDTH)
    with pytest.raises(ExportError, match="leave two_pass_head and encoder_only out"):
        export(folder, tmp_path / "out", "int8", head_preview=WIDTH, two_pass_head=True)
    with pytest.raises(ExportError, match="the head has 61 words; a preview finds the 128 best of more"):
        export(make("t5gemma2")[1], tmp_path / "out", "int8", head_preview=WIDTH)
    assert not (tmp_path / "out").exists()


def test_the_command_tells_how_much_the_view_holds(make: Callable, tmp_path: Path) -> None:
    _, folder = make("t5gemma2", vocab_size=300)
    told: list[tuple[int, int]] = []
    export(folder, tmp_path / "told", head_preview=WIDTH, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > told[0][0]
    command = ["export", str(folder), str(tmp_path / "out"), "--head-preview", "32"]
    ran = CliRunner().invoke(app, [*command, "--weights", "int4"])
    assert ran.exit_code == 0 and "% of the head's energy in its view" in ran.stdout
    ran = CliRunner().invoke(app, [*command, "--force", "--json"])
    energy = json.loads(ran.stdout)["preview_energy"]
    assert 32 / 48 < energy < 1 and math.isfinite(energy)
