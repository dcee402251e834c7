"""A recipe's `[data]` -> the mixture that a run reads: sources tokenised, cut, mixed, laid out in steps. No torch here.

With `data.cache` the text is tokenised first and kept. Without, it is tokenised when a step needs it; only an index of
the records is made first, and of held-out files no more is tokenised than what is validated on.

reading = open_reading(recipe, tokenizer, encoder=True)
reading.steps.arrays(0)      # the first step, as arrays
reading.fingerprint          # changes with the ids that are read
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encore.data.corpus import open_corpus
from encore.data.examples import (
    Causal,
    Denoise,
    Examples,
    Objective,
    PairExamples,
    TablePairs,
    TextExamples,
    causal,
)
from encore.data.formats import Tally
from encore.data.mixture import Mixture
from encore.data.on_the_fly import LiveDocuments, LivePairs, LiveWindows
from encore.data.sources import note, pair_tables, text_tables, tokenizer_fingerprint
from encore.data.steps import Packing, Steps
from encore.data.token_cache import Table, TokenStream
from encore.data.windows import Documents, Stretches, Windows
from encore.objectives import ul2
from encore.objectives.denoise import longest_for_sentinels
from encore.tokenizer import Tokenizer
from encore.train.pictures import Keys, PictureExamples, Pictures, read_rows
from encore.train.recipe import DataRecipe, Recipe, SourceRecipe

_MODES = ("[NLU]", "[S2S]", "[NLG]")


@dataclass(frozen=True)
class Source:
    """One source of a mixture, opened."""

    name: str
    objective: str
    share: float
    tokens: int
    texts: int
    tally: Tally
    examples: Examples
    digests: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """What a run reads."""

    sources: tuple[Source, ...]
    steps: Steps
    fingerprint: str

    def write_report(self, run: Path) -> None:
        """RUN/data.json: what was read, and what was skipped."""
        run.mkdir(parents=True, exist_ok=True)
        rows = [
            {"name": s.name, "objective": s.objective, "share": s.share, "tokens": s.tokens, "texts": s.texts}
            | dataclasses.asdict(s.tally)
            for s in self.sources
        ]
        temporary = run / f".writing-data-{os.getpid()}.json"
        temporary.write_text(json.dumps({"sources": rows}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, run / "data.json")


def open_reading(recipe: Recipe, tokenizer: Tokenizer, *, encoder: bool, pictures: Pictures | None = None) -> Reading:
    """Open, and where needed tokenise, everything the recipe trains on. `pictures`: what the model makes of one."""
    wanted = sources_of(recipe)
    cache = cache_folder(recipe.data)
    total = sum(source.weight for source in wanted)
    opened = [
        open_source(
            recipe, source, source.files, tokenizer, cache, encoder=encoder, number=number, of=total, pictures=pictures
        )
        for number, source in enumerate(wanted)
    ]
    data, train = recipe.data, recipe.train
    steps = Steps(
        Mixture([s.examples for s in opened], [s.share for s in opened], [s.name for s in opened]),
        tokenizer,
        batch_size=train.batch_size,
        accumulation_steps=train.accumulation_steps,
        seed=train.seed,
        packing=Packing(data.encoder_row_tokens, data.decoder_row_tokens, data.pool_examples) if data.pack else None,
    )
    return Reading(tuple(opened), steps, fingerprint_of([s.digests for s in opened], tokenizer))


def sources_of(recipe: Recipe) -> list[SourceRecipe]:
    """The sources of a recipe with nothing left open: what they do not say is as in `[data]`."""
    data = recipe.data
    if not data.train and not data.sources:
        what, example = ("pairs", "asset:pairs/train") if recipe.objective == "pairs" else ("text", "asset:text/train")
        raise ValueError(f"the recipe names no {what}; set data.train, for example to {example}")
    given = data.sources or (SourceRecipe(files=data.train),)
    shared = [f.name for f in dataclasses.fields(SourceRecipe) if f.name != "validation" and hasattr(data, f.name)]
    return [
        dataclasses.replace(
            source,
            name=source.name or source.files[0],
            objective=source.objective or recipe.objective,
            **{key: getattr(source, key) or getattr(data, key) for key in shared},
        )
        for source in given
    ]


def cache_folder(data: DataRecipe) -> Path | None:
    return Path(data.cache_folder).expanduser() if data.cache_folder else None


def open_source(
    recipe: Recipe,
    source: SourceRecipe,
    files: Sequence[str],
    tokenizer: Tokenizer,
    cache: Path | None,
    *,
    encoder: bool,
    number: int = 0,
    of: float = 1.0,
    shuffle: bool = True,
    pictures: Pictures | None = None,
) -> Source:
    """The examples of some files, as `source` (with nothing left open) says. `number` is its place in the mixture.

    `shuffle` False: held-out files, whose examples come in order.
    """
    seed = recipe.train.seed
    if source.objective == "pictures":
        return _open_pictures(source, files, tokenizer, pictures, seed=seed, number=number, of=of, shuffle=shuffle)
    if shuffle and not recipe.data.cache:
        return _open_on_the_fly(recipe, source, files, tokenizer, cache, encoder=encoder, number=number, of=of)
    if source.objective == "pairs":
        keys = {"source_key": source.source_key, "target_key": source.target_key}
        limit = source.max_pairs if shuffle else 0
        tables = pair_tables(files, tokenizer, **keys, max_pairs=limit, cache_folder=cache)
        pairs = read_pairs(tables, source.max_source_tokens, source.max_target_tokens, limit)
        made: Examples = PairExamples(pairs, tokenizer, encoder=encoder, seed=seed, source=number, shuffle=shuffle)
        texts, tokens = len(pairs), int(pairs.side_lengths.sum())
    else:
        objective = objective_named(source.objective, tokenizer, encoder=encoder, mode_tokens=recipe.data.mode_tokens)
        lengths = _window_lengths(source, objective, tokenizer)
        limit = source.max_tokens if shuffle else 0 if recipe.data.cache else _held_out_tokens(recipe.data, lengths)
        tables = text_tables(files, tokenizer, text_key=source.text_key, max_tokens=limit, cache_folder=cache)
        stream = TokenStream(tables, limit)
        options: dict[str, Any] = {"seed": seed, "source": number, "shuffle": shuffle}
        eos = {"keep_eos": isinstance(objective, Causal), "eos_id": tokenizer.eos_id}
        joined = source.documents == "joined"
        stretches: list[Stretches] = [
            Windows(stream, length, **options) if joined else Documents(stream, length, **options, **eos)
            for length in lengths
        ]
        made = TextExamples(stretches, objective, seed=seed, source=number)
        texts, tokens = len(stream.document_ends()), len(stream)
    tally = Tally()
    for table in tables:
        tally.add(table.tally)
    digests = tuple(table.digest for table in tables)
    return Source(source.name, source.objective, source.weight / of, tokens, texts, tally, made, digests)


def _open_on_the_fly(
    recipe: Recipe,
    source: SourceRecipe,
    files: Sequence[str],
    tokenizer: Tokenizer,
    cache: Path | None,
    *,
    encoder: bool,
    number: int,
    of: float,
) -> Source:
    """The same without tokenising anything before it is needed; how many tokens there are is estimated."""
    seed = recipe.train.seed
    if source.objective == "pairs":
        corpus = open_corpus(files, tokenizer, (source.source_key, source.target_key), cache)
        limits = source.max_source_tokens, source.max_target_tokens
        pairs = LivePairs(corpus, *limits, max_pairs=source.max_pairs, seed=seed, number=number)
        made: Examples = PairExamples(pairs, tokenizer, encoder=encoder, seed=seed, order=pairs.order)
    else:
        objective = objective_named(source.objective, tokenizer, encoder=encoder, mode_tokens=recipe.data.mode_tokens)
        lengths = _window_lengths(source, objective, tokenizer)
        corpus = open_corpus(files, tokenizer, (source.text_key,), cache)
        options: dict[str, Any] = {"seed": seed, "source": number, "max_tokens": source.max_tokens}
        joined, keep_eos = source.documents == "joined", isinstance(objective, Causal)
        stretches: list[Stretches] = [
            LiveWindows(corpus, length, **options)
            if joined
            else LiveDocuments(corpus, length, **options, keep_eos=keep_eos)
            for length in lengths
        ]
        made = TextExamples(stretches, objective, seed=seed, source=number)
    tokens = round(corpus.num_characters * corpus.tokens_per_character)
    digests = ("on the fly", *corpus.digests)
    share = source.weight / of
    return Source(source.name, source.objective, share, tokens, corpus.num_records, corpus.tally, made, digests)


def _open_pictures(
    source: SourceRecipe,
    files: Sequence[str],
    tokenizer: Tokenizer,
    pictures: Pictures | None,
    *,
    seed: int,
    number: int,
    of: float,
    shuffle: bool,
) -> Source:
    if pictures is None:
        raise ValueError(
            f"the source {source.name} has pictures, but the model reads text only; name one with a picture tower, or "
            "describe one in [model.architecture.vision]"
        )
    tally = Tally()
    rows = read_rows(
        files,
        tokenizer,
        pictures.form,
        Keys(source.source_key, source.target_key, source.text_key, source.images_key),
        max_source_tokens=source.max_source_tokens,
        max_target_tokens=source.max_target_tokens,
        max_rows=source.max_pairs if shuffle else 0,
        tally=tally,
    )
    made = PictureExamples(rows, pictures.form, tokenizer, seed=seed, source=number, shuffle=shuffle)
    tokens = sum(len(row.source) + len(row.target) for row in rows)
    digest = made.digest
    if pictures.keep:
        made = made.with_features(pictures.keep(made.paths))
    return Source(source.name, source.objective, source.weight / of, tokens, len(rows), tally, made, (digest,))


def _window_lengths(source: SourceRecipe, objective: Objective, tokenizer: Tokenizer) -> list[int]:
    """The length of one cut of the text for all tasks, or by the budget rule of one for each."""
    if source.lengths == "budget":
        limits = source.max_source_tokens, source.max_target_tokens
        return [objective.longest_text(task, *limits) for task in range(len(objective.tasks))]
    sentinels = len(tokenizer.sentinel_ids)
    for task in objective.tasks:
        if task.num_sentinels(source.window_tokens) > sentinels:
            raise ValueError(
                f"task {task.name!r} needs {task.num_sentinels(source.window_tokens)} sentinels for "
                f"{source.window_tokens} tokens but the tokenizer has {sentinels}; set data.window_tokens to "
                f"{longest_for_sentinels(task, sentinels)} at most, or data.lengths to budget"
            )
    return [source.window_tokens]


def _held_out_tokens(data: DataRecipe, lengths: Sequence[int]) -> int:
    """As much as the windows need that are validated on."""
    return max(data.validation_windows, 2) * max(lengths)


def read_pairs(tables: Sequence[Table], max_source_tokens: int, max_target_tokens: int, max_pairs: int) -> TablePairs:
    """The usable pairs of some tables, and a note on those that are left out; none is cut."""
    pairs = TablePairs(tables, max_source_tokens, max_target_tokens, max_pairs)
    if pairs.too_long or pairs.empty:
        note(
            f"left out {pairs.too_long} of {pairs.read} pairs that are longer than {max_source_tokens} source or "
            f"{max_target_tokens} target tokens, and {pairs.empty} with an empty side"
        )
    if not len(pairs):
        raise ValueError(
            f"none of the {pairs.read} pairs can be used; see data.max_source_tokens and data.max_target_tokens"
        )
    return pairs


def objective_named(name: str, tokenizer: Tokenizer, *, encoder: bool, mode_tokens: Sequence[str] = ()) -> Objective:
    """ "causal" for a decoder-only model, a name of `ul2.MIXTURES` for an encoder-decoder."""
    if name == "causal" and not encoder:
        return causal
    if name == "causal" or not encoder:
        kind, fitting = ("an encoder-decoder", "a mixture of ul2.MIXTURES") if encoder else ("decoder-only", '"causal"')
        raise ValueError(f"objective is {name!r} but the model is {kind}, which learns {fitting}")
    return Denoise(ul2.mixture_rows(name), tokenizer, mode_ids=_mode_ids(tokenizer, mode_tokens))


def _mode_ids(tokenizer: Tokenizer, pieces: Sequence[str]) -> dict[str, int] | None:
    if not pieces:
        return None
    found = {mode: tokenizer.token_id(piece) for mode, piece in zip(_MODES, pieces, strict=True)}
    ids = {mode: token for mode, token in found.items() if token is not None}
    if len(ids) < len(found):
        absent = [piece for piece in pieces if tokenizer.token_id(piece) is None]
        raise ValueError(f"data.mode_tokens: the tokenizer in {tokenizer.folder} has no piece {', '.join(absent)}")
    return ids


def fingerprint_of(digests: Sequence[Sequence[str]], tokenizer: Tokenizer) -> str:
    """Equal for equal ids in equal sources, wherever they lie."""
    text = json.dumps([tokenizer_fingerprint(tokenizer), *digests])
    return hashlib.sha256(text.encode()).hexdigest()
