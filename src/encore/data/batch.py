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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass. Masks are bool, True = real."""

    encoder_input_tokens: Int[Tensor, "B S"] | None
    encoder_mask: Bool[Tensor, "B S"] | None
    decoder_input_tokens: Int[Tensor, "B T"]
    decoder_target_tokens: Int[Tensor, "B T"]
    decoder_loss_weights: Float[Tensor, "B T"]
    decoder_mask: Bool[Tensor, "B T"]

    def to(self, device: torch.device | str) -> Batch:
        encoder_tokens, encoder_mask = self.encoder_input_tokens, self.encoder_mask
        return Batch(
            None if encoder_tokens is None else encoder_tokens.to(device),
            None if encoder_mask is None else encoder_mask.to(device),
            self.decoder_input_tokens.to(device),
            self.decoder_target_tokens.to(device),
            self.decoder_loss_weights.to(device),
            self.decoder_mask.to(device),
        )

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
    _check_rows(sources, "source")
    _check_rows(targets, "target")
    encoder, encoder_mask = _pad(sources, pad_id)
    labels, mask = _pad(targets, pad_id)
    return Batch(encoder, encoder_mask, _shift_right(labels, mask, bos_id, pad_id), labels, mask.float(), mask)


def decoder_batch(rows: Sequence[Ids], prompt_lengths: Sequence[int], *, bos_id: int, pad_id: int) -> Batch:
    """Rows of one text each -> Batch for a decoder-only model. BOS is put in front here; rows do not carry it.

    Args:
        rows: what is to be predicted, token by token (the first token too, from BOS).
        prompt_lengths: how many tokens at the start of each row are given, not learned (loss weight 0).
    """
    _check_rows(rows, "row")
    labels, mask = _pad(rows, pad_id)
    prompts = torch.as_tensor(list(prompt_lengths))[:, None]
    if bool((prompts[:, 0] >= mask.sum(dim=1)).any()):
        raise ValueError("a row is all prompt: every row needs at least one token to learn after its prompt")
    learned = mask & (torch.arange(labels.shape[1]) >= prompts)
    return Batch(None, None, _shift_right(labels, mask, bos_id, pad_id), labels, learned.float(), mask)


def _pad(rows: Sequence[Ids], pad_id: int) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    tokens = np.full((len(rows), length), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def _shift_right(labels: Tensor, mask: Tensor, bos_id: int, pad_id: int) -> Tensor:
    shifted = torch.full_like(labels, bos_id)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(~mask, pad_id)


def _check_rows(rows: Sequence[Ids], name: str) -> None:
    if not rows:
        raise ValueError(f"no {name}s: a batch needs at least one row")
    for i, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"{name} {i} of the batch is empty; every {name} needs at least one token")
