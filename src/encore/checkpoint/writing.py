"""Writing a checkpoint folder: safetensors tensor by tensor, and a folder that appears whole or not at all.

No torch: a tensor is given by name, dtype, shape and a function that yields its bytes in pieces, so one that is
copied from file to file is never held. The layout is the one the safetensors library writes (widest dtype first,
then by name; header padded with spaces to 8 bytes), so equal tensors give equal files.

    with new_folder(out) as staged:          # .out.new-…, beside out
        write_weights(staged, tensors)
        (staged / "config.json").write_text(…)
                                             # left without error: renamed to out; with one: deleted
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from encore.checkpoint import CheckpointError
from encore.checkpoint.folder import INDEX_FILE, ITEM_SIZES, SINGLE_FILE

Piece = bytes | np.ndarray[Any, Any]
MAX_SHARD_BYTES = 5_000_000_000
WEIGHT_PATTERNS = ("*.safetensors", INDEX_FILE)
"""What a folder that is written again never keeps from its former content."""


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written. `pieces` is called once, when its turn comes; the pieces make up all of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Piece]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def write_weights(
    folder: Path,
    tensors: Sequence[OutputTensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write one file, or shards of at most `max_shard_bytes` (a larger tensor has one alone) and their index.

    `progress` is told the number of bytes of each piece written. Returns the files.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; expected at least 1")
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / SINGLE_FILE, shards[0], progress)
        return [folder / SINGLE_FILE]
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file_name, shard, progress)
        weight_map.update((tensor.name, file_name) for tensor in shard)
    metadata = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "total_size": sum(tensor.num_bytes for tensor in tensors),
    }
    write_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    return [*(folder / name for name in sorted(set(weight_map.values()))), folder / INDEX_FILE]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _split(tensors: Sequence[OutputTensor], max_shard_bytes: int) -> list[list[OutputTensor]]:
    shards: list[list[OutputTensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    return shards


def _write_file(path: Path, tensors: Sequence[OutputTensor], progress: Callable[[int], None] | None) -> None:
    ordered = sorted(tensors, key=lambda tensor: (-ITEM_SIZES[tensor.dtype], tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            written = 0
            for piece in tensor.pieces():
                size = len(piece) if isinstance(piece, bytes) else piece.nbytes
                file.write(piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).data)
                written += size
                if progress is not None:
                    progress(size)
            assert written == tensor.num_bytes, f"{tensor.name}: {written} bytes for {tensor.num_bytes}"
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(target: Path, replaced: Sequence[str] = WEIGHT_PATTERNS) -> Iterator[Path]:
    """A staging folder beside `target` that takes its place on leaving without error, and vanishes with one.

    What `target` held before stays in it, unless the new content has a file of that name or a pattern of `replaced`
    fits. At every moment a whole folder exists: the old one (for the moment between two renames under the name
    `.NAME.old-…`) or the new one. A mount point cannot be renamed; there the files are put in place one by one,
    config.json last.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; expected a folder, or a name that is free")
    mounted = os.path.ismount(target)
    parent = target if mounted else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=parent))
    try:
        staged.chmod(target.stat().st_mode & 0o777 if target.is_dir() else 0o777 & ~_umask())
        yield staged
        if mounted:
            _move_into(staged, target, replaced)
            return
        if target.is_dir() and any(target.iterdir()):
            _keep_old(target, staged, replaced)
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=parent))
            os.rename(target, old)
            os.rename(staged, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(staged, target)
        _sync_folder(parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def copy_files(paths: Iterable[Path], folder: Path) -> None:
    """Copy files (links followed) into a folder; those that stand there already stay."""
    for path in paths:
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _keep_old(target: Path, staged: Path, replaced: Sequence[str]) -> None:
    """The files of the old folder that the new one does not bring, as hard links where the system has them."""

    def link(source: str, destination: str) -> str:
        try:
            os.link(source, destination, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, destination, follow_symlinks=False)
        return destination

    for path in target.iterdir():
        if (staged / path.name).exists() or any(fnmatchcase(path.name, pattern) for pattern in replaced):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, staged / path.name, symlinks=True, copy_function=link)
        else:
            link(str(path), str(staged / path.name))


def _move_into(staged: Path, target: Path, replaced: Sequence[str]) -> None:
    (target / "config.json").unlink(missing_ok=True)
    for path in target.iterdir():
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in replaced):
            path.unlink()
    for path in sorted(staged.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, target / path.name)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
