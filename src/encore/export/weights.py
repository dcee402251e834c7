"""A checkpoint's matrices -> one file, as float32 or in packed blocks of int8 or int4 (`quantize/blocks.py`). No torch.

Float weights are rounded to nearest here; packed ones (`encore quantize`) are copied as they are. Rows go through some
at a time, so of the largest matrix only a slice is ever held.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encore.checkpoint.folder import TensorInfo, read_folder, same_bytes
from encore.checkpoint.names import our_name
from encore.checkpoint.packing import is_packed_matrix, packing, scales_name
from encore.config import T5GemmaConfig
from encore.export import ExportError
from encore.quantize.blocks import dequantise, in_planes, quantise
from encore.quantize.tensors import float_rows

ALIGNMENT = 4096


@dataclass(frozen=True)
class Place:
    """Where an array lies in the weights file."""

    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Matrix:
    """A matrix (rows, columns) in the weights file; `bits` None = float32.

    With `lower`, an int8 matrix lies in two planes (`quantize.blocks.in_planes`): `values` is the upper one, so `bits`
    is 4, and scales are those of 4 bits.
    """

    name: str
    num_rows: int
    num_columns: int
    bits: int | None
    block_size: int
    values: Place
    scales: Place | None = None
    lower: Place | None = None

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


@dataclass(frozen=True)
class RowMatrix:
    """A matrix (rows, columns) in the weights file, transposed, int8 in -63 … 63, with a scale for each row."""

    name: str
    num_rows: int
    num_columns: int
    values: Place
    scales: Place


ROW_NUMBERS = 1 << 22
"""How many numbers are unpacked at a time."""

ROW_LEVELS = 63
"""7 bits, so that pairs of products with uint8 stay below 2^15, in which processors without VNNI add them up."""


class StoredWeights:
    """The tensors of a checkpoint folder by our names. Raises ExportError that names tensor and file."""

    def __init__(
        self, folder: Path, config: T5GemmaConfig, advance: Callable[[int], object] = lambda num_bytes: None
    ) -> None:
        """`advance` is told the bytes of matrices that were read."""
        self.folder, self.packing, self.advance = folder, packing(config), advance
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
        """The tensor as float32, some rows at a time."""
        info = self._info(name, shape)
        for rows in float_rows(info):
            if len(shape) > 1:
                self.advance(len(rows) * info.num_bytes // shape[0])
            yield rows

    def bytes_of(self, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The bytes of a tensor where they lie, mapped."""
        info = self._info(name, shape)
        self.advance(info.num_bytes)
        return info.map()

    def num_bytes(self, *sides: str) -> int:
        """Of the matrices whose names begin with one of these, pictures' apart."""
        matrices = (name for name in self._infos if is_packed_matrix(name.replace(".scales", ".weight")))
        return sum(self._infos[name].num_bytes for name in matrices if name.startswith(sides))

    def _info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self._infos.get(name)
        if info is None:
            raise ExportError(f"{self.folder} lacks the tensor {name}; it is no whole checkpoint of its config.json")
        if info.shape != shape:
            raise ExportError(
                f"{info.path}: tensor {info.name} has shape {list(info.shape)}, config.json makes it {list(shape)}"
            )
        return info


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

    def matrix(
        self, parts: Sequence[tuple[str, int]], num_columns: int, bits: int | None, *, planes: bool = False
    ) -> Matrix:
        """Write one matrix whose rows are those of `parts` (our names and row counts), one below the other.

        `planes`: int8 weights in two planes; the lower one is held until the upper one is written.
        """
        name = "+".join(part for part, _ in parts)
        num_rows = sum(rows for _, rows in parts)
        error = self.errors[name] = Error()
        self.num_weights += num_rows * num_columns
        scales: list[NDArray[np.float32]] = []
        lower: list[NDArray[np.uint8]] = []
        begin = self._align()
        if bits is not None and self.stored.packing is not None:
            return self._packed(parts, num_columns, bits, planes)
        for part, rows in parts:
            for weight in self.stored.slices(part, (rows, num_columns)):
                if bits is None:
                    self._write(weight)
                    continue
                codes, scale = quantise(weight, bits, self.block_size)
                if planes:
                    codes, low = in_planes(codes)
                    lower.append(low)
                    difference = dequantise(low, scale, 4, num_columns) - weight
                    scale *= np.float32(16)
                    difference += dequantise(codes, scale, 4, num_columns)
                else:
                    difference = dequantise(codes, scale, bits, num_columns) - weight
                self._write(codes)
                scales.append(scale)
                error.squared_error += float(np.vdot(difference, difference))
                error.squared_norm += float(np.vdot(weight, weight))
        values = Place(begin, self._end - begin)
        if bits is None:
            return Matrix(name, num_rows, num_columns, None, 1, values)
        places = [self._written(arrays) for arrays in (scales, lower) if arrays]
        return Matrix(name, num_rows, num_columns, 4 if planes else bits, self.block_size, values, *places)

    def matrix_by_rows(self, parts: Sequence[tuple[str, int]], num_columns: int) -> RowMatrix:
        """As `matrix`, with a scale for each row; the whole matrix is held while it is written."""
        name, num_rows = "+".join(part for part, _ in parts), sum(rows for _, rows in parts)
        if self.stored.packing is not None:
            raise ExportError(
                f"{self.stored.folder} holds weights packed in blocks, which cannot get a scale for each row; "
                "export the checkpoint that it was made of, or choose activations int8"
            )
        slices = [piece for part, rows in parts for piece in self.stored.slices(part, (rows, num_columns))]
        weight = np.concatenate(slices)
        scales = np.maximum(np.abs(weight).max(axis=1) / np.float32(ROW_LEVELS), np.float32(1e-20))
        levels = np.rint(weight / scales[:, None]).astype(np.int8)
        difference = levels * scales[:, None] - weight
        self.errors[name] = Error(float(np.vdot(difference, difference)), float(np.vdot(weight, weight)))
        self.num_weights += weight.size
        begin = self._align()
        self._write(levels.T)
        values, begin = Place(begin, self._end - begin), self._align()
        self._write(scales)
        return RowMatrix(name, num_rows, num_columns, values, Place(begin, self._end - begin))

    def rows_of(self, matrix: Matrix) -> Iterator[NDArray[np.float32]]:
        """What a packed matrix of this file stands for, some rows at a time."""
        assert matrix.bits is not None and matrix.scales is not None and matrix.lower is None
        self._file.flush()
        shape = (matrix.num_rows, matrix.num_blocks)
        codes = np.memmap(self.path, np.uint8, "r", matrix.values.offset, (*shape, matrix.block_bytes))
        scales = np.memmap(self.path, np.float32, "r", matrix.scales.offset, shape)
        at_once = max(1, ROW_NUMBERS // matrix.num_columns)
        for start in range(0, matrix.num_rows, at_once):
            rows = slice(start, start + at_once)
            yield dequantise(codes[rows], scales[rows], matrix.bits, matrix.num_columns)
            self.stored.advance(codes[rows].nbytes)

    def written(
        self,
        name: str,
        slices: Iterable[NDArray[np.float32]],
        num_columns: int,
        bits: int | None = None,
        block_size: int = 1,
    ) -> Matrix:
        """Write a matrix that is not the checkpoint's, given some rows at a time."""
        begin, num_rows, scales = self._align(), 0, list[NDArray[np.float32]]()
        for rows in slices:
            num_rows += len(rows)
            if bits is None:
                self._write(rows)
                continue
            codes, scale = quantise(rows, bits, block_size)
            self._write(codes)
            scales.append(scale)
        values = Place(begin, self._end - begin)
        return Matrix(name, num_rows, num_columns, bits, block_size, values, self._written(scales) if scales else None)

    def _packed(self, parts: Sequence[tuple[str, int]], num_columns: int, bits: int, planes: bool) -> Matrix:
        """`matrix`, of a folder that holds packed weights: copied as they are, or taken apart into planes."""
        num_rows, blocks = sum(rows for _, rows in parts), -(-num_columns // self.block_size)
        shapes = [(rows, blocks, self.block_size * bits // 8) for _, rows in parts]
        codes = [self.stored.bytes_of(part, shape) for (part, _), shape in zip(parts, shapes, strict=True)]
        scales = [self.stored.bytes_of(scales_name(part), (rows, blocks)) for part, rows in parts]
        name, lower = "+".join(part for part, _ in parts), []
        if planes:
            pairs = [in_planes(array.reshape(shape)) for array, shape in zip(codes, shapes, strict=True)]
            codes, lower = ([pair[i] for pair in pairs] for i in (0, 1))
            scales = [array.view(np.float32) * np.float32(16) for array in scales]
        places = [self._written(arrays) for arrays in (codes, scales, lower) if arrays]
        return Matrix(name, num_rows, num_columns, 4 if planes else bits, self.block_size, *places)

    def _written(self, arrays: Sequence[NDArray[Any]]) -> Place:
        begin = self._align()
        for array in arrays:
            self._write(array)
        return Place(begin, self._end - begin)

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
