"""How well a model reads long sources: examples of RULER and MRCR, its greedy answers, and scores by task and length.

    tasks x lengths ─ make_examples ─▶ Example … ─ answer ─▶ text … ─ score ─▶ Cell(task, length, score), …

An encoder-decoder reads a source whole, or in chunks with the question before each. Lengths past the trained one are
read with stretched positions (`stretch`).
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from encore.config import GemmaConfig, ModelConfig, StackConfig, T5GemmaConfig
from encore.evaluate.examples import Count, Example, Style
from encore.evaluate.haystack import DoesNotFit, Library
from encore.evaluate.mrcr import MRCR_TASKS, mrcr_examples
from encore.evaluate.report import Panel
from encore.evaluate.ruler import ANSWER_TOKENS, TASKS, RulerSettings, ruler_examples
from encore.generate.batch import generate
from encore.generate.onnx_backend import OnnxModel
from encore.generate.padding import by_length
from encore.generate.rows import source_limit
from encore.generate.sampling import SamplingSettings
from encore.generate.source import SourceReader
from encore.tokenizer import Tokenizer

ALL_TASKS = (*TASKS, *MRCR_TASKS)
NEEDLE_TOKENS = 128
"""How many tokens an answer about needles may take, as published."""


@dataclass(frozen=True)
class Suite:
    """Which examples are asked, in the order of tasks, then lengths."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    num_examples: int = 20
    seed: int = 0
    style: Style = field(default_factory=Style)
    ruler: RulerSettings = field(default_factory=RulerSettings)

    def __post_init__(self) -> None:
        if unknown := [task for task in self.tasks if task not in ALL_TASKS]:
            raise ValueError(f"no task is called {unknown[0]!r}; expected some of {', '.join(ALL_TASKS)}")
        if not self.tasks or not self.lengths or min(self.lengths) < 1 or self.num_examples < 1:
            raise ValueError("give at least one task, one length above 0 and one example each")

    @property
    def library(self) -> Library:
        return self.ruler.library

    def examples(self, task: str, length: int, count: Count) -> Iterator[Example]:
        """Those of one task at one length. ValueError where it does not fit."""
        how = {"seed": self.seed, "style": self.style}
        if task in MRCR_TASKS:
            return mrcr_examples(task, length, self.num_examples, count, library=self.library, **how)
        return ruler_examples(task, length, self.num_examples, count, settings=self.ruler, **how)

    def written(self, count: Count, note: Callable[[str], None]) -> Iterator[list[Example]]:
        """The examples of each task and length, in order; `note` is told what does not fit and is left out."""
        for task, length in itertools.product(self.tasks, self.lengths):
            try:
                yield list(self.examples(task, length, count))
            except DoesNotFit as error:
                note(f"left out: {error}")


@dataclass(frozen=True)
class Reading:
    """How a model is asked.

    `chunk_tokens` cuts the prompt into chunks with the question before each; None = whole. `opening` puts the
    beginning of the answer behind the prompt, for models that only continue text.
    """

    chunk_tokens: int | None = None
    opening: bool = False
    batch_size: int = 4


@dataclass(frozen=True)
class Cell:
    """The mean score (0..1) of one model at one task and length, and the answers that it is the mean of."""

    model: str
    task: str
    length: int
    score: float
    answers: tuple[str, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "task": self.task,
            "length": self.length,
            "score": round(self.score, 4),
            "examples": len(self.answers),
            "seconds": round(self.seconds, 3),
        }


def evaluate(
    name: str,
    model: Any,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    reading: Reading | None = None,
    on_answer: Callable[[], None] | None = None,
) -> Cell:
    """A model's greedy answers to the examples of one task and length, scored by the task's rule.

    Args:
        model: anything that generates: T5Gemma, Gemma or an exported model.

    Raises:
        ValueError: there is no example, or the model has no positions for one.
    """
    if not examples:
        raise ValueError("no example to evaluate on; give at least one")
    reading = reading or Reading()
    start = time.perf_counter()
    first = examples[0]
    room = ANSWER_TOKENS.get(first.task, NEEDLE_TOKENS)
    if first.task in MRCR_TASKS:
        room = max(len(tokenizer.encode_target(example.target)) for example in examples)
    room += max(len(tokenizer.encode(example.opening)) for example in examples)
    sources = [_read(model, tokenizer, example, reading, room) for example in examples]
    settings = SamplingSettings(max_target_tokens=room)
    answers = [""] * len(examples)
    for rows in by_length(sources, reading.batch_size):
        for row, found in zip(
            rows, generate(model, [sources[i] for i in rows], settings, tokenizer=tokenizer), strict=True
        ):
            answers[row] = found.text.strip()
            if on_answer:
                on_answer()
    score = sum(example.score(answer) for example, answer in zip(examples, answers, strict=True)) / len(examples)
    return Cell(name, first.task, first.length, score, tuple(answers), time.perf_counter() - start)


def _read(model: Any, tokenizer: Tokenizer, example: Example, reading: Reading, room: int) -> list[int]:
    limit = source_limit(model, room)
    text = f"{example.prompt} {example.opening}".strip() if reading.opening else example.prompt
    if reading.chunk_tokens is None:
        reader = SourceReader(tokenizer, max_tokens=limit)
    else:
        if isinstance(model.config, GemmaConfig):
            raise ValueError("a decoder-only model has no memory to join; leave --chunk-tokens out for it")
        reader = SourceReader(
            tokenizer,
            max_tokens=1 << 40,
            chunk_tokens=min(reading.chunk_tokens, limit),
            instruction=example.question,
        )
    return reader.read(text).tokens


def stretch(model: Any, *, rope_factor: float | None = None, positions: int = 0) -> Any:
    """The model with the same weights and positions for at least so many tokens.

    With a `rope_factor`, positions on global layers are divided by it (linear interpolation); local layers never see
    further than their window, and stay.
    """
    if rope_factor is not None and rope_factor <= 0:
        raise ValueError(f"rope_factor is {rope_factor}; expected more than 0")
    config = _stretched(model.config, rope_factor, positions)
    if config == model.config:
        return model
    if isinstance(model, OnnxModel):
        assert isinstance(config, T5GemmaConfig)
        other = copy.copy(model)
        other.config = config  # rotations are computed from it, outside the graphs
        return other
    import torch

    with torch.device("meta"):
        other = type(model)(config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in other.state_dict()}
    other.load_state_dict(weights, assign=True)
    other.origin = model.origin
    return other.eval()


def _stretched(config: ModelConfig, rope_factor: float | None, positions: int) -> ModelConfig:
    def stack(old: StackConfig) -> StackConfig:
        rope = old.global_rope if rope_factor is None else replace(old.global_rope, factor=rope_factor)
        return replace(old, global_rope=rope, max_position_embeddings=max(old.max_position_embeddings, positions))

    if isinstance(config, GemmaConfig):
        return replace(config, stack=stack(config.stack))
    return replace(config, encoder=stack(config.encoder), decoder=stack(config.decoder))


def table(cells: Sequence[Cell]) -> str:
    """Scores in per cent as text: a line for each model and task, a column for each length, and means."""
    lengths = sorted({cell.length for cell in cells})
    found = {(cell.model, cell.task, cell.length): cell.score for cell in cells}
    lines = [["model", "task", *(f"{length:,}" for length in lengths)]]
    for model in dict.fromkeys(cell.model for cell in cells):
        tasks = list(dict.fromkeys(cell.task for cell in cells if cell.model == model))
        for task in tasks:
            lines.append([model, task, *(_percent(found.get((model, task, length))) for length in lengths)])
        if len(tasks) > 1:
            means = (
                _mean([found[model, t, length] for t in tasks if (model, t, length) in found]) for length in lengths
            )
            lines.append([model, "mean", *map(_percent, means)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[text.ljust(w) for text, w in zip(line[:2], widths[:2], strict=True)] for line in lines]
    for row, line in zip(padded, lines, strict=True):
        row += [text.rjust(w) for text, w in zip(line[2:], widths[2:], strict=True)]
    return "\n".join("  ".join(row) for row in padded)


def panels(cells: Sequence[Cell]) -> list[Panel]:
    """Score by length: a panel for each task, a line for each model."""
    found: list[Panel] = []
    for task in dict.fromkeys(cell.task for cell in cells):
        curves: dict[str, list[tuple[float, float]]] = {}
        for cell in sorted((c for c in cells if c.task == task), key=lambda cell: cell.length):
            curves.setdefault(cell.model, []).append((cell.length, 100 * cell.score))
        found.append(Panel(task, "tokens", "score, %", curves))
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percent(score: float | None) -> str:
    return "–" if score is None else f"{100 * score:.1f}"
