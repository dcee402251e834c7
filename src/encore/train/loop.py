"""fit(): the one training loop. Forward, backward, clip, step; measure, evaluate, save; continue after any crash.

A step reads `batches(step)`, one batch or several (accumulation). Its loss is the sum over all of them of weighted
negative log-likelihoods divided by the sum of all their weights, so how a step is cut into batches changes nothing but
rounding. Nor does how many processes there are (`parallel.py`): each takes its rows of every batch. Weights and
optimizer are float32; matrix products run in bfloat16 where the machine has it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encore.checkpoint.training import Checkpoint, RunFolder
from encore.data.batch import Batch
from encore.data.pipeline import BatchesOf
from encore.model.t5gemma import T5Gemma
from encore.tokenizer import Tokenizer
from encore.train.balance import Balance
from encore.train.faults import full_disk_explained
from encore.train.loss import Model, resolve_precision, summed_loss
from encore.train.metrics import MetricsFile, Progress, Silent, default_progress, read_metrics
from encore.train.optim import (
    clip_gradients,
    freeze,
    is_cross_attention,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from encore.train.parallel import Processes, open_processes, products_in, reshard, shard, synchronise_gradients
from encore.train.recipe import Recipe, flat
from encore.train.recipe_file import to_toml
from encore.train.saving import Saver
from encore.train.signals import Interrupted, StopSignals
from encore.train.trackers import open_metrics

Evaluate = Callable[[Model], dict[str, float]]
Loss = Callable[[Model, Batch], Tensor]
"""A model and a batch -> the weighted sum over its tokens, in nats; a step's weights come divided by their total."""

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

    Processes that torchrun has started train together: each calls this with the same arguments. The first one alone
    shows progress and writes metrics.

    Args:
        batches: step number -> batches; a pure function, so that the step's number is the whole state of the data.
        data_fingerprint: what must be the same for a resumed run to read the same data.
        evaluate: called every `evaluate_every_steps`, at step 0 and at the end; its values go into the metrics.
            "validation_loss" among them decides which checkpoint is the best, which is kept.
        loss: what is learned from a batch.
        resume: continue from the last checkpoint in the folder; False removes what an earlier run wrote there.

    Raises:
        TrainingDiverged, encore.train.signals.Interrupted, encore.checkpoint.training.OutOfSpace,
        encore.train.parallel.ProcessLost; ValueError when the folder holds another run.
    """
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        processes = stack.enter_context(open_processes(recipe.train))
        shown = (progress or default_progress()) if processes.is_first else Silent()
        stack.callback(shown.close)
        stack.callback(torch.set_num_threads, threads)
        if processes.is_first:
            stack.enter_context(run.lock())
            run.remove_leftovers()
            if not resume:
                run.clear()
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        one = _Fit(model, batches, recipe, run, tokenizer, data_fingerprint, evaluate, loss, shown, name, processes)
        with full_disk_explained(run.path, one.where_safe), processes.watched(one.where_safe):
            return one.run_all()


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
        processes: Processes,
    ) -> None:
        self.model, self.batches, self.recipe, self.folder = model, batches, recipe, run
        self.tokenizer, self.data_fingerprint, self.evaluate = tokenizer, data_fingerprint, evaluate
        self.loss, self.progress, self.name, self.processes = loss, progress, name, processes
        self.device = processes.device
        self.precision = resolve_precision(recipe.train.precision, self.device)
        freeze(model, recipe.optim)
        self.learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        shard(model, processes, recipe.train, self.precision)
        self.optimizer = make_optimizer(model, recipe.optim)
        self.saver = Saver(run, recipe, processes, model, self.optimizer, tokenizer)
        self.balance = Balance()
        self.step = 0
        self.tokens = 0
        self.wall_seconds = 0.0
        self.smoothed_loss: float | None = None
        self.best_smoothed_loss = math.inf
        self.best_validation: tuple[int, float] | None = None

    def run_all(self) -> RunResult:
        latest = self.saver.open()
        self.progress.start(self.name, self.recipe.train.steps, latest.step if latest else 0)
        if latest:
            self._resume(latest)
        with ExitStack() as stack:
            metrics = None
            if self.processes.is_first:
                self.folder.recipe.write_text(to_toml(self.recipe), encoding="utf-8")
                metrics = open_metrics(
                    self.folder.metrics,
                    self.recipe.train.tracker,
                    step=self.step if latest else -1,
                    settings=flat(self.recipe),
                    note=self.progress.note,
                )
                stack.callback(metrics.close)
            self._train(metrics, stack.enter_context(StopSignals()))
        done = latest is not None and latest.step == self.recipe.train.steps and self.folder.model.is_dir()
        if not self.processes.told(done) and (note := self.saver.write_model()):
            self.progress.note(note)
        return result_of(self.folder)

    def _train(self, metrics: MetricsFile | None, stop: StopSignals) -> None:
        settings = self.recipe.train
        before, start = self.wall_seconds, time.perf_counter()
        if self.step == 0 and self.evaluate:
            row = {"step": 0, **self._evaluate(), "wall_seconds": round(time.perf_counter() - start, 3)}
            if metrics:
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
            if metrics and (last or evaluated or _due(self.step, settings.log_every_steps)):
                metrics.write(row)
            self.progress.step(row)
            asked_to_stop = self._agree(stop)
            if last or asked_to_stop or _due(self.step, settings.checkpoint_every_steps):
                if metrics:
                    metrics.sync()
                self._save(row.get("validation_loss"))
            if last or asked_to_stop:
                self.saver.finish()
            if asked_to_stop and not last:
                message = f"stopped after step {self.step}; {self.where_safe()}, and the same command goes on"
                raise Interrupted(asked_to_stop, message)

    def _agree(self, stop: StopSignals) -> int | None:
        """The signal that any process has got; and a checkpoint that all have written is given its name."""
        signals, written = zip(*self.processes.every(stop.signal or 0, self.saver.written), strict=True)
        if all(written):
            self.saver.finish()
        return int(max(signals)) or None

    def _step(self) -> tuple[dict[str, Any], int]:
        """One optimizer step: the row to log, and its tokens."""
        rate = learning_rate(self.step, self.recipe.train.steps, self.recipe.optim)
        set_learning_rate(self.optimizer, rate)
        self._thaw()
        self.model.train()
        batches = self.batches(self.step)
        total_weight = sum(batch.total_weight for batch in batches)
        parts = []
        for number, batch in enumerate(batches):
            synchronise_gradients(self.model, number == len(batches) - 1)
            with self._products():
                rows = self.processes.rows(batch).to(self.device)
                weights = rows.decoder_loss_weights / total_weight
                part = self.loss(self.model, replace(rows, decoder_loss_weights=weights))
            parts.append(part.detach())
            part.backward()
        losses = self.processes.total_losses(torch.stack(parts).tolist())
        loss = sum(losses)
        if not math.isfinite(loss):
            raise TrainingDiverged(self._bad_news(self._cause(batches, losses)))
        named, norm = self.model.named_parameters(), self.recipe.optim.max_gradient_norm
        norms = clip_gradients(named, norm, self.processes.squared_norms)
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

    def _cause(self, batches: Sequence[Batch], losses: Sequence[float]) -> str:
        """Which batch gave a loss that is no number, and why."""
        number = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(batches) - 1)
        with self._products():
            cause = self.processes.culprits(self.model, batches[number].to(self.device), self.loss, self.tokenizer)
        return f"the loss of batch {number + 1} of {len(batches)} is {losses[number]}, {cause}"

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
        self.saver.finish()
        return (
            f"training diverged in step {self.step + 1}: {what}; {self.where_safe()}. "
            "Lower optim.learning_rate, lengthen optim.warmup_steps, or look at the data of that step"
        )

    def where_safe(self) -> str:
        last = self.saver.last
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
        with torch.no_grad(), self._products():
            found = self.evaluate(self.model)
        reshard(self.model)
        return found

    def _products(self) -> AbstractContextManager[Any]:
        return products_in(self.precision, self.processes)

    def _save(self, validation_loss: float | None) -> None:
        if weight := self.processes.first_not_finite(self.model):
            raise TrainingDiverged(self._bad_news(f"the weights are not finite any more (first {weight})"))
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
        best = {self.best_validation[0]} if self.best_validation else set[int]()
        self.saver.save(self.step, state, best.union(self.recipe.train.averaged_steps))

    def _machine(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "precision": str(self.precision).removeprefix("torch."),
            "processes": self.processes.world,
            "tensor_parallel": self.processes.tensor_parallel,
        }

    def _resume(self, checkpoint: Checkpoint) -> None:
        self.saver.check_continues(checkpoint, self.data_fingerprint)
        state = self.saver.restore(checkpoint)
        self.step, self.tokens, self.wall_seconds = checkpoint.step, state["tokens"], state["wall_seconds"]
        self.smoothed_loss = state["smoothed_loss"]
        self.best_smoothed_loss = math.inf if state["best_smoothed_loss"] is None else state["best_smoothed_loss"]
        self.best_validation = tuple(state["best_validation"]) if state["best_validation"] else None
        self.progress.note(f"continuing after step {self.step} of {checkpoint.folder}")
        before = {"processes": 1, "tensor_parallel": 1, **state["machine"]}
        for key, value in self._machine().items():
            if (old := before[key]) != value:
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
