"""Stored logits: a run that reads them learns what it would from the teacher, and says what they do not cover."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import encore
from encore.checkpoint import CheckpointError
from encore.data.teacher_logits import Manifest, MissingExample, TeacherLogits, example_key
from encore.data.teacher_text import TeacherText
from encore.objectives.distill import TeacherStates, TeacherTop, top_of_teacher
from encore.train import distill_logits as writing
from encore.train.distill import StoredTeacher, open_distillation
from encore.train.distill_logits import distill_logits
from encore.train.feed import open_feed
from encore.train.metrics import Silent, read_metrics
from encore.train.models import open_model
from encore.train.pretrain import pretrain
from encore.train.recipe import Recipe
from encore.train.recipe_file import to_toml
from encore.train.sft import tune


@pytest.fixture
def recipe(tiny: Any) -> Recipe:
    """Five steps of UL2, with a held-out part and a teacher of random weights."""
    teacher = open_model(tiny.recipe("causal", "model.architecture.hidden_size=48").model, tiny.tokenizer, seed=9)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(4)
    encore.save(teacher, tiny.folder / "teacher", tokenizer=tiny.tokenizer)
    return tiny.recipe(
        "t5gemma2",
        *(f"distill.teacher={tiny.folder / 'teacher'}", f"data.validation={json.dumps([tiny.text])}"),
        *("train.steps=5", "train.checkpoint_every_steps=0", "distill.temperature=2.0", "distill.top_k=512"),
    )


def reading(recipe: Recipe, folder: Path, **changes: Any) -> Recipe:
    return replace(recipe, distill=replace(recipe.distill, logits=str(folder), **changes))


def stored(recipe: Recipe, folder: Path, tiny: Any) -> StoredTeacher:
    opened = open_distillation(reading(recipe, folder), tiny.tokenizer, 512)
    assert opened is not None and isinstance(opened.teacher, StoredTeacher)
    return opened.teacher


def test_all_logits_stored_teach_what_the_teacher_does(tiny: Any, recipe: Recipe) -> None:
    manifest = distill_logits(recipe, tiny.folder / "logits")
    assert manifest.num_examples == 5 * 4 + 8
    live = pretrain(recipe, tiny.folder / "live", progress=Silent())
    read = pretrain(reading(recipe, tiny.folder / "logits"), tiny.folder / "read", progress=Silent())
    for (step, one), (_, other) in zip(read.losses, live.losses, strict=True):
        assert one == pytest.approx(other, rel=2e-3), step
    rows = [read_metrics(tiny.folder / name / "metrics.jsonl")[-1] for name in ("live", "read")]
    assert rows[1]["validation_divergence"] == pytest.approx(rows[0]["validation_divergence"], rel=2e-3)
    assert rows[1]["validation_loss"] == pytest.approx(rows[0]["validation_loss"], rel=1e-3)


def test_what_is_stored_is_the_top_of_what_the_teacher_says(tiny: Any, recipe: Recipe) -> None:
    """Token by token, through the files: ids, log-probabilities and the mass of the rest."""
    recipe = replace(recipe, distill=replace(recipe.distill, top_k=7))
    distill_logits(recipe, tiny.folder / "logits")
    disk, opened = stored(recipe, tiny.folder / "logits", tiny), open_distillation(recipe, tiny.tokenizer, 512)
    assert opened is not None
    for batch in open_feed(recipe, tiny.tokenizer, encoder=True).batches(3):
        kept, taught = disk.about(batch)
        states, live_taught = opened.teacher.about(batch)
        assert isinstance(kept, TeacherTop) and isinstance(states, TeacherStates)
        assert torch.equal(taught >= 0, live_taught >= 0) and bool((taught >= 0).any())
        chosen = taught >= 0
        expected = top_of_teacher(states.select(live_taught[chosen]), 7, temperature=2.0)
        order = taught[chosen]
        assert torch.equal(kept.ids[order], expected.ids)
        torch.testing.assert_close(kept.log_probabilities[order], expected.log_probabilities, atol=4e-3, rtol=0)
        torch.testing.assert_close(kept.log_rest[order], expected.log_rest, atol=4e-3, rtol=0)
        mass = kept.log_probabilities.exp().sum(1) + kept.log_rest.exp()
        torch.testing.assert_close(mass, torch.ones(len(mass)))


def test_the_size_is_said_before_and_true(tiny: Any, recipe: Recipe) -> None:
    recipe = replace(recipe, distill=replace(recipe.distill, top_k=16))
    said: list[str] = []
    manifest = distill_logits(recipe, tiny.folder / "logits", note=said.append)
    files = [path for path in (tiny.folder / "logits").iterdir() if path.suffix == ".npy"]
    headers = sum(path.stat().st_size - np.load(path).nbytes for path in files)
    assert sum(path.stat().st_size for path in files) - headers == manifest.num_bytes
    assert manifest.num_bytes == manifest.num_tokens * (16 * 4 + 4) + manifest.num_examples * 32
    assert f"{manifest.num_tokens:,} tokens x 16 logits of teacher" in said[0] and "kB" in said[0]


def test_examples_that_come_again_are_stored_once(tiny: Any, recipe: Recipe) -> None:
    """An epoch of the 80 pairs after the other; packed or not, another order, they are the same examples."""
    pairs = tiny.recipe(
        "pairs",
        *("model.architecture.model_type=t5gemma2", "train.steps=12", "data.batch_tokens=2000"),
        *(f"distill.teacher={recipe.distill.teacher}", "distill.top_k=8"),
    )
    manifest = distill_logits(pairs, tiny.folder / "logits")
    assert manifest.num_examples <= 80
    ran = reading(pairs, tiny.folder / "logits")
    other_order = replace(ran, train=replace(ran.train, seed=8, steps=2))
    tune(other_order, tiny.folder / "other", progress=Silent())
    packed = replace(other_order, data=replace(ran.data, pack=True), train=replace(other_order.train, batch_size=40))
    assert len(tune(packed, tiny.folder / "packed", progress=Silent()).losses) == 2


def test_what_was_not_stored_is_an_error(tiny: Any, recipe: Recipe) -> None:
    recipe = replace(recipe, distill=replace(recipe.distill, top_k=4))
    folder = tiny.folder / "logits"
    distill_logits(recipe, folder)
    longer = reading(replace(recipe, train=replace(recipe.train, seed=8)), folder)
    with pytest.raises(MissingExample, match=r"logits says nothing about an example .* encore distill-logits"):
        pretrain(longer, tiny.folder / "run", progress=Silent())
    with pytest.raises(ValueError, match=r"temperature 2\.0 over 512 ids; the run has distill\.temperature 1\.0"):
        open_distillation(reading(recipe, folder, temperature=1.0), tiny.tokenizer, 512)
    with pytest.raises(ValueError, match="holds no teacher logits"):
        TeacherLogits(tiny.folder)
    with pytest.raises(ValueError, match=r"leave distill\.logits out"):
        distill_logits(reading(recipe, folder), tiny.folder / "again")
    with pytest.raises(CheckpointError, match="holds files already"):
        distill_logits(recipe, folder)
    distill_logits(recipe, folder, force=True)
    (folder / "ids.npy").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"ids\.npy cannot be read"):
        TeacherLogits(folder)


def test_an_example_is_known_by_all_that_is_learned_of_it(tiny: Any) -> None:
    layout = TeacherText(tiny.tokenizer, pairs=True)
    batches = open_feed(tiny.recipe("pairs"), tiny.tokenizer, encoder=False).batches(0)
    examples = [example for batch in batches for example in layout.examples(batch)]
    keys = {example_key(example) for example in examples}
    texts = {example.target.tobytes() for example in examples}
    assert len(keys) == len(texts) > 1
    one = examples[0]
    assert example_key(replace(one, places=np.full_like(one.places, -1))) not in keys
    assert example_key(replace(one, source=one.target[:2])) not in keys


def test_a_folder_that_needs_more_than_is_free_is_not_begun(
    tiny: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"will take .* but only 1 kB are free there; lower distill\.top_k"):
        distill_logits(recipe, tiny.folder / "logits")
    assert not (tiny.folder / "logits").exists()


def test_a_manifest_of_a_large_vocabulary() -> None:
    manifest = Manifest("google/gemma-3-4b", "", 262_144, 256, 1.0, num_examples=10, num_tokens=1000)
    assert manifest.num_bytes == 1000 * (256 * (4 + 2) + 4) + 320


def test_the_verb(tiny: Any, recipe: Recipe, cli: Any) -> None:
    path = tiny.folder / "distill.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    command = ["distill-logits", path, "--set", "distill.top_k=3", "--out", tiny.folder / "logits"]
    status, out, said = cli(*command, "--json")
    told = json.loads(out)
    assert status == 0 and told["top_k"] == 3 and told["bytes"] > 0 and "tokens x 3 logits of teacher" in said
    assert TeacherLogits(tiny.folder / "logits").manifest.num_tokens == told["num_tokens"]
    status, _, said = cli(*command)
    assert status == 2 and "holds files already" in said and len(said.splitlines()) == 1


def test_a_recipe_without_a_teacher_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"set distill\.teacher"):
        distill_logits(tiny.recipe("t5gemma2"), tiny.folder / "logits")
    assert not (tiny.folder / "logits").exists()
