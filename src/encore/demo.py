"""The main job, end to end, on what the package ships: `encore demo`, `make demo`.

    source (a small Gemma) ──┬─ adapt ─▶ encoder-decoder ─ UL2 ────▶ tune ─▶ evaluate     "adapted"
                             ├──────── the same architecture, random weights ─ UL2 ─ …   "random"
                             └──────── decoder-only ────── causal LM ─▶ tune ─▶ …        "source"

All three read the same windows of text in the same order, then the same sentence pairs in the same batches, for the
same number of steps: the budget is fixed in steps, so a run repeats. The numbers are computed in that run, whatever
comes out. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from encore import assets
from encore.adapt import adapt
from encore.checkpoint.pretrained import load
from encore.evaluate import report
from encore.evaluate.translation import SentencePair, TranslationResult, evaluate_translation
from encore.generate.decoding import Model
from encore.model.encoder import Encoder
from encore.tokenizer import load_tokenizer
from encore.train.loop import RunResult
from encore.train.metrics import Progress
from encore.train.pretrain import pretrain
from encore.train.recipe import DataRecipe, ModelRecipe, OptimRecipe, Recipe, TrainRecipe
from encore.train.sft import tune

SHOWN = 5


@dataclass(frozen=True)
class Budget:
    """What each of the three gets. Steps, not seconds."""

    pretrain_steps: int = 60
    windows_per_step: int = 8
    window_tokens: int = 256
    text_tokens: int = 1_000_000
    tune_steps: int = 120
    tune_batch_tokens: int = 2048
    pairs: int = 20_000
    test_sentences: int = 500
    threads: int = 2


SHORT = Budget(
    pretrain_steps=3,
    windows_per_step=2,
    window_tokens=64,
    text_tokens=4_000,
    tune_steps=4,
    tune_batch_tokens=256,
    pairs=100,
    test_sentences=8,
)
"""Seconds instead of minutes: for tests, and for a first look that everything runs."""


@dataclass(frozen=True)
class Contestant:
    """One line of the table."""

    name: str
    what: str
    bleu: float
    chrf: float
    validation_loss: float
    pretrain_seconds: float
    tune_seconds: float
    evaluate_seconds: float
    parameters: int


@dataclass(frozen=True)
class DemoResult:
    """What a demo came to: the table, the answers of all to the first held-out sentences, and the whole time."""

    contestants: list[Contestant]
    answers: list[dict[str, str]]
    wall_seconds: float
    report: str
    model: str
    budget: Budget

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def run_demo(
    out: str | Path,
    budget: Budget = Budget(),
    *,
    resume: bool = True,
    say: Callable[[str], None] = lambda _: None,
    make_progress: Callable[[], Progress | None] = lambda: None,
    on_sentences: Callable[[str, int, int], None] = lambda *_: None,
) -> DemoResult:
    """Adapt, continue, tune and evaluate all three into the folder `out`, and write `report.html` there.

    Args:
        say: told what begins.
        make_progress: a fresh progress display for each training run; None = the default one.
        on_sentences: told (who, sentences done, sentences in all) while evaluating.
    """
    begin = time.perf_counter()
    out = Path(out)
    source = assets.path("source")
    adapted = out / "adapted"
    if not resume or not (adapted / "config.json").is_file():
        say("Adapting the shipped decoder-only model into an encoder-decoder (T5Gemma 2)")
        adapt(source, adapted, style="t5gemma2", force=True)
    pairs = [
        SentencePair(row["src"], tuple(row.get("refs") or [row["tgt"]]))
        for row in assets.read_jsonl("pairs/test.jsonl")
    ]
    pairs = pairs[: budget.test_sentences]

    plans = [
        ("adapted", "encoder-decoder, adapted from the source", ModelRecipe(init=str(adapted)), "t5gemma2"),
        ("source", "decoder-only, the source itself", ModelRecipe(init=str(source)), "causal"),
        (
            "random",
            "encoder-decoder, from random weights",
            ModelRecipe(init=str(adapted), weights="random"),
            "t5gemma2",
        ),
    ]
    contestants: list[Contestant] = []
    results: dict[str, TranslationResult] = {}
    runs: dict[str, tuple[RunResult, RunResult]] = {}
    for name, what, init, objective in plans:
        say(f"{what}: {budget.pretrain_steps} steps of {'causal LM' if objective == 'causal' else 'UL2'} on real text")
        first = pretrain(
            _pretraining(init, objective, budget),
            out / name / "pretrain",
            resume=resume,
            progress=make_progress(),
            name=f"{name}: pretrain",
        )
        say(f"{what}: {budget.tune_steps} steps of translating English into German")
        second = tune(
            _tuning(ModelRecipe(init=str(first.model_folder)), budget),
            out / name / "tune",
            resume=resume,
            progress=make_progress(),
            name=f"{name}: tune",
        )
        say(f"{what}: translating {len(pairs)} held-out sentences")
        model, result = _evaluate(
            second.model_folder, pairs, lambda done, who=name: on_sentences(who, done, len(pairs))
        )
        results[name], runs[name] = result, (first, second)
        contestants.append(
            Contestant(
                name=name,
                what=what,
                bleu=round(result.bleu, 2),
                chrf=round(result.chrf, 2),
                validation_loss=round(second.validation_losses[-1][1], 4),
                pretrain_seconds=round(first.wall_seconds, 1),
                tune_seconds=round(second.wall_seconds, 1),
                evaluate_seconds=round(result.seconds, 1),
                parameters=sum(p.numel() for p in model.parameters()),
            )
        )

    shipped = _shipped_answers([pair.source for pair in pairs[:SHOWN]])
    answers = [
        {
            "input": pair.source,
            "reference": pair.references[0],
            **{name: results[name].answers[i] for name in results},
            **({"shipped translator": shipped[i]} if shipped else {}),
        }
        for i, pair in enumerate(pairs[:SHOWN])
    ]
    page = out / "report.html"
    page.write_text(_page(contestants, answers, runs, budget), encoding="utf-8")
    done = DemoResult(
        contestants,
        answers,
        round(time.perf_counter() - begin, 1),
        str(page),
        str(runs["adapted"][1].model_folder),
        budget,
    )
    (out / "result.json").write_text(json.dumps(done.as_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return done


def default_budget() -> Budget:
    """The full budget with as many threads as there are cores, two at most: the figures are for two cores."""
    return replace(Budget(), threads=min(2, os.cpu_count() or 1))


def _pretraining(model: ModelRecipe, objective: str, budget: Budget) -> Recipe:
    return Recipe(
        objective=objective,
        model=model,
        data=DataRecipe(train=("asset:text/train",), max_tokens=budget.text_tokens, window_tokens=budget.window_tokens),
        optim=OptimRecipe(
            learning_rate=1e-3, warmup_steps=min(20, budget.pretrain_steps), final_learning_rate_fraction=0.1
        ),
        train=TrainRecipe(
            steps=budget.pretrain_steps,
            batch_size=budget.windows_per_step,
            accumulation_steps=min(2, budget.windows_per_step),
            checkpoint_every_steps=50,
            evaluate_every_steps=0,
            keep_last=1,
            seed=11,
            threads=budget.threads,
        ),
    )


def _tuning(model: ModelRecipe, budget: Budget) -> Recipe:
    return Recipe(
        objective="pairs",
        model=model,
        data=DataRecipe(
            train=("asset:pairs/train",),
            max_pairs=budget.pairs,
            validation=("asset:pairs/validation",),
            batch_tokens=budget.tune_batch_tokens,
            max_source_tokens=64,
            max_target_tokens=64,
            validation_pairs=min(128, 16 * budget.test_sentences),
        ),
        optim=OptimRecipe(
            learning_rate=2e-3, warmup_steps=min(20, budget.tune_steps), final_learning_rate_fraction=0.05
        ),
        train=TrainRecipe(
            steps=budget.tune_steps,
            checkpoint_every_steps=80,
            evaluate_every_steps=max(1, budget.tune_steps // 4),
            keep_last=1,
            seed=12,
            threads=budget.threads,
        ),
    )


def _evaluate(
    folder: Path, pairs: list[SentencePair], on_done: Callable[[int], None]
) -> tuple[Model, TranslationResult]:
    model = load(folder, "float32")
    assert not isinstance(model, Encoder)
    done = 0

    def count(finished: int) -> None:
        nonlocal done
        done += finished
        on_done(done)

    return model, evaluate_translation(model, load_tokenizer(folder), pairs, on_batch=count)


def _shipped_answers(sources: list[str]) -> list[str]:
    """What the shipped translator, of the same recipe with a longer budget, says."""
    folder = assets.path("translator")
    model = load(folder, "float32")
    assert not isinstance(model, Encoder)
    return evaluate_translation(model, load_tokenizer(folder), [SentencePair(s, (s,)) for s in sources]).answers


def _page(
    contestants: list[Contestant],
    answers: list[dict[str, str]],
    runs: dict[str, tuple[RunResult, RunResult]],
    budget: Budget,
) -> str:
    pretraining = {name: first.losses for name, (first, _) in runs.items()}
    tuning = {name: second.losses for name, (_, second) in runs.items()}
    held_out = {name: second.validation_losses for name, (_, second) in runs.items()}
    parts = [
        report.paragraph(
            "A small decoder-only Gemma was adapted into a T5Gemma 2, continued with UL2 and tuned to translate "
            "English into German. Beside it: the source, continued with causal LM, and the same encoder-decoder from "
            "random weights. All three read the same text in the same order and the same pairs in the same batches: "
            f"{budget.pretrain_steps} and {budget.tune_steps} steps."
        ),
        report.table(
            ["model", "BLEU", "chrF", "loss, nats", "pretrain s", "tune s", "evaluate s", "parameters"],
            [
                [
                    *(c.what, c.bleu, c.chrf, c.validation_loss, c.pretrain_seconds, c.tune_seconds),
                    *(c.evaluate_seconds, f"{c.parameters:,}"),
                ]
                for c in contestants
            ],
        ),
        report.heading("Pretraining"),
        report.paragraph("UL2 and causal LM are different tasks: their losses are not to be compared with each other."),
        report.image(report.curves_png("Pretraining loss", "step", "nats per token", pretraining), "pretraining loss"),
        report.heading("Tuning"),
        report.image(report.curves_png("Tuning loss", "step", "nats per token", tuning), "tuning loss"),
        report.image(report.curves_png("Held-out pairs", "step", "nats per token", held_out), "validation loss"),
        report.heading("Answers to held-out sentences"),
        report.table(list(answers[0]), [list(row.values()) for row in answers]),
    ]
    return report.page("Encore: from a Gemma to an encoder-decoder", parts)
