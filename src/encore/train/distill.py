"""Distillation: the student's decoder learns, token by token, what a decoder-only teacher makes of the same text.

    [distill]  teacher = "asset:source"              the teacher runs beside the student            (LiveTeacher)
               logits = "runs/logits"                 its top-k distributions are read back instead  (StoredTeacher)

T5Gemma was adapted so (PrefixLM + KD, arXiv 2504.06225, section 3), and T5Gemma 2's ablation UL2 + KD takes one-hot
targets for masking tokens (arXiv 2512.14856, section 4). What the teacher reads and which target token it speaks about
is said in `data/teacher_text.py`, the loss in `objectives/distill.py`. `fit(…, loss=Distillation(…))`: the loss depends
on model and batch alone, so a run resumes bit for bit, and every process of several has its own teacher.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from encore.checkpoint import hub, provenance
from encore.checkpoint.pretrained import load
from encore.data.batch import Batch
from encore.data.teacher_logits import TeacherLogits
from encore.data.teacher_text import TeacherText, teacher_rows
from encore.model.gemma import Gemma
from encore.objectives import ul2
from encore.objectives.distill import Teacher, TeacherStates, TeacherTop, distillation
from encore.tokenizer import Tokenizer
from encore.train.loss import Model, mean_loss, resolve_precision, summed_loss, target_states
from encore.train.recipe import Recipe


class Speaks(Protocol):
    """A teacher: what it says of a batch's target tokens, and a digest that changes with what it would say."""

    fingerprint: str

    def about(self, batch: Batch) -> tuple[Teacher, Int[Tensor, "B T"]]:
        """Its tokens, and for each target token which of them speaks about it (-1: none)."""
        ...


class LiveTeacher:
    """A frozen Gemma that reads the text of each batch. It knows ids 0 to `vocab_size` - 1."""

    def __init__(self, model: Gemma, layout: TeacherText, vocab_size: int, fingerprint: str = "") -> None:
        rows = model.head_weight.shape[0]
        if rows < vocab_size:
            raise ValueError(f"the teacher knows {rows} ids, the student {vocab_size}; they need the same vocabulary")
        self.model = model.eval().requires_grad_(False)
        self.layout, self.vocab_size, self.fingerprint = layout, vocab_size, fingerprint

    @torch.no_grad()
    def about(self, batch: Batch) -> tuple[TeacherStates, Int[Tensor, "B T"]]:
        """The states over which its head, cut to the student's vocabulary, gives the distributions."""
        self.model.to(batch.decoder_target_tokens.device)
        head, softcap = self.model.head_weight[: self.vocab_size], self.model.config.final_logit_softcapping
        rows = teacher_rows(batch, self.layout)
        if rows is None:
            nobody = torch.full_like(batch.decoder_target_tokens, -1)
            return TeacherStates(head.new_empty((0, head.shape[1])), head, softcap), nobody
        states = self.model.states(rows.tokens, segment_ids=rows.segment_ids)
        return TeacherStates(states.flatten(0, 1), head, softcap), rows.taught


class StoredTeacher:
    """Top-k distributions, written once and read back."""

    def __init__(self, logits: TeacherLogits, layout: TeacherText) -> None:
        self.logits, self.layout, self.fingerprint = logits, layout, logits.fingerprint

    def about(self, batch: Batch) -> tuple[TeacherTop, Int[Tensor, "B T"]]:
        """The stored tokens of the batch's examples; raises MissingExample where there are none."""
        taught = np.full(tuple(batch.decoder_target_tokens.shape), -1, np.int64)
        rows: list[np.ndarray] = [np.zeros(0, np.int64)]
        number = 0
        for example in self.layout.examples(batch):
            stored = self.logits.rows(example)
            spoken = example.taught
            taught[example.row, example.start + spoken] = number + np.arange(len(spoken))
            rows.append(np.arange(stored.start, stored.stop))
            number += len(spoken)
        where, device = np.concatenate(rows), batch.decoder_target_tokens.device
        ids, top, rest = (
            torch.from_numpy(array[where].astype(dtype)).to(device)
            for array, dtype in (
                (self.logits.ids, np.int64),
                (self.logits.log_probabilities, np.float32),
                (self.logits.log_rest, np.float32),
            )
        )
        # Rounded to 16 bits they may sum to a little more or less than all there is.
        total = torch.logaddexp(top.logsumexp(dim=1), rest)
        return TeacherTop(ids, top - total[:, None], rest - total), torch.from_numpy(taught).to(device)


@dataclass(frozen=True)
class Distillation:
    """A loss for `fit`: summed over the batch, weighted, in nats. Tokens without a teacher are learned one-hot."""

    teacher: Speaks
    temperature: float = 1.0
    alpha: float = 1.0

    def __call__(self, model: Model, batch: Batch) -> Tensor:
        """Differentiable; divide by the batch's total weight for the mean."""
        if self.alpha == 0:
            return summed_loss(model, batch)
        teacher, taught = self.teacher.about(batch)
        return self._loss(model, batch, teacher, taught, batch.decoder_loss_weights, self.temperature, self.alpha)

    @torch.no_grad()
    def mean_divergence(self, model: Model, batches: Sequence[Batch]) -> float:
        """KL(teacher || student) in nats per token that the teacher speaks about; for validation."""
        total = weight = 0.0
        for batch in batches:
            batch = batch.to(model.head_weight.device)
            teacher, taught = self.teacher.about(batch)
            weights = batch.decoder_loss_weights * (taught >= 0)
            total += float(self._loss(model, batch, teacher, taught, weights, self.temperature, 1.0))
            weight += float(weights.sum(dtype=torch.float64))
        return total / self.temperature**2 / weight if weight else 0.0

    def _loss(
        self, model: Model, batch: Batch, teacher: Teacher, taught: Tensor, weights: Tensor, *factors: float
    ) -> Tensor:
        temperature, alpha = factors
        loss, _ = distillation(
            target_states(model, batch).flatten(0, 1),
            model.head_weight,
            batch.decoder_target_tokens.flatten(),
            teacher,
            taught.flatten(),
            weights.flatten(),
            model.config.final_logit_softcapping,
            temperature=temperature,
            alpha=alpha,
        )
        return loss


def evaluation(batches: Sequence[Batch], distillation: Distillation | None) -> Callable[[Model], dict[str, float]]:
    """For `fit`: the plain cross-entropy as "validation_loss", comparable over all runs, and how far the teacher is."""

    def evaluate(model: Model) -> dict[str, float]:
        values = {"validation_loss": mean_loss(model, batches)}
        if distillation:
            values["validation_divergence"] = distillation.mean_divergence(model, batches)
        return values

    return evaluate


def open_distillation(recipe: Recipe, tokenizer: Tokenizer, vocab_size: int) -> Distillation | None:
    """The loss that `[distill]` asks for, for a student of `vocab_size` ids; None if it names no teacher."""
    settings = recipe.distill
    if not (settings.logits or settings.teacher):
        return None
    layout = _layout(recipe, tokenizer)
    if settings.logits:
        logits = TeacherLogits(settings.logits)
        if logits.manifest.temperature != settings.temperature or logits.manifest.vocab_size != vocab_size:
            raise ValueError(
                f"{logits.folder} holds logits of temperature {logits.manifest.temperature} over "
                f"{logits.manifest.vocab_size} ids; the run has distill.temperature {settings.temperature} and "
                f"{vocab_size} ids"
            )
        return Distillation(StoredTeacher(logits, layout), settings.temperature, settings.alpha)
    return Distillation(_open_teacher(recipe, tokenizer, layout, vocab_size), settings.temperature, settings.alpha)


def _layout(recipe: Recipe, tokenizer: Tokenizer) -> TeacherText:
    objectives = {source.objective or recipe.objective for source in recipe.data.sources} or {recipe.objective}
    if "pairs" in objectives and len(objectives) > 1:
        raise ValueError(
            f"the mixture has the objectives {', '.join(sorted(objectives))}: a teacher reads pairs and other text "
            'differently and cannot tell them apart in a batch; distil from "pairs" in a run of their own'
        )
    if unknown := objectives - {"causal", "pairs", *ul2.MIXTURES}:
        raise ValueError(
            f"distillation is of text, but the objective is {', '.join(sorted(unknown))}; a teacher can be had with "
            f"causal, pairs, {', '.join(name for name in ul2.MIXTURES if name != 'causal')}"
        )
    modes = (tokenizer.token_id(piece) for piece in recipe.data.mode_tokens)
    return TeacherText(tokenizer, pairs=objectives == {"pairs"}, mode_ids=[i for i in modes if i is not None])


def _open_teacher(recipe: Recipe, tokenizer: Tokenizer, layout: TeacherText, vocab_size: int) -> LiveTeacher:
    """Its weights are held as the products are made: bfloat16 where those are."""
    name = recipe.distill.teacher
    folder = hub.resolve(name.removeprefix("asset:"))
    model = load(folder, resolve_precision(recipe.train.precision, torch.device(recipe.train.device)))
    if not isinstance(model, Gemma):
        raise ValueError(f"distill.teacher is {name}, a {type(model).__name__}; expected a decoder-only Gemma")
    _check_vocabulary(name, folder, tokenizer)
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(provenance.sha256(path).encode())
    return LiveTeacher(model, layout, vocab_size, digest.hexdigest())


def _check_vocabulary(name: str, folder: Path, tokenizer: Tokenizer) -> None:
    """The same ids must mean the same pieces; a folder without a tokenizer is taken at its word."""
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        return
    other = hub.load_tokenizer(folder)
    first = next((i for i in range(tokenizer.vocab_size) if _piece(tokenizer, i) != _piece(other, i)), None)
    if first is not None:
        raise ValueError(
            f"the teacher {name} has another vocabulary: id {first} is {_piece(other, first)!r} there and "
            f"{_piece(tokenizer, first)!r} here; distillation needs the same"
        )


def _piece(tokenizer: Tokenizer, token: int) -> bytes | None:
    with contextlib.suppress(ValueError, IndexError):
        return tokenizer.token_bytes(token)
    return None
