"""Folders of arrays that are written piece by piece, whole or absent, and then mapped into memory.

A folder is written under a hidden name and renamed when it is finished: a crash leaves none. Of several processes that
want the same one, one writes; the others wait.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

_HEADER_BYTES = 128


class GrowingArray:
    """An .npy file of rows that are appended; its header is written last, when the number of rows is known."""

    def __init__(self, path: Path, dtype: str, columns: int = 0) -> None:
        self.dtype, self.columns, self.length = np.dtype(dtype), columns, 0
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `finish` or `close`)
        self._file.write(bytes(_HEADER_BYTES))

    def append(self, rows: Any) -> bytes:
        """Add rows; returns the bytes written."""
        array = np.asarray(rows, self.dtype)
        data = array.tobytes()
        self._file.write(data)
        self.length += len(array)
        return data

    def finish(self) -> None:
        """Write the header of a version 1.0 .npy file, padded to a fixed size, and flush everything to disk."""
        shape = f"({self.length}, {self.columns})" if self.columns else f"({self.length},)"
        fields = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
        head = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(head + fields.encode("latin1").ljust(_HEADER_BYTES - 11) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        self._file.close()


def make_folder(folder: Path, write: Callable[[Path], dict[str, Any]], cache_folder: Path) -> dict[str, Any]:
    """What info.json in `folder` holds; where there is none, `write` fills a folder and says what it is to hold."""
    if not (folder / "info.json").is_file():
        with _lock(folder), _disk_full_explained(cache_folder):
            for leftover in folder.parent.glob(f".writing-{folder.name}-*"):
                shutil.rmtree(leftover)
            if not (folder / "info.json").is_file():
                temporary = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
                temporary.mkdir()
                try:
                    text = json.dumps(write(temporary), ensure_ascii=False, indent=1)
                    (temporary / "info.json").write_text(text, encoding="utf-8")
                    os.replace(temporary, folder)
                except BaseException:
                    shutil.rmtree(temporary, ignore_errors=True)
                    raise
    return read_info(folder)


def read_info(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "info.json").read_text(encoding="utf-8"))


def mapped(path: Path) -> np.ndarray:
    """The array in a file, left there."""
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
