"""A teacher's top-k logits for everything that a run will read, written once: `encore distill-logits`.

    plan      every batch of the run is made and counted, without the teacher: so the size is known and said first
    write     every batch once more, through the teacher; a folder that is whole or absent

Examples that come again (epochs of pairs) are asked about once. See `data/teacher_logits.py` for the folder.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from encore.checkpoint import CheckpointError, provenance
from encore.checkpoint.training import write_folder
from encore.data.batch import Batch
from encore.data.teacher_logits import Manifest, example_key, spoken_size, write_teacher_logits
from encore.model.t5gemma import T5Gemma
from encore.objectives.distill import top_of_teacher
from encore.train.distill import LiveTeacher, open_distillation
from encore.train.feed import open_feed
from encore.train.models import open_model, open_tokenizer
from encore.train.recipe import Recipe

Batches = Callable[[], Iterable[Batch]]
"""Each call goes once through all batches of a run, in the same order."""


@dataclass(frozen=True)
class Plan:
    """What is going to be written; as text, its size."""

    manifest: Manifest
    keys: list[bytes]
    lengths: list[int]

    def __str__(self) -> str:
        m = self.manifest
        return (
            f"{m.num_examples:,} examples, {m.num_tokens:,} tokens x {m.top_k} logits of {m.teacher}: "
            f"{spoken_size(m.num_bytes)}"
        )


def distill_logits(
    recipe: Recipe,
    out: Path,
    *,
    force: bool = False,
    note: Callable[[str], None] = lambda message: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write what `distill.teacher` says about everything that the recipe trains and validates on.

    Args:
        force: replace a folder that is there.
        note: is told the size before the writing begins.
        progress: is told the bytes written and those in all.

    Raises ValueError for a recipe without a teacher, CheckpointError when the disk has not the room, OutOfSpace when it
    fills up meanwhile.
    """
    provenance.check_out(out, (), force)
    if recipe.distill.logits or not recipe.distill.teacher:
        raise ValueError("logits are written of a teacher that runs: set distill.teacher, and leave distill.logits out")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=0))
    tokenizer = open_tokenizer(recipe.model)
    student = open_model(recipe.model, tokenizer, recipe.train.seed)
    feed = open_feed(recipe, tokenizer, encoder=isinstance(student, T5Gemma))
    opened = open_distillation(recipe, feed.tokenizer, student.head_weight.shape[0])
    del student
    assert opened is not None and isinstance(opened.teacher, LiveTeacher)

    def batches() -> Iterator[Batch]:
        for step in range(recipe.train.steps):
            yield from feed.batches(step)
        for part in feed.validation:
            yield from part.batches

    plan = plan_logits(opened.teacher, recipe, batches)
    note(f"{out}: {plan}")
    write_logits(out, plan, opened.teacher, batches, torch.device(recipe.train.device), progress)
    return plan.manifest


def plan_logits(teacher: LiveTeacher, recipe: Recipe, batches: Batches) -> Plan:
    """Count what a run reads, without running the teacher."""
    top_k = recipe.distill.top_k
    if not 0 < top_k <= teacher.vocab_size:
        raise ValueError(f"distill.top_k is {top_k}; expected 1 to {teacher.vocab_size}, the vocabulary")
    found: dict[bytes, int] = {}
    for batch in batches():
        found |= {example_key(example): len(example.taught) for example in teacher.layout.examples(batch)}
    manifest = Manifest(
        teacher=provenance.spoken_name(recipe.distill.teacher, Path(recipe.distill.teacher)),
        fingerprint=teacher.fingerprint,
        vocab_size=teacher.vocab_size,
        top_k=top_k,
        temperature=recipe.distill.temperature,
        num_examples=len(found),
        num_tokens=sum(found.values()),
    )
    return Plan(manifest, list(found), list(found.values()))


def write_logits(
    folder: Path,
    plan: Plan,
    teacher: LiveTeacher,
    batches: Batches,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run the teacher over all batches and write the folder, all or nothing.

    Raises CheckpointError when the disk has not the room that the plan needs, OutOfSpace when it fills up meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < plan.manifest.num_bytes:
        raise CheckpointError(
            f"{folder} will take {spoken_size(plan.manifest.num_bytes)}, but only {spoken_size(free)} are free there; "
            "lower distill.top_k or train.steps, or choose another --out"
        )

    def write(temporary: Path) -> None:
        parts = _parts(plan.manifest, teacher, batches, device)
        write_teacher_logits(temporary, plan.manifest, plan.keys, plan.lengths, parts, progress)

    write_folder(folder, write, hint="free some space, or lower distill.top_k, and give the same command again")


def _parts(
    manifest: Manifest, teacher: LiveTeacher, batches: Batches, device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The tokens of each batch's examples that were not met before, in the order in which they were counted."""
    met: set[bytes] = set()
    for batch in batches():
        new = torch.zeros_like(batch.decoder_loss_weights)
        for example in teacher.layout.examples(batch):
            if (key := example_key(example)) not in met:
                met.add(key)
                new[example.row, example.start : example.start + len(example.target)] = 1
        if not new.any():
            continue
        fresh = dataclasses.replace(batch, decoder_loss_weights=batch.decoder_loss_weights * new)
        states, taught = teacher.about(fresh.to(device))
        top = top_of_teacher(states.select(taught[taught >= 0]), manifest.top_k, temperature=manifest.temperature)
        yield top.ids.cpu().numpy(), top.log_probabilities.float().cpu().numpy(), top.log_rest.float().cpu().numpy()
