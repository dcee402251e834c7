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

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from encore.data.formats import Tally
from encore.tokenizer import Tokenizer

_FORMAT_VERSION = 2
_HEADER_BYTES = 128


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
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        tokens, ends = (_mapped(folder / name) for name in ("tokens.npy", "ends.npy"))
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
    if not (folder / "info.json").is_file():
        with _lock(folder), _disk_full_explained(cache_folder):
            for leftover in folder.parent.glob(f".writing-{key}-*"):
                shutil.rmtree(leftover)
            if not (folder / "info.json").is_file():
                _write(folder, texts, tally, np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4"))
    return Table.open(folder)


def _write(folder: Path, texts: Iterable[Sequence[tuple[list[int], bool]]], tally: Tally, dtype: np.dtype[Any]) -> None:
    temporary = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    temporary.mkdir()
    digest = hashlib.sha256()
    total = num_texts = 0
    try:
        with open(temporary / "tokens.npy", "wb") as tokens_file, open(temporary / "ends.npy", "wb") as ends_file:
            for file in (tokens_file, ends_file):
                file.write(bytes(_HEADER_BYTES))
            for batch in texts:
                ids = np.concatenate([np.zeros(0, dtype), *(np.asarray(text, dtype) for text, _ in batch)])
                lengths = np.cumsum([len(text) for text, _ in batch], dtype=np.int64) + total
                ends = lengths[[ends_here for _, ends_here in batch]].astype("<i8")
                for file, array in ((tokens_file, ids), (ends_file, ends)):
                    file.write(array.tobytes())
                    digest.update(array.tobytes())
                total += len(ids)
                num_texts += len(ends)
            for file, kind, length in ((tokens_file, dtype, total), (ends_file, np.dtype("<i8"), num_texts)):
                file.seek(0)
                file.write(_header(kind, length))
                file.flush()
                os.fsync(file.fileno())
        info = {"digest": digest.hexdigest(), "tokens": total, "texts": num_texts, "tally": asdict(tally)}
        (temporary / "info.json").write_text(json.dumps(info, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _header(dtype: np.dtype[Any], length: int) -> bytes:
    """The head of a version 1.0 .npy file, padded to a fixed size so that it can be written last."""
    fields = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({length},), }}"
    head = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
    return head + fields.encode("latin1").ljust(_HEADER_BYTES - 11) + b"\n"


def _mapped(path: Path) -> np.ndarray:
    empty = path.stat().st_size <= _HEADER_BYTES  # which cannot be mapped
    return cast("np.ndarray", np.load(path, mmap_mode=None if empty else "r", allow_pickle=False))


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _disk_full_explained(cache_folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"the disk is full while writing tokens into {cache_folder}; make room there, or name another place with "
            "data.cache_folder",
        ) from error


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
