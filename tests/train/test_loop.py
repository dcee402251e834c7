"""The loop: what is learned and what is not, accumulation, and how a run stops, saves and refuses."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import encore
from encore.checkpoint.training import RunFolder
from encore.data.batch import Batch, decoder_batch, encoder_decoder_batch
from encore.data.examples import TablePairs
from encore.data.pipeline import PairBatches
from encore.data.sources import pair_tables
from encore.model.gemma import Gemma
from encore.model.t5gemma import T5Gemma
from encore.train.loop import RunResult, TrainingDiverged
from encore.train.loss import Model, mean_loss, resolve_precision, summed_loss
from encore.train.metrics import Silent, read_metrics
from encore.train.models import open_model, open_tokenizer
from encore.train.optim import make_optimizer
from encore.train.pretrain import pretrain
from encore.train.recipe import OptimRecipe
from encore.train.recipe_file import load_recipe, to_toml
from encore.train.sft import tune
from encore.train.signals import Interrupted

PAD, EOS, BOS = 0, 1, 2
ROWS = [[400, 401, 402, 403, EOS], [404, EOS], [405, 406, EOS]]
KINDS = ("causal", "t5gemma2", "t5gemma")


def model_of(tiny: Any, kind: str) -> Model:
    changes = [f"model.architecture.model_type={kind}"] if kind == "t5gemma" else []
    recipe = tiny.recipe("causal" if kind == "causal" else "t5gemma2", *changes)
    return open_model(recipe.model, open_tokenizer(recipe.model), seed=3)


def batch_of(kind: str, rows: list[list[int]], pad_id: int = PAD) -> Batch:
    if kind == "causal":
        return decoder_batch(rows, [0] * len(rows), bos_id=BOS, pad_id=pad_id)
    return encoder_decoder_batch([[BOS, *row] for row in rows], rows, bos_id=BOS, pad_id=pad_id)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_labels_shifted_once_from_bos(tiny: Any, kind: str) -> None:
    """By hand, from the models' own logits: position t, having read BOS and the targets before t, predicts target t."""
    model = model_of(tiny, kind)
    expected = 0.0
    for row in ROWS:
        read = torch.tensor([[BOS, *row[:-1]]])
        logits = model(read) if isinstance(model, Gemma) else model(torch.tensor([[BOS, *row]]), read)
        expected += float(F.cross_entropy(logits[0], torch.tensor(row), reduction="sum"))
    batch = batch_of(kind, ROWS)
    assert float(summed_loss(model, batch)) == pytest.approx(expected, rel=1e-5)
    assert mean_loss(model, [batch]) == pytest.approx(expected / sum(map(len, ROWS)), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_neither_learned_nor_seen(tiny: Any, kind: str) -> None:
    model = model_of(tiny, kind)
    losses = [float(summed_loss(model, batch_of(kind, ROWS, pad_id))) for pad_id in (PAD, 407)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    alone = sum(float(summed_loss(model, batch_of(kind, [row]))) for row in ROWS)
    assert losses[0] == pytest.approx(alone, rel=1e-5)


def test_eos_is_learned(tiny: Any) -> None:
    model = model_of(tiny, "causal")
    summed_loss(model, batch_of("causal", [[400, EOS]])).backward()
    with_eos = model.head_weight.grad
    assert with_eos is not None and with_eos[EOS].abs().max() > 0.01


def test_a_model_gets_batches_of_its_own_kind(tiny: Any) -> None:
    with pytest.raises(ValueError, match="needs batches with a source"):
        summed_loss(model_of(tiny, "t5gemma2"), batch_of("causal", ROWS))
    with pytest.raises(ValueError, match="nowhere to put"):
        summed_loss(model_of(tiny, "causal"), batch_of("t5gemma2", ROWS))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    model = encore.load(folder)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_alike(one: RunResult, many: RunResult) -> None:
    for (step, left), (_, right) in zip(one.losses, many.losses, strict=True):
        assert left == pytest.approx(right, rel=1e-4), step
    left, right = weights_of(one.model_folder), weights_of(many.model_folder)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=3e-4, msg=name)


@pytest.mark.parametrize("objective", ["causal", "t5gemma2"])
def test_accumulation_equals_the_big_batch(tiny: Any, objective: str) -> None:
    one, many = (
        pretrain(
            tiny.recipe(objective, "train.steps=3", f"train.accumulation_steps={parts}"),
            tiny.folder / str(parts),
            progress=Silent(),
        )
        for parts in (1, 4)
    )
    assert_alike(one, many)


def test_accumulation_over_batches_of_unequal_weight_equals_the_big_batch(tiny: Any) -> None:
    """An epoch of pairs as one batch, or as several: a mean of means would weigh their tokens differently."""
    one = tune(
        tiny.recipe("pairs", "data.batch_tokens=100000", "train.steps=3"), tiny.folder / "one", progress=Silent()
    )
    tokens = TablePairs(pair_tables([tiny.pairs], tiny.tokenizer, cache_folder=tiny.folder / "cache"), 99, 99)
    cut = PairBatches(tokens, tiny.tokenizer, encoder=False, batch_tokens=900)
    parts = next(n for n in range(1, 99) if sum(len(cut.indices(i)) for i in range(n)) == len(tokens))
    assert parts > 1 and len({cut(i)[0].total_weight for i in range(parts)}) > 1
    recipe = tiny.recipe("pairs", "data.batch_tokens=900", "train.steps=3", f"train.accumulation_steps={parts}")
    assert_alike(one, tune(recipe, tiny.folder / "many", progress=Silent()))


def test_a_run_folder_and_its_metrics(tiny: Any) -> None:
    recipe = tiny.recipe("t5gemma2", f"data.validation={json.dumps([tiny.text])}", "train.keep_last=1")
    result = pretrain(recipe, tiny.folder / "run", progress=Silent())
    rows = read_metrics(tiny.folder / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(9))
    assert [step for step, _ in result.validation_losses] == [0, 4, 8]
    last = rows[-1]
    assert last["loss"] == result.losses[-1][1] < result.losses[0][1]
    parts = [last[f"gradient_norm_{part}"] for part in ("encoder", "decoder", "embedding")]
    assert all(norm > 0 for norm in parts) and math.hypot(*parts) == pytest.approx(last["gradient_norm"])
    assert last["tokens"] == result.tokens > 8 * 4 * 24
    checkpoint = tiny.folder / "run" / "checkpoints" / "step-000008"
    for folder in (result.model_folder, checkpoint):
        assert isinstance(encore.load(folder), T5Gemma)
        assert encore.load_tokenizer(folder).encode_source("abc") == tiny.tokenizer.encode_source("abc")
    assert load_recipe(checkpoint / "training" / "recipe.toml") == load_recipe(tiny.folder / "run" / "recipe.toml")
    assert not list(tiny.folder.rglob("*.p*t*")) and not list(tiny.folder.rglob("*.pkl"))


def test_the_same_seed_gives_the_same_run_and_another_another(tiny: Any) -> None:
    runs = [
        pretrain(
            tiny.recipe("causal", "train.steps=3", f"train.seed={seed}"), tiny.folder / f"run{i}", progress=Silent()
        )
        for i, seed in enumerate((1, 1, 2))
    ]
    assert runs[0].losses == runs[1].losses != runs[2].losses


def test_output_dtype(tiny: Any) -> None:
    result = pretrain(
        tiny.recipe("causal", "train.steps=1", "train.output_dtype=bfloat16"), tiny.folder / "run", progress=Silent()
    )
    assert {p.dtype for p in encore.load(result.model_folder).parameters()} == {torch.bfloat16}
    kept = encore.load(tiny.folder / "run" / "checkpoints" / "step-000001")
    assert {p.dtype for p in kept.parameters()} == {torch.float32}


def test_the_best_checkpoint_is_kept_beside_the_last(tiny: Any) -> None:
    """The rate rises until it spoils the model, so that the best validation is not the last one."""
    recipe = tiny.recipe(
        "causal",
        f"data.validation={json.dumps([tiny.text])}",
        *("train.steps=6", "train.keep_last=1", "train.evaluate_every_steps=1", "train.checkpoint_every_steps=1"),
        *("optim.learning_rate=0.01", "optim.warmup_steps=0", "optim.final_learning_rate_fraction=1000.0"),
    )
    result = pretrain(recipe, tiny.folder / "run", progress=Silent())
    best = min(result.validation_losses[1:], key=lambda entry: entry[1])[0]
    assert best < 6
    assert [c.step for c in RunFolder(result.folder).checkpoints()] == [best, 6]


def test_nan_stops_and_names_the_last_good_checkpoint(tiny: Any) -> None:
    recipe = tiny.recipe("causal", "train.steps=4")
    pretrain(recipe, tiny.folder / "run", progress=Silent())
    folder = tiny.folder / "run" / "model"
    model = encore.load(folder)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    encore.save(model, tiny.folder / "broken", tokenizer=tiny.tokenizer)
    broken = replace(recipe, model=replace(recipe.model, init=str(tiny.folder / "broken")))
    with pytest.raises(
        TrainingDiverged, match=r"step 1: .* is nan, the weights are not finite .* there is no checkpoint yet"
    ):
        pretrain(broken, tiny.folder / "run2", progress=Silent())
    assert not RunFolder(tiny.folder / "run2").checkpoints()


def test_a_diverging_loss_stops_and_names_the_last_good_checkpoint(tiny: Any) -> None:
    recipe = tiny.recipe(
        "causal",
        *("train.steps=400", "train.checkpoint_every_steps=10", "train.divergence_nats=1.0"),
        *("optim.learning_rate=0.02", "optim.warmup_steps=0", "optim.final_learning_rate_fraction=5000.0"),
    )  # the rate rises from 0.02 to 100
    with pytest.raises(TrainingDiverged, match=r"smoothed loss is .* last good checkpoint is .*step-0000\d0"):
        pretrain(recipe, tiny.folder / "run", progress=Silent())
    good = RunFolder(tiny.folder / "run").latest()
    assert good is not None and all(bool(w.isfinite().all()) for w in weights_of(good.folder).values())


def test_a_folder_with_another_run_is_refused(tiny: Any) -> None:
    pretrain(tiny.recipe("causal", "train.steps=2"), tiny.folder / "run", progress=Silent())
    with pytest.raises(ValueError, match=r"train\.steps was 2, is 3"):
        pretrain(tiny.recipe("causal", "train.steps=3"), tiny.folder / "run", progress=Silent())
    again = pretrain(tiny.recipe("causal", "train.steps=3"), tiny.folder / "run", resume=False, progress=Silent())
    assert again.steps == 3 and len(again.losses) == 3


def test_other_data_is_refused(tiny: Any) -> None:
    recipe = tiny.recipe("causal", "train.steps=2")
    pretrain(recipe, tiny.folder / "run", progress=Silent())
    tiny.write("text.jsonl", [{"text": "abc def " * 99}])
    with pytest.raises(ValueError, match="other data"):
        pretrain(recipe, tiny.folder / "run", progress=Silent())


def test_a_finished_run_is_not_trained_again(tiny: Any) -> None:
    recipe = tiny.recipe("causal", "train.steps=2")
    first = pretrain(recipe, tiny.folder / "run", progress=Silent())
    before = (first.model_folder / "model.safetensors").stat().st_mtime_ns
    assert pretrain(recipe, tiny.folder / "run", progress=Silent()) == first
    assert (first.model_folder / "model.safetensors").stat().st_mtime_ns == before


class Signalling(Silent):
    """Sends a signal to this process in a step."""

    def __init__(self, number: int, at_step: int) -> None:
        self.number, self.at_step = number, at_step

    def step(self, row: Any) -> None:
        if row["step"] == self.at_step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_finish_the_step_and_save(tiny: Any, number: int, exit_code: int) -> None:
    recipe = tiny.recipe("causal")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="after step 3") as caught:
        pretrain(recipe, tiny.folder / "run", progress=Signalling(number, 3))
    assert caught.value.exit_code == exit_code and signal.getsignal(number) is before
    latest = RunFolder(tiny.folder / "run").latest()
    assert latest is not None and latest.step == 3
    resumed = pretrain(recipe, tiny.folder / "run", progress=Silent())
    assert resumed.losses == pretrain(recipe, tiny.folder / "whole", progress=Silent()).losses


def test_cross_attention_alone_learns_during_its_warmup(tiny: Any) -> None:
    recipe = tiny.recipe(
        "t5gemma2", "model.architecture.model_type=t5gemma", "train.steps=1", "optim.cross_attention_warmup_steps=1"
    )
    before = dict(open_model(recipe.model, tiny.tokenizer, recipe.train.seed).named_parameters())
    result = pretrain(recipe, tiny.folder / "run", progress=Silent())
    for name, after in weights_of(result.model_folder).items():
        learns = "cross_attn" in name
        assert torch.equal(before[name], after) is not learns, name


def test_precision_follows_the_machine() -> None:
    assert resolve_precision("bfloat16", torch.device("cpu")) == torch.bfloat16
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    fast = "amx_bf16" in flags or "avx512_bf16" in flags
    assert resolve_precision("auto", torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)


def test_bfloat16_products_keep_float32_weights(tiny: Any) -> None:
    recipe = tiny.recipe("t5gemma2", "train.steps=4", "train.precision=bfloat16")
    result = pretrain(recipe, tiny.folder / "run", progress=Silent())
    plain = pretrain(
        tiny.recipe("t5gemma2", "train.steps=4", "train.precision=float32"), tiny.folder / "f", progress=Silent()
    )
    assert {w.dtype for w in weights_of(result.model_folder).values()} == {torch.float32}
    assert result.losses != plain.losses
    assert result.losses[-1][1] == pytest.approx(plain.losses[-1][1], rel=0.02)


def test_recipes_in_the_wrong_place(tiny: Any) -> None:
    with pytest.raises(ValueError, match="for tune"):
        pretrain(tiny.recipe("pairs"), tiny.folder / "run")
    with pytest.raises(ValueError, match="tune takes"):
        tune(tiny.recipe("causal"), tiny.folder / "run")
    with pytest.raises(ValueError, match=r"set data\.train"):
        pretrain(tiny.recipe("causal", "data.train=[]"), tiny.folder / "run")
    with pytest.raises(ValueError, match=r"set model\.tokenizer"):
        pretrain(tiny.recipe("causal", "model.tokenizer="), tiny.folder / "run")
    with pytest.raises(ValueError, match="do not belong together"):
        pretrain(tiny.recipe("causal", "model.architecture.vocab_size=100"), tiny.folder / "run")
    assert "[optim]" in to_toml(tiny.recipe())
    assert make_optimizer(model_of(tiny, "causal"), OptimRecipe()).defaults["lr"] == OptimRecipe().learning_rate
