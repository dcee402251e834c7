"""fit(): the one training loop. Forward, backward, clip, step; measure, evaluate, save; continue after any crash.

A step reads `batches(step)`, one batch or several (accumulation). Its loss is the sum over all of them of weighted
negative log-likelihoods divided by the sum of all their weights, so how a step is cut into batches changes nothing but
rounding. Weights and optimizer are float32; matrix products run in bfloat16 where the machine has it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encore.checkpoint.averaging import average
from encore.checkpoint.pretrained import load, save
from encore.checkpoint.training import Checkpoint, RunFolder, restore_checkpoint, save_checkpoint, write_folder
from encore.data.batch import Batch
from encore.data.pipeline import BatchesOf
from encore.model.t5gemma import T5Gemma
from encore.tokenizer import Tokenizer
from encore.train.balance import Balance
from encore.train.loss import Model, resolve_precision, summed_loss
from encore.train.metrics import MetricsFile, Progress, default_progress, read_metrics
from encore.train.optim import (
    clip_gradients,
    freeze,
    is_cross_attention,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from encore.train.recipe import Recipe
from encore.train.recipe_file import differences, load_recipe, to_toml
from encore.train.signals import Interrupted, StopSignals

Evaluate = Callable[[Model], dict[str, float]]
Loss = Callable[[Model, Batch], Tensor]
"""A model and a batch -> the weighted sum over its tokens, in nats; the step divides by the batches' total weight."""

MAY_CHANGE = {
    "data.cache_folder",
    *(f"train.{key}" for key in ("threads", "device", "keep_last", "output_dtype")),
    *(f"train.{event}_every_steps" for event in ("log", "evaluate", "checkpoint")),
}
"""Keys that a resumed run may have changed: none of them touches what is learned."""

_SMOOTHING = 0.9
_SETTLING_STEPS = 10  # before this the smoothed loss is not compared with


class TrainingDiverged(ValueError):
    """The loss is not a number, or far above where it was."""


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `losses` and `validation_losses` are (step, nats per token)."""

    folder: Path
    model_folder: Path
    steps: int
    tokens: int
    wall_seconds: float
    losses: list[tuple[int, float]]
    validation_losses: list[tuple[int, float]]


def fit(
    model: Model,
    batches: BatchesOf,
    recipe: Recipe,
    run: RunFolder,
    *,
    tokenizer: Tokenizer,
    data_fingerprint: str,
    evaluate: Evaluate | None = None,
    loss: Loss = summed_loss,
    resume: bool = True,
    progress: Progress | None = None,
    name: str = "train",
) -> RunResult:
    """Train `model` (float32, changed in place) for recipe.train.steps and write the run folder.

    Args:
        batches: step number -> batches; a pure function, so that the step's number is the whole state of the data.
        data_fingerprint: what must be the same for a resumed run to read the same data.
        evaluate: called every `evaluate_every_steps`, at step 0 and at the end; its values go into the metrics.
            "validation_loss" among them decides which checkpoint is the best, which is kept.
        loss: what is learned from a batch.
        resume: continue from the last checkpoint in the folder; False removes what an earlier run wrote there.

    Raises:
        TrainingDiverged, encore.train.signals.Interrupted, encore.checkpoint.training.OutOfSpace; ValueError when the
        folder holds another run.
    """
    shown = progress or default_progress()
    threads = torch.get_num_threads()
    with run.lock():
        run.remove_leftovers()
        if not resume:
            run.clear()
        try:
            if recipe.train.threads:
                torch.set_num_threads(recipe.train.threads)
            return _Fit(model, batches, recipe, run, tokenizer, data_fingerprint, evaluate, loss, shown, name).run_all()
        finally:
            torch.set_num_threads(threads)
            shown.close()


class _Fit:
    """The state of one fit() call."""

    def __init__(
        self,
        model: Model,
        batches: BatchesOf,
        recipe: Recipe,
        run: RunFolder,
        tokenizer: Tokenizer,
        data_fingerprint: str,
        evaluate: Evaluate | None,
        loss: Loss,
        progress: Progress,
        name: str,
    ) -> None:
        self.model, self.batches, self.recipe, self.folder = model, batches, recipe, run
        self.tokenizer, self.data_fingerprint, self.evaluate = tokenizer, data_fingerprint, evaluate
        self.loss, self.progress, self.name = loss, progress, name
        self.device = torch.device(recipe.train.device)
        self.precision = resolve_precision(recipe.train.precision, self.device)
        self.model.to(self.device)
        freeze(model, recipe.optim)
        self.learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.optimizer = make_optimizer(model, recipe.optim)
        self.balance = Balance()
        self.step = 0
        self.tokens = 0
        self.wall_seconds = 0.0
        self.smoothed_loss: float | None = None
        self.best_smoothed_loss = math.inf
        self.best_validation: tuple[int, float] | None = None
        self._checkpoint: Checkpoint | None = None

    def run_all(self) -> RunResult:
        latest = self.folder.latest()
        self.progress.start(self.name, self.recipe.train.steps, latest.step if latest else 0)
        if latest:
            self._resume(latest)
        else:
            self.folder.clear()
        self.folder.recipe.write_text(to_toml(self.recipe), encoding="utf-8")
        metrics = MetricsFile(self.folder.metrics, step=self.step if latest else -1)
        try:
            with StopSignals() as stop:
                self._train(metrics, stop)
        finally:
            metrics.close()
        if not (latest and latest.step == self.recipe.train.steps and self.folder.model.is_dir()):
            write_folder(self.folder.model, self._write_result)
        return result_of(self.folder)

    def _train(self, metrics: MetricsFile, stop: StopSignals) -> None:
        settings = self.recipe.train
        before, start = self.wall_seconds, time.perf_counter()
        if self.step == 0 and self.evaluate:
            row = {"step": 0, **self._evaluate(), "wall_seconds": round(time.perf_counter() - start, 3)}
            metrics.write(row)
        while self.step < settings.steps:
            step_start = time.perf_counter()
            row, step_tokens = self._step()
            step_seconds = time.perf_counter() - step_start
            last = self.step == settings.steps
            evaluated = self.evaluate and (last or _due(self.step, settings.evaluate_every_steps))
            if evaluated:
                row |= self._evaluate()
            self.wall_seconds = before + time.perf_counter() - start
            row["tokens_per_second"] = round(step_tokens / step_seconds, 1)
            row["wall_seconds"] = round(self.wall_seconds, 3)
            if last or evaluated or _due(self.step, settings.log_every_steps):
                metrics.write(row)
            self.progress.step(row)
            if last or stop.signal or _due(self.step, settings.checkpoint_every_steps):
                metrics.sync()
                self._save(row.get("validation_loss"))
            if stop.signal and not last:
                message = f"stopped after step {self.step}; {self._where_safe()}, and the same command goes on"
                raise Interrupted(stop.signal, message)

    def _step(self) -> tuple[dict[str, Any], int]:
        """One optimizer step: the row to log, and its tokens."""
        rate = learning_rate(self.step, self.recipe.train.steps, self.recipe.optim)
        set_learning_rate(self.optimizer, rate)
        self._thaw()
        self.model.train()
        batches = self.batches(self.step)
        total_weight = sum(batch.total_weight for batch in batches)
        loss = 0.0
        for batch in batches:
            with self._autocast():
                part = self.loss(self.model, batch.to(self.device)) / total_weight
            loss += part.item()
            if not math.isfinite(loss):
                raise TrainingDiverged(self._bad_news(f"the loss is {loss}"))
            part.backward()
        norms = clip_gradients(self.model.named_parameters(), self.recipe.optim.max_gradient_norm)
        if not math.isfinite(norms["gradient_norm"]):
            raise TrainingDiverged(self._bad_news(f"the norm of the gradients is {norms['gradient_norm']}"))
        if warning := self.balance.look(self.step + 1, norms):
            self.progress.note(warning)
        self._watch(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        step_tokens = sum(batch.num_tokens for batch in batches)
        self.tokens += step_tokens
        row = {"step": self.step, "loss": loss, "learning_rate": rate, "tokens": self.tokens, **norms}
        return row, step_tokens

    def _watch(self, loss: float) -> None:
        """Stop before the step that would follow a loss far above what was reached."""
        allowed = self.recipe.train.divergence_nats
        previous = loss if self.smoothed_loss is None else self.smoothed_loss
        self.smoothed_loss = _SMOOTHING * previous + (1 - _SMOOTHING) * loss
        if allowed and self.smoothed_loss > self.best_smoothed_loss + allowed:
            raise TrainingDiverged(
                self._bad_news(f"the smoothed loss is {self.smoothed_loss:.2f}, was {self.best_smoothed_loss:.2f}")
            )
        if self.step >= _SETTLING_STEPS:
            self.best_smoothed_loss = min(self.best_smoothed_loss, self.smoothed_loss)

    def _bad_news(self, what: str) -> str:
        return (
            f"training diverged in step {self.step + 1}: {what}; {self._where_safe()}. "
            "Lower optim.learning_rate, lengthen optim.warmup_steps, or look at the data of that step"
        )

    def _where_safe(self) -> str:
        last = self._checkpoint or self.folder.latest()
        return f"the last good checkpoint is {last.folder}" if last else "there is no checkpoint yet"

    def _thaw(self) -> None:
        """For the first `cross_attention_warmup_steps` only the cross-attention learns (T5Gemma paper, section 2)."""
        warmup = self.recipe.optim.cross_attention_warmup_steps
        if warmup and isinstance(self.model, T5Gemma):
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self.learning and (self.step >= warmup or is_cross_attention(name)))

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluate is not None
        self.model.eval()
        with torch.no_grad(), self._autocast():
            return self.evaluate(self.model)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    def _save_model(self, folder: Path, dtype: torch.dtype) -> None:
        model = self.model if dtype == torch.float32 else copy.deepcopy(self.model).to(dtype)
        save(model, folder, tokenizer=self.tokenizer)

    def _write_result(self, folder: Path) -> None:
        """RUN/model: the weights as they are, or the mean of the last checkpoints (T5Gemma 2 paper: of five)."""
        dtype, steps = getattr(torch, self.recipe.train.output_dtype), self.recipe.train.averaged_steps
        if len(steps) == 1:
            self._save_model(folder, dtype)
            return
        kept = {checkpoint.step: checkpoint.folder for checkpoint in self.folder.checkpoints()}
        if missing := [str(step) for step in steps if step not in kept]:
            raise ValueError(
                f"{self.folder.checkpoints_folder} lacks step {', '.join(missing)}, which RUN/model should be averaged "
                "from; average the others with `encore average`, or train anew with --no-resume"
            )
        average([kept[step] for step in steps], folder, dtype=dtype)
        self.progress.note(f"the model is the mean of the checkpoints of steps {', '.join(map(str, steps))}")

    def _save(self, validation_loss: float | None) -> None:
        if validation_loss is not None and validation_loss < (self.best_validation or (0, math.inf))[1]:
            self.best_validation = (self.step, validation_loss)
        state = {
            "tokens": self.tokens,
            "wall_seconds": self.wall_seconds,
            "smoothed_loss": self.smoothed_loss,
            "best_smoothed_loss": None if math.isinf(self.best_smoothed_loss) else self.best_smoothed_loss,
            "best_validation": self.best_validation,
            "data": self.data_fingerprint,
            "machine": self._machine(),
        }
        self._checkpoint = save_checkpoint(
            self.folder,
            self.step,
            self.model,
            self.optimizer,
            state,
            save_model=lambda folder: self._save_model(folder, torch.float32),
            recipe=to_toml(self.recipe),
        )
        best = {self.best_validation[0]} if self.best_validation else set[int]()
        self.folder.prune(self.recipe.train.keep_last, best.union(self.recipe.train.averaged_steps))

    def _machine(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "precision": str(self.precision).removeprefix("torch."),
        }

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        before = load_recipe(checkpoint.folder / "training" / "recipe.toml")
        averaged = self.recipe.train.average_last > 1  # then what is kept when makes the model
        may_change = MAY_CHANGE - ({"train.checkpoint_every_steps"} if averaged else set())
        changed = {k: v for k, v in differences(before, self.recipe).items() if k not in may_change}
        if changed:
            listed = ", ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
            raise ValueError(
                f"{self.folder.path} holds a run of another recipe ({listed}); give another --out, "
                "or --no-resume to start anew"
            )
        if state["data"] != self.data_fingerprint:
            raise ValueError(
                f"{self.folder.path} holds a run on other data or with another tokenizer; give another --out, "
                "or --no-resume to start anew"
            )
        restore_checkpoint(
            checkpoint, self.model, self.optimizer, load_model=lambda path: load(path, torch.float32).state_dict()
        )
        self._checkpoint = checkpoint
        self.step, self.tokens, self.wall_seconds = checkpoint.step, state["tokens"], state["wall_seconds"]
        self.smoothed_loss = state["smoothed_loss"]
        self.best_smoothed_loss = math.inf if state["best_smoothed_loss"] is None else state["best_smoothed_loss"]
        self.best_validation = tuple(state["best_validation"]) if state["best_validation"] else None
        self.progress.note(f"continuing after step {self.step} of {checkpoint.folder}")
        for key, value in self._machine().items():
            if state["machine"][key] != value:
                old = state["machine"][key]
                self.progress.note(f"note: {key} was {old}, is {value}; the run continues, but not bit for bit")


def result_of(run: RunFolder) -> RunResult:
    """The result of a finished run, read from its folder."""
    rows = read_metrics(run.metrics)
    latest = run.latest()
    state = latest.state() if latest else {"step": 0, "tokens": 0, "wall_seconds": 0.0}
    return RunResult(
        folder=run.path,
        model_folder=run.model,
        steps=state["step"],
        tokens=state["tokens"],
        wall_seconds=state["wall_seconds"],
        losses=[(row["step"], row["loss"]) for row in rows if "loss" in row],
        validation_losses=[(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row],
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
