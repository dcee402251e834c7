"""Rows of examples -> the arrays of a batch (`encore.data.batch` draws them). No torch here: workers make these.

One example per row, or several (`segments`): then every place says which of the row's examples it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Ids = np.ndarray


@dataclass(frozen=True)
class Row:
    """One example: the encoder reads `source` (None: no encoder); the first `prompt_tokens` of `target` are given.

    `pictures` stand in the order of their placeholders in `source`.
    """

    source: Ids | None
    target: Ids
    prompt_tokens: int = 0
    pictures: np.ndarray | None = None  # (N, 3, size, size), or the tower's features (N, tokens, W)


Arrays = dict[str, np.ndarray | None]
"""The fields of a Batch by name; ids are int32 here."""


def lay_out(
    rows: Sequence[Sequence[Row]],
    *,
    bos_id: int,
    pad_id: int,
    encoder_tokens: int = 0,
    decoder_tokens: int = 0,
    segments: bool = False,
) -> Arrays:
    """Rows of one or more examples each, padded to the given lengths (0: to the longest).

    Raises ValueError for an example without a token, and when some examples have a source and others none.
    """
    examples = [example for row in rows for example in row]
    if not examples:
        raise ValueError("no rows: a batch needs at least one row")
    without = sum(example.source is None for example in examples)
    if 0 < without < len(examples):
        raise ValueError(f"{without} of {len(examples)} rows have no source; a batch holds rows of one kind")
    for number, example in enumerate(examples):
        if not len(example.target) or (example.source is not None and not len(example.source)):
            side = "target" if not len(example.target) else "source"
            raise ValueError(f"{side} {number} of the batch is empty; every {side} needs at least one token")
    targets, target_ids = _side([[e.target for e in row] for row in rows], pad_id, decoder_tokens)
    inputs = np.full_like(targets, pad_id)
    weights = (target_ids > 0).astype(np.float32)
    for number, row in enumerate(rows):
        place = 0
        for example in row:
            end = place + len(example.target)
            inputs[number, place] = bos_id
            inputs[number, place + 1 : end] = example.target[:-1]
            weights[number, place : place + example.prompt_tokens] = 0
            place = end
    arrays: Arrays = {
        "encoder_input_tokens": None,
        "encoder_mask": None,
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": weights,
        "decoder_mask": target_ids > 0,
        "encoder_segment_ids": None,
        "decoder_segment_ids": target_ids if segments else None,
        "pictures": None,
        "picture_rows": None,
    }
    if any(example.pictures is not None for example in examples):
        shown = [(n, e.pictures) for n, row in enumerate(rows) for e in row if e.pictures is not None]
        arrays["pictures"] = np.concatenate([pictures for _, pictures in shown])
        arrays["picture_rows"] = np.repeat([n for n, _ in shown], [len(pictures) for _, pictures in shown])
    if not without:
        sources = [[e.source for e in row if e.source is not None] for row in rows]
        tokens, source_ids = _side(sources, pad_id, encoder_tokens)
        arrays |= {"encoder_input_tokens": tokens, "encoder_mask": source_ids > 0}
        arrays["encoder_segment_ids"] = source_ids if segments else None
    return arrays


def _side(rows: Sequence[Sequence[np.ndarray]], pad_id: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and which example (1, 2, …; 0: padding) each place belongs to."""
    length = length or max(sum(map(len, row)) for row in rows)
    tokens = np.full((len(rows), length), pad_id, dtype=np.int32)
    segment_ids = np.zeros((len(rows), length), dtype=np.int32)
    for number, row in enumerate(rows):
        place = 0
        for segment, ids in enumerate(row, start=1):
            tokens[number, place : place + len(ids)] = ids
            segment_ids[number, place : place + len(ids)] = segment
            place += len(ids)
    return tokens, segment_ids
