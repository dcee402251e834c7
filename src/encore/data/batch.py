"""The batch, with seqio's field names, and how rows of unequal length are laid into it.

Encoder-decoder, two examples: sources [a b c] and [d], targets [x y EOS] and [z EOS]:

    encoder_input_tokens    a  b  c     d  0  0
    encoder_mask            1  1  1     1  0  0
    decoder_input_tokens  BOS  x  y   BOS  z  0
    decoder_target_tokens   x  y EOS    z EOS 0
    decoder_loss_weights    1  1  1     1  1  0
    decoder_mask            1  1  1     1  1  0

The shift to the right happens here and nowhere else: models take `decoder_input_tokens` as they are, losses compare
the output at a position with `decoder_target_tokens` at that position. The first decoder token is BOS, the last
target EOS. Padding has weight 0.

Decoder-only: the encoder fields are None and the row is one text; loss weights say which of its tokens are learned.

Packed rows hold several examples, numbered 1, 2, … from the left on both sides; 0 is padding. The first example above
with a third one, [e f] -> [w EOS], in one row:

    encoder_input_tokens    a  b  c  e  f        encoder_segment_ids     1  1  1  2  2
    decoder_input_tokens  BOS  x  y BOS  w       decoder_segment_ids     1  1  1  2  2
    decoder_target_tokens   x  y EOS  w EOS
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from encore.data.layout import Arrays, Row, lay_out

Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass. Masks are bool, True = real. Segment ids None: each row is one example.

    `pictures` (pixels, or features of a frozen tower) stand in the order of their placeholders over the batch;
    `picture_rows` says which row each belongs to.

    Segment n of a row's decoder side belongs to segment n of its encoder side.
    """

    encoder_input_tokens: Int[Tensor, "B S"] | None
    encoder_mask: Bool[Tensor, "B S"] | None
    decoder_input_tokens: Int[Tensor, "B T"]
    decoder_target_tokens: Int[Tensor, "B T"]
    decoder_loss_weights: Float[Tensor, "B T"]
    decoder_mask: Bool[Tensor, "B T"]
    encoder_segment_ids: Int[Tensor, "B S"] | None = None
    decoder_segment_ids: Int[Tensor, "B T"] | None = None
    pictures: Float[Tensor, "N C size size"] | Float[Tensor, "N tokens W"] | None = None
    picture_rows: Int[Tensor, " N"] | None = None

    @classmethod
    def of(cls, arrays: Arrays) -> Batch:
        """A batch of arrays as `encore.data.layout` makes them."""
        tensors = {name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()}
        whole = {n: t.long() if t is not None and t.dtype == torch.int32 else t for n, t in tensors.items()}
        return cls(**cast("dict[str, Any]", whole))

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device))

    def shard(self, rank: int, world: int) -> Batch:
        """The rows rank, rank + world, … that one of `world` processes works on.

        A process for which no row is left gets the first one with all its loss weights 0, so that it takes part in
        the step's collectives and adds nothing to the loss.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of {world} processes; expected 0 to {world - 1}")
        if rank < len(self.decoder_mask):
            return self._rows(slice(rank, None, world))
        row = self._rows(slice(0, 1))
        return replace(row, decoder_loss_weights=torch.zeros_like(row.decoder_loss_weights))

    def _rows(self, which: slice) -> Batch:
        """Some rows, with their own pictures."""
        batch = replace(self, pictures=None, picture_rows=None)._each(lambda tensor: tensor[which])
        if self.pictures is None or self.picture_rows is None:
            return batch
        numbers = torch.full((len(self.decoder_mask),), -1, device=self.picture_rows.device)
        numbers[which] = torch.arange(len(batch.decoder_mask), device=numbers.device)
        kept = numbers[self.picture_rows] >= 0
        if not bool(kept.any()):
            return batch
        return replace(batch, pictures=self.pictures[kept], picture_rows=numbers[self.picture_rows[kept]])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: None if value is None else change(value) for name, value in values.items()}
        return Batch(**cast("dict[str, Any]", changed))

    @property
    def total_weight(self) -> float:
        """The sum of the loss weights: what the summed loss is to be divided by."""
        return float(self.decoder_loss_weights.sum(dtype=torch.float64))

    @property
    def num_tokens(self) -> int:
        """Real tokens read and written, padding left out."""
        encoder = 0 if self.encoder_mask is None else int(self.encoder_mask.sum())
        return encoder + int(self.decoder_mask.sum())


def encoder_decoder_batch(sources: Sequence[Ids], targets: Sequence[Ids], *, bos_id: int, pad_id: int) -> Batch:
    """Rows of (source, target) -> Batch. Targets end in EOS already; sources are in the model's source format."""
    pairs = zip(sources, targets, strict=True)
    rows = [[Row(np.asarray(source), np.asarray(target))] for source, target in pairs]
    return Batch.of(lay_out(rows, bos_id=bos_id, pad_id=pad_id))


def decoder_batch(rows: Sequence[Ids], prompt_lengths: Sequence[int], *, bos_id: int, pad_id: int) -> Batch:
    """Rows of one text each -> Batch for a decoder-only model. BOS is put in front here; rows do not carry it.

    Args:
        rows: what is to be predicted, token by token (the first token too, from BOS).
        prompt_lengths: how many tokens at the start of each row are given, not learned (loss weight 0).
    """
    if any(0 < len(row) <= prompt for row, prompt in zip(rows, prompt_lengths, strict=True)):
        raise ValueError("a row is all prompt: every row needs at least one token to learn after its prompt")
    made = [[Row(None, np.asarray(row), prompt)] for row, prompt in zip(rows, prompt_lengths, strict=True)]
    return Batch.of(lay_out(made, bos_id=bos_id, pad_id=pad_id))
