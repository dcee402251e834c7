"""What a run is fed: the batches of each step and those it is validated on, as its recipe says.

feed = open_feed(recipe, tokenizer, encoder=True)
feed.batches(0)       # the first step's
feed.validation       # held-out batches, by name
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from encore.checkpoint import hub
from encore.config import T5GemmaConfig
from encore.data.batch import Batch
from encore.data.corpus import open_corpus
from encore.data.examples import TablePairs
from encore.data.mixture import Mixture
from encore.data.on_the_fly import LivePairs
from encore.data.pipeline import Batches, PairBatches
from encore.data.shards import resolve
from encore.data.sources import pair_tables
from encore.data.steps import Steps
from encore.presets import PRESETS, preset
from encore.tokenizer import SourceFormat, Tokenizer
from encore.train.loss import Model
from encore.train.pictures import Pictures
from encore.train.reading import (
    Reading,
    cache_folder,
    fingerprint_of,
    open_reading,
    open_source,
    read_pairs,
    sources_of,
)
from encore.train.recipe import Recipe, SourceRecipe


@dataclass(frozen=True)
class HeldOut:
    """Batches to validate on. `share` is that of the source in the mixture."""

    name: str
    share: float
    batches: list[Batch]


@dataclass(frozen=True)
class Feed:
    """All that a run reads, and the tokenizer in the format that it learns and is stored with."""

    batches: Batches
    validation: tuple[HeldOut, ...]
    fingerprint: str
    tokenizer: Tokenizer
    reading: Reading | None  # None: pairs under a token budget

    def close(self) -> None:
        """End the workers."""
        self.batches.close()

    def write_report(self, run: str | Path) -> None:
        """RUN/data.json, once per run, where there is a mixture to tell about."""
        if self.reading and not (Path(run) / "data.json").is_file():
            self.reading.write_report(Path(run))

    def evaluation(
        self, evaluate: Callable[[list[Batch]], Callable[[Model], dict[str, float]]]
    ) -> Callable[[Model], dict[str, float]] | None:
        """For `fit`: each held-out source by name, and their mean weighed as the mixture is; None: nothing held out."""
        if len(self.validation) < 2:
            return evaluate(self.validation[0].batches) if self.validation else None
        parts = [(part, evaluate(part.batches)) for part in self.validation]

        def run(model: Model) -> dict[str, float]:
            values: dict[str, float] = {}
            total = sum(part.share for part, _ in parts)
            for part, one in parts:
                for key, value in one(model).items():
                    values[key] = values.get(key, 0.0) + value * part.share / total
                    values[f"{key}_{part.name}"] = value
            return values

        return run


def open_feed(recipe: Recipe, tokenizer: Tokenizer, *, encoder: bool, pictures: Pictures | None = None) -> Feed:
    """Open the recipe's data for an encoder-decoder (`encoder`) or a decoder-only model.

    `pictures`: what the model makes of them, where the recipe has rows with pictures.
    """
    if not encoder:  # a causal LM goes on from its prompt, without EOS; a tuned one answers after EOS
        tokenizer = tokenizer.with_source_format(SourceFormat(bos=True, eos=recipe.objective == "pairs"))
    data, train = recipe.data, recipe.train
    if recipe.objective == "pairs" and data.train and not data.pack:
        source, reading = _budgeted(recipe, data.train, data.max_pairs, tokenizer, encoder=encoder), None
        digests = [_digests(source)]
        limits = f"{data.max_source_tokens} {data.max_target_tokens}"
        fingerprint = fingerprint_of([*digests, [limits]], tokenizer)
    else:
        reading = open_reading(recipe, tokenizer, encoder=encoder, pictures=pictures)
        source, fingerprint = reading.steps, reading.fingerprint
    batches = Batches(source, workers=data.workers, num_steps=train.steps)
    validation = _validation(recipe, tokenizer, encoder=encoder, pictures=pictures)
    return Feed(batches, validation, fingerprint, tokenizer, reading)


def reads_source(recipe: Recipe) -> bool:
    """Whether the recipe trains a model with an encoder, found without loading one."""
    objectives = {source.objective for source in sources_of(recipe)}
    if objectives != {"pairs"}:
        return "causal" not in objectives
    init = recipe.model.init
    if not init:
        return "t5gemma" in recipe.model.architecture.model_type
    if init in PRESETS and not Path(init).exists():
        return isinstance(preset(init), T5GemmaConfig)
    config = json.loads((hub.resolve(resolve(init)) / "config.json").read_text(encoding="utf-8"))
    return "t5gemma" in config.get("model_type", "")


def _digests(batches: PairBatches) -> list[str]:
    if isinstance(batches.pairs, LivePairs):
        return ["on the fly", *batches.pairs.corpus.digests]
    return [table.digest for table in batches.pairs.tables] if isinstance(batches.pairs, TablePairs) else []


def _budgeted(
    recipe: Recipe,
    files: tuple[str, ...],
    max_pairs: int,
    tokenizer: Tokenizer,
    *,
    encoder: bool,
    held_out: bool = False,
) -> PairBatches:
    """Pairs of like length, up to data.batch_tokens in a batch."""
    data = recipe.data
    limits = data.max_source_tokens, data.max_target_tokens
    if data.cache or held_out:
        keys = {"source_key": data.source_key, "target_key": data.target_key}
        tables = pair_tables(files, tokenizer, **keys, max_pairs=max_pairs, cache_folder=cache_folder(data))
        pairs: TablePairs | LivePairs = read_pairs(tables, *limits, max_pairs)
    else:
        corpus = open_corpus(files, tokenizer, (data.source_key, data.target_key), cache_folder(data))
        seed = recipe.train.seed
        pairs = LivePairs(corpus, *limits, max_pairs=max_pairs, max_tokens=data.batch_tokens, seed=seed)
    return PairBatches(
        pairs,
        tokenizer,
        encoder=encoder,
        batch_tokens=data.batch_tokens,
        accumulation_steps=recipe.train.accumulation_steps,
        seed=recipe.train.seed,
    )


def _validation(
    recipe: Recipe, tokenizer: Tokenizer, *, encoder: bool, pictures: Pictures | None
) -> tuple[HeldOut, ...]:
    data = recipe.data
    if data.validation and recipe.objective == "pairs":
        made = _budgeted(recipe, data.validation, 0, tokenizer, encoder=encoder, held_out=True)
        return (HeldOut("", 1.0, made.in_order(data.validation_pairs)),)
    if data.validation:
        everything = replace(data, train=data.validation, sources=())
        (whole,) = sources_of(replace(recipe, data=everything))
        return (_held_out(recipe, whole, data.validation, tokenizer, 0, encoder=encoder, pictures=pictures),)
    return tuple(
        _held_out(recipe, source, source.validation, tokenizer, number, encoder=encoder, pictures=pictures)
        for number, source in enumerate(sources_of(recipe))
        if source.validation
    )


def _held_out(
    recipe: Recipe,
    source: SourceRecipe,
    files: tuple[str, ...],
    tokenizer: Tokenizer,
    number: int,
    *,
    encoder: bool,
    pictures: Pictures | None,
) -> HeldOut:
    """The first windows or pairs of a source's held-out files, with the same objective and always the same noise."""
    data, train = recipe.data, recipe.train
    cache = cache_folder(data)
    opened = open_source(
        recipe, source, files, tokenizer, cache, encoder=encoder, number=number, shuffle=False, pictures=pictures
    )
    wanted = data.validation_pairs if source.objective in ("pairs", "pictures") else data.validation_windows
    count = min(opened.examples.per_epoch, wanted)
    steps = Steps(Mixture([opened.examples]), tokenizer, batch_size=count, seed=train.seed)
    arrays = steps.padded([(0, i) for i in range(count)], max(1, count // train.batch_size))
    return HeldOut(source.name, source.weight, [Batch.of(part) for part in arrays])
