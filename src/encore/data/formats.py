"""Shard -> records, of every format, in bounded memory; what is damaged comes out as `Damage`, with its place.

    .jsonl             one object per line                            a record per line
    .txt, .md          one document per file, in pieces if it is long
    .parquet           a table, read by row groups                    a record per row
    .arrow             what `datasets.save_to_disk` writes: an Arrow stream

A record is the strings under the wanted keys. A key may go into a nested object: "translation.de" is the "de" of the
object under "translation", unless a column has that very name. Reading may begin at any record whose place was seen.
"""

from __future__ import annotations

import codecs
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from encore.data.shards import Shard, need

MAX_RECORD_BYTES = 1 << 26
"""A longer line is damage: it is passed over without ever being held in memory."""

_TEXT_PIECE_BYTES = 1 << 20
_TABLE_ROWS = 1024
_BROKEN_STREAM = (OSError, EOFError, zlib.error, lzma.LZMAError)
_PLACES_TOLD = 5


@dataclass(frozen=True)
class Record:
    """The wanted strings of one row. `last` is False for a piece of a document that goes on in the next record.

    `place` is where to begin to read this one again (`records(…, start=place)`), in the format's own count; `cheap`
    says that beginning there costs nothing, because what comes before need not be unpacked.
    """

    values: tuple[str, ...]
    last: bool = True
    place: int = 0
    cheap: bool = False


@dataclass(frozen=True)
class Damage:
    """One or more records that cannot be used."""

    place: str
    reason: str
    records: int = 1


@dataclass
class Tally:
    """What reading came to: how many records there were, how many were skipped, and where the first of these are."""

    records: int = 0
    skipped: int = 0
    places: list[str] = field(default_factory=list)

    def damage(self, name: str, damage: Damage) -> None:
        self.records += damage.records
        self.skipped += damage.records
        if len(self.places) < _PLACES_TOLD:
            self.places.append(f"{name} {damage.place} ({damage.reason})")

    def add(self, other: Tally) -> None:
        self.records += other.records
        self.skipped += other.skipped
        self.places = (self.places + other.places)[:_PLACES_TOLD]

    def message(self) -> str | None:
        """What to tell the user; None where nothing was skipped."""
        if not self.skipped:
            return None
        others = self.skipped - len(self.places)
        more = f"; and {others:,} more" if others > 0 else ""
        return f"skipped {self.skipped:,} of {self.records:,} records: {'; '.join(self.places)}{more}"

    def check(self, names: Sequence[str]) -> None:
        """Raises ValueError when every record was damaged: such a source is a mistake, not an accident."""
        if self.skipped and self.skipped == self.records:
            places = "; ".join(self.places)
            raise ValueError(f"{', '.join(names)}: all {self.records:,} records are damaged: {places}")


def records(shard: Shard, keys: Sequence[str], start: int = 0) -> Iterator[Record | Damage]:
    """Everything in a shard from the place `start` on, in order; places of damage count from there.

    Raises UnreadableShard where nothing can be read at all.
    """
    if shard.suffix == ".jsonl":
        yield from _lines(shard, keys, start)
    elif shard.suffix == ".parquet":
        yield from _parquet(shard, keys, start)
    elif shard.suffix == ".arrow":
        yield from _arrow(shard, keys, start)
    elif len(keys) > 1:
        raise ValueError(
            f"{shard.name}: pairs are read from rows (JSONL, Parquet, Arrow) that hold {' and '.join(map(repr, keys))}"
        )
    else:
        yield from _text(shard, start)


def _lines(shard: Shard, keys: Sequence[str], start: int) -> Iterator[Record | Damage]:
    number, next_place = 0, start
    with shard.unpacked(start) as file:
        while True:
            place = next_place
            try:
                line = file.readline(MAX_RECORD_BYTES + 1)
                next_place += len(line)
                too_long = len(line) > MAX_RECORD_BYTES
                while too_long and not line.endswith(b"\n") and (more := file.readline(1 << 20)):
                    line = more
                    next_place += len(line)
            except _BROKEN_STREAM as error:
                if not number:
                    raise shard.unreadable(error) from error
                yield Damage(f"after line {number}", f"the file breaks off: {error}")
                return
            if not line:
                return
            number += 1
            if too_long:
                yield Damage(f"line {number}", f"longer than {MAX_RECORD_BYTES >> 20} MiB")
            elif line.strip():
                row = _from_line(line if place else line.removeprefix(codecs.BOM_UTF8), f"line {number}", keys)
                yield row if isinstance(row, Damage) else Record(row, True, place, not shard.is_packed)


def _from_line(line: bytes, place: str, keys: Sequence[str]) -> tuple[str, ...] | Damage:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return Damage(place, f"not UTF-8: {error.reason}")
    except (ValueError, RecursionError) as error:
        return Damage(place, f"not JSON: {getattr(error, 'msg', error)}")
    if not isinstance(row, dict):
        return Damage(place, f"expected an object, got {type(row).__name__}")
    return _from_row(row, place, keys)


def _from_row(row: dict[str, Any], place: str, keys: Sequence[str]) -> tuple[str, ...] | Damage:
    values: list[str] = []
    for key in keys:
        value: Any = row.get(key)
        if value is None and "." in key:
            value = row
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, str):
            there = ", ".join(map(repr, row)) or "nothing"
            found = f"it holds {there}" if value is None else f"got {type(value).__name__}"
            return Damage(place, f"expected a string under {key!r}; {found}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                return Damage(place, f"half a surrogate pair under {key!r}, which is no Unicode")
        values.append(value)
    return tuple(values)


def _text(shard: Shard, start: int) -> Iterator[Record | Damage]:
    """A file of text: one document, given in pieces that end with a line wherever there is one.

    Where a piece ends depends on nothing before it, so that reading can begin at each.
    """
    place, waiting, whole = start, b"", False
    with shard.unpacked(start) as file:
        while True:
            try:
                while not whole and len(waiting) < _TEXT_PIECE_BYTES:
                    data = file.read(_TEXT_PIECE_BYTES - len(waiting))
                    waiting += data
                    whole = not data
            except _BROKEN_STREAM as error:
                if not place + len(waiting):
                    raise shard.unreadable(error) from error
                yield Damage(f"after byte {place + len(waiting)}", f"the file breaks off: {error}")
                return
            mark = len(codecs.BOM_UTF8) if not place and waiting.startswith(codecs.BOM_UTF8) else 0
            try:
                text, length = codecs.utf_8_decode(waiting[mark:], "strict", whole)
            except UnicodeDecodeError as error:
                yield Damage(f"byte {place + mark + error.start}", f"not UTF-8: {error.reason}")
                return
            if whole:
                if place or text.strip():
                    yield Record((text,), True, place, not shard.is_packed)
                return
            cut = text.rfind("\n") + 1 or text.rfind(" ") + 1 or len(text)
            used = mark + (length if cut == len(text) else len(text[:cut].encode()))
            yield Record((text[:cut],), False, place, not shard.is_packed)
            place, waiting = place + used, waiting[used:]


def _parquet(shard: Shard, keys: Sequence[str], start: int) -> Iterator[Record | Damage]:
    what = f"reading {shard.name}"
    arrow, parquet = need("pyarrow", what), need("pyarrow.parquet", what)
    with shard.open() as source:
        try:
            file = parquet.ParquetFile(source, page_checksum_verification=True)
        except (arrow.ArrowException, OSError) as error:
            raise shard.unreadable(error) from error
        columns, absent = _columns(keys, file.schema_arrow.names)
        if absent:
            yield Damage(f"rows 1-{file.metadata.num_rows}", absent, file.metadata.num_rows)
            return
        done = 0
        for group in range(file.metadata.num_row_groups):
            first = done
            end = done + file.metadata.row_group(group).num_rows
            if end <= start:
                done = end
                continue
            try:
                for batch in file.iter_batches(_TABLE_ROWS, row_groups=[group], columns=columns, use_threads=False):
                    yield from _from_table(batch, done, keys, start, cheap=range(first, first + 1))
                    done += batch.num_rows
            except (arrow.ArrowException, OSError) as error:
                yield Damage(f"rows {done + 1}-{end}", f"row group {group}: {_first_line(error)}", end - done)
            done = end


def _arrow(shard: Shard, keys: Sequence[str], start: int) -> Iterator[Record | Damage]:
    arrow = need("pyarrow", f"reading {shard.name}")
    done = 0
    with _mapped(shard, arrow) as source:
        try:
            stream = arrow.ipc.open_stream(source)
        except (arrow.ArrowException, OSError) as error:
            raise shard.unreadable(error) from error
        columns, absent = _columns(keys, stream.schema.names)
        while True:
            try:
                batch = stream.read_next_batch()
            except StopIteration:
                return
            except (arrow.ArrowException, OSError) as error:
                yield Damage(f"after row {done}", f"the file breaks off: {_first_line(error)}")
                return
            if absent:
                yield Damage(f"rows {done + 1}-{done + batch.num_rows}", absent, batch.num_rows)
            elif start < done + batch.num_rows:
                here = batch.select(columns)
                cheap = range(done, done + batch.num_rows) if not shard.is_remote else range(0)
                for first in range(0, batch.num_rows, _TABLE_ROWS):
                    yield from _from_table(here.slice(first, _TABLE_ROWS), done + first, keys, start, cheap)
            done += batch.num_rows


def _mapped(shard: Shard, arrow: Any) -> Any:
    if shard.is_remote:
        return shard.open()
    try:
        return arrow.memory_map(shard.name)
    except OSError as error:
        raise shard.unreadable(error) from error


def _columns(keys: Sequence[str], names: Sequence[str]) -> tuple[list[str], str]:
    """The columns that hold the keys, and what to say when one is absent."""
    columns: list[str] = []
    for key in keys:
        column = key if key in names else key.split(".")[0]
        if column not in names:
            return [], f"no column {key!r}; there are {', '.join(map(repr, names))}"
        if column not in columns:
            columns.append(column)
    return columns, ""


def _from_table(batch: Any, done: int, keys: Sequence[str], start: int, cheap: range) -> Iterator[Record | Damage]:
    """The rows of a batch, of which `done` came before, from row `start` on. `cheap`: where reading may well begin."""
    if done + batch.num_rows <= start:
        return
    skipped = max(start - done, 0)
    batch = batch.slice(skipped)
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError:  # one bad string spoils the batch: row by row then
        rows = [_row_or_none(batch, number) for number in range(batch.num_rows)]
    for number, row in enumerate(rows, start=done + skipped):
        place = f"row {number + 1}"
        values = Damage(place, "not UTF-8") if row is None else _from_row(row, place, keys)
        yield values if isinstance(values, Damage) else Record(values, True, number, number in cheap)


def _row_or_none(batch: Any, number: int) -> dict[str, Any] | None:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
