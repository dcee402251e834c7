"""Training on rows with pictures: what is read, that a model learns to see, and what is kept of a frozen tower."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import encore
from encore.data.batch import Batch
from encore.data.formats import Tally
from encore.data.layout import Row, lay_out
from encore.generate.sampling import SamplingSettings
from encore.generate.source import PictureFormat
from encore.generate.text import TextGenerator
from encore.model.t5gemma import T5Gemma
from encore.train.feed import open_feed
from encore.train.loss import mean_loss
from encore.train.metrics import Silent
from encore.train.models import open_model, open_tokenizer
from encore.train.picture_features import what_pictures_become
from encore.train.pictures import Keys, Pictures, read_rows
from encore.train.recipe import Recipe
from encore.train.recipe_file import recipe_from_table
from encore.train.sft import tune

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (120, 120, 120)}


def draw(folder: Path, number: int, *, seed: int = 0) -> list[dict[str, object]]:
    """Pictures of one colour with noise, and a question on each."""
    random = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    for i in range(number):
        name = list(COLOURS)[i % len(COLOURS)]
        noise = random.integers(-20, 20, (16, 16, 3))
        Image.fromarray(np.clip(noise + COLOURS[name], 0, 255).astype(np.uint8)).save(folder / f"{seed}-{i}.png")
        rows.append({"src": "which colour?", "tgt": name, "images": [f"{seed}-{i}.png"]})
    return rows


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe(train: str, validation: str = "", **changes: object) -> Recipe:
    table = {
        "objective": "pictures",
        "model": {
            "tokenizer": "asset:tokenizer",
            "architecture": {
                "model_type": "t5gemma2",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "head_dim": 16,
                "vision": {
                    "image_size": 16,
                    "patch_size": 8,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "mm_tokens_per_image": 1,
                },
            },
        },
        "data": {"sources": [{"files": [train], "validation": [validation] if validation else []}]},
        "optim": {"learning_rate": 1e-2, "warmup_steps": 5, "weight_decay": 0.0, "vision_rate": 1.0},
        "train": {"steps": 160, "batch_size": 8, "evaluate_every_steps": 160, "checkpoint_every_steps": 160},
    }
    for key, value in changes.items():
        group, _, leaf = key.partition("__")
        table[group][leaf] = value  # pyright: ignore
    return recipe_from_table(table)


def pictures_of(plan: Recipe) -> tuple[T5Gemma, Pictures]:
    model = open_model(plan.model, open_tokenizer(plan.model), 0, vision=True)
    assert isinstance(model, T5Gemma)
    return model, what_pictures_become(model, plan)


def test_a_small_model_learns_to_see(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", draw(tmp_path, 64))
    held_out = draw(tmp_path, 16, seed=1)
    steps = dict.fromkeys(("train__steps", "train__evaluate_every_steps", "train__checkpoint_every_steps"), 240)
    plan = recipe(train, write(tmp_path / "held.jsonl", held_out), **steps)
    result = tune(plan, tmp_path / "run", progress=Silent())
    assert result.validation_losses[-1][1] < 0.3 < result.validation_losses[0][1]
    generator = TextGenerator.load(result.model_folder, vision=True)
    answers = generator.generate(
        [row["src"] for row in held_out],  # pyright: ignore
        SamplingSettings(max_target_tokens=6),
        pictures=[[str(tmp_path / name) for name in row["images"]] for row in held_out],  # pyright: ignore
    )
    right = sum(answer.text == row["tgt"] for answer, row in zip(answers, held_out, strict=True))
    assert right >= 14  # 4 by chance


def test_a_frozen_tower_stays_and_its_features_are_kept(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", draw(tmp_path, 8))
    cache = str(tmp_path / "cache")
    short = {"train__steps": 3, "train__checkpoint_every_steps": 3, "optim__vision_rate": 0.0}
    whole = tune(recipe(train, train, **short), tmp_path / "whole", progress=Silent())
    kept = tune(with_features(recipe(train, train, **short), cache), tmp_path / "kept", progress=Silent())
    assert [loss for _, loss in kept.losses] == pytest.approx([loss for _, loss in whole.losses], abs=1e-5)
    (file,) = (tmp_path / "cache" / "pictures").iterdir()
    assert np.load(file).shape == (8, 1, 16)
    model, _ = pictures_of(recipe(train))
    trained = encore.load(whole.model_folder, vision=True)
    for part in ("vision_tower", "multi_modal_projector"):
        before, after = (getattr(m.encoder, part).state_dict() for m in (model, trained))  # pyright: ignore
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (part == "vision_tower")


def with_features(plan: Recipe, cache: str) -> Recipe:
    data = dataclasses.replace(plan.data, keep_features=True, cache_folder=cache)
    return dataclasses.replace(plan, data=data)


def test_features_of_a_learning_tower_are_refused(tmp_path: Path) -> None:
    plan = with_features(recipe(write(tmp_path / "t.jsonl", draw(tmp_path, 4))), str(tmp_path))
    with pytest.raises(ValueError, match="vision_rate"):
        tune(plan, tmp_path / "run", progress=Silent())


def test_damaged_rows_cost_themselves_only(tmp_path: Path) -> None:
    rows = draw(tmp_path, 4)
    (tmp_path / "broken.png").write_bytes((tmp_path / "0-0.png").read_bytes()[:60])
    rows += [
        {"src": "?", "tgt": "x", "images": ["broken.png"]},
        {"src": "?", "tgt": "x", "images": ["missing.png"]},
        {"src": "?", "tgt": "x", "images": ["../../etc/passwd"]},
        {"src": "<start_of_image> <start_of_image>", "tgt": "x", "images": ["0-0.png"]},
        {"text": "no picture in here"},
        {"src": "no picture needed", "tgt": "yes"},
    ]
    plan = recipe(write(tmp_path / "rows.jsonl", rows))
    _, pictures = pictures_of(plan)
    tally = Tally()
    good = read_rows(
        plan.data.sources[0].files,
        open_tokenizer(plan.model),
        pictures.form,
        Keys(),
        max_source_tokens=64,
        max_target_tokens=8,
        tally=tally,
    )
    assert [len(row.images) for row in good] == [1, 1, 1, 1, 0]
    assert (tally.records, tally.skipped) == (10, 5)
    assert "line 5" in tally.places[0] and "damaged" in tally.places[0]
    assert "line 7" in tally.places[2] and "outside" in tally.places[2]


def test_a_text_is_cut_behind_its_last_picture(tmp_path: Path) -> None:
    draw(tmp_path, 2)
    text = "A red one: <start_of_image> and a green one: <start_of_image> both are squares."
    plan = recipe(write(tmp_path / "t.jsonl", [{"text": text, "images": ["0-0.png", "0-1.png"]}]))
    _, pictures = pictures_of(plan)
    tokenizer = open_tokenizer(plan.model)
    files = plan.data.sources[0].files
    (row,) = read_rows(files, tokenizer, pictures.form, Keys(), max_source_tokens=99, max_target_tokens=30)
    assert (row.source == pictures.form.placeholder).sum() == 2
    assert tokenizer.decode(row.target.tolist()) == " both are squares."
    assert "green" in tokenizer.decode(row.source.tolist()) and "squares" not in tokenizer.decode(row.source.tolist())


def test_pictures_go_with_their_rows() -> None:
    """Sharding over processes and packing several examples into a row keep each picture at its placeholder."""
    rows = [
        [Row(np.array([5, 9]), np.array([1]), pictures=np.full((1, 2, 4), 0.0, np.float32))],
        [Row(np.array([6]), np.array([1]))],
        [
            Row(np.array([9, 9]), np.array([1]), pictures=np.full((2, 2, 4), 2.0, np.float32)),
            Row(np.array([7, 9]), np.array([1]), pictures=np.full((1, 2, 4), 3.0, np.float32)),
        ],
    ]
    batch = Batch.of(lay_out(rows, bos_id=2, pad_id=0, segments=True))
    assert batch.pictures is not None and batch.picture_rows is not None
    assert batch.picture_rows.tolist() == [0, 2, 2, 2] and batch.pictures[:, 0, 0].tolist() == [0, 2, 2, 3]
    first, second = batch.shard(0, 2), batch.shard(1, 2)
    assert first.picture_rows is not None and first.picture_rows.tolist() == [0, 1, 1, 1]
    assert second.pictures is None and second.picture_rows is None


def test_pictures_and_text_in_one_run(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", draw(tmp_path, 8))
    plan = recipe(train)
    table = {"files": ["asset:pairs/validation"], "objective": "pairs", "name": "text"}
    mixed = recipe(train, data__sources=[{"files": [train], "name": "pictures"}, table])
    model, pictures = pictures_of(plan)
    feed = open_feed(mixed, open_tokenizer(plan.model), encoder=True, pictures=pictures)
    batches = feed.batches(0)
    shown = sum(len(batch.pictures) for batch in batches if batch.pictures is not None)
    assert shown == 4 and sum(len(batch.decoder_mask) for batch in batches) == 8
    with torch.no_grad():
        assert np.isfinite(mean_loss(model, batches))


def test_a_model_of_text_is_refused(tmp_path: Path) -> None:
    plan = recipe(write(tmp_path / "t.jsonl", draw(tmp_path, 4)))
    with pytest.raises(ValueError, match="text only"):
        PictureFormat.of(encore.load("translator").config)
    with pytest.raises(ValueError, match="picture tower"):
        open_feed(plan, open_tokenizer(plan.model), encoder=True)
