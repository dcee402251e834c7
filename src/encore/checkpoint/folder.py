"""What lies in a checkpoint folder, learned from the safetensors headers alone. No torch, no tensor is read.

A safetensors file:

    8 bytes   length N of the header, little-endian
    N bytes   JSON: {"name": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}, …, "__metadata__": {…}}
    the rest  the tensors, without gaps or overlaps

Everything is checked before memory is spent, since a folder may come from anywhere: header length, dtypes,
shapes, offsets, gaps, the length of the file, and in an index the files' names. Files may be links (the hub cache
is made of them); their names must lie inside the folder.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from encore.checkpoint import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""Bytes per number of every dtype of whole bytes that the format knows."""

_MAX_HEADER_BYTES = 100_000_000
_MAX_INDEX_BYTES = 100_000_000
_MAX_DIMENSIONS = 16
_COMPARE_BYTES = 2**24


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `num_bytes` bytes from byte `begin` of `path`."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int

    def map(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes, mapped: resident only where touched, gone with the array. Writing never reaches the file."""
        if not self.num_bytes:
            return np.zeros(0, np.uint8)
        return np.memmap(self.path, np.uint8, mode="c", offset=self.begin, shape=(self.num_bytes,))


def same_bytes(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors are equal bit for bit, compared piece by piece."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    left, right = first.map(), second.map()
    return all(
        np.array_equal(left[start : start + _COMPARE_BYTES], right[start : start + _COMPARE_BYTES])
        for start in range(0, first.num_bytes, _COMPARE_BYTES)
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, and the index if there is one. Raises CheckpointError."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    names = sorted(set(_read_index(folder).values()))
    return [folder / INDEX_FILE, *(folder / name for name in names)]


def read_folder(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder by its public name; single file or shards with an index. Raises CheckpointError."""
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    weight_map = _read_index(folder)
    index = folder / INDEX_FILE
    tensors: dict[str, TensorInfo] = {}
    for file_name in sorted(set(weight_map.values())):
        for name, info in read_header(folder / file_name).items():
            if name not in weight_map:
                raise CheckpointError(f"tensor {name} lies in {info.path} but {index} does not list it")
            if weight_map[name] == file_name:
                tensors[name] = info
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index} says that tensor {name} lies in {file_name}, but it does not")
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, from its header, fully checked. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: it has {size} bytes, its header claims {length}"
                )
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: a header of {length} bytes; the format allows {_MAX_HEADER_BYTES}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    header = _parse_json(text, path)
    header.pop("__metadata__", None)
    data_size = size - 8 - length
    infos = [_read_entry(name, entry, path, 8 + length, data_size) for name, entry in header.items()]
    end = 8 + length
    for info in sorted(infos, key=lambda info: (info.begin, info.num_bytes)):
        if info.begin != end:
            raise CheckpointError(f"{path}: tensor {info.name} starts at byte {info.begin}, expected {end}")
        end += info.num_bytes
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes but its tensors end at {end}")
    return {info.name: info for info in infos}


def _read_entry(name: str, entry: Any, path: Path, data_begin: int, data_size: int) -> TensorInfo:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected an object with dtype, shape and data_offsets, not {_short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(f"{where}: unknown dtype {_short(dtype)}; expected one of {', '.join(ITEM_SIZES)}")
    if not _are_counts(shape):
        raise CheckpointError(f"{where}: shape {_short(shape)} is no list of whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {_short(offsets)} are no [begin, end]")
    begin, end = offsets
    if end > data_size:
        raise CheckpointError(
            f"{where} ends at data byte {end} but the file holds {data_size}: truncated, or its offsets are wrong"
        )
    wanted = math.prod(shape) * ITEM_SIZES[dtype]
    if end - begin != wanted:
        raise CheckpointError(f"{where}: {shape} of {dtype} needs {wanted} bytes, data_offsets give {end - begin}")
    return TensorInfo(name, path, dtype, tuple(shape), data_begin + begin, wanted)


def _read_index(folder: Path) -> dict[str, str]:
    """tensor -> file name, from the index; names are inside the folder and exist."""
    path = folder / INDEX_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; an index has less than {_MAX_INDEX_BYTES}")
    weight_map = _parse_json(path.read_bytes(), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty; expected tensor names and their files")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _lies_inside(file_name):
            raise CheckpointError(f"{path}: tensor {name} points to {_short(file_name)}, no file of the folder")
        if not (folder / file_name).is_file():
            raise CheckpointError(f"{path}: tensor {name} points to {file_name}, which does not exist")
    return weight_map


def _lies_inside(file_name: str) -> bool:
    """Whether a relative name stays in its folder, on any system."""
    if not file_name.endswith(".safetensors") or any(sign in file_name for sign in ("\\", ":", "\0")):
        return False
    path = PurePosixPath(file_name)
    return not path.is_absolute() and ".." not in path.parts


def _are_counts(value: Any) -> bool:
    """A short list of whole numbers that fit 63 bits."""
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in value)
    )


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object without doubled keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            doubled, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"{_short(doubled)} stands there twice")
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header or index is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: the header or index is a {type(value).__name__}; expected a JSON object")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "…"
