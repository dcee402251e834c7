"""What is read: documents, pairs, and the token tables that are made of either.

    names ──documents()──▶ texts ──text_tables()──▶ ids of each document and EOS
    names ──pairs()──────▶ (source, target) ──pair_tables()──▶ ids of both, without special tokens

`encore.data.shards` says what a name may be, `encore.data.formats` which files there are and what becomes of damage: a
damaged record is passed over, counted and reported with its place; when all are damaged, that is an error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from encore.data.formats import Damage, Tally, records
from encore.data.shards import Shard, shards
from encore.data.shards import resolve as resolve
from encore.data.token_cache import (
    Table,
    TokenStream,
    default_cache_folder,
    make_table,
    vocabulary_fingerprint,
)
from encore.data.token_cache import tokenizer_fingerprint as tokenizer_fingerprint
from encore.tokenizer import Tokenizer

_ENCODE_TEXTS = 512
_ENCODE_CHARACTERS = 1 << 22
_NOTE_SECONDS = 10.0

Ids = list[int]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Pair:
    """One row to learn: `source` is read, `target` is written."""

    source: str
    target: str


def documents(names: Sequence[str], text_key: str = "text", tally: Tally | None = None) -> Iterator[str]:
    """Texts in file order; empty ones are passed over. A long text file comes in several pieces."""
    for (text,), _ in _values(names, (text_key,), tally):
        if text.strip():
            yield text


def pairs(
    names: Sequence[str], source_key: str = "src", target_key: str = "tgt", tally: Tally | None = None
) -> Iterator[Pair]:
    """Pairs in file order, from rows that hold two strings."""
    for (source, target), _ in _values(names, (source_key, target_key), tally):
        yield Pair(source, target)


def _values(names: Sequence[str], keys: Sequence[str], tally: Tally | None) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The good records of all shards. At the end damage is reported: added to `tally`, or else told as a note."""
    seen = Tally() if tally is None else tally
    for shard in shards(names):
        yield from _good(shard, keys, seen)
    seen.check(names)
    if tally is None:
        report(seen)


def _good(shard: Shard, keys: Sequence[str], tally: Tally) -> Iterator[tuple[tuple[str, ...], bool]]:
    for record in records(shard, keys):
        if isinstance(record, Damage):
            tally.damage(shard.name, record)
        else:
            tally.records += record.last
            yield record.values, record.last


def report(tally: Tally) -> None:
    """Tells what was skipped, if anything."""
    if message := tally.message():
        note(message)


def text_tables(
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    max_tokens: int = 0,
    cache_folder: Path | None = None,
) -> list[Table]:
    """A table per shard: the ids of each document and EOS. `max_tokens`: no more shards once there are so many ids."""

    def texts(shard: Shard, tally: Tally, limit: int) -> Iterator[list[tuple[Ids, bool]]]:
        total, inside = 0, False  # inside: of a document whose beginning came before
        characters = min(_ENCODE_CHARACTERS, 8 * limit or _ENCODE_CHARACTERS)
        for batch in _batched(_good(shard, (text_key,), tally), characters):
            made: list[tuple[Ids, bool]] = []
            wanted = [(value[0], last) for value, last in batch]
            for (text, last), ids in zip(wanted, tokenizer.encode_batch([text for text, _ in wanted]), strict=True):
                if text.strip() or inside or not last:
                    inside = not last
                    made.append((ids if inside or ids[-1:] == [tokenizer.eos_id] else [*ids, tokenizer.eos_id], last))
                    total += len(made[-1][0])
            yield made
            if limit and total >= limit:
                return

    return _tables(names, tokenizer, f"text {text_key}", texts, max_tokens, cache_folder, lambda t: len(t.tokens))


def pair_tables(
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    source_key: str = "src",
    target_key: str = "tgt",
    max_pairs: int = 0,
    cache_folder: Path | None = None,
) -> list[Table]:
    """A table per shard; pair i is texts 2i and 2i + 1. `max_pairs`: no more shards once there are so many."""

    def texts(shard: Shard, tally: Tally, limit: int) -> Iterator[list[tuple[Ids, bool]]]:
        total = 0
        for batch in _batched(_good(shard, (source_key, target_key), tally), _ENCODE_CHARACTERS):
            ids = tokenizer.encode_batch([side for value, _ in batch for side in value])
            yield [(side, True) for side in ids]
            total += len(batch)
            if limit and total >= limit:
                return

    kind = f"pairs {source_key} {target_key}"
    return _tables(names, tokenizer, kind, texts, max_pairs, cache_folder, lambda t: len(t.ends) // 2)


def token_stream(
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    max_tokens: int = 0,
    cache_folder: Path | None = None,
) -> TokenStream:
    """The ids of all documents, each followed by EOS, as one sequence mapped from disk; tokenised once.

    Args:
        max_tokens: stop reading documents when there are so many ids, and cut there; 0 reads all.
        cache_folder: where the tables live; by default $ENCORE_CACHE or ~/.cache/encore.
    """
    tables = text_tables(names, tokenizer, text_key=text_key, max_tokens=max_tokens, cache_folder=cache_folder)
    return TokenStream(tables, max_tokens)


def _tables(
    names: Sequence[str],
    tokenizer: Tokenizer,
    kind: str,
    texts: Callable[[Shard, Tally, int], Iterator[list[tuple[Ids, bool]]]],
    limit: int,
    cache_folder: Path | None,
    size: Callable[[Table], int],
) -> list[Table]:
    cache = cache_folder or default_cache_folder()
    fingerprint = vocabulary_fingerprint(tokenizer)
    found = shards(names)
    tables: list[Table] = []
    done = 0
    for number, shard in enumerate(found, start=1):
        tally = Tally()
        left = limit - done if limit else 0
        what = f"tokenising {shard.name} ({number} of {len(found)})"
        watched = note_progress(texts(shard, tally, left), what, "tokens", lambda t: sum(len(ids) for ids, _ in t))
        key = (kind, fingerprint, shard.suffix, shard.identity(cache / "files"), str(left))
        tables.append(make_table(key, watched, tally, tokenizer.vocab_size, cache))
        done += size(tables[-1])
        if limit and done >= limit:
            break
    all_tallies = Tally()
    for table in tables:
        all_tallies.add(table.tally)
    all_tallies.check(names)
    report(all_tallies)
    if not done:
        raise ValueError(f"{', '.join(names)}: no text in there")
    return tables


def _batched(
    values: Iterator[tuple[tuple[str, ...], bool]], max_characters: int
) -> Iterator[list[tuple[tuple[str, ...], bool]]]:
    """Batches for the tokenizer, bounded in number and in characters."""
    batch: list[tuple[tuple[str, ...], bool]] = []
    characters = 0
    for value in values:
        batch.append(value)
        characters += sum(map(len, value[0]))
        if len(batch) == _ENCODE_TEXTS or characters > max_characters:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def note_progress(items: Iterator[Item], what: str, unit: str, count: Callable[[Item], int]) -> Iterator[Item]:
    """The same, with a line on stderr now and then while it takes long."""
    begin = time.monotonic()
    due, done = begin + 2.0, 0
    for item in items:
        done += count(item)
        now = time.monotonic()
        if now > due:
            note(f"{what}: {done:,} {unit}, {done / (now - begin):,.0f} {unit}/s")
            due = now + _NOTE_SECONDS
        yield item


def note(message: str) -> None:
    """A line for the person at the terminal: stderr, so that data on stdout stays clean."""
    print(message, file=sys.stderr, flush=True)
