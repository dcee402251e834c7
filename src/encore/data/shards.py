"""Names in a recipe -> shards: the files that data is read from, here or far away, and their bytes unpacked.

    data/*.jsonl.zst         a path, with wildcards; a folder stands for the files in it, in the order of their names
    asset:text/train         what the package ships
    s3://bucket/corpus/      any URL that fsspec knows (memory://, file://, hf://, gs://, …), also with wildcards
    corpus/train             a folder written by `datasets.save_to_disk`: its Arrow files

Nothing is read whole: a shard opens as a stream of bytes, whatever it is packed with.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import lzma
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

KINDS = (".jsonl", ".txt", ".md", ".parquet", ".arrow")
PACKINGS = (".xz", ".gz", ".zst")
_WILDCARDS = frozenset("*?[")
_EXPECTED = f"expected {', '.join(KINDS[:-1])} or {KINDS[-1]}, text also packed by {', '.join(PACKINGS)}"


class MissingLibrary(ValueError):
    """A library of the extra `data` is needed for this kind of file."""


class UnreadableShard(ValueError):
    """A file that cannot be opened, or in which nothing can be made out."""


def need(library: str, what: str) -> Any:
    """The imported library, or an error that names the extra which brings it."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        package = library.partition(".")[0]
        raise MissingLibrary(
            f"{what} needs {package}, which is not installed; install it with: pip install 'encore-lm[data]'"
        ) from error


@dataclass(frozen=True)
class Shard:
    """One file. `name` is a path or a URL; `suffix` one of KINDS."""

    name: str
    suffix: str

    @property
    def is_remote(self) -> bool:
        return "://" in self.name

    @property
    def is_packed(self) -> bool:
        return self.name.endswith(PACKINGS)

    def open(self) -> BinaryIO:
        """The file's bytes as they lie there."""
        try:
            if self.is_remote:
                return cast("BinaryIO", _filesystem(self.name)[0].open(self.name, "rb"))
            return open(self.name, "rb")
        except OSError as error:
            raise self.unreadable(error.strerror or str(error)) from error

    @contextmanager
    def unpacked(self, start: int = 0) -> Iterator[BinaryIO]:
        """The file's bytes from `start` on, unpacked as they are read."""
        with ExitStack() as stack:
            file = stack.enter_context(self.open())
            if self.name.endswith(".gz"):
                file = cast("BinaryIO", stack.enter_context(gzip.GzipFile(fileobj=file)))
            elif self.name.endswith(".xz"):
                file = cast("BinaryIO", stack.enter_context(lzma.LZMAFile(file)))
            elif self.name.endswith(".zst"):
                file = cast("BinaryIO", stack.enter_context(io.BufferedReader(_ZstdFrames(file), 1 << 16)))
            if not self.is_packed:
                file.seek(start)
            while self.is_packed and start and (passed := len(file.read(min(start, 1 << 20)))):
                start -= passed
            yield file

    def identity(self, memory: Path) -> str:
        """A hash that changes with the contents: of the bytes for a file here, of what the store says of one far away.

        Args:
            memory: a folder in which the hash of a file that has kept its name, size and time is found again.
        """
        if self.is_remote:
            system, path = _filesystem(self.name)
            return hashlib.sha256(f"{self.name} {system.ukey(path)}".encode()).hexdigest()
        stat = os.stat(self.name)
        stamp = f"{os.path.realpath(self.name)} {stat.st_size} {stat.st_mtime_ns}"
        known = memory / hashlib.sha256(stamp.encode()).hexdigest()[:32]
        if known.is_file() and len(text := known.read_text(encoding="ascii")) == 64:
            return text
        with self.open() as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
        memory.mkdir(parents=True, exist_ok=True)
        temporary = known.with_name(f".writing-{os.getpid()}-{known.name}")
        temporary.write_text(digest, encoding="ascii")
        os.replace(temporary, known)
        return digest

    def unreadable(self, why: object) -> UnreadableShard:
        return UnreadableShard(f"cannot read {self.name}: {why}; repair it, fetch it again, or take it out of the data")


def resolve(name: str) -> Path:
    """The path behind a name: `asset:...` inside the package, anything else as it stands (a leading ~ is the home)."""
    if not name.startswith("asset:"):
        return Path(name).expanduser()
    root = Path(str(resources.files("encore"))) / "assets"
    wanted = root / name.removeprefix("asset:")
    candidates = [wanted, *(Path(f"{wanted}{s}{p}") for s in KINDS for p in ("", *PACKINGS))]
    for candidate in candidates:
        if candidate.exists() and candidate.resolve().is_relative_to(root.resolve()):
            return candidate
    folder = wanted.parent if wanted.parent.is_dir() else root
    shipped = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    raise ValueError(f"the package ships no {name!r}; beside it there are: {', '.join(shipped) or 'no files at all'}")


def shards(names: Sequence[str]) -> list[Shard]:
    """All files behind `names`, folders and wildcards opened, in a fixed order."""
    found: list[Shard] = []
    for name in names:
        found.extend(_remote(name) if "://" in name else _local(name))
    return found


def _local(name: str) -> list[Shard]:
    path = resolve(name)
    if path.is_dir():
        return [Shard(str(path / entry), suffix) for entry, suffix in _inside(path)]
    if path.exists():
        return [_shard(str(path))]
    if _WILDCARDS & set(name):
        root = Path(path.anchor) if path.is_absolute() else Path()
        matches = sorted(str(match) for match in root.glob(str(path.relative_to(root))) if match.is_file())
        if matches:
            return [_shard(match) for match in matches]
    raise ValueError(f"no file or folder {path} (given as {name!r})")


def _inside(folder: Path) -> list[tuple[str, str]]:
    """Names and kinds of the files that a folder stands for."""
    state, splits = folder / "state.json", folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8")).get("splits", [])
        raise ValueError(f"{folder} holds a data set of several splits; give one: {', '.join(map(repr, names))}")
    if state.is_file():
        return [(name, ".arrow") for name in _saved_files(state.read_bytes(), str(folder))]
    inside = [(entry.name, kind) for entry in sorted(folder.iterdir()) if entry.is_file() and (kind := _kind(entry))]
    if not inside:
        raise ValueError(f"{folder} holds no file of text, rows or tables; {_EXPECTED}")
    return inside


def _saved_files(state: bytes, folder: str) -> list[str]:
    """The Arrow files of a `save_to_disk` folder, from its state.json."""
    try:
        names = [entry["filename"] for entry in json.loads(state)["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableShard(
            f"{folder}/state.json is not what datasets.save_to_disk writes ({error!r}); save it again"
        ) from error
    if not names:
        raise ValueError(f"{folder} is an empty data set: its state.json lists no file")
    return names


def _remote(name: str) -> list[Shard]:
    system, path = _filesystem(name)
    try:
        if _WILDCARDS & set(path):
            paths = sorted(system.glob(path))
        elif system.isdir(path):
            state = f"{path.rstrip('/')}/state.json"
            if system.isfile(state):
                names = _saved_files(system.cat_file(state), name)
                return [Shard(system.unstrip_protocol(f"{path.rstrip('/')}/{entry}"), ".arrow") for entry in names]
            paths = sorted(entry for entry in system.ls(path, detail=False) if _kind(PurePosixPath(entry)))
        else:
            paths = [path] if system.isfile(path) else []
    except OSError as error:
        raise UnreadableShard(f"cannot look into {name}: {error}") from error
    if not paths:
        raise ValueError(f"no file or folder {name}, or no file of data in it; {_EXPECTED}")
    return [_shard(system.unstrip_protocol(found)) for found in paths]


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    fsspec = need("fsspec", f"reading {url}")
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:  # fsspec's own message names the package: s3fs, gcsfs, …
        raise MissingLibrary(f"cannot open {url}: {error}") from error
    except ValueError as error:
        raise ValueError(f"cannot open {url}: {error}") from error


def _shard(name: str) -> Shard:
    kind = _kind(PurePosixPath(name))
    if kind is None:
        raise ValueError(f"{name}: unknown kind of file; {_EXPECTED}")
    return Shard(name, kind)


def _kind(path: PurePosixPath | Path) -> str | None:
    name = path.name
    for packing in PACKINGS:
        name = name.removesuffix(packing)
    kind = next((suffix for suffix in KINDS if name.endswith(suffix)), None)
    return None if kind in (".parquet", ".arrow") and name != path.name else kind


class _ZstdFrames(io.RawIOBase):
    """Zstandard frames as a stream that, unlike the library's own, says when the last frame is cut short."""

    def __init__(self, file: BinaryIO) -> None:
        self._zstandard = need("zstandard", "reading a .zst file")
        self._file, self._ready = file, b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            packed = packed or self._file.read(1 << 16)
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the file ends in the middle of a zstandard frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(packed)
            except self._zstandard.ZstdError as error:
                raise OSError(f"not zstandard: {error}") from error
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
