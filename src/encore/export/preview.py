"""A narrow view of the head, by which the best words are found: SVD-softmax (Shim et al., NeurIPS 2017).

The head's product, V = 262,144 words by D numbers, is half of what a step of a small model reads. The words' rows W lie
mostly along few directions U (the first eigenvectors of W'W), so

    W h ~ (W U) (U'h)                                  r of D numbers for each word, in 4 bits

tells which words are the best; what those have in full is computed from their own rows (`step.py`). U is turned at
random within what it spans (U Q): else the first direction is so much larger than the others that these would be
rounded away beside it, in the rows and in U'h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from encore.export import ExportError
from encore.export.weights import Matrix, WeightsFile

BITS = 4
STEP = 32
"""A view's width is a multiple of it, so that it can be packed in blocks."""

CANDIDATES = 128
"""How many of the best logits of the view are computed in full."""


@dataclass(frozen=True)
class View:
    """`directions` (r, D) and `rows` (V, r); `energy`: the part of the sum of W's squares that lies along them."""

    directions: Matrix
    rows: Matrix
    energy: float


def check_width(width: int, num_words: int, num_columns: int) -> None:
    """Raises ExportError for a width that a head of this shape cannot be seen in."""
    if width % STEP or not 0 < width < num_columns:
        raise ExportError(
            f"head_preview is {width}; expected a multiple of {STEP} below the head's {num_columns} columns"
        )
    if num_words <= CANDIDATES:
        raise ExportError(f"the head has {num_words} words; a preview finds the {CANDIDATES} best of more")


def view(file: WeightsFile, table: Matrix, width: int) -> View:
    """Writes the view of a packed matrix (V, D) that the file holds."""
    gram = np.zeros((table.num_columns,) * 2)
    for rows in file.rows_of(table):
        gram += rows.T @ rows
    values, vectors = np.linalg.eigh(gram)  # ascending
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]
    directions = (vectors[:, -width:] @ turn).astype(np.float32)
    block_size = next(size for size in (128, 64, 32) if width % size == 0)
    seen = (rows @ directions for rows in file.rows_of(table))
    return View(
        file.written(f"{table.name}.directions", [np.ascontiguousarray(directions.T)], table.num_columns),
        file.written(f"{table.name}.view", seen, width, BITS, block_size),
        float(values[-width:].sum() / max(values.sum(), 1e-30)),
    )
