"""Token tables: the texts of one shard as ids, written once, mapped into memory by every run and every process.

    CACHE/tokens/KEY/
      tokens.npy     all ids, one text after the other (uint16, or uint32 for a large vocabulary)
      ends.npy       int64: where each text ends
      info.json      what reading came to, and a digest of the ids

The key hashes the shard's contents, the tokenizer and the options. A table is written in pieces (so memory stays
bounded, whatever the corpus), into a hidden folder that is renamed when it is whole: a crash leaves no table, and the
shards that were done before it stay done. Of several processes that want the same table one writes; the others wait.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encore.data.array_folder import GrowingArray, make_folder, mapped, read_info
from encore.data.formats import Tally
from encore.tokenizer import Tokenizer

_FORMAT_VERSION = 2


@dataclass(frozen=True)
class Table:
    """The texts of a shard as ids. Pickles as its folder's name, so that it costs nothing to send to a process."""

    folder: Path
    tokens: np.ndarray
    ends: np.ndarray
    digest: str
    tally: Tally

    @classmethod
    def open(cls, folder: Path) -> Table:
        info = read_info(folder)
        tokens, ends = (mapped(folder / name) for name in ("tokens.npy", "ends.npy"))
        return cls(folder, tokens, ends, info["digest"], Tally(**info["tally"]))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Table.open, (self.folder,))


class TokenStream:
    """Several tables' ids as one sequence; only slices of it are ever in memory."""

    def __init__(self, tables: Sequence[Table], max_tokens: int = 0) -> None:
        self.tables = tuple(tables)
        self._starts = np.concatenate([[0], np.cumsum([len(table.tokens) for table in self.tables])]).astype(np.int64)
        self._length = min(int(self._starts[-1]), max_tokens or int(self._starts[-1]))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(self._length)
        if step != 1:
            raise ValueError("a token stream is read in stretches; take a slice without a step")
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts: list[np.ndarray] = []
        for number in range(first, len(self.tables)):
            begin = int(self._starts[number])
            if begin >= stop:
                break
            parts.append(self.tables[number].tokens[max(start - begin, 0) : stop - begin])
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, dtype=np.uint32)])

    def document_ends(self) -> np.ndarray:
        """Where each document ends in the stream; the last one may be cut short by `max_tokens`."""
        parts = [table.ends + start for table, start in zip(self.tables, self._starts[:-1], strict=True)]
        ends = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
        whole = ends[ends <= self._length]
        cut = not whole.size or int(whole[-1]) < self._length
        return np.append(whole, self._length) if cut and self._length else whole


def make_table(
    key_parts: Sequence[str],
    texts: Iterable[Sequence[tuple[list[int], bool]]],
    tally: Tally,
    vocab_size: int,
    cache_folder: Path,
) -> Table:
    """The table of that key: the one that is there, or a new one of `texts`.

    Args:
        texts: batches of (ids, whether the text ends here); read only if the table has to be made.
        tally: what reading the texts adds to, stored with the table.
    """
    key = hashlib.sha256("\n".join((str(_FORMAT_VERSION), *key_parts)).encode()).hexdigest()[:32]
    folder = cache_folder / "tokens" / key
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    make_folder(folder, lambda temporary: _write(temporary, texts, tally, dtype), cache_folder)
    return Table.open(folder)


def _write(folder: Path, texts: Iterable[Sequence[tuple[list[int], bool]]], tally: Tally, dtype: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    tokens, ends = GrowingArray(folder / "tokens.npy", dtype), GrowingArray(folder / "ends.npy", "<i8")
    try:
        for batch in texts:
            lengths = np.cumsum([len(text) for text, _ in batch], dtype=np.int64) + tokens.length
            ids = np.concatenate([np.zeros(0, dtype), *(np.asarray(text, dtype) for text, _ in batch)])
            digest.update(tokens.append(ids))
            digest.update(ends.append(lengths[[ends_here for _, ends_here in batch]]))
        tokens.finish()
        ends.finish()
    finally:
        tokens.close()
        ends.close()
    return {"digest": digest.hexdigest(), "tokens": tokens.length, "texts": ends.length, "tally": asdict(tally)}


def vocabulary_fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of the vocabulary's file and of EOS: equal fingerprints, equal ids of a text."""
    files = (tokenizer.folder / name for name in ("tokenizer.json", "tokenizer.model"))
    with open(next(path for path in files if path.is_file()), "rb") as file:
        digest = hashlib.sha256(hashlib.file_digest(file, "sha256").hexdigest().encode())
    digest.update(f"{tokenizer.eos_id} {tokenizer.vocab_size}".encode())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """The same with all special ids and the source format: equal fingerprints, equal batches."""
    special = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.source_format, tokenizer.sentinel_ids)
    return hashlib.sha256(f"{vocabulary_fingerprint(tokenizer)} {special!r}".encode()).hexdigest()


def default_cache_folder() -> Path:
    """$ENCORE_CACHE, else `encore` in $XDG_CACHE_HOME, else ~/.cache/encore."""
    if named := os.environ.get("ENCORE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "encore"
