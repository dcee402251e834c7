"""What is said and checked of the folders that a new checkpoint is made from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from encore.checkpoint import CheckpointError


def check_out(out: Path, sources: Iterable[Path], force: bool) -> None:
    """Refuse a folder that holds files (unless forced), or that is or contains a source. Raises CheckpointError."""
    if out.is_dir() and any(out.iterdir()) and not force:
        raise CheckpointError(f"{out} holds files already; choose another folder, or use --force to write into it")
    target = Path(os.path.realpath(out))
    for source in sources:
        real = Path(os.path.realpath(source))
        if real == target or target in real.parents:
            raise CheckpointError(f"{out} is or contains the source {source}; choose another folder")


def spoken_name(given: str | os.PathLike[str], folder: Path) -> str:
    """A hub name as given; of a local folder its name alone, since paths say nothing elsewhere."""
    return Path(os.path.realpath(folder)).name if Path(given).expanduser().is_dir() else os.fspath(given)


def sha256(path: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """The digest of a file, read in pieces; `advance` is told the bytes of each."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()
