"""Parts that learn at their own rate or not at all, the mean of the last checkpoints, and the watch over two sides."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import encore
from encore.checkpoint.training import RunFolder
from encore.train.metrics import Silent, read_metrics
from encore.train.models import open_model
from encore.train.optim import rate_part
from encore.train.pretrain import pretrain
from encore.train.signals import Interrupted


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in encore.load(folder).named_parameters()}


class Stopped(Silent):
    """Stops the run in a step, as SIGTERM does."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def step(self, row: Any) -> None:
        if row["step"] == self.at_step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("part", ["encoder", "decoder", "cross_attention", "embedding"])
def test_a_frozen_part_stays_keeps_no_state_and_resumes(tiny: Any, part: str) -> None:
    """Also past the warm-up of the cross-attention, which must not wake what is frozen."""
    warmup = 0 if part == "cross_attention" else 2
    recipe = tiny.recipe(
        "t5gemma2",
        *("model.architecture.model_type=t5gemma", "train.steps=5", "train.checkpoint_every_steps=0"),
        *(f"optim.cross_attention_warmup_steps={warmup}", "optim.encoder_rate=0.5", f"optim.{part}_rate=0"),
    )
    before = dict(open_model(recipe.model, tiny.tokenizer, recipe.train.seed).named_parameters())
    whole = pretrain(recipe, tiny.folder / "whole", progress=Silent())
    frozen = {name for name in before if rate_part(name) == part}
    after = weights_of(whole.model_folder)
    assert frozen and {name for name in before if torch.equal(before[name], after[name])} == frozen
    rows = read_metrics(tiny.folder / "whole" / "metrics.jsonl")
    if part in ("encoder", "embedding"):  # no gradient is made; the norm of the decoder has the cross-attention in it
        assert not any(f"gradient_norm_{part}" in row for row in rows)
    last = "checkpoints/step-000005/training/optimizer.safetensors"
    with safe_open(str(tiny.folder / "whole" / last), "pt") as stored:
        assert {key.removesuffix(".exp_avg") for key in stored.keys() if key.endswith(".exp_avg")} == (  # noqa: SIM118
            set(before) - frozen
        )
    with pytest.raises(Interrupted):
        pretrain(recipe, tiny.folder / "run", progress=Stopped(3))
    assert pretrain(recipe, tiny.folder / "run", progress=Silent()).losses == whole.losses
    assert (tiny.folder / "run" / last).read_bytes() == (tiny.folder / "whole" / last).read_bytes()


def test_a_slower_part_moves_less(tiny: Any) -> None:
    recipe = tiny.recipe("t5gemma2", "train.steps=1", "optim.encoder_rate=0.01", "optim.weight_decay=0.0")
    before = open_model(recipe.model, tiny.tokenizer, recipe.train.seed).state_dict()
    after = weights_of(pretrain(recipe, tiny.folder / "run", progress=Silent()).model_folder)
    moved = {name: float((weight - before[name]).abs().max()) for name, weight in after.items()}
    peak = recipe.optim.learning_rate / recipe.optim.warmup_steps  # Adam's first step is of the rate's size
    assert moved["decoder.layers.0.mlp.up_proj.weight"] == pytest.approx(peak, rel=0.01)
    assert moved["encoder.layers.0.mlp.up_proj.weight"] == pytest.approx(peak / 100, rel=0.01)


class Noting(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_the_model_is_the_mean_of_the_last_checkpoints_even_when_interrupted(tiny: Any) -> None:
    """A checkpoint of an interruption stands between the others, is not averaged, and pushes none of them out."""
    recipe = tiny.recipe(
        "t5gemma2", *("train.steps=8", "train.checkpoint_every_steps=2", "train.average_last=3", "train.keep_last=1")
    )
    noting = Noting()
    result = pretrain(recipe, tiny.folder / "run", progress=noting)
    run = RunFolder(result.folder)
    assert [c.step for c in run.checkpoints()] == [4, 6, 8]
    assert noting.notes == ["the model is the mean of the checkpoints of steps 4, 6, 8"]
    kept = [weights_of(checkpoint.folder) for checkpoint in run.checkpoints()]
    for name, weight in weights_of(result.model_folder).items():
        mean = torch.stack([weights[name].double() for weights in kept]).mean(0)
        torch.testing.assert_close(weight.double(), mean, rtol=1e-7, atol=1e-9)
        assert name.endswith("eoi_embedding") or not torch.equal(weight, kept[-1][name])
    read = encore.load_tokenizer(result.model_folder)
    assert read.encode_source("abc") == tiny.tokenizer.encode_source("abc")
    for step in (5, 7):
        with pytest.raises(Interrupted):
            pretrain(recipe, tiny.folder / "cut", progress=Stopped(step))
    cut = pretrain(recipe, tiny.folder / "cut", progress=Silent())
    weights = "model.safetensors"
    assert (cut.model_folder / weights).read_bytes() == (result.model_folder / weights).read_bytes()


def test_averages_that_cannot_be_are_refused(tiny: Any) -> None:
    for changes in (["train.steps=7"], ["train.average_last=5"], ["train.checkpoint_every_steps=0"]):
        with pytest.raises(ValueError, match=r"train\.average_last is \d, but \d steps"):
            tiny.recipe("causal", "train.checkpoint_every_steps=2", "train.average_last=2", *changes)
    recipe = tiny.recipe("causal", "train.checkpoint_every_steps=2", "train.average_last=2")
    with pytest.raises(Interrupted):
        pretrain(recipe, tiny.folder / "run", progress=Stopped(3))
    other = tiny.recipe("causal", "train.checkpoint_every_steps=4", "train.average_last=2")
    with pytest.raises(ValueError, match=r"train\.checkpoint_every_steps was 2, is 4"):
        pretrain(other, tiny.folder / "run", progress=Silent())


def test_a_side_without_gradients_is_told_once(tiny: Any) -> None:
    """The decoder's attention to the memory is closed, so that nothing comes back to the encoder."""
    recipe = tiny.recipe("t5gemma2", "model.architecture.model_type=t5gemma", "train.steps=12")
    model = open_model(recipe.model, tiny.tokenizer, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("post_cross_attn_layernorm.weight"):
                parameter.fill_(-1.0)  # the norm multiplies by 1 + weight
    encore.save(model, tiny.folder / "closed", tokenizer=tiny.tokenizer)
    closed = replace(recipe, model=replace(recipe.model, init=str(tiny.folder / "closed")))
    noting = Noting()
    pretrain(replace(closed, optim=replace(recipe.optim, cross_attention_rate=0.0)), tiny.folder / "r", progress=noting)
    assert len(noting.notes) == 1 and "in step 5 the encoder gets no gradient" in noting.notes[0]
