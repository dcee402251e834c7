"""A checkpoint's matrices -> one file, as float32 or in packed blocks of int8 or int4. No torch.

A block is 32, 64 or 128 numbers of one row that share a float32 scale, rounded to nearest. The scale is the number of
largest magnitude / -2^(bits-1), sign included, so that this number is met exactly:

    w ~ scale * (q - 2^(bits-1)),   q unsigned, two to a byte at 4 bits (the first in the low half)

which is what ONNX Runtime's MatMulNBits and GatherBlockQuantized read. Rows go through some at a time, so of the
largest matrix only a slice is ever held.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encore.checkpoint.folder import TensorInfo, read_folder, same_bytes
from encore.checkpoint.names import our_name
from encore.config import T5GemmaConfig
from encore.export import ExportError

ALIGNMENT = 4096
SLICE_NUMBERS = 1 << 22
"""Numbers of a matrix that are in memory at a time: 16 MiB in float32."""

_TINY = 1e-30


@dataclass(frozen=True)
class Place:
    """Where an array lies in the weights file."""

    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Matrix:
    """A matrix (rows, columns) in the weights file; `bits` None = float32."""

    name: str
    num_rows: int
    num_columns: int
    bits: int | None
    block_size: int
    values: Place
    scales: Place | None = None

    @property
    def num_blocks(self) -> int:
        return -(-self.num_columns // self.block_size)

    @property
    def block_bytes(self) -> int:
        assert self.bits is not None
        return self.block_size * self.bits // 8

    def rows(self, start: int, stop: int) -> Matrix:
        """Some of the rows, where they lie."""

        def part(place: Place) -> Place:
            width = place.num_bytes // self.num_rows
            return Place(place.offset + start * width, (stop - start) * width)

        scales = None if self.scales is None else part(self.scales)
        name = f"{self.name}[{start}:{stop}]"
        return replace(self, name=name, num_rows=stop - start, values=part(self.values), scales=scales)


def quantise(weight: NDArray[np.float32], bits: int, block_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Packed blocks (N, blocks, bytes) and scales (N, blocks) of a matrix (N, K); a last block is filled with zeros."""
    num_rows, num_columns = weight.shape
    num_blocks = -(-num_columns // block_size)
    if num_blocks * block_size > num_columns:
        weight = np.pad(weight, ((0, 0), (0, num_blocks * block_size - num_columns)))
    blocks = weight.reshape(num_rows, num_blocks, block_size)
    half = 1 << (bits - 1)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2)
    scales = np.where(np.abs(largest) < _TINY, np.float32(0), largest / np.float32(-half)).astype(np.float32)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = (np.clip(np.rint(blocks * inverse), -half, half - 1) + half).astype(np.uint8)
    if bits == 4:
        codes = (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)
    return codes, scales[..., 0]


def dequantise(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], bits: int, num_columns: int
) -> NDArray[np.float32]:
    """What the packed blocks stand for, (N, K)."""
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1).astype(np.uint8).reshape(*codes.shape[:2], -1)
    numbers = (codes.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return numbers.reshape(len(codes), -1)[:, :num_columns]


class StoredWeights:
    """The tensors of a checkpoint folder by our names, as float32. Raises ExportError that names tensor and file."""

    def __init__(self, folder: Path, config: T5GemmaConfig) -> None:
        self.folder = folder
        self._infos: dict[str, TensorInfo] = {}
        copies: list[tuple[str, TensorInfo]] = []
        for public, info in read_folder(folder).items():
            name, role = our_name(config.model_type, public)
            if role == "tied":
                copies.append((name, info))
            elif role == "weight":
                self._infos[name] = info
        for name, info in copies:
            original = self._infos.setdefault(name, info)
            if not same_bytes(info, original):
                raise ExportError(
                    f"{info.path}: tensor {info.name} should be tied to {original.name} but differs from it; "
                    "a head of its own cannot be represented"
                )

    def vector(self, name: str, size: int) -> NDArray[np.float32]:
        return next(self.slices(name, (size,)))

    def slices(self, name: str, shape: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
        """The tensor, some rows at a time."""
        info = self._infos.get(name)
        if info is None:
            raise ExportError(f"{self.folder} lacks the tensor {name}; it is no whole checkpoint of its config.json")
        if info.shape != shape:
            raise ExportError(
                f"{info.path}: tensor {info.name} has shape {list(info.shape)}, config.json makes it {list(shape)}"
            )
        data = info.map()
        num_rows, *rest = shape
        width = info.num_bytes // num_rows
        step = max(1, SLICE_NUMBERS // max(1, math.prod(rest))) if rest else num_rows
        for start in range(0, num_rows, step):
            rows = min(step, num_rows - start)
            numbers = _as_float32(np.array(data[start * width : (start + rows) * width]), info)
            if not np.isfinite(numbers).all():
                raise ExportError(f"{info.path}: tensor {info.name} holds numbers that are not finite")
            yield numbers.reshape(rows, *rest)


def _as_float32(data: NDArray[np.uint8], info: TensorInfo) -> NDArray[np.float32]:
    if info.dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
    if info.dtype not in kinds:
        raise ExportError(f"{info.path}: tensor {info.name} is stored as {info.dtype}; expected BF16 or a float")
    return data.view(kinds[info.dtype]).astype(np.float32)


@dataclass
class Error:
    """How far packed weights are from what they were packed from."""

    squared_error: float = 0.0
    squared_norm: float = 0.0

    @property
    def relative(self) -> float:
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


class WeightsFile:
    """Writes the matrices one after the other, and keeps count of bits and errors."""

    def __init__(self, path: Path, stored: StoredWeights, block_size: int) -> None:
        self.path, self.stored, self.block_size = path, stored, block_size
        self.errors: dict[str, Error] = {}
        self.num_weights = 0
        self.num_bytes = 0
        self._digest = hashlib.sha256()
        self._end = 0
        self._file = path.open("wb")

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def size(self) -> int:
        return self._end

    def matrix(self, parts: Sequence[tuple[str, int]], num_columns: int, bits: int | None) -> Matrix:
        """Write one matrix whose rows are those of `parts` (our names and row counts), one below the other."""
        name = "+".join(part for part, _ in parts)
        num_rows = sum(rows for _, rows in parts)
        error = self.errors[name] = Error()
        self.num_weights += num_rows * num_columns
        scales: list[NDArray[np.float32]] = []
        begin = self._align()
        for part, rows in parts:
            for weight in self.stored.slices(part, (rows, num_columns)):
                if bits is None:
                    self._write(weight)
                    continue
                codes, scale = quantise(weight, bits, self.block_size)
                self._write(codes)
                scales.append(scale)
                difference = dequantise(codes, scale, bits, num_columns) - weight
                error.squared_error += float(np.vdot(difference, difference))
                error.squared_norm += float(np.vdot(weight, weight))
        values = Place(begin, self._end - begin)
        if bits is None:
            return Matrix(name, num_rows, num_columns, None, 1, values)
        begin = self._align()
        for scale in scales:
            self._write(scale)
        return Matrix(name, num_rows, num_columns, bits, self.block_size, values, Place(begin, self._end - begin))

    def _align(self) -> int:
        padding = bytes(-self._end % ALIGNMENT)
        self._file.write(padding)
        self._digest.update(padding)
        self._end += len(padding)
        return self._end

    def _write(self, array: NDArray[Any]) -> None:
        data = np.ascontiguousarray(array).data
        self._file.write(data)
        self._digest.update(data)
        self._end += array.nbytes
        self.num_bytes += array.nbytes
