"""Rows of unequal length -> one tensor of ids and a mask of what is real."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Item = TypeVar("Item")


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, *, side: Literal["left", "right"], device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"] | None]:
    """Ids padded on one side to the longest row (at least one place), and True where real (None if all are).

    >>> pad_rows([[5, 6], [7]], 0, side="left")
    (tensor([[5, 6],
            [0, 7]]), tensor([[ True,  True],
            [False,  True]]))
    """
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


def check_ids(rows: Sequence[Sequence[int]], vocab_size: int, what: str) -> None:
    """Refuses ids that the embedding does not have, before they become an index error deep inside."""
    for i, row in enumerate(rows):
        for token in row:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{what} {i} holds the id {token}; the model has ids 0 to {vocab_size - 1}: "
                    "use the tokenizer that belongs to the model"
                )
