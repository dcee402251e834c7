"""Tensors of a checkpoint as float32, some rows at a time. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from encore.checkpoint import CheckpointError
from encore.checkpoint.folder import TensorInfo

SLICE_NUMBERS = 1 << 22
"""Numbers of a tensor that are in memory at a time: 16 MiB in float32."""

_KINDS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


def float_rows(info: TensorInfo) -> Iterator[NDArray[np.float32]]:
    """The rows of a tensor, some at a time; a vector at once. Raises CheckpointError."""
    num_rows, *rest = info.shape
    data, width = info.map(), info.num_bytes // max(1, num_rows)
    step = max(1, SLICE_NUMBERS // max(1, math.prod(rest))) if rest else num_rows
    for start in range(0, num_rows, step):
        rows = min(step, num_rows - start)
        numbers = _as_float32(np.array(data[start * width : (start + rows) * width]), info)
        if not np.isfinite(numbers).all():
            raise CheckpointError(f"{info.path}: tensor {info.name} holds numbers that are not finite")
        yield numbers.reshape(rows, *rest)


def _as_float32(data: NDArray[np.uint8], info: TensorInfo) -> NDArray[np.float32]:
    if info.dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if info.dtype not in _KINDS:
        raise CheckpointError(f"{info.path}: tensor {info.name} is stored as {info.dtype}; expected BF16 or a float")
    return data.view(_KINDS[info.dtype]).astype(np.float32)
