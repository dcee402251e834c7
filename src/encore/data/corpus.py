"""Texts of any size, found by number without reading what comes before: for tokenising on the fly.

    CACHE/texts/KEY/         made by one pass over a shard's records; neither texts nor ids are kept
      blocks.npy    (N, 4) int64: where reading begins, records, characters, whether to begin there is cheap
      records.npy   (R, keys) uint32: twice the characters of each string, + 1 where its document ends
      info.json     what reading came to, a digest of the texts, tokens and characters of a sample

The pass sees all damage, so that it is counted and told before training; every 256 K characters it tokenises some
2,000, to know how many tokens to expect. A block is a stretch of records, some 256 K characters of plain text; of what
can only be read from the front (gzip, xz, zstd; the inside of a Parquet row group) the blocks are read in order, and to
begin in their middle means unpacking what comes before. Only the blocks in use are held in memory.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from encore.data.array_folder import GrowingArray, make_folder, mapped, read_info
from encore.data.formats import Damage, Record, Tally, records
from encore.data.shards import Shard, UnreadableShard, shards
from encore.data.sources import note_progress, report
from encore.data.token_cache import default_cache_folder, vocabulary_fingerprint
from encore.tokenizer import Tokenizer, load_tokenizer

_FORMAT_VERSION = 1
_BLOCK_CHARACTERS = 1 << 18
_LARGEST_BLOCK = 1 << 20  # where no cheap place comes sooner
_SAMPLE_CHARACTERS = 2048  # of each block
_HELD_CHARACTERS = 3 << 24
_OPEN_SHARDS = 4
_LONGEST_WORD = 64
_SPARE_TOKENS = 8  # the last ones of a text that was cut may not be those of the whole text
_PLACE, _RECORDS, _CHARACTERS, _CHEAP = range(4)


@dataclass(frozen=True)
class TextIndex:
    """Where the records of one shard are. Pickles as its folder's name."""

    shard: Shard
    keys: tuple[str, ...]
    folder: Path
    blocks: np.ndarray
    records: np.ndarray
    info: dict[str, Any]

    @classmethod
    def open(cls, shard: Shard, keys: tuple[str, ...], folder: Path) -> TextIndex:
        blocks, lengths = (mapped(folder / name) for name in ("blocks.npy", "records.npy"))
        return cls(shard, keys, folder, blocks, lengths, read_info(folder))

    def __reduce__(self) -> tuple[Any, ...]:
        return (TextIndex.open, (self.shard, self.keys, self.folder))


def open_corpus(
    names: Sequence[str], tokenizer: Tokenizer, keys: Sequence[str], cache_folder: Path | None = None
) -> Corpus:
    """The texts under `keys` of all files behind `names`; indexed now where they are not yet.

    Damage is reported. Raises ValueError where all is damaged or nothing is there.
    """
    cache = cache_folder or default_cache_folder()
    fingerprint = vocabulary_fingerprint(tokenizer)
    tally, indices = Tally(), []
    for shard in shards(names):
        parts = (str(_FORMAT_VERSION), *keys, fingerprint, shard.suffix, shard.identity(cache / "files"))
        folder = cache / "texts" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

        def write(temporary: Path, shard: Shard = shard) -> dict[str, Any]:
            return _write_index(temporary, shard, keys, tokenizer)

        tally.add(Tally(**make_folder(folder, write, cache)["tally"]))
        indices.append(TextIndex.open(shard, tuple(keys), folder))
    tally.check(names)
    report(tally)
    if not sum(len(index.blocks) for index in indices):
        raise ValueError(f"{', '.join(names)}: no text in there")
    return Corpus(indices, tokenizer, tally)


def _write_index(folder: Path, shard: Shard, keys: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
    tally, digest = Tally(), hashlib.sha256()
    blocks, lengths = (
        GrowingArray(folder / "blocks.npy", "<i8", 4),
        GrowingArray(folder / "records.npy", "<u4", len(keys)),
    )
    sampled = {"tokens": 0, "characters": 0}
    block: list[tuple[Record, list[int]]] = []
    characters = 0

    def close_block() -> None:
        first, taken = block[0][0], list[str]()
        blocks.append([(first.place, len(block), characters, first.cheap)])
        lengths.append([sizes for _, sizes in block])
        for value in (value for record, _ in block for value in record.values):
            if sum(map(len, taken)) < _SAMPLE_CHARACTERS:
                taken.append(value[:_SAMPLE_CHARACTERS])
        sampled["tokens"] += sum(map(len, tokenizer.encode_batch(taken)))
        sampled["characters"] += sum(map(len, taken))

    try:
        for record in note_progress(_kept(shard, keys, tally), f"indexing {shard.name}", "records", lambda record: 1):
            full = _BLOCK_CHARACTERS if record.cheap else _LARGEST_BLOCK
            if characters >= full:
                close_block()
                block, characters = [], 0
            block.append((record, [2 * len(value) + record.last for value in record.values]))
            characters += sum(map(len, record.values)) + record.last
            digest.update(f"{record.last} {' '.join(str(len(value)) for value in record.values)}".encode())
            digest.update("".join(record.values).encode())
        if block:
            close_block()
        blocks.finish()
        lengths.finish()
    finally:
        blocks.close()
        lengths.close()
    return {"tally": asdict(tally), "digest": digest.hexdigest(), "sample": sampled}


def _kept(shard: Shard, keys: Sequence[str], tally: Tally, start: int = 0) -> Iterator[Record]:
    """The records that are neither damaged nor (single texts) empty; the same from every place on."""
    for record in records(shard, keys, start):
        if isinstance(record, Damage):
            tally.damage(shard.name, record)
            continue
        tally.records += record.last
        if len(keys) > 1 or shard.suffix in (".txt", ".md") or record.values[0].strip():
            yield record


class Corpus:
    """The records of some shards as one sequence, and their characters as one: `block(b)`, `record(n)`, `ids_from`.

    A document's end counts as one character: its EOS. Sent to a process as the names of its folders.
    """

    def __init__(self, indices: Sequence[TextIndex], tokenizer: Tokenizer, tally: Tally) -> None:
        self.indices, self.tokenizer, self.tally = tuple(indices), tokenizer, tally
        sizes = [len(index.blocks) for index in self.indices]
        self._table = np.concatenate([np.asarray(index.blocks) for index in self.indices])
        self._shard_of = np.repeat(np.arange(len(sizes)), sizes)
        self._first_block = np.cumsum([0, *sizes])
        self.cheap = self._table[:, _CHEAP].astype(bool)
        self.cheap[self._first_block[:-1][np.asarray(sizes) > 0]] = True
        self.block_characters = self._table[:, _CHARACTERS]
        self.character_starts = np.cumsum([0, *self.block_characters])
        self.record_starts = np.cumsum([0, *self._table[:, _RECORDS]])
        samples = [index.info["sample"] for index in self.indices]
        read = max(1, sum(sample["characters"] for sample in samples))
        self.tokens_per_character = max(1, sum(sample["tokens"] for sample in samples)) / read
        self._held: OrderedDict[int, list[Record]] = OrderedDict()
        self._held_characters = 0
        self._readers: OrderedDict[int, _Reader] = OrderedDict()

    @property
    def num_characters(self) -> int:
        return int(self.character_starts[-1])

    @property
    def num_records(self) -> int:
        return int(self.record_starts[-1])

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(index.info["digest"] for index in self.indices)

    def record_lengths(self) -> np.ndarray:
        """(R, keys): the characters of each record's strings."""
        return np.concatenate([index.records >> 1 for index in self.indices])

    def record(self, number: int) -> Record:
        block = int(np.searchsorted(self.record_starts, number, side="right")) - 1
        return self.block(block)[number - int(self.record_starts[block])]

    def ids_from(self, position: int, number: int, end: int) -> np.ndarray:
        """`number` ids from the first word on that begins at or behind character `position`, documents joined by EOS.

        After the character `end` it goes on with the first one, so there must be some text.
        """
        wanted = int(1.15 * number / self.tokens_per_character) + 64
        while True:
            parts = self._texts(position, wanted, end)
            ids: list[int] = []
            for (_, last), made in zip(parts, self.tokenizer.encode_batch([text for text, _ in parts]), strict=True):
                ids += [*made, self.tokenizer.eos_id] if last else made
            if len(ids) >= number + _SPARE_TOKENS:
                return np.asarray(ids[:number], np.int64)
            wanted *= 2

    def _texts(self, position: int, wanted: int, end: int) -> list[tuple[str, bool]]:
        """Some `wanted` characters from `position` on: texts, the first and the last in part, and whether they end."""
        parts: list[tuple[str, bool]] = []
        block = int(np.searchsorted(self.character_starts, position, side="right")) - 1
        while True:
            place = int(self.character_starts[block])
            for record in self.block(block):
                text, begin = record.values[0], 0
                size = len(text) + record.last
                if place + size > position:
                    if place < position:
                        begin = _word_start(text, position - place)
                    taken = text[begin : max(begin, end - place)][:wanted]
                    parts.append((taken, record.last and begin + len(taken) == len(text)))
                    wanted -= len(taken) + 1
                    if wanted <= 0:
                        return parts
                place += size
                if place >= end:
                    break
            block += 1
            if place >= end:
                block = position = 0

    def block(self, number: int) -> list[Record]:
        """The records of a block, held for the next time."""
        if number not in self._held:
            self._held[number] = self._read(number)
            self._held_characters += int(self.block_characters[number])
            while self._held_characters > _HELD_CHARACTERS and len(self._held) > 1:
                dropped, _ = self._held.popitem(last=False)
                self._held_characters -= int(self.block_characters[dropped])
        self._held.move_to_end(number)
        return self._held[number]

    def _read(self, number: int) -> list[Record]:
        shard = int(self._shard_of[number])
        index, first = self.indices[shard], int(self._first_block[shard])
        start = first + int(np.flatnonzero(self.cheap[first : number + 1])[-1])
        reader = self._readers.pop(shard, None)
        if reader is None or not start <= reader.block <= number:
            place = int(self._table[start, _PLACE])
            reader = _Reader(start, _kept(index.shard, index.keys, Tally(), place))
        found: list[Record] = []
        while reader.block <= number:
            found = list(islice(reader.records, int(self._table[reader.block, _RECORDS])))
            reader.block += 1
        self._readers[shard] = reader
        if len(self._readers) > _OPEN_SHARDS:
            self._readers.popitem(last=False)
        lengths = sum(sum(map(len, record.values)) + record.last for record in found)
        if lengths != self.block_characters[number]:
            raise UnreadableShard(
                f"{index.shard.name} is not what it was when the run began; leave the data as they are while a run "
                "goes on, and give the same command again"
            )
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.indices, self.tokenizer.folder, self.tally)


@dataclass
class _Reader:
    """A shard that is being read, and which block comes next."""

    block: int
    records: Iterator[Record]


def _reopened(indices: Sequence[TextIndex], tokenizer: Path, tally: Tally) -> Corpus:
    return Corpus(indices, load_tokenizer(tokenizer), tally)


def _word_start(text: str, skip: int) -> int:
    """The place of the first space or end from `skip` on; `skip` itself where words have no spaces between."""
    stop = min(skip + _LONGEST_WORD, len(text))
    return next((i for i in range(skip, stop) if text[i].isspace()), stop if stop == len(text) else skip)
