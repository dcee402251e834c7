"""Rounding that makes up for its own errors (GPTQ, arXiv 2210.17323; column order by use, as its authors later added).

What counts is the error of a product, not of a weight: with inputs x and H = sum of x x', rounding errors E of a row
cost E H E'. Columns are rounded one after the other, the most used first; each error is spread over the columns that
are left, by the upper Cholesky factor U of the inverse of H, in the way that costs least:

    e_i = (w_i - rounded w_i) / U_ii,        w_j -= e_i U_ij   for every later j

Scales are chosen beforehand for the original weights (`blocks.searched_scales`, weighed by the diagonal of H), since a
block's columns are not rounded in one go. numpy alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from encore.quantize.blocks import Codes, Floats, in_blocks, pack, searched_scales

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: directions that the text hardly uses are not trusted to be free."""

COLUMNS_AT_ONCE = 128


def cholesky_of_inverse(hessian: NDArray[np.floating], order: NDArray[np.int64]) -> Floats:
    """The upper factor U with U' U = the inverse of the damped H, its columns in this order."""
    damped = hessian.astype(np.float64)[np.ix_(order, order)]
    mean = float(np.trace(damped)) / len(damped)
    damped[np.diag_indices_from(damped)] += DAMPING * mean if mean > 0 else 1.0
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


class Rounding:
    """GPTQ for the matrices that share their inputs: `hessian` (K, K) is the sum of x x'."""

    def __init__(self, hessian: NDArray[np.floating]) -> None:
        self.importance = np.diagonal(hessian).astype(np.float32)
        self.order = np.argsort(-self.importance, kind="stable")
        self.factor = cholesky_of_inverse(hessian, self.order)

    def quantise(self, weight: Floats, bits: int, block_size: int) -> tuple[Codes, Floats]:
        """A matrix (N, K) -> packed blocks (N, blocks, bytes) and scales (N, blocks). Rows do not touch each other."""
        half, (num_rows, num_columns) = 1 << (bits - 1), weight.shape
        mean = float(self.importance.mean())
        scales = searched_scales(weight, bits, block_size, self.importance + np.float32(DAMPING * mean or 1.0))
        columns = np.ascontiguousarray(weight.T[self.order])  # (K, N), in the order of rounding
        column_scales = np.repeat(scales, block_size, axis=1)[:, :num_columns].T[self.order]
        inverse = np.divide(1.0, column_scales, out=np.zeros_like(column_scales), where=column_scales != 0)
        levels = np.empty((num_columns, num_rows), np.uint8)
        for start in range(0, num_columns, COLUMNS_AT_ONCE):
            stop = min(start + COLUMNS_AT_ONCE, num_columns)
            errors = np.empty((stop - start, num_rows), np.float32)
            for i in range(start, stop):
                level = np.clip(np.rint(columns[i] * inverse[i]), -half, half - 1)
                levels[i] = level + half
                error = (columns[i] - level * column_scales[i]) / self.factor[i, i]
                errors[i - start] = error
                columns[i + 1 : stop] -= self.factor[i, i + 1 : stop, None] * error
            columns[stop:] -= self.factor[start:stop, stop:].T @ errors
        codes = np.empty((num_rows, num_columns), np.uint8)
        codes[:, self.order] = levels.T
        filled = in_blocks(codes.astype(np.float32) - half, block_size) + half
        return pack(filled.astype(np.uint8), bits), scales
