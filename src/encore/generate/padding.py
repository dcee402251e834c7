"""Rows of unequal length -> one tensor of ids and a mask of what is real. torch only where a tensor is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from encore.images import Pixels

Item = TypeVar("Item")
PicturesOfRows: TypeAlias = "Sequence[Pixels | None] | None"
"""For each row the pixels (N, 3, size, size) of its pictures, or None; None for text only."""


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, *, side: Literal["left", "right"], device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"] | None]:
    """Ids padded on one side to the longest row (at least one place), and True where real (None if all are).

    >>> pad_rows([[5, 6], [7]], 0, side="left")
    (tensor([[5, 6],
            [0, 7]]), tensor([[ True,  True],
            [False,  True]]))
    """
    import torch

    length = max([1, *map(len, rows)])
    padding = [[pad_id] * (length - len(row)) for row in rows]
    pairs = list(zip(rows, padding, strict=True))
    tokens = torch.tensor([[*row, *pad] if side == "right" else [*pad, *row] for row, pad in pairs], device=device)
    if not any(padding):
        return tokens, None
    lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]
    places = torch.arange(length, device=device)
    return tokens, places < lengths if side == "right" else places >= length - lengths


def by_length(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """The row numbers in batches of like length, longest first: little padding, and memory fails early if it fails."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def join_pictures(pictures: PicturesOfRows, num_rows: int) -> Float[Tensor, "N C size size"] | None:
    """The pictures of all rows in the order of the rows; None if there are none."""
    import torch

    check_pictures(pictures, num_rows)
    found = [torch.as_tensor(pixels) for pixels in pictures or () if pixels is not None and len(pixels)]
    return torch.cat(found) if found else None


def check_pictures(pictures: PicturesOfRows, num_rows: int) -> None:
    if pictures is not None and len(pictures) != num_rows:
        raise ValueError(f"pictures has {len(pictures)} entries for {num_rows} sources; give one (or None) for each")
