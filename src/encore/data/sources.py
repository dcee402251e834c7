"""Readers of documents and of pairs, and the token stream that is made of documents once.

    files ──documents()──▶ texts ──token_stream()──▶ one long array of ids, on disk, mapped into memory
    files ──pairs()──────▶ (source, target) texts

A name is a path (relative to the current folder), or `asset:text/train` for what the package ships: a file of
`encore/assets`, its suffix left out if you like, or a folder, whose files are read in the order of their names.
Files are JSONL or plain text (one document per file), plain or packed by xz or gzip.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from encore.tokenizer import Tokenizer

_FORMAT_VERSION = 1
_DOCUMENT_SUFFIXES = (".jsonl", ".txt", ".md")
_PACKED_SUFFIXES = ("", ".xz", ".gz")
_ENCODE_BATCH = 512


def resolve(name: str) -> Path:
    """The path behind a name: `asset:...` inside the package, anything else as it stands (a leading ~ is the home)."""
    if not name.startswith("asset:"):
        return Path(name).expanduser()
    root = Path(str(resources.files("encore"))) / "assets"
    wanted = root / name.removeprefix("asset:")
    candidates = [wanted, *(Path(f"{wanted}{s}{p}") for s in _DOCUMENT_SUFFIXES for p in _PACKED_SUFFIXES)]
    for candidate in candidates:
        if candidate.exists() and candidate.resolve().is_relative_to(root.resolve()):
            return candidate
    folder = wanted.parent if wanted.parent.is_dir() else root
    shipped = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    raise ValueError(f"the package ships no {name!r}; beside it there are: {', '.join(shipped) or 'no files at all'}")


def files(names: Sequence[str]) -> list[Path]:
    """All files behind `names`, folders opened, in a fixed order."""
    found: list[Path] = []
    for name in names:
        path = resolve(name)
        if path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if _kind(entry) is not None)
            if not inside:
                raise ValueError(f"{path} holds no .jsonl, .txt or .md file (plain, .xz or .gz)")
            found.extend(inside)
        elif path.is_file():
            if _kind(path) is None:
                raise ValueError(
                    f"{path}: unknown kind of file; expected .jsonl, .txt or .md, plain or with .xz or .gz"
                )
            found.append(path)
        else:
            raise ValueError(f"no file or folder {path} (given as {name!r})")
    return found


def documents(names: Sequence[str], text_key: str = "text") -> Iterator[str]:
    """Texts in file order. A JSONL row gives the string under `text_key`; empty texts are passed over."""
    for path in files(names):
        if _kind(path) == ".jsonl":
            for number, row in _rows(path):
                text = _string(row, text_key, path, number)
                if text.strip():
                    yield text
        else:
            with _open(path) as file:
                text = file.read()
            if text.strip():
                yield text


@dataclass(frozen=True)
class Pair:
    """One row to learn: `source` is read, `target` is written."""

    source: str
    target: str


def pairs(names: Sequence[str], source_key: str = "src", target_key: str = "tgt") -> Iterator[Pair]:
    """Pairs in file order, from JSONL rows that hold two strings."""
    for path in files(names):
        if _kind(path) != ".jsonl":
            raise ValueError(
                f"{path}: pairs are read from JSONL files, one object with {source_key!r} and {target_key!r} per line"
            )
        for number, row in _rows(path):
            yield Pair(_string(row, source_key, path, number), _string(row, target_key, path, number))


def token_stream(
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    max_tokens: int = 0,
    cache_folder: Path | None = None,
) -> np.ndarray:
    """The ids of all documents, each followed by EOS, as one read-only array mapped from disk.

    Tokenised once: the file is named by the hash of the texts' files, of the tokenizer and of the options, and is
    written beside its place and then renamed, so a half-written one is never met.

    Args:
        max_tokens: stop reading documents when there are so many ids, and cut there; 0 reads all.
        cache_folder: where the arrays live; by default $ENCORE_CACHE or ~/.cache/encore, in `tokens/`.
    """
    folder = (cache_folder or default_cache_folder()) / "tokens"
    key = hashlib.sha256()
    key.update(f"{_FORMAT_VERSION} {text_key} {max_tokens} {tokenizer_fingerprint(tokenizer)}".encode())
    for path in files(names):
        key.update(f"\n{_kind(path)} {_file_hash(path)}".encode())
    path = folder / f"{key.hexdigest()[:32]}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        stream = _tokenize(documents(names, text_key), tokenizer, max_tokens)
        if not stream.size:
            raise ValueError(f"{', '.join(names)}: no text in there")
        _write_array(path, stream)
    return cast("np.ndarray", np.load(path, mmap_mode="r", allow_pickle=False))


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of the vocabulary's file and the special ids: equal fingerprints, equal batches."""
    files = (tokenizer.folder / name for name in ("tokenizer.json", "tokenizer.model"))
    digest = hashlib.sha256(_file_hash(next(path for path in files if path.is_file())).encode())
    special = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.source_format, tokenizer.sentinel_ids)
    digest.update(repr(special).encode())
    return digest.hexdigest()


def default_cache_folder() -> Path:
    """$ENCORE_CACHE, else `encore` in $XDG_CACHE_HOME, else ~/.cache/encore."""
    if named := os.environ.get("ENCORE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "encore"


def _tokenize(texts: Iterator[str], tokenizer: Tokenizer, max_tokens: int) -> np.ndarray:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    parts = [np.zeros(0, dtype=dtype)]
    total = 0
    while batch := list(islice(texts, _ENCODE_BATCH)):
        for ids in tokenizer.encode_batch(batch, eos=True):
            parts.append(np.asarray(ids, dtype=dtype))
            total += len(ids)
        if max_tokens and total >= max_tokens:
            break
    stream = np.concatenate(parts)
    return stream[:max_tokens] if max_tokens else stream


def _write_array(path: Path, array: np.ndarray) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=".npy")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _kind(path: Path) -> str | None:
    name = path.name.removesuffix(".xz").removesuffix(".gz")
    return next((suffix for suffix in _DOCUMENT_SUFFIXES if name.endswith(suffix)), None)


def _open(path: Path) -> IO[str]:
    if path.name.endswith(".xz"):
        return lzma.open(path, "rt", encoding="utf-8")
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error.msg}); expected one object per line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
            yield number, cast("dict[str, Any]", row)


def _string(row: dict[str, Any], key: str, path: Path, number: int) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(
            f"{path}, line {number}: expected a string under {key!r}; the row has {', '.join(map(repr, row))}"
        )
    return value


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def note(message: str) -> None:
    """A line for the person at the terminal: stderr, so that data on stdout stays clean."""
    print(message, file=sys.stderr, flush=True)
