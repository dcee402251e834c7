"""Shard -> records, of every format, in bounded memory; what is damaged comes out as `Damage`, with its place.

    .jsonl             one object per line                            a record per line
    .txt, .md          one document per file, in pieces if it is long
    .parquet           a table, read by row groups                    a record per row
    .arrow             what `datasets.save_to_disk` writes: an Arrow stream

A record is the strings under the wanted keys. A key may go into a nested object: "translation.de" is the "de" of the
object under "translation", unless a column has that very name.
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
    """The wanted strings of one row. `last` is False for a piece of a document that goes on in the next record."""

    values: tuple[str, ...]
    last: bool = True


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


def records(shard: Shard, keys: Sequence[str]) -> Iterator[Record | Damage]:
    """Everything in a shard, in order. Raises UnreadableShard where nothing can be read at all."""
    if shard.suffix == ".jsonl":
        yield from _lines(shard, keys)
    elif shard.suffix == ".parquet":
        yield from _parquet(shard, keys)
    elif shard.suffix == ".arrow":
        yield from _arrow(shard, keys)
    elif len(keys) > 1:
        raise ValueError(
            f"{shard.name}: pairs are read from rows (JSONL, Parquet, Arrow) that hold {' and '.join(map(repr, keys))}"
        )
    else:
        yield from _text(shard)


def _lines(shard: Shard, keys: Sequence[str]) -> Iterator[Record | Damage]:
    number = 0
    with shard.unpacked() as file:
        while True:
            try:
                line = file.readline(MAX_RECORD_BYTES + 1)
                too_long = len(line) > MAX_RECORD_BYTES
                while too_long and not line.endswith(b"\n") and (more := file.readline(1 << 20)):
                    line = more
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
                yield _from_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, number, keys)


def _from_line(line: bytes, number: int, keys: Sequence[str]) -> Record | Damage:
    place = f"line {number}"
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return Damage(place, f"not UTF-8: {error.reason}")
    except (ValueError, RecursionError) as error:
        return Damage(place, f"not JSON: {getattr(error, 'msg', error)}")
    if not isinstance(row, dict):
        return Damage(place, f"expected an object, got {type(row).__name__}")
    return _from_row(row, place, keys)


def _from_row(row: dict[str, Any], place: str, keys: Sequence[str]) -> Record | Damage:
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
    return Record(tuple(values))


def _text(shard: Shard) -> Iterator[Record | Damage]:
    """A file of text: one document, given in pieces that end with a line wherever there is one."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    place, waiting = 0, ""
    with shard.unpacked() as file:
        while True:
            try:
                data = file.read(_TEXT_PIECE_BYTES)
                waiting += decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                yield Damage(f"byte {place + error.start}", f"not UTF-8: {error.reason}")
                return
            except _BROKEN_STREAM as error:
                if not place:
                    raise shard.unreadable(error) from error
                yield Damage(f"after byte {place}", f"the file breaks off: {error}")
                return
            if not data:
                yield Record((waiting,))
                return
            place += len(data)
            cut = waiting.rfind("\n") + 1 or waiting.rfind(" ") + 1 or len(waiting)
            if len(waiting) > _TEXT_PIECE_BYTES // 2 and cut > len(waiting) // 2 and cut < len(waiting):
                yield Record((waiting[:cut],), last=False)
                waiting = waiting[cut:]
            elif len(waiting) > 2 * _TEXT_PIECE_BYTES:
                yield Record((waiting,), last=False)
                waiting = ""


def _parquet(shard: Shard, keys: Sequence[str]) -> Iterator[Record | Damage]:
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
            end = done + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(_TABLE_ROWS, row_groups=[group], columns=columns, use_threads=False):
                    yield from _from_table(batch, done, keys)
                    done += batch.num_rows
            except (arrow.ArrowException, OSError) as error:
                yield Damage(f"rows {done + 1}-{end}", f"row group {group}: {_first_line(error)}", end - done)
            done = end


def _arrow(shard: Shard, keys: Sequence[str]) -> Iterator[Record | Damage]:
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
            else:
                for start in range(0, batch.num_rows, _TABLE_ROWS):
                    yield from _from_table(batch.select(columns).slice(start, _TABLE_ROWS), done + start, keys)
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


def _from_table(batch: Any, done: int, keys: Sequence[str]) -> Iterator[Record | Damage]:
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError:  # one bad string spoils the batch: row by row then
        rows = [_row_or_none(batch, number) for number in range(batch.num_rows)]
    for number, row in enumerate(rows, start=done + 1):
        place = f"row {number}"
        yield Damage(place, "not UTF-8") if row is None else _from_row(row, place, keys)


def _row_or_none(batch: Any, number: int) -> dict[str, Any] | None:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
