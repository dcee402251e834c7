"""What a run says when it cannot go on: which rows gave a loss that is no number, and that the disk is full.

Whatever happens, checkpoints are whole or absent (`checkpoint/training.py`); here is only how the message gets to name
the cause and the place to go on from.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from encore.checkpoint.training import OutOfSpace, is_disk_full
from encore.data.batch import Batch
from encore.train.loss import Model

_SHOWN_ROWS = 5
_SHOWN_CHARACTERS = 60


class Decodes(Protocol):
    """A tokenizer, as far as it is needed to show a row."""

    def decode(self, ids: list[int], /) -> str: ...


@torch.no_grad()
def culprits(model: Model, batch: Batch, loss: Callable[[Model, Batch], Tensor], tokenizer: Decodes) -> str:
    """Where a loss that is not finite comes from: the weights, or the rows that give it alone. Runs each row."""
    if weight := first_not_finite(model):
        return f"the weights are not finite any more (first {weight}), so it is no single row"
    number = len(batch.decoder_mask)
    rows = [row for row in range(number) if not math.isfinite(float(loss(model, batch.shard(row, number))))]
    if not rows:
        return "no row alone gives it"
    shown = ", ".join(f"{row} ({_text(batch, row, tokenizer)!r})" for row in rows[:_SHOWN_ROWS])
    more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
    return f"from row {shown}{more} of {number}, counted from 0, shown by the beginning of its target"


def first_not_finite(model: Model) -> str | None:
    """The name of a parameter that holds a number that is none, if there is one."""
    return next((name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())), None)


@contextmanager
def full_disk_explained(folder: Path, where_safe: Callable[[], str]) -> Iterator[None]:
    """A full disk, wherever in a run it is met, becomes an OutOfSpace that says where to go on from."""
    try:
        yield
    except OutOfSpace:
        raise
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise OutOfSpace(
            errno.ENOSPC,
            f"no space left while writing {error.filename or folder}; {where_safe()}; free some space and give the "
            "same command again",
        ) from error


def _text(batch: Batch, row: int, tokenizer: Decodes) -> str:
    text = tokenizer.decode(batch.decoder_target_tokens[row][batch.decoder_mask[row]].tolist())
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
