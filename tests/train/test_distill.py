"""Distillation in a run: the teacher speaks about the right tokens, the student nears it, resuming is exact."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import encore
from encore.checkpoint.training import RunFolder
from encore.data.batch import Batch, encoder_decoder_batch
from encore.data.examples import TokenPair, pair_row, source_tokens
from encore.data.layout import lay_out
from encore.data.teacher_text import TeacherText, teacher_rows
from encore.model.gemma import Gemma
from encore.objectives import ul2
from encore.objectives.distill import TeacherStates
from encore.tokenizer import Tokenizer
from encore.train.distill import Distillation, LiveTeacher, evaluation, open_distillation
from encore.train.metrics import Silent, read_metrics
from encore.train.models import open_model
from encore.train.pretrain import pretrain
from encore.train.recipe import Recipe, SourceRecipe
from encore.train.sft import tune
from encore.train.signals import Interrupted

PAD, EOS, BOS = 0, 1, 2


@pytest.fixture
def teacher(tiny: Any) -> Gemma:
    """A wider decoder-only model than the students, with its weights drawn at random."""
    model = open_model(tiny.recipe("causal", "model.architecture.hidden_size=48").model, tiny.tokenizer, seed=9)
    assert isinstance(model, Gemma)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # far from the uniform distribution
    return model.eval()


@pytest.fixture
def teacher_folder(tiny: Any, teacher: Gemma) -> str:
    encore.save(teacher, tiny.folder / "teacher", tokenizer=tiny.tokenizer)
    return str(tiny.folder / "teacher")


def live(teacher: Gemma, tokenizer: Tokenizer, pairs: bool = False) -> LiveTeacher:
    return LiveTeacher(teacher, TeacherText(tokenizer, pairs=pairs), tokenizer.vocab_size)


@torch.no_grad()
def said(teacher: LiveTeacher, batch: Batch) -> torch.Tensor:
    """The teacher's distribution over every target token of a batch (B, T, V); zeros where it says nothing."""
    states, taught = teacher.about(batch)
    logits = teacher.model.logits(states.states)
    return torch.where((taught >= 0)[..., None], logits.softmax(-1)[taught], 0.0)


@torch.no_grad()
def naive(teacher: Gemma, text: list[int], token: int) -> torch.Tensor:
    """The distribution over token number `token` of a text, from the tokens before it and nothing else."""
    return teacher(torch.tensor([[BOS, *text[:token]]]))[0, -1].softmax(-1)


@pytest.mark.parametrize("mixture", ["prefixlm", "t5gemma2"])
def test_it_speaks_about_the_very_token(tiny: Any, teacher: Gemma, mixture: str) -> None:
    """Each example's own text, read token by token without any batch."""
    tokenizer, random = tiny.tokenizer, np.random.default_rng(0)
    speaks = live(teacher, tokenizer)
    for task in ul2.mixture_rows(mixture):
        window = random.choice([EOS, *range(400, 440)], 24)
        example = ul2.apply(task, window, tokenizer.sentinel_ids, EOS, random)
        other = (ids := np.asarray([400, 401, EOS]))[:2]
        sources = [source_tokens(other, tokenizer), source_tokens(example.inputs, tokenizer)]
        batch = encoder_decoder_batch(sources, [ids, example.targets], bos_id=BOS, pad_id=PAD)
        distributions = said(speaks, batch)[1]
        place = 0
        for t, token in enumerate(example.targets):
            if token in tokenizer.sentinel_ids or t == len(example.targets) - 1:
                assert not distributions[t].any()
                continue
            place = next(j for j in range(place, 24) if _is_hidden(window, example, tokenizer, j, t))
            assert window[place] == token
            torch.testing.assert_close(distributions[t], naive(teacher, window.tolist(), place), atol=1e-5, rtol=1e-4)
            place += 1


def _is_hidden(window: np.ndarray, example: ul2.Example, tokenizer: Tokenizer, place: int, t: int) -> bool:
    """Whether token `place` of the window is number t of the targets: kept tokens and sentinels are walked through."""
    source, target = example.inputs.tolist(), example.targets.tolist()
    sentinels = set(tokenizer.sentinel_ids)
    filled: list[tuple[str, int]] = []
    holes = [i for i, token in enumerate(target) if token in sentinels] or [-1]
    for i, token in enumerate([*source, *([] if set(source) & sentinels else [-1])]):
        if token in sentinels or token == -1:
            hole = holes.pop(0)
            end = holes[0] if holes else len(target) - 1
            filled += [("target", j) for j in range(hole + 1, end)]
        else:
            filled.append(("source", i))
    return filled[place] == ("target", t)


def test_pairs_are_read_as_a_tuned_decoder_only_model_reads_them(tiny: Any, teacher: Gemma) -> None:
    tokenizer = tiny.tokenizer
    tokens = [TokenPair(np.arange(400, 400 + n), np.arange(420, 425 - n)) for n in (1, 2, 4)]
    both, alone = (
        Batch.of(lay_out([[pair_row(pair, tokenizer, encoder=encoder)] for pair in tokens], bos_id=BOS, pad_id=PAD))
        for encoder in (True, False)
    )
    speaks = live(teacher, tokenizer, pairs=True)
    distributions, expected = said(speaks, both), said(speaks, alone)
    for r, pair in enumerate(tokens):
        first = len(pair.source) + 1
        for t in range(len(pair.target) + 1):
            text = [*pair.source.tolist(), EOS, *pair.target.tolist()]
            torch.testing.assert_close(distributions[r, t], naive(teacher, text, first + t), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(distributions[r, t], expected[r, first + t], atol=1e-5, rtol=1e-4)


def test_packed_rows_are_taught_as_their_examples_alone(tiny: Any, teacher: Gemma) -> None:
    """Two examples in one row, and one of another length, against a row each: the same loss and gradients."""
    tokenizer = tiny.tokenizer
    sources = [np.asarray([BOS, 400, 401, EOS]), np.asarray([BOS, 402, EOS])]
    targets = [np.asarray([410, 411, 412, EOS]), np.asarray([413, 414, EOS])]
    apart = encoder_decoder_batch(sources, targets, bos_id=BOS, pad_id=PAD)
    one = torch.tensor([[1] * 4 + [2] * 3])
    packed = Batch(
        torch.tensor([np.concatenate(sources).tolist()]),
        torch.ones(1, 7, dtype=torch.bool),
        torch.tensor([[BOS, 410, 411, 412, BOS, 413, 414]]),
        torch.tensor([np.concatenate(targets).tolist()]),
        torch.ones(1, 7),
        torch.ones(1, 7, dtype=torch.bool),
        one,
        one,
    )
    rows = teacher_rows(packed, TeacherText(tokenizer, pairs=False))
    assert rows is not None and rows.segment_ids is not None and len(rows.tokens) == 1
    speaks = live(teacher, tokenizer)
    left, right = said(speaks, packed)[0], said(speaks, apart)
    torch.testing.assert_close(left, torch.cat([right[0], right[1, :3]]), atol=1e-5, rtol=1e-4)
    gradients = []
    for batch in (apart, packed):
        student = open_model(tiny.recipe("t5gemma2").model, tokenizer, seed=3)
        Distillation(speaks, temperature=2.0, alpha=0.6)(student, batch).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def recipe_of(tiny: Any, teacher: str, *changes: str) -> Recipe:
    held_out = f"data.validation={json.dumps([tiny.text])}"
    return tiny.recipe("t5gemma2", f"distill.teacher={teacher}", held_out, *changes)


def test_a_student_nears_its_teacher_and_more_than_by_one_hot_targets(tiny: Any) -> None:
    """Shipped text, the shipped Gemma as the teacher, a student of width 32 from random weights, 40 steps each."""
    results = {}
    for alpha in (1.0, 0.0):
        recipe = tiny.recipe(
            "prefixlm",
            *("model.tokenizer=asset:tokenizer", "distill.teacher=asset:source", f"distill.alpha={alpha}"),
            *("data.train=asset:text/validation", "data.validation=asset:text/validation", "data.max_tokens=40000"),
            *("data.window_tokens=32", "train.steps=40", "train.evaluate_every_steps=0", "data.validation_windows=8"),
            *("optim.learning_rate=0.01", "train.checkpoint_every_steps=0"),
        )
        pretrain(recipe, tiny.folder / str(alpha), progress=Silent())
        rows = read_metrics(tiny.folder / str(alpha) / "metrics.jsonl")
        results[alpha] = (
            rows[0]["validation_divergence"],
            rows[-1]["validation_divergence"],
            rows[-1]["validation_loss"],
        )
    taught, one_hot = results[1.0], results[0.0]
    assert taught[0] == one_hot[0], "they begin with the same weights"
    assert taught[1] < 0.75 * taught[0]
    assert taught[1] < one_hot[1]


def test_the_validation_loss_is_the_plain_one(tiny: Any, teacher: Gemma) -> None:
    student = open_model(tiny.recipe("t5gemma2").model, tiny.tokenizer, seed=3).eval()
    batch = encoder_decoder_batch([[BOS, 400, EOS]], [[401, 402, EOS]], bos_id=BOS, pad_id=PAD)
    distillation = Distillation(live(teacher, tiny.tokenizer), temperature=2.0, alpha=0.5)
    with torch.no_grad():
        values = evaluation([batch], distillation)(student)
        assert values["validation_loss"] == evaluation([batch], None)(student)["validation_loss"]
        log_student = (student(batch.encoder_input_tokens, batch.decoder_input_tokens)[0, :2] / 2).log_softmax(-1)
        log_teacher = (teacher(torch.tensor([[BOS, 400, 401]]))[0, 1:] / 2).log_softmax(-1)
    expected = (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()
    assert values["validation_divergence"] == pytest.approx(expected.item(), rel=1e-4)


class Signalling(Silent):
    """Sends SIGTERM to this process in a step."""

    def step(self, row: Any) -> None:
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_interrupted_distillation_ends_the_same(tiny: Any, teacher_folder: str) -> None:
    recipe = recipe_of(tiny, teacher_folder, "train.steps=6", "train.checkpoint_every_steps=0")
    whole = pretrain(recipe, tiny.folder / "whole", progress=Silent())
    with pytest.raises(Interrupted, match="after step 3"):
        pretrain(recipe, tiny.folder / "run", progress=Signalling())
    resumed = pretrain(recipe, tiny.folder / "run", progress=Silent())
    assert resumed.losses == whole.losses
    for one, other in zip(
        encore.load(resumed.model_folder).parameters(), encore.load(whole.model_folder).parameters(), strict=True
    ):
        assert torch.equal(one, other)
    assert not (tiny.folder / "run" / "model" / "teacher").exists()
    assert RunFolder(tiny.folder / "run").latest() is not None


def test_a_run_with_another_teacher_is_refused(tiny: Any, teacher: Gemma, teacher_folder: str) -> None:
    recipe = recipe_of(tiny, teacher_folder, "train.steps=2")
    pretrain(recipe, tiny.folder / "run", progress=Silent())
    with torch.no_grad():
        teacher.head_weight.mul_(1.5)
    encore.save(teacher, teacher_folder, tokenizer=tiny.tokenizer)
    with pytest.raises(ValueError, match="other data, or with another tokenizer or teacher"):
        pretrain(recipe, tiny.folder / "run", progress=Silent())


def test_tuning_takes_a_teacher_too(tiny: Any, teacher_folder: str) -> None:
    recipe = tiny.recipe(
        "pairs",
        *(f"distill.teacher={teacher_folder}", "model.architecture.model_type=t5gemma2", "train.steps=3"),
        f"data.validation={json.dumps([tiny.pairs])}",
    )
    result = tune(recipe, tiny.folder / "run", progress=Silent())
    plain = tune(replace(recipe, distill=Recipe().distill), tiny.folder / "plain", progress=Silent())
    assert result.losses != plain.losses
    rows = read_metrics(tiny.folder / "run" / "metrics.jsonl")
    assert rows[-1]["validation_divergence"] > 0
    assert "validation_divergence" not in read_metrics(tiny.folder / "plain" / "metrics.jsonl")[-1]


def test_unfit_teachers_are_refused(tiny: Any, teacher: Gemma, teacher_folder: str) -> None:
    def opened(*changes: str, vocab_size: int = 512) -> Any:
        return open_distillation(tiny.recipe("t5gemma2", *changes), tiny.tokenizer, vocab_size)

    assert opened() is None
    assert isinstance(opened(f"distill.teacher={teacher_folder}").teacher, LiveTeacher)
    with pytest.raises(ValueError, match="the teacher knows 512 ids, the student 600"):
        opened(f"distill.teacher={teacher_folder}", vocab_size=600)
    with pytest.raises(ValueError, match="has another vocabulary: id"):
        opened("distill.teacher=asset:source")
    with pytest.raises(ValueError, match="a T5Gemma; expected a decoder-only Gemma"):
        opened("distill.teacher=asset:translator")
    with pytest.raises(ValueError, match=r"distill\.alpha is 1\.5"):
        opened("distill.alpha=1.5")
    with pytest.raises(ValueError, match="distillation is of text, but the objective is pictures"):
        pictures = tiny.recipe("t5gemma2", f"distill.teacher={teacher_folder}", "objective=pictures")
        open_distillation(pictures, tiny.tokenizer, 512)
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        opened("distill.teacher=nowhere")


def test_a_teacher_with_more_rows_is_cut_to_the_vocabulary(tiny: Any, teacher: Gemma) -> None:
    """Gemma 3 4B has 262,208 rows for 262,144 ids."""
    batch = encoder_decoder_batch([[BOS, 400, EOS]], [[401, EOS]], bos_id=BOS, pad_id=PAD)
    states, _ = LiveTeacher(teacher, TeacherText(tiny.tokenizer, pairs=False), 500).about(batch)
    assert isinstance(states, TeacherStates) and states.head_weight.shape[0] == 500


def test_the_recipe_that_is_shipped_is_one(tmp_path: Path) -> None:
    from encore.train.recipe_file import load_recipe

    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "distill.toml")
    assert recipe.distill.teacher == "asset:source" and recipe.objective == "prefixlm"


def test_a_mixture_of_pairs_and_text_is_refused(tiny: Any, teacher_folder: str) -> None:
    sources = tuple(SourceRecipe((file,), objective=kind) for file, kind in ((tiny.text, ""), (tiny.pairs, "pairs")))
    recipe = tiny.recipe("t5gemma2", f"distill.teacher={teacher_folder}")
    recipe = replace(recipe, data=replace(recipe.data, train=(), sources=sources))
    with pytest.raises(
        ValueError, match="objectives pairs, t5gemma2: a teacher reads pairs and other text differently"
    ):
        open_distillation(recipe, tiny.tokenizer, 512)
